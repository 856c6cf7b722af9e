# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `torch.nn.MultiheadAttention`, unchanged, on the fast path of self-attention.

The fast path needs evaluation mode, biases and an even number of heads: a layer without biases gets those of 0, and an
odd number of heads gets a further head of 0. The rest is as in torch_layer.py.
"""

from __future__ import annotations

import numpy
import torch
import torch_layer

arrays = "torch"
dtypes = torch_layer.dtypes
groups = False
conventions = torch_layer.conventions


def supports(question):
    """Refuse calls that do not take the fast path."""
    query, *others = (question.arrays.get(name) for name in ("query", "key", "value"))
    if question.function != "multi_head_attention" or not all(numpy.array_equal(query, array) for array in others):
        return "the fast path is that of self-attention"
    shapes = [question.shapes[f"w_{name}"] for name in "qkv"]
    embed, heads, size = shapes[0]
    even = heads + heads % 2
    same = len({*shapes, (embed, heads, size)}) == 1 and question.shapes["w_o"][2] <= even * size
    return (same and embed <= even * size) or "tokens and output are no larger than all heads together"


def multi_head_attention(query, key, value, params, *, mask=None, bias=None, causal=False, kv_lengths=None):
    """Append a head of 0 to an odd number of heads, and biases of 0, and call the layer."""
    embed, heads, size = params["w_q"].shape
    even, out = heads + heads % 2, params["w_o"].shape[2]
    sizes = {"w_o": (even, size, out), "b_o": (out,), **{f"b_{name}": (even, size) for name in "qkv"}}
    sizes |= {f"w_{name}": (embed, even, size) for name in "qkv"}
    params = {
        name: torch_layer.padded(params[name], shape) if name in params else torch.zeros(shape, dtype=query.dtype)
        for name, shape in sizes.items()
    }
    pairs = [None if x is None or x.shape[1] == 1 else even_heads(x, even) for x in (mask, bias)]
    pairs = [x if y is None else y for x, y in zip((mask, bias), pairs, strict=True)]
    return torch_layer.call(query, query, query, params, *pairs, causal, kv_lengths)[0]


def even_heads(pairs, heads):
    """Repeat the mask of the last head, or the bias, for a further head."""
    return pairs[:, [*range(pairs.shape[1]), *[pairs.shape[1] - 1] * (heads - pairs.shape[1])]]
