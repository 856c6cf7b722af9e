# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""The functions of mha_spec_torch over several devices, in four processes under gloo, or in as many as MHA_RING_RANKS.

The environment variable MHA_RING_FORM names the function, "ring", "all_to_all" or "sharded_kv", and MHA_RING_LAYOUT the
layout; by default these are the ring and zigzag. A sequence is padded to a length that the layout can deal out, with
NaN, which its lengths hide.
"""

from __future__ import annotations

import os

import numpy
import processes
import torch

import mha_spec_torch
from mha_spec.sharding import shard_order

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
features = (
    *("causal", "offset", "window", "chunk", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"),
    *("segments", "scale", "softcap", "sinks"),
)

FORM = os.environ.get("MHA_RING_FORM", "ring")
LAYOUT = os.environ.get("MHA_RING_LAYOUT", "zigzag")
ranks, rank_layout = (1 if FORM == "all_to_all" else processes.RANKS), LAYOUT
FUNCTION = getattr(mha_spec_torch, f"{FORM}_attention")
SHARDED = ("kv",) if FORM == "sharded_kv" else ("q", "kv")
"""The sides of a call that lie on the ranks."""
SIDES = {"query": "q", "key": "kv", "value": "kv", "q_segment_ids": "q", "kv_segment_ids": "kv"}
"""The side of each array with tokens."""
UNIT = processes.RANKS * (2 if LAYOUT == "zigzag" else 1)
"""What divides the number of tokens on the ranks."""


def supports(question):
    """Refuse heads that the exchange of tokens and heads cannot deal out (MHA-SHARD-6)."""
    heads = [question.shapes[name][1] for name in ("query", "key")]
    if FORM == "all_to_all" and any(number % processes.RANKS for number in heads):
        return f"heads and kv_heads are multiples of {processes.RANKS}"
    return True


def attention(query, key, value, *, return_lse=False, **options):
    """Ask all processes for output and lse."""
    output, lse = processes.everywhere(of_rank, {"query": query, "key": key, "value": value} | options, None)
    return (output, lse) if return_lse else output


def attention_vjp(grad_output, query, key, value, *, grad_lse=None, **options):
    """Ask all processes for the gradients of autograd."""
    arguments = {"query": query, "key": key, "value": value} | options
    gradients = processes.everywhere(of_rank, arguments, (grad_output, grad_lse))
    return (*gradients[:3], None, gradients[3] if len(gradients) > 3 else None)


def of_rank(arguments, cotangents):
    """Deal out the tokens, call the function on this rank's, and join the results of all ranks, or the gradients."""
    options = {name: x for name, x in arguments.items() if x is not None}
    lengths = {side: options[name].shape[2] for side, name in (("q", "query"), ("kv", "key"))}
    if any(lengths[side] % UNIT for side in SHARDED):
        options = _of_padded(options, lengths)
    orders = {side: shard_order(LAYOUT, processes.RANKS, -(-lengths[side] // UNIT) * UNIT) for side in SHARDED}

    def dealt(array, side, fill=None):
        return processes.of_rank(array, orders[side], min(array.ndim - 1, 2), fill) if side in orders else array

    def joined(array, side):
        return processes.joined(array, orders[side], lengths[side]) if side in orders else array

    for name in SIDES.keys() & options.keys():
        options[name] = dealt(options[name], SIDES[name])
    operands = [options[name].detach().clone().requires_grad_() for name in ("query", "key", "value")]
    operands += [options["sinks"].detach().clone().requires_grad_()] if "sinks" in options else []
    options.update(zip(("query", "key", "value", "sinks"), operands, strict=False))
    outputs = FUNCTION(**options, layout=LAYOUT, return_lse=True)
    if cotangents is None:
        return [joined(output.detach(), "q") for output in outputs]
    pairs = [(output, dealt(x, "q", 0)) for output, x in zip(outputs, cotangents, strict=True) if x is not None]
    gradients = torch.autograd.grad([output for output, _ in pairs], operands, [x.to(y.dtype) for y, x in pairs])
    return [*(joined(x, side) for x, side in zip(gradients[:3], ("q", "kv", "kv"), strict=True)), *gradients[3:]]


def _of_padded(options, lengths):
    """Say which tokens are real, and where the diagonal lies."""
    positional = options.get("causal") or "window" in options or "chunk" in options
    padded = {"q_offset": 0} if positional else {}
    for side in SHARDED:
        padded[f"{side}_lengths"] = numpy.full(len(options["query"]), lengths[side], numpy.int32)
    return padded | options
