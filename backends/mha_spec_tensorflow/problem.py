"""One call, prepared: what is fixed, what has a gradient and what has none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy
import tensorflow as tf

from mha_spec.arrays import dtype_name, softmax_dtype_name
from mha_spec.steps import scale_of

from .plan import Known, as_int64, offset_of, plan_of, unknown_plan
from .unknown import Size, sizes_of

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .plan import Run

__all__ = ["Given", "Operands", "Problem", "Size", "finite", "problem_of", "sizes_of", "softmax_dtype"]


class Operands(NamedTuple):
    """What has a gradient."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    sinks: Array | None


class Given(NamedTuple):
    """What has none: constraints, each broadcastable to (batch, heads, q_len, kv_len), and dropout.

    Lengths, offsets and ids that the host may read are NumPy arrays.
    """

    mask: Array | None
    q_offset: Array | None
    q_lengths: Array | None
    kv_lengths: Array | None
    segment_ids: tuple[tuple[Array, Array], ...]
    """Pairs of integers for queries and keys, all of which agree in one segment."""
    dropout_mask: Array | None
    dropout_seed: Array | None


@dataclass(frozen=True)
class Problem:
    """The options of one call, without the operands that have gradients."""

    scale: float
    softcap: float | None
    dropout_rate: float
    known: Known
    given: Given
    excludes: bool
    """Whether some pair may be invisible."""
    plan: tuple[Run, ...] | None
    """The blocks, none where there is nothing to cut; None where a size is not known."""

    def runs(self, x: Operands) -> tuple[Run, ...]:
        """The blocks; sizes in tensors are those of the operands at hand, so that XLA knows them in a gradient too."""
        if self.plan is not None:
            return self.plan
        batch, _, q_len, _ = sizes_of(x.query)
        return unknown_plan(self.known, batch, q_len, sizes_of(x.key)[2])


def problem_of(a: Arguments, seed: Array | None = None) -> Problem:
    """Read the options of a call."""
    a = replace(a, q_offset=offset_of(a))
    known = Known(a)
    constraints = (a.mask, a.bias, a.q_lengths, a.kv_lengths, a.q_segment_ids, known.left, known.right)
    excludes = any(one is not None for one in constraints)
    sizes = a.batch, a.q_len, a.kv_len
    plan = () if 0 in sizes[:2] else None if None in sizes else plan_of(known)
    scale, softcap = float(scale_of(a.scale, a.query.shape[3])), None if a.softcap is None else float(a.softcap)
    return Problem(scale, softcap, float(a.dropout_rate), known, _given(a, known, seed), excludes, plan)


def _given(a: Arguments, known: Known, seed: Array | None) -> Given:
    return Given(
        a.mask,
        _per_entry(known.offset, 0 if a.q_offset is None else a.q_offset),
        _per_entry(known.q_lengths, a.q_lengths),
        _per_entry(known.kv_lengths, a.kv_lengths),
        _segment_ids(a, known),
        a.dropout_mask,
        seed,
    )


def _per_entry(known: list[int] | None, value: Array | None) -> Array | None:
    """One number, or one for each batch entry; int32, beyond whose range a length is that of its buffer (MHA-LEN-3)."""
    if value is None:
        return None
    limits = -(2**31), 2**31 - 1
    if known is not None:
        return numpy.clip(numpy.asarray(known, object), *limits).astype(numpy.int32).reshape(-1, 1, 1, 1)
    return tf.reshape(tf.cast(tf.clip_by_value(as_int64(value), *limits), tf.int32), (-1, 1, 1, 1))


def _segment_ids(a: Arguments, known: Known) -> tuple[tuple[Array, Array], ...]:
    """Pairs of integers for queries and keys, all of which agree where the ids are equal by value (MHA-SEG-1).

    Ids that the host read are small. Of others, a number beyond int64 becomes a negative one, which the second pair
    tells from the negative numbers of another type.
    """
    if a.q_segment_ids is None or a.kv_segment_ids is None:
        return ()
    if known.ids is not None:
        return (_beside(*known.ids),)
    q_ids, kv_ids = (tf.convert_to_tensor(ids) for ids in (a.q_segment_ids, a.kv_segment_ids))
    q_low, kv_low = tf.cast(q_ids, tf.int64), tf.cast(kv_ids, tf.int64)
    if q_ids.dtype == kv_ids.dtype or tf.uint64 not in (q_ids.dtype, kv_ids.dtype):
        return (_beside(q_low, kv_low),)
    beyond = ((low < 0) & ids.dtype.is_unsigned for low, ids in ((q_low, q_ids), (kv_low, kv_ids)))
    return _beside(q_low, kv_low), _beside(*beyond)


def _beside(of_queries: Array, of_keys: Array) -> tuple[Array, Array]:
    """(batch, q_len) and (batch, kv_len) as arrays of pairs that broadcast."""
    return of_queries[:, None, :, None], of_keys[:, None, None, :]


def softmax_dtype(query: Array) -> tf.DType:
    """The type of scores and softmax (MHA-SOFTMAX-2)."""
    return tf.as_dtype(softmax_dtype_name(dtype_name(query)))


def finite(array: Array) -> Array:
    """0 for every number that is not finite, so that a weight of 0 hides it (MHA-POISON-2)."""
    return tf.where(tf.math.is_finite(array), array, tf.zeros((), array.dtype))
