# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `scaled_dot_product_attention` under `torch.compile`, otherwise as torch_sdpa.py calls it."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

arrays = "torch"
dtypes = ("float32",)
conventions = {"causal_alignment": "upper_left"}

torch._dynamo.config.recompile_limit = 10_000

compiled = torch.compile(scaled_dot_product_attention, dynamic=True, fullgraph=True)


def attention(query, key, value, *, mask=None, bias=None, causal=False, scale=None):
    """Call the compiled function."""
    if mask is not None and bias is not None:
        raise NotImplementedError("attn_mask is either boolean or floating-point, not both")
    pairs = bias if mask is None else mask
    groups = query.shape[1] != key.shape[1]
    return compiled(query, key, value, attn_mask=pairs, is_causal=causal, scale=scale, enable_gqa=groups)
