"""A call as the arguments of a compiled program: constants, arrays with a gradient, and arrays without.

Query heads that share a key/value head are a separate axis, (batch, kv_heads, group, ...), so that keys and values are
never repeated (MHA-HEAD-1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy

from mha_spec.arguments import offset_of_reading
from mha_spec.arrays import dtype_name, host_integers, segment_ids, softmax_dtype_name
from mha_spec.errors import refuse_value
from mha_spec.steps import scale_of

from .plan import Plan, Stretches, are_known, plan_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax import Array

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array as AnyArray

    Integers = Array | Sequence[int]

__all__ = [
    "Constraints",
    "Operands",
    "Problem",
    "anchor_of",
    "bounded",
    "digits_of",
    "finite",
    "fold",
    "folded",
    "offset_of",
    "problem_of",
    "scale_for",
    "softmax_dtype",
    "unfold",
    "with_offset",
]


@dataclass(frozen=True)
class Problem:
    """The constants of a program."""

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    unlifted_right: int | None
    """The right bound of the window, which a prefix does not lift (MHA-CAUSAL-2)."""
    chunk: int | None
    dropout_rate: float
    excludes: bool
    """True if a pair can be hidden, or a row empty."""
    plan: Plan
    strides: tuple[int, int] = (1, 1)
    """The distance of the positions of neighbouring queries, and of keys; a shard may hold every n-th token."""


class Operands(NamedTuple):
    """The arrays with a gradient."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    sinks: Array | None


class Constraints(NamedTuple):
    """The arrays without a gradient: constraints, dropout, and the first keys of stretches."""

    mask: Array | None
    q_offset: AnyArray | None
    q_lengths: AnyArray | None
    kv_lengths: AnyArray | None
    kv_starts: AnyArray | None
    prefix_lengths: AnyArray | None
    q_segment_ids: tuple[Array, ...]
    """The digits of the ids; a pair is visible where all digits are equal. Empty without segments."""
    kv_segment_ids: tuple[Array, ...]
    dropout_mask: Array | None
    dropout_key: Array | None
    stretches: Stretches


def problem_of(a: Arguments, dropout_key: Array | None = None) -> tuple[Problem, Operands, Constraints]:
    """Split the arguments of a call."""
    left, right = a.bounds
    hiding = (a.mask, a.bias, a.q_lengths, a.kv_lengths, a.kv_starts, a.q_segment_ids, left, right, a.chunk)
    excludes = a.kv_len == 0 or any(argument is not None for argument in hiding)
    plan, stretches = plan_of(a)
    scale = scale_for(a.scale, a.query.shape[3])
    softcap = None if a.softcap is None else float(a.softcap)
    bounds = left, right, a.unlifted_right, a.chunk
    problem = Problem(scale, softcap, *bounds, float(a.dropout_rate), excludes, plan)
    constraints = Constraints(
        a.mask,
        _integers(a.q_offset),
        _integers(a.q_lengths),
        _integers(a.kv_lengths),
        _integers(a.kv_starts),
        _integers(a.prefix_lengths),
        *digits_of(a),
        a.dropout_mask,
        dropout_key,
        stretches,
    )
    return problem, Operands(a.query, a.key, a.key if a.value is None else a.value, a.bias, a.sinks), constraints


def scale_for(scale: float | None, qk_dim: int) -> float:
    """Return the scale, which is a constant of a program, so that its default needs a known qk_dim (MHA-SCORE-1)."""
    if scale is None and not are_known(qk_dim):
        refuse_value(
            "MHA-ARG-2",
            f"`scale` must be a Python number where qk_dim is symbolic, received scale=None, qk_dim={qk_dim}. "
            "Pass scale, or export the program with a fixed qk_dim.",
        )
    return float(scale_of(scale, qk_dim))


def with_offset(a: Arguments) -> Arguments:
    """Replace the name of an alignment by the offset that it means (MHA-POS-2)."""
    if isinstance(a.q_offset, str):
        a.q_offset = offset_of_reading(a.q_offset, _length(a.q_lengths, a.q_len), _length(a.kv_lengths, a.kv_len))
    return a


def offset_of(
    name: str, q_lengths: Integers | None, kv_lengths: Integers | None, query: Array, key: Array
) -> Array | numpy.ndarray | int:
    """Return the offset that the name of an alignment means: host data where the lengths are, else an array.

    Axis 2 of `query` and `key` counts queries and keys; lengths are clamped to it (MHA-LEN-3).
    """
    return offset_of_reading(name, _length(q_lengths, query.shape[2]), _length(kv_lengths, key.shape[2]))


def _length(lengths: Integers | None, size: int) -> Array | numpy.ndarray | int:
    """Return the length of a buffer that is in use."""
    if lengths is None:
        return size if are_known(size) else jnp.asarray(size, jnp.int32)
    return bounded(lengths, size) if host_integers(lengths) is None else numpy.asarray(lengths, numpy.int32)


def softmax_dtype(query: Array) -> str:
    """Name the type of scores and softmax (MHA-SOFTMAX-2)."""
    return softmax_dtype_name(dtype_name(query))


def _integers(value: Integers | int | str | None) -> Array | numpy.ndarray | None:
    """Convert host integers to int32, whose range they were checked against, and symbolic sizes to traced integers."""
    if value is None or isinstance(value, jax.Array):
        return value
    return numpy.asarray(value, numpy.int32) if host_integers(value) is not None else jnp.asarray(value, jnp.int32)


def digits_of(a: Arguments) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the ids of queries and of keys as digits that can be compared (MHA-SEG-1)."""
    if a.q_segment_ids is None or a.kv_segment_ids is None:
        return (), ()
    q_ids, kv_ids = zip(*segment_ids(a.q_segment_ids, a.kv_segment_ids, a.query), strict=True)
    return q_ids, kv_ids


def folded(x: Operands, constraints: Constraints) -> tuple[Operands, Constraints]:
    """Split the axis of heads into (kv_heads, group), and shape segment ids as a mask."""
    kv_heads = x.key.shape[1]
    arrays = (x.bias, constraints.mask, constraints.dropout_mask)
    bias, mask, dropout_mask = (None if array is None else fold(array, kv_heads) for array in arrays)
    sinks = None if x.sinks is None else x.sinks.reshape(1, kv_heads, -1, 1)
    q_ids = tuple(ids[:, None, None, :, None] for ids in constraints.q_segment_ids)
    kv_ids = tuple(ids[:, None, None, None, :] for ids in constraints.kv_segment_ids)
    q_lengths = None if constraints.q_lengths is None else bounded(constraints.q_lengths, x.query.shape[2])
    kv_lengths, kv_starts, prefix_lengths = (
        None if numbers is None else bounded(numbers, x.key.shape[2])
        for numbers in (constraints.kv_lengths, constraints.kv_starts, constraints.prefix_lengths)
    )
    x = x._replace(query=fold(x.query, kv_heads), bias=bias, sinks=sinks)
    constraints = constraints._replace(mask=mask, dropout_mask=dropout_mask, q_lengths=q_lengths, kv_lengths=kv_lengths)
    constraints = constraints._replace(kv_starts=kv_starts, prefix_lengths=prefix_lengths)
    return x, constraints._replace(q_segment_ids=q_ids, kv_segment_ids=kv_ids)


def fold(array: Array, kv_heads: int) -> Array:
    """Reshape (batch, heads, ...) to (batch, kv_heads, group, ...), heads=1 to (batch, 1, 1, ...)."""
    batch, heads, *rest = array.shape
    return array.reshape(batch, min(heads, kv_heads), heads // min(heads, kv_heads), *rest)


def unfold(array: Array) -> Array:
    """Reshape (batch, kv_heads, group, ...) to (batch, heads, ...)."""
    batch, kv_heads, group, *rest = array.shape
    return array.reshape(batch, kv_heads * group, *rest)


def bounded(lengths: Array | numpy.ndarray | Sequence[int], largest: int) -> Array:
    """Clamp lengths to the buffer, and convert them to int32 (MHA-LEN-3)."""
    lengths = jnp.asarray(lengths)
    if jnp.iinfo(lengths.dtype).bits < 32:  # A narrow type may not hold the size of the buffer.
        lengths = lengths.astype(jnp.int32)
    return jnp.clip(lengths, 0, jnp.asarray(largest, lengths.dtype)).astype(jnp.int32)


def anchor_of(maximum: Array) -> Array:
    """Return the number that is subtracted before exp: the maximum, or 0 in an empty row (MHA-EMPTY-1)."""
    return jnp.where(maximum == -math.inf, 0.0, maximum)


def finite(array: Array) -> Array:
    """Set non-finite numbers to 0, so that a weight of 0 hides them (MHA-POISON-2)."""
    return jnp.where(jnp.isfinite(array), array, 0.0)
