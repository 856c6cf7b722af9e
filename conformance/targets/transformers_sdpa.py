# /// script
# dependencies = ["torch==2.13.0", "transformers==5.24.0"]
# ///
"""Transformers' `sdpa_attention_forward`, unchanged, with the masks of `sdpa_mask`, or `is_causal` in a plain call.

`mask` and the masks of the library are its boolean `attention_mask`; a bias is its `position_bias`.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers_eager import mask_arguments, supports

__all__ = ["attention", "attention_vjp", "supports"]

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
conventions = {"causal_alignment": "upper_left"}
features = ("mask", "bias", "causal", "window", "offset", "kv_lengths", "segments", "scale")


def attention(query, key, value, *, mask=None, bias=None, scale=None, causal=False, **structure):
    """Make the mask, and call the function."""
    if structure:
        built = masking_utils.sdpa_mask(**mask_arguments(query, key, causal=causal, **structure))
        mask = built if mask is None else built & mask
    elif causal and mask is not None:
        mask = mask & masking_utils.sdpa_mask(**mask_arguments(query, key, causal=True))
    groups = query.shape[1] // key.shape[1]
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=causal and mask is None)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scale, position_bias=bias)[0].transpose(1, 2)


def attention_vjp(grad_output, query, key, value, *, bias=None, **options):
    """Return the gradients of autograd."""
    operands = [None if x is None else x.detach().requires_grad_() for x in (query, key, value, bias)]
    output = attention(*operands[:3], bias=operands[3], **options)
    gradients = iter(torch.autograd.grad(output, [x for x in operands if x is not None], grad_output))
    return (*(None if x is None else next(gradients) for x in operands), None)
