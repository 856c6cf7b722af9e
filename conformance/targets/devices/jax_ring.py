# /// script
# dependencies = ["jax==0.10.2"]
# ///
"""`mha_spec_jax.ring_attention` on four devices, which are threads of the CPU.

A sequence is padded to a length that the layout can deal out, with NaN, which its lengths hide. The environment
variable MHA_RING_LAYOUT names the layout, zigzag by default.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy
from jax.sharding import AxisType, PartitionSpec

import mha_spec_jax
from mha_spec.sharding import shard_order

arrays = "jax"
dtypes = ("float64", "float32", "float16", "bfloat16")

LAYOUT = os.environ.get("MHA_RING_LAYOUT", "zigzag")
MESH = jax.make_mesh((len(jax.devices()),), ("ranks",), axis_types=(AxisType.Auto,))
ranks, rank_layout = len(MESH.devices), LAYOUT
TOKENS = PartitionSpec(None, None, "ranks")
SIDES = {
    "query": ("q", 2),
    "key": ("kv", 2),
    "value": ("kv", 2),
    "q_segment_ids": ("q", 1),
    "kv_segment_ids": ("kv", 1),
}
"""The side and the axis of tokens of each array that is sharded."""


def attention(query, key, value, *, return_lse=False, **options):
    """Deal out the tokens, call the ring, and put its rows back into place."""
    options = {name: x for name, x in options.items() if x is not None}
    lengths = {"q": query.shape[2], "kv": key.shape[2]}
    if any(length % _unit() for length in lengths.values()):
        options = _of_padded(options, query.shape[0], lengths)
    operands = {"query": query, "key": key, "value": value}
    operands |= {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    rest = {name: x for name, x in options.items() if name not in operands}
    orders = {side: _order(length) for side, length in lengths.items()}

    def ring(operands):
        return mha_spec_jax.ring_attention(**operands, **rest, axis_name="ranks", layout=LAYOUT, return_lse=True)

    dealt, specs = dict(operands), dict.fromkeys(operands, PartitionSpec())
    for name, (side, axis) in SIDES.items():
        if name in operands:
            dealt[name] = _dealt(operands[name], orders[side], axis)
            specs[name] = PartitionSpec(*[None] * axis, "ranks")
    output, lse = jax.jit(jax.shard_map(ring, mesh=MESH, in_specs=(specs,), out_specs=(TOKENS, TOKENS)))(dealt)
    places = jnp.asarray(numpy.argsort(orders["q"])[: lengths["q"]])
    output, lse = output[:, :, places], lse[:, :, places]
    return (output, lse) if return_lse else output


def attention_vjp(grad_output, query, key, value, *, grad_lse=None, sinks=None, **options):
    """Return the gradients of jax.vjp."""
    operands = (query, key, value) if sinks is None else (query, key, value, sinks)

    def call(query, key, value, *sinks):
        return attention(query, key, value, sinks=sinks[0] if sinks else None, return_lse=True, **options)

    (output, lse), pull = jax.vjp(call, *operands)
    grad_lse = jnp.zeros_like(lse) if grad_lse is None else grad_lse
    gradients = pull((grad_output.astype(output.dtype), grad_lse.astype(lse.dtype)))
    return (*gradients[:3], None, gradients[3] if sinks is not None else None)


features = (
    *("causal", "offset", "window", "chunk", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"),
    *("segments", "scale", "softcap", "sinks"),
)


def _unit():
    return len(MESH.devices) * (2 if LAYOUT == "zigzag" else 1)


def _order(length):
    return shard_order(LAYOUT, len(MESH.devices), -(-length // _unit()) * _unit())


def _dealt(array, order, axis):
    """Pad the tokens, and bring them into the order of the layout."""
    widths = [(0, len(order) - size if place == axis else 0) for place, size in enumerate(array.shape)]
    fill = jnp.nan if jnp.issubdtype(array.dtype, jnp.floating) else 0
    return jnp.take(jnp.pad(array, widths, constant_values=fill), order, axis)


def _of_padded(options, batch, lengths):
    """Say which tokens are real, and where the diagonal lies."""
    positional = options.get("causal") or "window" in options or "chunk" in options
    padded = {"q_offset": 0} if positional else {}
    for side, length in lengths.items():
        padded[f"{side}_lengths"] = numpy.full(batch, length, numpy.int32)
    return padded | options
