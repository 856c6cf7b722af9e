# /// script
# dependencies = [
#     "einops==0.8.2",
#     "einx==0.4.3",
#     "frozendict==2.5.1",
#     "loguru==0.7.3",
#     "torch==2.13.0",
#     "torch-einops-utils==0.2.0",
#     "x-transformers==2.31.10",
# ]
# ///
"""x-transformers' `Attend(flash=True)`, unchanged, which calls PyTorch's SDPA; it has neither soft cap nor sinks.

Its groups are tiled, and the suite repeats keys and values, as for x_transformers_eager.py.
"""

from __future__ import annotations

import torch
from x_transformers.attend import Attend

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "lower_right"}


def attention(query, key, value, *, mask=None, bias=None, causal=False, kv_lengths=None, scale=None):
    """Call the module with the mask, or that of the lengths."""
    if kv_lengths is not None:
        within = torch.arange(key.shape[2]) < kv_lengths[:, None]
        mask = within[:, None, None] if mask is None else mask & within[:, None, None]
    return Attend(causal=causal, scale=scale, flash=True)(query, key, value, mask=mask, attn_bias=bias)[0]


def attention_vjp(grad_output, query, key, value, *, bias=None, **options):
    """Return the gradients of autograd."""
    operands = [None if x is None else x.detach().requires_grad_() for x in (query, key, value, bias)]
    output = attention(*operands[:3], bias=operands[3], **options)
    gradients = iter(torch.autograd.grad(output, [x for x in operands if x is not None], grad_output))
    return (*(None if x is None else next(gradients) for x in operands), None)


features = ("mask", "bias", "causal", "kv_lengths", "scale")
