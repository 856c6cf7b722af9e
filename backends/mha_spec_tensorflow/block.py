"""Compute the logits, the visibility and the dropout of a block of queries and its range of keys.

Products stack the queries of all heads that share a key/value head as rows of a matrix, (batch, kv_heads, rows, ...),
so that keys and values are never repeated (MHA-HEAD-1); everything else has the axes (batch, heads, queries, keys).
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

__all__ = ["Block", "Scores", "Softmax", "constrained", "covers", "kept", "rows_by", "scores", "softmax", "stacked"]


class Block(NamedTuple):
    """Consecutive batch entries, queries and keys: the first index and the number of each.

    Both may be tensors; where only the number is a tensor, the block has all of them.
    """

    entry: Size
    entries: Size
    query: Size
    queries: Size
    key: Size
    keys: Size

    def of_rows(self, array: Array) -> Array:
        """Return the rows of this block in (batch, heads, q_len, ...)."""
        return _cut(self._of_entries(array), self.query, self.queries, 2)

    def of_keys(self, array: Array) -> Array:
        """Return the keys of this block in (batch, kv_heads, kv_len, size)."""
        return _cut(self._of_entries(array), self.key, self.keys, 2)

    def of_pairs(self, array: Array) -> Array:
        """Return the pairs of this block in a mask or bias, which may broadcast (MHA-MASK-2)."""
        places = (0, self.entry, self.entries), (2, self.query, self.queries), (3, self.key, self.keys)
        for axis, start, size in places:
            array = _cut(array, *_within(array, start, size, axis), axis)
        return array

    def _of_entries(self, array: Array) -> Array:
        return _cut(array, self.entry, self.entries, 0)


def covers(start: Size, size: Size, known: int | None) -> bool:
    """Return True if a range covers an axis, whose size may be known."""
    return size == known if isinstance(size, int) else isinstance(start, int)


def _within(array: Array, start: Size, size: Size, axis: int) -> tuple[Size, Size]:
    """Return a range of an axis that may broadcast: an axis of unknown size may have the size 1 at run time."""
    if array.shape[axis] is not None or covers(start, size, None):
        return start, size
    total = tf.shape(array)[axis]
    size = tf.minimum(size, total)
    return tf.minimum(start, total - size), size


def _cut(array: Array, start: Size, size: Size, axis: int) -> Array:
    """Return a range of an axis; all of an axis of size 1, which broadcasts, unless the range is known to be empty."""
    empty = isinstance(size, int) and size == 0
    if (array.shape[axis] == 1 and not empty) or covers(start, size, array.shape[axis]):
        return array
    start = 0 if empty else start
    if isinstance(array, numpy.ndarray) and isinstance(start, int) and isinstance(size, int):
        return array[(slice(None),) * axis + (slice(start, start + size),)]
    starts, sizes = [0] * len(array.shape), [-1] * len(array.shape)
    starts[axis], sizes[axis] = start, size
    if isinstance(start, int) and isinstance(size, int):
        # TensorFlow converts an array in a third of the time that it needs for a list.
        return tf.slice(array, numpy.array(starts, numpy.int32), numpy.array(sizes, numpy.int32))
    part = tf.slice(array, starts, sizes)
    if not isinstance(size, int):
        part.set_shape((*array.shape[:axis], None, *array.shape[axis + 1 :]))
    return part


class Scores(NamedTuple):
    """The logits of a block, with its visibility and the slope of the soft cap."""

    logits: Array
    """-inf where a pair is invisible, but 0 in all of a row that sees no key, so that its weights are finite."""
    visible: Array | None
    """True for visible pairs, broadcastable to the logits; None if all pairs are visible."""
    seeing: Array | None
    """True for rows that see a key, broadcastable to the logits; None if all rows do."""
    slope: Array | None
    """The slope of the soft cap (MHA-VJP-2)."""

    def zero_unless_seeing(self, rows: Array) -> Array:
        """Set rows that see no key to 0 (MHA-EMPTY-1)."""
        return rows if self.seeing is None else tf.where(self.seeing, rows, tf.zeros((), rows.dtype))


def stacked(array: Array, kv_heads: int) -> Array:
    """Reshape (batch, heads, queries, size) to (batch, kv_heads, rows, size)."""
    if array.shape[1] == kv_heads:
        return array
    batch, heads, queries, size = sizes_of(array)
    return tf.reshape(array, (batch, kv_heads, heads // kv_heads * queries, size))


def rows_by(rows: Array, matrix: Array, *, transpose: bool = False) -> Array:
    """Multiply (batch, heads, queries, size) by a matrix for each key/value head."""
    # In eager mode, `tf.matmul` takes twice the time of its operation to start it.
    product = tf.raw_ops.BatchMatMulV2(x=stacked(rows, matrix.shape[1]), y=matrix, adj_x=False, adj_y=transpose)
    if rows.shape[1] == matrix.shape[1]:
        return product
    return tf.reshape(product, (*sizes_of(rows)[:3], sizes_of(product)[3]))


def scores(problem: Problem, x: Operands, block: Block, *, slope: bool = False) -> Scores:
    """Compute scores of scaled queries; cap, bias and hide them."""
    return constrained(
        problem, x, block, rows_by(block.of_rows(x.query), block.of_keys(x.key), transpose=True), slope=slope
    )


def constrained(problem: Problem, x: Operands, block: Block, logits: Array, *, slope: bool = False) -> Scores:
    """Cap, bias and hide scores (MHA-CAP-1, MHA-CAP-2, MHA-BIAS-1, MHA-POISON-2)."""
    cap_slope = None
    if problem.softcap is not None:
        tanh = tf.tanh(logits / problem.softcap)
        cap_slope = 1 - tanh * tanh if slope else None
        logits = problem.softcap * tanh
    if x.bias is not None:
        logits += block.of_pairs(x.bias)
    if problem.constants.slopes is not None:
        logits -= problem.constants.slopes * _distances(problem, block, logits.dtype)
    visible = _visible(problem, x, block)
    seeing = _seeing(problem, x, visible, block)
    if visible is None:
        return Scores(logits, None, seeing, cap_slope)
    hidden = tf.constant(-math.inf, logits.dtype)
    if seeing is not None:
        hidden = tf.where(seeing, hidden, tf.zeros((), logits.dtype))
    return Scores(tf.where(visible, logits, hidden), visible, seeing, cap_slope)


def _seeing(problem: Problem, x: Operands, visible: Array | None, block: Block) -> Array | None:
    """Compute which rows see a key; None if all are known to see a key."""
    if problem.constants.mask is None and x.bias is None and problem.known.every_row_sees(*block):
        return None
    if isinstance(visible, numpy.ndarray):
        # A constraint of rows alone has a single column, also where there are no keys.
        seeing = visible.any(axis=-1, keepdims=True) & (int(block.keys) > 0)
        return None if seeing.all() else seeing
    has_keys = None if isinstance(block.keys, int) and block.keys else tf.reshape(block.keys > 0, (1, 1, 1, 1))
    if visible is None:
        return has_keys
    seeing = tf.reduce_any(visible, axis=-1, keepdims=True)
    return seeing if has_keys is None else seeing & has_keys


class Softmax(NamedTuple):
    """The softmax of a block; all but the weights are (batch, heads, queries, 1), or None where not needed."""

    weights: Array
    """The weights among the keys only, without the sink."""
    share: Array | None
    """The keys' part of a row's weight, 0 in a row that sees no key; None if it is 1 everywhere."""
    sink_share: Array | None
    """The sink's part of a row's weight."""
    lse: Array | None


def softmax(x: Operands, block_scores: Scores, *, needs_lse: bool) -> Softmax:
    """Compute the softmax; the largest weight is the reciprocal of the sum of exponentials (MHA-SOFTMAX-1)."""
    logits, seeing = block_scores.logits, block_scores.seeing
    weights = tf.nn.softmax(logits)
    if x.sinks is None and not needs_lse:
        return Softmax(weights, None if seeing is None else tf.cast(seeing, weights.dtype), None, None)
    # Every weight of a row with NaN is NaN (MHA-NAN-1), but a maximum of XLA ignores NaN.
    nan = 0 * tf.reduce_sum(weights[:, :, :, :1], axis=-1, keepdims=True)
    largest = tf.reduce_max(weights, axis=-1, keepdims=True) + nan
    lse = tf.reduce_max(logits, axis=-1, keepdims=True) - tf.math.log(largest)
    if x.sinks is None:
        share = None if seeing is None else tf.cast(seeing, weights.dtype)
        return Softmax(weights, share, None, _where(seeing, lse, tf.constant(-math.inf, lse.dtype)))
    zero = tf.zeros((), lse.dtype)
    share = _where(seeing, tf.sigmoid(lse - x.sinks), zero)
    sink_share = _where(seeing, tf.sigmoid(x.sinks - lse), tf.cast(x.sinks > -math.inf, lse.dtype))
    return Softmax(weights, share, sink_share, _where(seeing, log_add_exp(lse, x.sinks), x.sinks))


def _where(seeing: Array | None, array: Array, otherwise: Array) -> Array:
    return array if seeing is None else tf.where(seeing, array, otherwise)


def kept(problem: Problem, x: Operands, block: Block) -> Array | None:
    """Compute the factors of dropout for the weights of a block; None without dropout (MHA-DROP-1, MHA-DROP-2).

    A random mask depends on the seed and on the block's place only, so that the backward pass can draw it again.
    """
    dtype = x.query.dtype
    if problem.constants.dropout_mask is not None:
        keep = block.of_pairs(problem.constants.dropout_mask)
    elif problem.constants.dropout_seed is not None:
        entry, query = (tf.cast(place, tf.int64) for place in (block.entry, block.query))
        seed = tf.stack([problem.constants.dropout_seed, entry * 2**31 + query])
        shape = (block.entries, x.query.shape[1], block.queries, block.keys)
        keep = tf.random.stateless_uniform(shape, seed) >= problem.dropout_rate
    else:
        return None
    return tf.cast(keep, dtype) / (1 - problem.dropout_rate)


def _visible(problem: Problem, x: Operands, block: Block) -> Array | None:
    """Compute which pairs of a block are visible, broadcastable to its logits; None if all are (MHA-MASK-3).

    The result is an array of NumPy where the host knows it.
    """
    constraints = list(_by_position(problem, block))
    if constraints:
        by_position = reduce(operator.and_, constraints)
        known = isinstance(by_position, numpy.ndarray) and block.keys and by_position.all()
        constraints = [] if known else [by_position]
    if problem.constants.mask is not None:
        constraints.append(block.of_pairs(problem.constants.mask))
    if x.bias is not None:
        constraints.append(tf.not_equal(block.of_pairs(x.bias), -math.inf))
    return reduce(tf.logical_and, constraints) if constraints else None


def _by_position(problem: Problem, block: Block) -> Iterator[Array]:
    """Yield the constraints of window, lengths and segments that may hide a pair of this block.

    The bounds of a window are added to the keys, where int32 holds the sum.
    """
    arrays, known, inactive = problem.constants, problem.known, problem.known.inactive(*block)
    rows, keys = (_indices(first, count) for first, count in (block[2:4], block[4:]))
    rows = rows[:, None]
    if known.left is not None and not inactive.left:
        yield keys + known.left >= rows + block.of_rows(arrays.q_offset)
    if known.right is not None and not inactive.right:
        shows = keys - known.right <= rows + block.of_rows(arrays.q_offset)
        yield shows if arrays.prefix_lengths is None else shows | (keys < block.of_rows(arrays.prefix_lengths))
    if known.a.unlifted_right is not None and not inactive.right:
        yield keys - known.a.unlifted_right <= rows + block.of_rows(arrays.q_offset)
    if known.a.chunk is not None and not inactive.chunk:
        starts = 0 if arrays.kv_starts is None else block.of_rows(arrays.kv_starts)
        positions = rows + block.of_rows(arrays.q_offset)
        yield _equal((positions - starts) // known.a.chunk, (keys - starts) // known.a.chunk)
    if arrays.kv_starts is not None and not inactive.kv_starts:
        yield keys >= block.of_rows(arrays.kv_starts)
    if arrays.q_lengths is not None and not inactive.q_lengths:
        yield rows < block.of_rows(arrays.q_lengths)
    if arrays.kv_lengths is not None and not inactive.kv_lengths:
        yield keys < block.of_rows(arrays.kv_lengths)
    for q_ids, kv_ids in () if inactive.segments else arrays.segment_ids:
        yield _equal(block.of_pairs(q_ids), block.of_pairs(kv_ids))


def _equal(first: Array, second: Array) -> Array:
    """Compare each element; `==` compares the identity of tensors in a graph of TensorFlow 1."""
    on_host = isinstance(first, numpy.ndarray) and isinstance(second, numpy.ndarray)
    return first == second if on_host else tf.equal(first, second)


def _distances(problem: Problem, block: Block, dtype: tf.DType) -> Array:
    """Return the distance of each key from the position of each query, (batch, 1, queries, keys)."""
    rows, keys = (_indices(first, count) for first, count in (block[2:4], block[4:]))
    return tf.cast(tf.abs(keys - (rows[:, None] + block.of_rows(problem.constants.q_offset))), dtype)


def _indices(first: Size, count: Size) -> Array:
    """Return consecutive indices: on the host in eager mode, where comparing them there costs no operation."""
    if tf.executing_eagerly():
        return numpy.arange(first, first + count, dtype=numpy.int32)
    return first + tf.range(count)
