# /// script
# dependencies = ["openai-whisper==20250625", "torch==2.13.0"]
# ///
"""openai-whisper's `MultiHeadAttention.qkv_attention`, unchanged, without SDPA, as for word timestamps.

It scales query and key by size^-1/4 each and adds its `mask`, (q_len, q_len), to the scores.
"""

from __future__ import annotations

import torch
from whisper.model import MultiHeadAttention

arrays = "torch"
dtypes = ("float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "upper_left"}
MultiHeadAttention.use_sdpa = False


def supports(question):
    """Refuse the calls that the method does not have."""
    query, key, value = (question.shapes[name] for name in ("query", "key", "value"))
    bias = question.shapes.get("bias")
    if (bias or question.options.get("causal")) and query[2] != key[2]:
        return "a mask has as many queries as keys"
    if bias and (bias[:2] != (1, 1) or question.options.get("causal")):
        return "a mask is (q_len, q_len), for all heads"
    return (key[3] == value[3] and 0 not in query) or "values are as large as keys, and no axis is empty"


def attention(query, key, value, *, bias=None, causal=False):
    """Call the method."""
    heads, length, size = query.shape[1:]
    query, key, value = (array.transpose(1, 2).flatten(2) for array in (query, key, value))
    mask = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1) if causal else bias
    mask = mask[0, 0].expand(length, length) if bias is not None else mask
    output, _ = MultiHeadAttention(heads * size, heads).qkv_attention(query, key, value, mask)
    return output.unflatten(2, (heads, size)).transpose(1, 2)
