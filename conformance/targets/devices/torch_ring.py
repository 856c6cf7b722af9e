# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""`mha_spec_torch.ring_attention` in four processes under gloo, of which three are started by the first call.

A sequence is padded to a length that the layout can deal out, with NaN, which its lengths hide. The environment
variable MHA_RING_LAYOUT names the layout, zigzag by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

import mha_spec_torch
from mha_spec.errors import MhaSpecError
from mha_spec.sharding import shard_order

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
features = (
    *("causal", "offset", "window", "chunk", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"),
    *("segments", "scale", "softcap", "sinks"),
)

RANKS = 4
TIMEOUT = timedelta(seconds=60)
LAYOUT = os.environ.get("MHA_RING_LAYOUT", "zigzag")
ranks, rank_layout = RANKS, LAYOUT
SIDES = {"query": "q", "key": "kv", "value": "kv", "q_segment_ids": "q", "kv_segment_ids": "kv"}
"""The side of each array that is sharded."""


def attention(query, key, value, *, return_lse=False, **options):
    """Ask all processes for output and lse."""
    output, lse = _everywhere({"query": query, "key": key, "value": value} | options, None)
    return (output, lse) if return_lse else output


def attention_vjp(grad_output, query, key, value, *, grad_lse=None, **options):
    """Ask all processes for the gradients of autograd."""
    arguments = {"query": query, "key": key, "value": value} | options
    gradients = _everywhere(arguments, (grad_output, grad_lse))
    return (*gradients[:3], None, gradients[3] if len(gradients) > 3 else None)


def of_rank(arguments, cotangents):
    """Deal out the tokens, call the ring on this rank's, and join the results of all ranks, or the gradients."""
    options = {name: x for name, x in arguments.items() if x is not None}
    lengths = {"q": options["query"].shape[2], "kv": options["key"].shape[2]}
    if any(length % _unit() for length in lengths.values()):
        options = _of_padded(options, lengths)
    orders = {side: _order(length) for side, length in lengths.items()}
    for name in SIDES.keys() & options.keys():
        options[name] = _dealt(options[name], orders[SIDES[name]])
    operands = [options[name].detach().requires_grad_() for name in ("query", "key", "value")]
    operands += [options["sinks"].detach().clone().requires_grad_()] if "sinks" in options else []
    options.update(zip(("query", "key", "value", "sinks"), operands, strict=False))
    outputs = mha_spec_torch.ring_attention(**options, layout=LAYOUT, return_lse=True)
    if cotangents is None:
        return [_joined(output.detach(), orders["q"], lengths["q"]) for output in outputs]
    pairs = [
        (output, _dealt(x, orders["q"], 0)) for output, x in zip(outputs, cotangents, strict=True) if x is not None
    ]
    gradients = torch.autograd.grad([output for output, _ in pairs], operands, [x.to(y.dtype) for y, x in pairs])
    sides = zip(gradients[:3], ("q", "kv", "kv"), strict=True)
    return [*(_joined(x, orders[side], lengths[side]) for x, side in sides), *gradients[3:]]


def _unit():
    return RANKS * (2 if LAYOUT == "zigzag" else 1)


def _order(length):
    return shard_order(LAYOUT, RANKS, -(-length // _unit()) * _unit())


def _of_padded(options, lengths):
    """Say which tokens are real, and where the diagonal lies."""
    positional = options.get("causal") or "window" in options or "chunk" in options
    padded = {"q_offset": 0} if positional else {}
    for side, length in lengths.items():
        padded[f"{side}_lengths"] = numpy.full(len(options["query"]), length, numpy.int32)
    return padded | options


def _dealt(array, order, fill=None):
    """Return the tokens of this rank, which lie on axis 2, or on axis 1 of segment ids."""
    axis = min(array.ndim - 1, 2)
    fill = (torch.nan if array.is_floating_point() else 0) if fill is None else fill
    shape = list(array.shape)
    shape[axis] = len(order) - shape[axis]
    padded = torch.cat([array, array.new_full(shape, fill)], axis)
    return padded.index_select(axis, torch.from_numpy(numpy.split(order, RANKS)[dist.get_rank()].copy()))


def _joined(array, order, length):
    """Put the rows of all ranks into place."""
    parts = [torch.empty_like(array, memory_format=torch.contiguous_format) for _ in range(RANKS)]
    dist.all_gather(parts, array.contiguous())
    return torch.cat(parts, 2)[:, :, torch.from_numpy(numpy.argsort(order)[:length])]


def _everywhere(arguments, cotangents):
    if not dist.is_initialized():
        _start()
    dist.broadcast_object_list([(arguments, cotangents)])
    return of_rank(arguments, cotangents)


def _start():
    """Start the other processes, which end with this one: their next broadcast fails."""
    store = f"{tempfile.mkdtemp()}/store"
    for rank in range(1, RANKS):
        subprocess.Popen([sys.executable, "-P", __file__, str(rank), store])
    _join(0, store)


def _join(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=TIMEOUT)


def _serve(rank, store):
    """Answer the calls of rank 0 until it ends."""
    _join(rank, store)
    while True:
        call: list = [None]
        try:
            dist.broadcast_object_list(call)
        except RuntimeError:
            return
        try:
            of_rank(*call[0])
        except MhaSpecError:
            continue


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
