"""One block of queries against its stretch of keys: logits, what is visible, and what dropout keeps.

Products see the queries of all heads that share a key/value head as rows of one matrix, (batch, kv_heads, rows, ...),
so that keys and values are never repeated (MHA-HEAD-1); everything else sees (batch, heads, queries, keys).
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy
import tensorflow as tf

from .merging import log_add_exp
from .problem import sizes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mha_spec.arrays import Array

    from .problem import Operands, Problem, Size

__all__ = ["Block", "Scores", "Softmax", "covers", "kept", "rows_by", "scores", "softmax", "stacked"]


class Block(NamedTuple):
    """Consecutive batch entries, queries and keys: where they begin, and how many they are.

    Either may be traced; where only the number is, they are all of them.
    """

    entry: Size
    entries: Size
    query: Size
    queries: Size
    key: Size
    keys: Size

    def of_rows(self, array: Array) -> Array:
        """The rows of this block in (batch, heads, q_len, ...)."""
        return _cut(self._of_entries(array), self.query, self.queries, 2)

    def of_keys(self, array: Array) -> Array:
        """The keys of this block in (batch, kv_heads, kv_len, size)."""
        return _cut(self._of_entries(array), self.key, self.keys, 2)

    def of_pairs(self, array: Array) -> Array:
        """The pairs of this block in a mask or bias, 1 where it broadcasts (MHA-MASK-2)."""
        places = (0, self.entry, self.entries), (2, self.query, self.queries), (3, self.key, self.keys)
        for axis, start, size in places:
            array = _cut(array, *_within(array, start, size, axis), axis)
        return array

    def _of_entries(self, array: Array) -> Array:
        return _cut(array, self.entry, self.entries, 0)


def covers(start: Size, size: Size, known: int | None) -> bool:
    """Whether a stretch is the whole of an axis, whose size may be known."""
    return size == known if isinstance(size, int) else isinstance(start, int)


def _within(array: Array, start: Size, size: Size, axis: int) -> tuple[Size, Size]:
    """A stretch of an axis that may broadcast: one whose size is not known may turn out to be 1."""
    if array.shape[axis] is not None or covers(start, size, None):
        return start, size
    found = tf.shape(array)[axis]
    size = tf.minimum(size, found)
    return tf.minimum(start, found - size), size


def _cut(array: Array, start: Size, size: Size, axis: int) -> Array:
    """A stretch of an axis; all of an axis of size 1, which broadcasts, unless the stretch is known to be empty."""
    empty = isinstance(size, int) and size == 0
    if (array.shape[axis] == 1 and not empty) or covers(start, size, array.shape[axis]):
        return array
    start = 0 if empty else start
    if isinstance(array, numpy.ndarray) and isinstance(start, int) and isinstance(size, int):
        return array[(slice(None),) * axis + (slice(start, start + size),)]
    starts, sizes = [0] * len(array.shape), [-1] * len(array.shape)
    starts[axis], sizes[axis] = start, size
    part = tf.slice(array, starts, sizes)
    if not isinstance(size, int):
        part.set_shape((*array.shape[:axis], None, *array.shape[axis + 1 :]))
    return part


class Scores(NamedTuple):
    """The logits of a block, and what belongs to them."""

    logits: Array
    """-inf where a pair is invisible, but 0 throughout a row that sees nothing, whose weights are thus finite."""
    visible: Array | None
    """Broadcastable to the logits; None where all pairs are visible."""
    seeing: Array | None
    """Which rows see a key, broadcastable to the logits; None where all do."""
    slope: Array | None
    """The slope of the soft cap (MHA-VJP-2)."""

    def shown(self, rows: Array) -> Array:
        """0 in rows that see nothing (MHA-EMPTY-1)."""
        return rows if self.seeing is None else tf.where(self.seeing, rows, tf.zeros((), rows.dtype))


def stacked(array: Array, kv_heads: int) -> Array:
    """(batch, heads, queries, size) to (batch, kv_heads, rows, size)."""
    if array.shape[1] == kv_heads:
        return array
    batch, heads, queries, size = sizes_of(array)
    return tf.reshape(array, (batch, kv_heads, heads // kv_heads * queries, size))


def rows_by(rows: Array, matrix: Array, *, transpose: bool = False) -> Array:
    """The product of (batch, heads, queries, size) with a matrix for each key/value head."""
    product = tf.matmul(stacked(rows, matrix.shape[1]), matrix, transpose_b=transpose)
    if rows.shape[1] == matrix.shape[1]:
        return product
    return tf.reshape(product, (*sizes_of(rows)[:3], sizes_of(product)[3]))


def scores(problem: Problem, x: Operands, block: Block, *, slope: bool = False) -> Scores:
    """The scores, capped, then biased, then hidden (MHA-SCORE-1, MHA-CAP-1, MHA-CAP-2, MHA-BIAS-1, MHA-POISON-2)."""
    logits = rows_by(block.of_rows(x.query) * problem.scale, block.of_keys(x.key), transpose=True)
    of_cap = None
    if problem.softcap is not None:
        tanh = tf.tanh(logits / problem.softcap)
        of_cap = 1 - tanh * tanh if slope else None
        logits = problem.softcap * tanh
    if x.bias is not None:
        logits += block.of_pairs(x.bias)
    visible = _visible(problem, x, block)
    seeing = _seeing(visible, block)
    if visible is None:
        return Scores(logits, None, seeing, of_cap)
    hidden = tf.constant(-math.inf, logits.dtype)
    if seeing is not None:
        hidden = tf.where(seeing, hidden, tf.zeros((), logits.dtype))
    return Scores(tf.where(visible, logits, hidden), visible, seeing, of_cap)


def _seeing(visible: Array | None, block: Block) -> Array | None:
    """Which rows see a key; None where it is known that all do."""
    if isinstance(visible, numpy.ndarray):
        seeing = visible.any(axis=-1, keepdims=True)
        return None if seeing.all() else seeing
    some = None if isinstance(block.keys, int) and block.keys else tf.reshape(block.keys > 0, (1, 1, 1, 1))
    if visible is None:
        return some
    seeing = tf.reduce_any(visible, axis=-1, keepdims=True)
    return seeing if some is None else seeing & some


class Softmax(NamedTuple):
    """The softmax of a block; all but the weights are (batch, heads, queries, 1), or None where not asked."""

    weights: Array
    """Those among the keys alone, without the sink."""
    share: Array | None
    """Of a row's weight, what its keys have; the rest is the sink's. 0 in a row that sees nothing; None where all 1."""
    of_sink: Array | None
    """The rest."""
    lse: Array | None


def softmax(x: Operands, found: Scores, *, needs_lse: bool) -> Softmax:
    """The softmax of logits; the largest weight is the reciprocal of the sum of exponentials (MHA-SOFTMAX-1).

    A row with NaN has nothing else, which XLA leaves out of a maximum (MHA-NAN-1).
    """
    logits, seeing = found.logits, found.seeing
    weights = tf.nn.softmax(logits)
    if x.sinks is None and not needs_lse:
        return Softmax(weights, None if seeing is None else tf.cast(seeing, weights.dtype), None, None)
    nan = 0 * tf.reduce_sum(weights[:, :, :, :1], axis=-1, keepdims=True)
    largest = tf.reduce_max(weights, axis=-1, keepdims=True) + nan
    lse = tf.reduce_max(logits, axis=-1, keepdims=True) - tf.math.log(largest)
    if x.sinks is None:
        share = None if seeing is None else tf.cast(seeing, weights.dtype)
        return Softmax(weights, share, None, _shown(lse, seeing, tf.constant(-math.inf, lse.dtype)))
    zero = tf.zeros((), lse.dtype)
    share = _shown(tf.sigmoid(lse - x.sinks), seeing, zero)
    of_sink = _shown(tf.sigmoid(x.sinks - lse), seeing, tf.cast(x.sinks > -math.inf, lse.dtype))
    return Softmax(weights, share, of_sink, _shown(log_add_exp(lse, x.sinks), seeing, x.sinks))


def _shown(array: Array, visible: Array | None, otherwise: Array) -> Array:
    return array if visible is None else tf.where(visible, array, otherwise)


def kept(problem: Problem, x: Operands, block: Block) -> Array | None:
    """By what dropout multiplies the weights of a block; None without dropout (MHA-DROP-1, MHA-DROP-2).

    A mask that is drawn depends on the seed and on where the block lies, so that it can be drawn again.
    """
    dtype = x.query.dtype
    if problem.given.dropout_mask is not None:
        keep = block.of_pairs(problem.given.dropout_mask)
    elif problem.given.dropout_seed is not None:
        entry, query = (tf.cast(place, tf.int64) for place in (block.entry, block.query))
        seed = tf.stack([problem.given.dropout_seed, entry * 2**31 + query])
        shape = (block.entries, x.query.shape[1], block.queries, block.keys)
        keep = tf.random.stateless_uniform(shape, seed) >= problem.dropout_rate
    else:
        return None
    return tf.cast(keep, dtype) / (1 - problem.dropout_rate)


def _visible(problem: Problem, x: Operands, block: Block) -> Array | None:
    """Which pairs of a block are visible, broadcastable to its logits; None where all are known to be (MHA-MASK-3).

    It is an array of NumPy where the host knows it.
    """
    of_places = reduce(operator.and_, _of_places(problem, block), True)
    if isinstance(of_places, numpy.ndarray) and block.keys and of_places.all():
        of_places = True
    constraints = [] if of_places is True else [of_places]
    if problem.given.mask is not None:
        constraints.append(block.of_pairs(problem.given.mask))
    if x.bias is not None:
        constraints.append(block.of_pairs(x.bias) != -math.inf)
    return reduce(tf.logical_and, constraints) if constraints else None


def _of_places(problem: Problem, block: Block) -> Iterator[Array]:
    """The constraints of window, lengths and segments, but for those that are known to hide nothing in this block.

    The bounds of a window stand beside the keys, where int32 holds the sum.
    """
    given, known, settled = problem.given, problem.known, problem.known.settled(*block)
    rows, keys = (_indices(first, count) for first, count in (block[2:4], block[4:]))
    rows = rows[:, None]
    if known.left is not None and not settled.left:
        yield keys + known.left >= rows + block.of_rows(given.q_offset)
    if known.right is not None and not settled.right:
        yield keys - known.right <= rows + block.of_rows(given.q_offset)
    if given.q_lengths is not None and not settled.q_lengths:
        yield rows < block.of_rows(given.q_lengths)
    if given.kv_lengths is not None and not settled.kv_lengths:
        yield keys < block.of_rows(given.kv_lengths)
    for q_ids, kv_ids in () if settled.segments else given.segment_ids:
        yield block.of_pairs(q_ids) == block.of_pairs(kv_ids)


def _indices(first: Size, count: Size) -> Array:
    """Indices in a row: on the host in eager mode, where no graph keeps what is made of them."""
    if tf.executing_eagerly():
        return numpy.arange(first, first + count, dtype=numpy.int32)
    return first + tf.range(count)
