"""Prepare a call: its options, its operands, which have gradients, and its other arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import tensorflow as tf

from mha_spec.arguments import Arguments
from mha_spec.arrays import dtype_name, softmax_dtype_name
from mha_spec.steps import scale_of

from .plan import Known, as_int64, offset_of, plan_of, unknown_plan
from .unknown import Size, sizes_of

if TYPE_CHECKING:
    from mha_spec.arrays import Array
    from mha_spec.varlen_arguments import VarlenArguments

    from .plan import Run

__all__ = [
    "Operands",
    "Problem",
    "Size",
    "finite",
    "finite_or_hiding",
    "packed_problem",
    "problem_of",
    "sizes_of",
    "softmax_dtype",
    "sum_is_finite",
]


class Operands(NamedTuple):
    """The arrays that have a gradient."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    sinks: Array | None


class Constants(NamedTuple):
    """The arrays without a gradient: constraints, each broadcastable to (batch, heads, q_len, kv_len), and dropout.

    Lengths, offsets and ids that the host may read are NumPy arrays.
    """

    mask: Array | None
    q_offset: Array | None
    q_lengths: Array | None
    kv_lengths: Array | None
    kv_starts: Array | None
    prefix_lengths: Array | None
    segment_ids: tuple[tuple[Array, Array], ...]
    """Pairs of integers for queries and keys; ids are equal where all pairs are."""
    dropout_mask: Array | None
    dropout_seed: Array | None
    slopes: Array | None = None
    """The linear bias of each head, (1, heads, 1, 1) in the softmax's type (MHA-VARLEN-8)."""


@dataclass(frozen=True)
class Problem:
    """The options and constants of a call, without its operands."""

    scale: float
    softcap: float | None
    dropout_rate: float
    known: Known
    constants: Constants
    excludes: bool
    """True if a pair may be invisible."""
    plan: tuple[Run, ...] | None
    """The blocks, of which an empty call has none; None if a size is unknown."""

    def scaled(self, x: Operands) -> Operands:
        """Multiply the query by the scale, once for all blocks (MHA-SCORE-1)."""
        return x._replace(query=x.query * self.scale)

    def runs(self, x: Operands) -> tuple[Run, ...]:
        """Return the blocks; unknown sizes are read from the operands, so that XLA knows them in a gradient too."""
        if self.plan is not None:
            return self.plan
        batch, _, q_len, _ = sizes_of(x.query)
        return unknown_plan(self.known, batch, q_len, sizes_of(x.key)[2])


def problem_of(a: Arguments, seed: Array | None = None) -> Problem:
    """Read the options of a call."""
    if isinstance(a.q_offset, str):
        a = replace(a, q_offset=offset_of(a.q_offset, a.q_lengths, a.kv_lengths, a.query, a.key))
    known = Known(a)
    constraints = (
        a.mask,
        a.bias,
        a.q_lengths,
        a.kv_lengths,
        a.kv_starts,
        a.q_segment_ids,
        known.left,
        known.right,
        a.chunk,
    )
    excludes = any(constraint is not None for constraint in constraints)
    sizes = a.batch, a.q_len, a.kv_len
    plan = () if 0 in sizes[:2] else None if None in sizes else plan_of(known)
    scale, softcap = float(scale_of(a.scale, a.query.shape[3])), None if a.softcap is None else float(a.softcap)
    return Problem(scale, softcap, float(a.dropout_rate), known, _constants(a, known, seed), excludes, plan)


def packed_problem(a: VarlenArguments, x: Operands, offset: Array | int, kv_lengths: Array | None = None) -> Problem:
    """Read the options of a packed call for a batch of its sequences; slopes are constants for gradients."""
    options: dict[str, Any] = {"causal": a.causal, "window": a.window, "scale": a.scale, "softcap": a.softcap}
    problem = problem_of(Arguments(*x[:3], q_offset=offset, kv_lengths=kv_lengths, **options))
    if a.alibi_slopes is None:
        return problem
    slopes = tf.reshape(tf.cast(tf.stop_gradient(a.alibi_slopes), softmax_dtype(a.query)), (1, -1, 1, 1))
    return replace(problem, constants=problem.constants._replace(slopes=slopes))


def _constants(a: Arguments, known: Known, seed: Array | None) -> Constants:
    return Constants(
        a.mask,
        _per_entry(known.offset, 0 if a.q_offset is None else a.q_offset),
        _per_entry(known.q_lengths, a.q_lengths),
        _per_entry(known.kv_lengths, a.kv_lengths),
        _not_negative(_per_entry(known.kv_starts, a.kv_starts)),
        _per_entry(known.prefixes, a.prefix_lengths),
        _segment_ids(a, known),
        a.dropout_mask,
        seed,
    )


def _per_entry(known: list[int] | None, value: Array | None) -> Array | None:
    """Return a number, or a number for each entry, as int32; a larger length means the whole buffer (MHA-LEN-3)."""
    if value is None:
        return None
    limits = -(2**31), 2**31 - 1
    if known is not None:
        return numpy.clip(numpy.asarray(known, object), *limits).astype(numpy.int32).reshape(-1, 1, 1, 1)
    return tf.reshape(tf.cast(tf.clip_by_value(as_int64(value), *limits), tf.int32), (-1, 1, 1, 1))


def _not_negative(starts: Array | None) -> Array | None:
    """Clamp starts at 0, from where chunks are then counted; one past all keys hides them as it is (MHA-LEN-5)."""
    return starts if starts is None or isinstance(starts, numpy.ndarray) else tf.maximum(starts, 0)


def _segment_ids(a: Arguments, known: Known) -> tuple[tuple[Array, Array], ...]:
    """Return pairs of integers for queries and keys, all equal where the ids are equal by value (MHA-SEG-1).

    Ids that the host has read are small. Of other ids, a number beyond int64 becomes negative, and the second pair
    distinguishes it from the negative numbers of another type.
    """
    if a.q_segment_ids is None or a.kv_segment_ids is None:
        return ()
    if known.ids is not None:
        return (_broadcastable(*known.ids),)
    q_ids, kv_ids = (tf.convert_to_tensor(ids) for ids in (a.q_segment_ids, a.kv_segment_ids))
    q_low, kv_low = tf.cast(q_ids, tf.int64), tf.cast(kv_ids, tf.int64)
    if q_ids.dtype == kv_ids.dtype or tf.uint64 not in (q_ids.dtype, kv_ids.dtype):
        return (_broadcastable(q_low, kv_low),)
    beyond = ((low < 0) & ids.dtype.is_unsigned for low, ids in ((q_low, q_ids), (kv_low, kv_ids)))
    return _broadcastable(q_low, kv_low), _broadcastable(*beyond)


def _broadcastable(q_ids: Array, kv_ids: Array) -> tuple[Array, Array]:
    """Reshape (batch, q_len) and (batch, kv_len) so that they broadcast to (batch, 1, q_len, kv_len)."""
    return q_ids[:, None, :, None], kv_ids[:, None, None, :]


def softmax_dtype(query: Array) -> tf.DType:
    """Return the type of scores and softmax (MHA-SOFTMAX-2)."""
    return tf.as_dtype(softmax_dtype_name(dtype_name(query)))


def finite(array: Array) -> Array:
    """Replace every number that is not finite by 0, so that a weight of 0 hides it (MHA-POISON-2)."""
    return tf.where(tf.math.is_finite(array), array, tf.zeros((), array.dtype))


def sum_is_finite(array: Array) -> Array | bool:
    """Return True if the sum of an array is finite; NumPy finds out faster where it can read the memory."""
    if tf.executing_eagerly() and "CPU" in array.device:
        with numpy.errstate(all="ignore"):
            return bool(numpy.isfinite(numpy.asarray(array).sum()))
    return tf.math.is_finite(tf.reduce_sum(array))


def finite_or_hiding(array: Array | None) -> Array | None:
    """Replace NaN and +inf by 0 in a bias or in sinks, whose -inf has a meaning (MHA-BIAS-2, MHA-SINK-1)."""
    return None if array is None else tf.where(array < math.inf, array, tf.zeros((), array.dtype))
