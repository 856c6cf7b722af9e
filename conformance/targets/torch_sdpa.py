# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `torch.nn.functional.scaled_dot_product_attention`, unchanged.

Mask and bias are the same argument, `attn_mask`; the causal diagonal begins at the upper left.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
conventions = {"causal_alignment": "upper_left"}


def attention(query, key, value, *, mask=None, bias=None, causal=False, scale=None):
    """Call SDPA, which chooses its kernel."""
    if mask is not None and bias is not None:
        raise NotImplementedError("attn_mask is either boolean or floating-point, not both")
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias if mask is None else mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attention_vjp(grad_output, query, key, value, *, mask=None, bias=None, causal=False, scale=None):
    """Return the gradients of autograd."""
    operands = [None if x is None else x.detach().requires_grad_() for x in (query, key, value, bias)]
    query, key, value, bias = operands
    output = attention(query, key, value, mask=mask, bias=bias, causal=causal, scale=scale)
    gradients = iter(torch.autograd.grad(output, [x for x in operands if x is not None], grad_output))
    return (*(None if x is None else next(gradients) for x in operands), None)
