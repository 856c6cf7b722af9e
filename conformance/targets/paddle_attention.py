# /// script
# dependencies = [
#     "anyio==4.16.0",
#     "certifi==2026.10.19.post1",
#     "h11==0.16.0",
#     "httpcore==1.0.9",
#     "httpx==0.28.1",
#     "idna==3.20",
#     "networkx==3.6.1",
#     "opt_einsum==3.4.0",
#     "paddlepaddle==3.3.1",
# ]
# ///
"""PaddlePaddle's `scaled_dot_product_attention` on the CPU, unchanged.

Its axes are (batch, length, heads, size), and its causal diagonal begins at the upper left. Mask and bias are the same
argument, which a causal call ignores, as its documentation says.
"""

from __future__ import annotations

import numpy
import paddle
from paddle.nn.functional import scaled_dot_product_attention

dtypes = ("float64", "float32")
layout = "bshd"
conventions = {"causal_alignment": "upper_left"}

paddle.set_device("cpu")


def supports(question):
    """Refuse the calls that the function does not have."""
    names = {name for name in ("mask", "bias") if name in question.arrays}
    names |= {"causal"} if question.options.get("causal") else set()
    if len(names) > 1:
        return "a call is causal, or has a boolean mask or a bias"
    bias = question.arrays.get("bias")
    return bias is None or bias.dtype.name == question.dtype or "a bias has the type of the query"


def attention(query, key, value, *, mask=None, bias=None, causal=False, scale=None):
    """Compute the output."""
    query, key, value = map(paddle.to_tensor, (query, key, value))
    return call(query, key, value, tensor(mask, bias), causal, scale).numpy()


def attention_vjp(grad_output, query, key, value, *, mask=None, bias=None, causal=False, scale=None):
    """Return the gradients of autograd."""
    pairs = tensor(mask, bias)
    operands = [*map(paddle.to_tensor, (query, key, value)), *([] if bias is None else [pairs])]
    for operand in operands:
        operand.stop_gradient = False
    output = call(*operands[:3], pairs, causal, scale)
    gradients = paddle.grad(output, operands, paddle.to_tensor(grad_output))
    return (*(array.numpy() for array in gradients), *[None] * (5 - len(gradients)))


def tensor(mask, bias):
    """Return the mask or the bias as a tensor."""
    pairs = bias if mask is None else mask
    return None if pairs is None else paddle.to_tensor(numpy.ascontiguousarray(pairs))


def call(query, key, value, pairs, causal, scale):
    """Call the function."""
    return scaled_dot_product_attention(query, key, value, pairs, is_causal=causal, training=False, scale=scale)
