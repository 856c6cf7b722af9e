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

from mha_spec.arrays import dtype_name, softmax_dtype_name
from mha_spec.errors import ArgumentValueError
from mha_spec.steps import scale_of

from .plan import Plan, Stretches, plan_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax import Array

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array as AnyArray

__all__ = ["Given", "Operands", "Problem", "anchor_of", "finite", "folded", "problem_of", "softmax_dtype", "unfold"]


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
    q_segment_ids: AnyArray | None
    kv_segment_ids: AnyArray | None
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
        _ids("q_segment_ids", a.q_segment_ids),
        _ids("kv_segment_ids", a.kv_segment_ids),
        a.dropout_mask,
        dropout_key,
        stretches,
    )
    return problem, Operands(a.query, a.key, a.key if a.value is None else a.value, a.bias, a.sinks), given


def softmax_dtype(query: Array) -> str:
    """Name the type of scores and softmax (MHA-SOFTMAX-2)."""
    return softmax_dtype_name(dtype_name(query))


def _integers(value: Array | Sequence[int] | int | None) -> Array | numpy.ndarray | None:
    """Host integers as int32, in whose range they were found to be; arrays of jax as they are."""
    if value is None or isinstance(value, jax.Array):
        return value
    return numpy.asarray(value, numpy.int32)


def _ids(name: str, value: Array | numpy.ndarray | None) -> Array | numpy.ndarray | None:
    """Ids on the host keep their 64 bits, or are refused where jax would cut off half of them (MHA-SEG-1)."""
    if not isinstance(value, numpy.ndarray) or jax.config.read("jax_enable_x64") or not value.size:
        return value
    smallest, largest = int(value.min()), int(value.max())
    if not -(2**31) <= smallest <= largest < 2**31:
        received = f"received ids from {smallest} to {largest}. Renumber the segments, or set jax_enable_x64"
        raise ArgumentValueError(f"`{name}` must fit int32 where jax_enable_x64=False, {received}. [MHA-SEG-1]")
    return value.astype(numpy.int32)


def folded(x: Operands, given: Given) -> tuple[Operands, Given]:
    """Give everything that has heads the axes (kv_heads, group) for them; segment ids have them as a mask has."""
    kv_heads = x.key.shape[1]
    pairs = (x.bias, given.mask, given.dropout_mask)
    bias, mask, dropout_mask = (None if one is None else fold(one, kv_heads) for one in pairs)
    sinks = None if x.sinks is None else x.sinks.reshape(1, kv_heads, -1, 1)
    q_ids, kv_ids = given.q_segment_ids, given.kv_segment_ids
    q_ids = None if q_ids is None else jnp.asarray(q_ids)[:, None, None, :, None]
    kv_ids = None if kv_ids is None else jnp.asarray(kv_ids)[:, None, None, None, :]
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
    lengths = jnp.maximum(lengths, 0)
    return (jnp.minimum(lengths, largest) if jnp.iinfo(lengths.dtype).max > largest else lengths).astype(jnp.int32)


def anchor_of(maximum: Array) -> Array:
    """What is subtracted before exp: the maximum, or 0 in a row that sees nothing (MHA-EMPTY-1)."""
    return jnp.where(maximum == -math.inf, 0.0, maximum)


def finite(array: Array) -> Array:
    """0 for every number that is not finite, so that a weight of 0 hides it (MHA-POISON-2)."""
    return jnp.where(jnp.isfinite(array), array, 0.0)
