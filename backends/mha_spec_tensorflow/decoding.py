"""The forward pass of a few queries of each sequence, all sequences at once, in eager mode.

To read the keys takes longer than to multiply them by a few queries. So neither keys nor values are transposed: chunks
of them, (sequences, keys, kv_heads * size), are gathered into memory that stays in the cache, and a product of all
heads has the numbers of a head in the columns of its key/value head, and 0 in the others:

    scores (sequences, keys, rows) = chunk of keys by queries (sequences, kv_heads * size, rows)
    output (sequences, rows, kv_heads * size) = weights (sequences, rows, keys) by chunk of values

Longer sequences come first, so that a chunk reads the sequences that have its keys, and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import tensorflow as tf

from mha_spec.arguments import Arguments

from .block import Block, constrained, softmax
from .problem import Operands, problem_of, softmax_dtype, sum_is_finite, with_slopes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mha_spec.arrays import Array
    from mha_spec.varlen_arguments import VarlenArguments

    from .block import Scores
    from .problem import Problem

__all__ = ["attend", "suits"]

ROWS = 32
"""The largest number of rows, heads * queries, for which the zeros cost less than transposed copies."""
CHUNK = 2**19
"""The largest number of components of a chunk: 2 MiB in float32."""
PADDING = 4
"""How many times the keys the scores may cover: the longest sequence sets their number for all."""


def suits(a: VarlenArguments, sequences: Any) -> bool:
    """Return True if the sequences have the same few queries, and keys of comparable numbers."""
    if not tf.executing_eagerly() or sequences.count < 2:
        return False
    queries, keys = sequences.q_lengths, sequences.kv_lengths
    rows, longest = int(queries[0]), int(keys.max())
    is_even = 0 < sequences.count * longest <= PADDING * int(keys.sum())
    return is_even and 0 < a.heads * rows <= ROWS and bool((queries == rows).all())


def attend(a: VarlenArguments, sequences: Any, x: Operands) -> tuple[Array, Array] | None:
    """Compute output and lse, (tokens, heads, ...), of all sequences; None if a result is not finite."""
    call = _Call(a, sequences, x)
    scores = call.scores()
    if not sum_is_finite(scores):  # 0 times a key of another head that is not finite is NaN.
        return None
    block_scores = constrained(call.problem, call.x, call.block, scores)
    weights, share, _, lse = softmax(call.x, block_scores, needs_lse=True)
    output = call.output(weights, block_scores)
    if not sum_is_finite(output):
        return None
    output = output if x.sinks is None else output * share
    return call.in_order(output), tf.squeeze(call.in_order(lse), 2)


class _Call:
    """The operands of a call, with a batch entry for each sequence, from the longest on."""

    def __init__(self, a: VarlenArguments, sequences: Any, x: Operands) -> None:
        self.order = numpy.argsort(-sequences.kv_lengths, kind="stable")
        self.lengths = sequences.kv_lengths[self.order]
        self.slots = _slots(sequences, self.order, self.lengths)
        batch, rows, longest = len(self.order), int(sequences.q_lengths[0]), int(self.lengths[0])
        first, dtype = int(sequences.q_ends[0]), softmax_dtype(a.query)
        query = tf.reshape(x.query[first : first + batch * rows], (batch, rows, *a.query.shape[1:]))
        query = tf.transpose(tf.gather(tf.cast(query, dtype), self.order), (0, 2, 1, 3))
        options: dict[str, Any] = {"causal": a.causal, "window": a.window, "kv_lengths": self.lengths}
        options |= {"q_offset": sequences.offsets[self.order], "scale": a.scale, "softcap": a.softcap}
        # A problem reads only the sizes of keys and values.
        shapes = ((batch, a.kv_heads, longest, array.shape[-1]) for array in (x.key, x.value))
        key, value = (numpy.broadcast_to(0.0, shape) for shape in shapes)
        self.problem: Problem = with_slopes(problem_of(Arguments(query, key, value, **options)), a.alibi_slopes, dtype)
        sinks = None if x.sinks is None else tf.reshape(x.sinks, (1, -1, 1, 1))
        self.x = self.problem.scaled(Operands(query, x.key, x.value, None, sinks))
        self.block = Block(0, batch, 0, rows, 0, longest)
        self.kv_heads = a.kv_heads

    def scores(self) -> Array:
        """Multiply queries by keys, (sequences, heads, queries, keys); 0 behind the keys of a sequence."""
        query = self.x.query
        batch, heads, rows, size = query.shape
        own = tf.reshape(query, (batch, self.kv_heads, -1, 1, size))
        spread = tf.reshape(self._own_columns(own), (batch, heads * rows, self.kv_heads * size))
        columns = tf.transpose(spread, (0, 2, 1))
        parts = [_filled(tf.matmul(chunk, columns[:count]), batch) for count, _, chunk in self._chunks(self.x.key)]
        return tf.reshape(tf.transpose(tf.concat(parts, 1), (0, 2, 1)), (batch, heads, rows, -1))

    def output(self, weights: Array, block_scores: Scores) -> Array:
        """Multiply weights by values, (sequences, heads, queries, v_dim)."""
        (batch, heads, rows, _), size = weights.shape, self.x.value.shape[-1]
        flat = tf.reshape(weights, (batch, heads * rows, -1))
        total = tf.zeros((batch, heads * rows, self.kv_heads * size), weights.dtype)
        for count, keys, chunk in self._chunks(self.x.value):
            total += _filled(tf.matmul(flat[:count, :, keys], chunk), batch)
        products = tf.reshape(total, (batch, self.kv_heads, -1, self.kv_heads, size))
        own = tf.reduce_sum(self._own_columns(products), 3)
        return block_scores.zero_unless_seeing(tf.reshape(own, (batch, heads, rows, size)))

    def in_order(self, rows: Array) -> Array:
        """Return rows (sequences, heads, queries, size) as tokens in the order of the sequences."""
        rows = tf.gather(rows, numpy.argsort(self.order))
        return tf.reshape(tf.transpose(rows, (0, 2, 1, 3)), (-1, rows.shape[1], rows.shape[3]))

    def _own_columns(self, array: Array) -> Array:
        """Set the columns of the other heads to 0, (sequences, kv_heads, rows, kv_heads, size)."""
        own = numpy.eye(self.kv_heads, dtype=bool)[:, None, :, None]
        return tf.where(own, array, tf.zeros((), array.dtype))

    def _chunks(self, source: Array) -> Iterator[tuple[int, slice, Array]]:
        """Yield the number of sequences that have the keys of a chunk, these keys, and their components."""
        width = self.kv_heads * source.shape[-1]
        tokens, longest = tf.reshape(source, (-1, width)), int(self.lengths[0])
        step = max(1, CHUNK // (len(self.order) * width))
        for first in range(0, longest, step):
            keys, count = slice(first, min(first + step, longest)), int((self.lengths > first).sum())
            yield count, keys, tf.cast(tf.gather(tokens, self.slots[:count, keys]), self.x.query.dtype)


def _filled(rows: Array, count: int) -> Array:
    """Append rows of 0 for the sequences that have no key of a chunk."""
    missing = count - rows.shape[0]
    return tf.pad(rows, [[0, missing], [0, 0], [0, 0]]) if missing else rows


def _slots(sequences: Any, order: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the slot of every key of every sequence; its last key behind them, because others may hold NaN."""
    keys = numpy.minimum(numpy.arange(lengths[0]), numpy.maximum(lengths, 1)[:, None] - 1)
    if sequences.page is None:
        return sequences.kv_ends[order][:, None] + keys
    columns, places = numpy.divmod(keys, sequences.page)
    pages = numpy.take_along_axis(sequences.table[order], columns, axis=1)
    return numpy.clip(pages, 0, sequences.a.key.shape[0] - 1) * sequences.page + places
