# /// script
# dependencies = ["jax==0.10.2", "flax==0.12.7"]
# ///
"""Flax's `nnx.dot_product_attention`, its weights and `nnx.MultiHeadAttention`, unchanged, under `jax.jit`.

Its axes are (batch, length, heads, size), and its causal diagonal begins at the upper left. The attention calls
`jax.nn.dot_product_attention`, while the weights and the layer's weights are computed by Flax.
"""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights

arrays = "jax"
dtypes = ("float32", "bfloat16")
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse sizes that the functions do not have."""
    shapes = question.shapes
    if question.function.startswith("multi_head_attention"):
        if shapes["w_q"][2] != shapes["w_v"][2]:
            return "values have the size of keys"
        return True if shapes["w_k"][0] == shapes["w_v"][0] else "key and value tokens have the same size"
    if "value" in shapes and shapes["query"][3] != shapes["value"][3]:
        return "query, key and value have the same head size"
    return True


@partial(jax.jit, static_argnames="causal")
def attention(query, key, value, *, mask=None, bias=None, causal=False):
    """Call the function, which calls jax.nn."""
    query, key, value = (array.swapaxes(1, 2) for array in (query, key, value))
    return nnx.dot_product_attention(query, key, value, bias, mask, is_causal=causal).swapaxes(1, 2)


@partial(jax.jit, static_argnames="causal")
def attention_weights(query, key, *, mask=None, bias=None, causal=False):
    """Call the function of the weights."""
    query, key = (array.swapaxes(1, 2) for array in (query, key))
    return dot_product_attention_weights(query, key, bias, mask, is_causal=causal)


def attention_vjp(grad_output, query, key, value, *, mask=None, bias=None, causal=False):
    """Return the gradients of jax.vjp."""

    def forward(query, key, value, *bias):
        return attention(query, key, value, mask=mask, bias=bias[0] if bias else None, causal=causal)

    operands = (query, key, value) if bias is None else (query, key, value, bias)
    return jax.vjp(forward, *operands)[1](grad_output)


def multi_head_attention(query, key, value, params, *, mask=None, causal=False):
    """Call a layer that has these parameters, with 0 for missing biases if it has any."""
    if causal:
        causal_mask = nnx.make_causal_mask(query[..., 0])
        if query.shape[1] != key.shape[1]:
            raise NotImplementedError("make_causal_mask makes square masks")
        mask = nnx.combine_masks(mask, causal_mask, dtype=bool)
    return layer_of(query.dtype, params)(query, key, value, mask=mask)


def layer_of(dtype, params):
    """Make a layer that has these parameters."""
    embed, heads, size = params["w_q"].shape
    layer = nnx.MultiHeadAttention(
        heads,
        embed,
        qkv_features=heads * size,
        out_features=params["w_o"].shape[2],
        in_kv_features=params["w_k"].shape[0],
        num_kv_heads=params["w_k"].shape[1],
        use_bias=any(name.startswith("b_") for name in params),
        decode=False,
        dtype=dtype,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    for name, part in {"q": layer.query, "k": layer.key, "v": layer.value, "o": layer.out}.items():
        part.kernel[...] = params[f"w_{name}"]
        if f"b_{name}" in params:
            part.bias[...] = params[f"b_{name}"]
    return layer
