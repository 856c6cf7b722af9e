"""One call, prepared: what is fixed, what has a gradient and what has none.

Query heads that share a key/value head have an axis of their own, (batch, kv_heads, group, ...), so that keys and
values are never repeated (MHA-HEAD-1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy
import tensorflow as tf

from mha_spec.arrays import dtype_name, softmax_dtype_name
from mha_spec.steps import scale_of

from .plan import Known, plan_of, unknown_plan
from .unknown import Size, sizes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .plan import Run

__all__ = ["Given", "Operands", "Problem", "Size", "finite", "folded", "problem_of", "sizes_of", "unfolded"]


class Operands(NamedTuple):
    """What has a gradient."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    sinks: Array | None


class Given(NamedTuple):
    """What has none: constraints, each broadcastable to (batch, kv_heads, group, q_len, kv_len), and dropout."""

    mask: Array | None
    q_offset: Array | None
    q_lengths: Array | None
    kv_lengths: Array | None
    q_segment_ids: Array | None
    kv_segment_ids: Array | None
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
        batch, _, _, q_len, _ = sizes_of(x.query)
        return unknown_plan(self.known, batch, q_len, sizes_of(x.key)[2])


def problem_of(a: Arguments, seed: Array | None = None) -> Problem:
    """Read the options of a call."""
    known = Known(a)
    constraints = (a.mask, a.bias, a.q_lengths, a.kv_lengths, a.q_segment_ids, known.left, known.right)
    excludes = any(one is not None for one in constraints)
    sizes = a.batch, a.q_len, a.kv_len
    plan = () if 0 in sizes[:2] else None if None in sizes else plan_of(known)
    scale, softcap = float(scale_of(a.scale, a.query.shape[3])), None if a.softcap is None else float(a.softcap)
    return Problem(scale, softcap, float(a.dropout_rate), known, _given(a, known, seed), excludes, plan)


def _given(a: Arguments, known: Known, seed: Array | None) -> Given:
    mask, dropout_mask = (None if one is None else folded(one, a.kv_heads) for one in (a.mask, a.dropout_mask))
    q_ids, kv_ids = _ids(*known.ids or (a.q_segment_ids, a.kv_segment_ids))
    return Given(
        mask,
        _per_entry(known.offset if a.q_offset is None else a.q_offset),
        _per_entry(a.q_lengths),
        _per_entry(a.kv_lengths),
        None if q_ids is None else q_ids[:, None, None, :, None],
        None if kv_ids is None else kv_ids[:, None, None, None, :],
        dropout_mask,
        seed,
    )


def _per_entry(value: Array | Sequence[int] | int | None) -> Array | None:
    """One number, or one for each batch entry; int32, beyond whose range a length is that of its buffer (MHA-LEN-3)."""
    if value is None:
        return None
    numbers = tf.cast(tf.convert_to_tensor(value), tf.int64)
    return tf.reshape(tf.cast(tf.clip_by_value(numbers, -(2**31), 2**31 - 1), tf.int32), (-1, 1, 1, 1, 1))


def _ids(q_ids: Array | None, kv_ids: Array | None) -> tuple[Array | None, Array | None]:
    """Segment ids of one type; those of NumPy are numbered afresh, so that none is cut (MHA-SEG-1)."""
    if q_ids is None or kv_ids is None:
        return None, None
    if isinstance(q_ids, numpy.ndarray) and isinstance(kv_ids, numpy.ndarray):
        numbers = numpy.unique(numpy.concatenate([q_ids.ravel(), kv_ids.ravel()]), return_inverse=True)[1]
        numbers = numbers.astype(numpy.int32)
        q_ids, kv_ids = numbers[: q_ids.size].reshape(q_ids.shape), numbers[q_ids.size :].reshape(kv_ids.shape)
        return tf.convert_to_tensor(q_ids), tf.convert_to_tensor(kv_ids)
    return tf.cast(q_ids, tf.int64), tf.cast(kv_ids, tf.int64)


def softmax_dtype(query: Array) -> tf.DType:
    """The type of scores and softmax (MHA-SOFTMAX-2)."""
    return tf.as_dtype(softmax_dtype_name(dtype_name(query)))


def folded(array: Array, kv_heads: int) -> Array:
    """(batch, heads, ...) to (batch, kv_heads, group, ...), with heads=1 to (batch, 1, 1, ...)."""
    batch, heads, *rest = sizes_of(array)
    kv_heads = min(heads, kv_heads)
    return tf.reshape(array, (batch, kv_heads, heads // kv_heads, *rest))


def unfolded(array: Array) -> Array:
    """(batch, kv_heads, group, ...) to (batch, heads, ...)."""
    batch, kv_heads, group, *rest = sizes_of(array)
    return tf.reshape(array, (batch, kv_heads * group, *rest))


def finite(array: Array) -> Array:
    """0 for every number that is not finite, so that a weight of 0 hides it (MHA-POISON-2)."""
    return tf.where(tf.math.is_finite(array), array, tf.zeros((), array.dtype))
