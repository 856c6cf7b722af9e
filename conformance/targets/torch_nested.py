# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `scaled_dot_product_attention` of nested tensors, unchanged, which takes sequences without padding.

On a CPU it has neither masks nor `is_causal`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

arrays = "torch"
layout = "thd"
groups = False
dtypes = ("float64", "float32", "float16", "bfloat16")


def attention(query, key, value, cu_seqlens_q, cu_seqlens_kv, *, scale=None):
    """Call SDPA with (batch, heads, ragged length, size); the tail behind the last token is left out."""
    offsets = [cu.to(torch.int64) for cu in (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_kv)]
    nested = [
        torch.nested.nested_tensor_from_jagged(array[: offset[-1]], offset).transpose(1, 2)
        for array, offset in zip((query, key, value), offsets, strict=True)
    ]
    output = scaled_dot_product_attention(*nested, scale=scale).transpose(1, 2).values()
    return torch.cat([output, output.new_zeros(len(query) - len(output), *output.shape[1:])])
