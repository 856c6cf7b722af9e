# /// script
# dependencies = ["openai-whisper==20250625", "torch==2.13.0"]
# ///
"""openai-whisper's `MultiHeadAttention.qkv_attention`, unchanged, with SDPA, as it runs by default.

Its `mask` is that of the decoder, -inf above the diagonal, and it must have as many queries as keys.
"""

from __future__ import annotations

import torch
from whisper.model import MultiHeadAttention

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "upper_left"}
MultiHeadAttention.use_sdpa = True


def supports(question):
    """Refuse the calls that the method does not have."""
    query, key, value = (question.shapes[name] for name in ("query", "key", "value"))
    if question.options.get("causal") and query[2] != key[2]:
        return "a mask has as many queries as keys"
    return (key[3] == value[3] and 0 not in query) or "values are as large as keys, and no axis is empty"


def attention(query, key, value, *, causal=False):
    """Call the method."""
    heads, length, size = query.shape[1:]
    query, key, value = (array.transpose(1, 2).flatten(2) for array in (query, key, value))
    mask = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1) if causal else None
    output, _ = MultiHeadAttention(heads * size, heads).qkv_attention(query, key, value, mask)
    return output.unflatten(2, (heads, size)).transpose(1, 2)


def attention_vjp(grad_output, query, key, value, *, causal=False):
    """Return the gradients of autograd."""
    operands = [x.detach().requires_grad_() for x in (query, key, value)]
    return (*torch.autograd.grad(attention(*operands, causal=causal), operands, grad_output), None, None)
