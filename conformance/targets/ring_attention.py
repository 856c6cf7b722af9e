# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch's `default_attention`, unchanged, which computes all scores at once.

Its groups are tiled: query head h reads key head h % kv_heads. `mask` is the key padding mask.
"""

from __future__ import annotations

import torch
from ring_attention_pytorch.ring_attention import default_attention

arrays = "torch"
layout = "bshd"
dtypes = ("float64", "float32", "float16", "bfloat16")
conventions = {"causal_alignment": "lower_right"}


def attention(query, key, value, *, causal=False, kv_lengths=None, softcap=None):
    """Call the function."""
    mask = None if kv_lengths is None else torch.arange(key.shape[1]) < kv_lengths[:, None]
    clamped = {} if softcap is None else {"softclamp_qk_sim": True, "softclamp_value": softcap}
    return default_attention(query, key, value, mask, causal, **clamped)


def attention_vjp(grad_output, query, key, value, *, causal=False, kv_lengths=None, softcap=None):
    """Return the gradients of autograd."""
    operands = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attention(*operands, causal=causal, kv_lengths=kv_lengths, softcap=softcap)
    return (*torch.autograd.grad(output, operands, grad_output), None, None)
