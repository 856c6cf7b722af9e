# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch's `ring_flash_attn`, unchanged, in four processes under gloo, as `RingAttention` calls it.

A sequence is padded with zeros, and a mask hides them. The environment variable MHA_RING_LAYOUT names the layout,
contiguous by default; "striped" is for causal calls. Groups are tiled, and values are as large as keys.
"""

from __future__ import annotations

import os

import processes
import torch
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

from mha_spec.sharding import shard_order

arrays = "torch"
layout = "bshd"
dtypes = ("float32",)
conventions = {"causal_alignment": "upper_left"}

LAYOUT = os.environ.get("MHA_RING_LAYOUT", "contiguous")
ranks, rank_layout = processes.RANKS, LAYOUT


def supports(question):
    """Refuse the calls that it does not have."""
    query, key, value = (question.shapes[name] for name in ("query", "key", "value"))
    causal = question.options.get("causal", False)
    if causal and "kv_lengths" in question.arrays:
        return "a causal call ignores the key padding mask"
    if LAYOUT == "striped" and not causal:
        return "striped shards are for causal calls"
    if query[1] != key[1]:
        return "it has as many keys as queries"
    return (key[3] == value[3] and 0 not in (*query, *key)) or "values are as large as keys, and no axis is empty"


def attention(query, key, value, *, causal=False, kv_lengths=None, softcap=None):
    """Call it on every rank."""
    return processes.everywhere(of_rank, (query, key, value), causal, kv_lengths, softcap, None)


def attention_vjp(grad_output, query, key, value, *, causal=False, kv_lengths=None, softcap=None):
    """Return the gradients of its backward pass."""
    return (*processes.everywhere(of_rank, (query, key, value), causal, kv_lengths, softcap, grad_output), None, None)


def of_rank(operands, causal, kv_lengths, softcap, grad_output):
    """Call it on the tokens of this rank, and join the outputs of all ranks, or the gradients."""
    length = operands[0].shape[1]
    order = shard_order(LAYOUT, processes.RANKS, -(-length // processes.RANKS) * processes.RANKS)
    local = [processes.of_rank(x, order, 1, 0).requires_grad_() for x in operands]
    mask = None
    if kv_lengths is not None or length < len(order):
        shown = torch.full(operands[0].shape[:1], length) if kv_lengths is None else kv_lengths
        mask = processes.of_rank(torch.arange(length) < shown[:, None], order, 1, False)
    clamped = {} if softcap is None else {"softclamp_qk_sim": True, "softclamp_value": softcap}
    ring = {"ring_reduce_col": True, "striped_ring_attn": LAYOUT == "striped", "ring_size": processes.RANKS}
    output = ring_flash_attn(*local, mask, causal, **ring, **clamped)
    if grad_output is None:
        return processes.joined(output.detach(), order, length, 1)
    gradients = torch.autograd.grad(output, local, processes.of_rank(grad_output, order, 1, 0))
    return [processes.joined(x, order, length, 1) for x in gradients]
