"""One call as compiled programs see it: what is fixed when they are traced, and the arrays that come in.

Query heads that share a key/value head have an axis of their own, (batch, kv_heads, group, ...), so that keys and
values are never repeated (MHA-HEAD-1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy

from mha_spec.arguments import offset_of_reading
from mha_spec.arrays import dtype_name, segment_ids, softmax_dtype_name
from mha_spec.steps import scale_of

from .plan import Plan, Stretches, are_known, plan_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax import Array

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array as AnyArray

__all__ = [
    "Given",
    "Operands",
    "Problem",
    "anchor_of",
    "finite",
    "folded",
    "problem_of",
    "softmax_dtype",
    "unfold",
    "with_offset",
]


@dataclass(frozen=True)
class Problem:
    """What is fixed when a program is traced."""

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    dropout_rate: float
    excludes: bool
    """Whether some pair may be invisible, or some row see nothing."""
    plan: Plan


class Operands(NamedTuple):
    """What has a gradient."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    sinks: Array | None


class Given(NamedTuple):
    """What has none: constraints, dropout, and where the stretches of keys begin."""

    mask: Array | None
    q_offset: AnyArray | None
    q_lengths: AnyArray | None
    kv_lengths: AnyArray | None
    q_segment_ids: tuple[Array, ...]
    """Arrays that all have to agree with those of a key for the pair to be visible; none without segments."""
    kv_segment_ids: tuple[Array, ...]
    dropout_mask: Array | None
    dropout_key: Array | None
    stretches: Stretches


def problem_of(a: Arguments, dropout_key: Array | None = None) -> tuple[Problem, Operands, Given]:
    """Take a call apart; causal is the window (None, 0) (MHA-CAUSAL-1, MHA-WINDOW-2)."""
    left, right = a.bounded_window or (None, None)
    right = 0 if a.causal else right
    constraints = (a.mask, a.bias, a.q_lengths, a.kv_lengths, a.q_segment_ids, left, right)
    excludes = a.kv_len == 0 or any(one is not None for one in constraints)
    plan, stretches = plan_of(a)
    scale = float(scale_of(a.scale, a.query.shape[3]))
    softcap = None if a.softcap is None else float(a.softcap)
    problem = Problem(scale, softcap, left, right, float(a.dropout_rate), excludes, plan)
    given = Given(
        a.mask,
        _integers(a.q_offset),
        _integers(a.q_lengths),
        _integers(a.kv_lengths),
        *_segment_ids(a),
        a.dropout_mask,
        dropout_key,
        stretches,
    )
    return problem, Operands(a.query, a.key, a.key if a.value is None else a.value, a.bias, a.sinks), given


def with_offset(a: Arguments) -> Arguments:
    """A call whose offset is no name: host data where the lengths that it speaks of are, else an array (MHA-POS-2)."""
    if not isinstance(a.q_offset, str):
        return a
    q_length, kv_length = _length(a.q_lengths, a.q_len), _length(a.kv_lengths, a.kv_len)
    a.q_offset = offset_of_reading(a.q_offset, q_length, kv_length)
    return a


def _length(lengths: Array | Sequence[int] | None, size: int) -> Array | numpy.ndarray | int:
    """How many of the buffer are in use."""
    if lengths is None:
        return size if are_known(size) else jnp.asarray(size, jnp.int32)
    return _bounded(lengths, size) if isinstance(lengths, jax.Array) else numpy.asarray(lengths, numpy.int32)


def softmax_dtype(query: Array) -> str:
    """Name the type of scores and softmax (MHA-SOFTMAX-2)."""
    return softmax_dtype_name(dtype_name(query))


def _integers(value: Array | Sequence[int] | int | None) -> Array | numpy.ndarray | None:
    """Host integers as int32, in whose range they were found to be; arrays of jax as they are."""
    if value is None or isinstance(value, jax.Array):
        return value
    return numpy.asarray(value, numpy.int32)


def _segment_ids(a: Arguments) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The ids of queries and of keys in arrays that can be compared (MHA-SEG-1)."""
    if a.q_segment_ids is None or a.kv_segment_ids is None:
        return (), ()
    q_ids, kv_ids = zip(*segment_ids(a.q_segment_ids, a.kv_segment_ids, a.query), strict=True)
    return q_ids, kv_ids


def folded(x: Operands, given: Given) -> tuple[Operands, Given]:
    """Give everything that has heads the axes (kv_heads, group) for them; segment ids have them as a mask has."""
    kv_heads = x.key.shape[1]
    pairs = (x.bias, given.mask, given.dropout_mask)
    bias, mask, dropout_mask = (None if one is None else fold(one, kv_heads) for one in pairs)
    sinks = None if x.sinks is None else x.sinks.reshape(1, kv_heads, -1, 1)
    q_ids = tuple(ids[:, None, None, :, None] for ids in given.q_segment_ids)
    kv_ids = tuple(ids[:, None, None, None, :] for ids in given.kv_segment_ids)
    q_lengths, kv_lengths = _bounded(given.q_lengths, x.query.shape[2]), _bounded(given.kv_lengths, x.key.shape[2])
    x = x._replace(query=fold(x.query, kv_heads), bias=bias, sinks=sinks)
    given = given._replace(mask=mask, dropout_mask=dropout_mask, q_lengths=q_lengths, kv_lengths=kv_lengths)
    return x, given._replace(q_segment_ids=q_ids, kv_segment_ids=kv_ids)


def fold(array: Array, kv_heads: int) -> Array:
    """(batch, heads, ...) to (batch, kv_heads, group, ...), with heads=1 to (batch, 1, 1, ...)."""
    batch, heads, *rest = array.shape
    return array.reshape(batch, min(heads, kv_heads), heads // min(heads, kv_heads), *rest)


def unfold(array: Array) -> Array:
    """(batch, kv_heads, group, ...) to (batch, heads, ...)."""
    batch, kv_heads, group, *rest = array.shape
    return array.reshape(batch, kv_heads * group, *rest)


def _bounded(lengths: Array | numpy.ndarray | None, largest: int) -> Array | None:
    """A length beyond the buffer is the buffer's, a negative one 0 (MHA-LEN-3); int32 whatever the type was."""
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if jnp.iinfo(lengths.dtype).bits < 32:  # The size of the buffer may be no number of a narrow type.
        lengths = lengths.astype(jnp.int32)
    return jnp.clip(lengths, 0, jnp.asarray(largest, lengths.dtype)).astype(jnp.int32)


def anchor_of(maximum: Array) -> Array:
    """What is subtracted before exp: the maximum, or 0 in a row that sees nothing (MHA-EMPTY-1)."""
    return jnp.where(maximum == -math.inf, 0.0, maximum)


def finite(array: Array) -> Array:
    """0 for every number that is not finite, so that a weight of 0 hides it (MHA-POISON-2)."""
    return jnp.where(jnp.isfinite(array), array, 0.0)
