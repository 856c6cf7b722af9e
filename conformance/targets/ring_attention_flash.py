# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch's `ring_flash_attn`, unchanged: buckets of keys with its own backward pass, on one machine.

Its groups are tiled, values are as large as keys, and a causal call ignores the key padding mask, as a comment says.
"""

from __future__ import annotations

import torch
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

arrays = "torch"
layout = "bshd"
dtypes = ("float32",)
conventions = {"causal_alignment": "lower_right"}


def supports(question):
    """Refuse the calls that the function does not have."""
    query, key, value = (question.shapes[name] for name in ("query", "key", "value"))
    if question.options.get("causal") and "kv_lengths" in question.arrays:
        return "a causal call ignores the key padding mask"
    return (key[3] == value[3] and 0 not in (*query, *key)) or "values are as large as keys, and no axis is empty"


def attention(query, key, value, *, causal=False, kv_lengths=None, softcap=None):
    """Call the function with buckets of 32 keys."""
    mask = None if kv_lengths is None else torch.arange(key.shape[1]) < kv_lengths[:, None]
    clamped = {} if softcap is None else {"softclamp_qk_sim": True, "softclamp_value": softcap}
    return ring_flash_attn(query, key, value, mask, causal, bucket_size=32, **clamped)


def attention_vjp(grad_output, query, key, value, *, causal=False, kv_lengths=None, softcap=None):
    """Return the gradients of its backward pass."""
    operands = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attention(*operands, causal=causal, kv_lengths=kv_lengths, softcap=softcap)
    return (*torch.autograd.grad(output, operands, grad_output), None, None)
