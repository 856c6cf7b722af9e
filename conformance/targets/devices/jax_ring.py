# /// script
# dependencies = ["jax==0.10.2"]
# ///
"""`mha_spec_jax.ring_attention` on several devices, which are threads of the CPU.

A sequence is padded to a length that the layout can deal out, with NaN, which its lengths hide. The environment
variables MHA_RING_RANKS and MHA_RING_LAYOUT set the number of devices, 8 by default, and the layout, zigzag by default.
Compilation takes most of the time, so most optimizations of XLA are disabled, and calls that differ only in arrays
share a program.
"""

from __future__ import annotations

import os
from functools import lru_cache

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import jax.numpy as jnp
import numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mha_spec_jax
from mha_spec.sharding import shard_order

RANKS = int(os.environ.get("MHA_RING_RANKS", "8"))
LAYOUT = os.environ.get("MHA_RING_LAYOUT", "zigzag")
jax.config.update("jax_num_cpu_devices", RANKS)

arrays = "jax"
dtypes = ("float64", "float32", "float16", "bfloat16")
ranks, rank_layout = RANKS, LAYOUT
features = (
    *("causal", "offset", "window", "chunk", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"),
    *("segments", "scale", "softcap", "sinks"),
)

MESH = jax.make_mesh((RANKS,), ("ranks",), axis_types=(AxisType.Auto,))
OPERANDS = ("query", "key", "value", "sinks")
SIDES = {
    "query": ("q", 2),
    "key": ("kv", 2),
    "value": ("kv", 2),
    "q_segment_ids": ("q", 1),
    "kv_segment_ids": ("kv", 1),
    "grad_output": ("q", 2),
    "grad_lse": ("q", 2),
}
"""The side and the axis of tokens of each array that is sharded."""
PROGRAMS = 128
"""The number of programs that are kept; calls of the same options come one after the other."""


def attention(query, key, value, *, return_lse=False, **options):
    """Deal out the tokens, call the ring, and put its rows back into place."""
    dealt, rest, orders, lengths = _dealt(options | {"query": query, "key": key, "value": value})
    output, lse = (_restored(x, orders["q"], lengths["q"]) for x in _program(rest)(dealt))
    return (output, lse) if return_lse else output


def attention_vjp(grad_output, query, key, value, **options):
    """Return the gradients of jax.vjp."""
    options |= {"grad_output": grad_output, "query": query, "key": key, "value": value}
    dealt, rest, orders, lengths = _dealt(options)
    gradients = _program(rest, of_gradients=True)(dealt)
    query, key, value = (
        _restored(gradients[name], orders[side], lengths[side])
        for name, side in (("query", "q"), ("key", "kv"), ("value", "kv"))
    )
    return query, key, value, None, gradients.get("sinks")


@lru_cache(maxsize=PROGRAMS)
def _program(rest, *, of_gradients=False):
    """Compile a call of these options that are not arrays; JAX compiles it for each set of shapes."""

    def of_rank(arrays):
        return mha_spec_jax.ring_attention(**arrays, **dict(rest), axis_name="ranks", layout=LAYOUT, return_lse=True)

    def ring(arrays):
        specs = {name: _spec(name) for name in arrays}
        results = _spec("query"), _spec("query")
        return jax.shard_map(of_rank, mesh=MESH, in_specs=(specs,), out_specs=results)(arrays)

    def gradients(arrays):
        cotangents = [arrays.pop(name, None) for name in ("grad_output", "grad_lse")]
        operands = {name: arrays.pop(name) for name in OPERANDS if name in arrays}
        outputs, pull = jax.vjp(lambda operands: ring(operands | arrays), operands)
        pairs = zip(outputs, cotangents, strict=True)
        return pull(tuple(jnp.zeros_like(x) if grad is None else grad.astype(x.dtype) for x, grad in pairs))[0]

    return jax.jit(gradients if of_gradients else ring)


def _spec(name):
    return PartitionSpec(*[None] * SIDES[name][1], "ranks") if name in SIDES else PartitionSpec()


def _dealt(arguments):
    """Place the arrays on the devices; return them, the other options, and the orders and lengths of both sides."""
    arguments = {name: x for name, x in arguments.items() if x is not None}
    lengths = {"q": arguments["query"].shape[2], "kv": arguments["key"].shape[2]}
    orders = {side: shard_order(LAYOUT, RANKS, _padded(length)) for side, length in lengths.items()}
    if any(len(orders[side]) != length for side, length in lengths.items()):
        arguments = _of_padded(arguments, lengths)
    # The host deals, because each operation of JAX would be compiled.
    on_host = {name: numpy.asarray(x) for name, x in arguments.items() if isinstance(x, (jax.Array, numpy.ndarray))}
    rest = tuple((name, x) for name, x in arguments.items() if name not in on_host)
    for name in SIDES.keys() & on_host.keys():
        side, axis = SIDES[name]
        on_host[name] = _in_order(on_host[name], orders[side], axis, 0 if name.startswith("grad") else numpy.nan)
    placed = {name: jax.device_put(x, NamedSharding(MESH, _spec(name))) for name, x in on_host.items()}
    return placed, rest, orders, lengths


def _padded(length):
    unit = RANKS * (2 if LAYOUT == "zigzag" else 1)
    return -(-length // unit) * unit


def _of_padded(arguments, lengths):
    """Say which tokens are real, and where the diagonal lies."""
    positional = arguments.get("causal") or "window" in arguments or "chunk" in arguments
    padded = {"q_offset": 0} if positional else {}
    for side, length in lengths.items():
        padded[f"{side}_lengths"] = numpy.full(len(arguments["query"]), length, numpy.int32)
    return padded | arguments


def _in_order(array, order, axis, fill):
    """Pad the tokens, and bring them into the order of the layout; numbers that are not floating are padded with 0."""
    widths = [(0, len(order) - size if place == axis else 0) for place, size in enumerate(array.shape)]
    fill = fill if jnp.issubdtype(array.dtype, jnp.floating) else 0
    return numpy.take(numpy.pad(array, widths, constant_values=fill), order, axis)


def _restored(array, order, length):
    """Put the rows of all ranks back into place."""
    return jnp.asarray(numpy.asarray(array)[:, :, numpy.argsort(order)[:length]])
