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
"""x-transformers' `Attend(flash=False)`, unchanged, which computes the scores with `einsum`.

Its groups are tiled: query head h reads key head h % kv_heads. The suite therefore repeats keys and values, so that all
else can be judged. The softmax is computed in float32, the soft cap comes after the bias, and `causal` is aligned with
the last key. A key padding mask is `mask` of (batch, kv_len).
"""

from __future__ import annotations

import torch
from x_transformers.attend import Attend

arrays = "torch"
dtypes = ("float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "lower_right"}


def attention(
    query, key, value, *, mask=None, bias=None, causal=False, kv_lengths=None, scale=None, softcap=None, sinks=None
):
    """Call the module."""
    module = Attend(
        causal=causal,
        scale=scale,
        heads=query.shape[1],
        softclamp_logits=softcap is not None,
        logit_softclamp_value=50.0 if softcap is None else softcap,
        head_learned_sink=sinks is not None,
    )
    if sinks is not None:
        module.head_attn_sink = torch.nn.Parameter(sinks.detach(), requires_grad=False)
    if kv_lengths is not None:
        within = torch.arange(key.shape[2]) < kv_lengths[:, None]
        mask = within if mask is None else mask & within[:, None, None]
    return module(query, key, value, mask=mask, attn_bias=bias)[0]


def attention_vjp(grad_output, query, key, value, *, bias=None, **options):
    """Return the gradients of autograd."""
    operands = [None if x is None else x.detach().requires_grad_() for x in (query, key, value, bias)]
    output = attention(*operands[:3], bias=operands[3], **options)
    gradients = iter(torch.autograd.grad(output, [x for x in operands if x is not None], grad_output))
    return (*(None if x is None else next(gradients) for x in operands), None)


features = ("mask", "bias", "causal", "kv_lengths", "scale", "softcap")
