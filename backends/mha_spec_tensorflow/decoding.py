"""The forward pass of a few queries of each sequence, all sequences at once, in eager mode.

To start the operations of a sequence takes longer than to attend to a thousand keys. So sequences of similar lengths
are a batch of dense attention. A token, or a slot of a page, of a single head is a row of all tokens and heads, and one
operation gathers the rows of a batch in the order (sequences, heads, tokens), so that nothing is transposed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import tensorflow as tf

from . import forward
from .problem import Operands, packed_problem, softmax_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mha_spec.arrays import Array
    from mha_spec.varlen_arguments import VarlenArguments

__all__ = ["attend", "suits"]

QUERIES = 32
"""The largest number of queries of a sequence; with more, the products take most of the time."""
BATCH = 2**23
"""The largest number of components of the keys of a batch, unless it is a single sequence: 32 MiB in float32."""
PADDING = 2**20
"""The number of components that are gathered in the time in which the operations of a batch start."""


def suits(sequences: Any) -> bool:
    """Return True if the sequences have the same few queries, and some of them have keys."""
    if not tf.executing_eagerly() or sequences.count < 2:
        return False
    queries = sequences.q_lengths
    return 0 < queries[0] <= QUERIES and bool((queries == queries[0]).all() and sequences.kv_lengths.any())


def attend(a: VarlenArguments, sequences: Any, x: Operands, *, needs_lse: bool) -> tuple[Array, ...]:
    """Compute output and, if needed, lse, (tokens, heads, ...), of all sequences."""
    order = numpy.argsort(-sequences.kv_lengths, kind="stable")
    width = a.kv_heads * max(x.key.shape[-1], x.value.shape[-1])
    batches = [order[batch] for batch in _batches(sequences.kv_lengths[order].tolist(), width)]
    of_queries = [_rows(_queries(sequences, batch), a.heads) for batch in batches]
    calls = zip(batches, of_queries, strict=True)
    results = [_attend(a, sequences, x, batch, rows, needs_lse=needs_lse) for batch, rows in calls]
    places = numpy.argsort(numpy.concatenate([rows.ravel() for rows in of_queries])).reshape(-1, a.heads)
    joined = {name: tf.concat([_flat(result[name]) for result in results], 0) for name in results[0]}
    output = tf.gather(joined["output"], places)
    return (output, tf.gather(joined["lse"][:, 0], places)) if needs_lse else (output,)


def _batches(lengths: list[int], width: int) -> Iterator[slice]:
    """Cut falling lengths into batches; a new batch begins where the padding would take longer than to start it.

    Sequences without keys are a batch without others, because they have no key that could be the padding.
    """
    first = padding = 0
    for index, length in enumerate(lengths):
        added = (lengths[first] - length) * width
        padding += added
        is_large = index > first and (index + 1 - first) * lengths[first] * width > BATCH
        # Where lengths fall steeply, the next sequences would have as much padding.
        if is_large or max(padding, 4 * added) > PADDING or length == 0 < lengths[first]:
            yield slice(first, index)
            first, padding = index, 0
    yield slice(first, len(lengths))


def _attend(
    a: VarlenArguments, sequences: Any, x: Operands, batch: numpy.ndarray, rows: numpy.ndarray, *, needs_lse: bool
) -> dict[str, Array]:
    """Compute output and, if needed, lse, (sequences, heads, queries, ...), of a batch with the rows of its queries."""
    lengths, dtype = sequences.kv_lengths[batch], softmax_dtype(a.query)
    of_keys = tf.constant(_rows(_slots(sequences, batch, lengths), a.kv_heads))
    gathered = ((x.query, tf.constant(rows)), (x.key, of_keys), (x.value, of_keys))
    # `tf.gather` starts in twice the time of its operation.
    query, key, value = (
        tf.cast(tf.raw_ops.GatherV2(params=_flat(array), indices=indices, axis=0), dtype) for array, indices in gathered
    )
    x = Operands(query, key, value, None, None if x.sinks is None else tf.reshape(x.sinks, (1, -1, 1, 1)))
    return forward.attend(packed_problem(a, x, sequences.offsets[batch], lengths), x, needs_lse=needs_lse)


def _queries(sequences: Any, batch: numpy.ndarray) -> numpy.ndarray:
    """Return the token of every query of a batch, (sequences, queries)."""
    return sequences.q_ends[batch][:, None] + numpy.arange(sequences.q_lengths[0])


def _slots(sequences: Any, batch: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the slot of every key of a batch, (sequences, keys).

    The padding is the last key of a sequence again: a NaN in another slot, though hidden, would take time.
    """
    keys = numpy.minimum(numpy.arange(lengths[0]), lengths[:, None] - 1)
    if sequences.page is None:
        return sequences.kv_ends[batch][:, None] + keys
    pages = sequences.table[batch, : -(-lengths[0] // sequences.page)]
    pages = numpy.clip(pages, 0, sequences.a.key.shape[0] - 1)
    slots = pages[:, :, None] * sequences.page + numpy.arange(sequences.page)
    return numpy.take_along_axis(slots.reshape(len(batch), -1), keys, 1)


def _rows(tokens: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Return the rows of tokens or slots, (sequences, tokens), in the order (sequences, heads, tokens)."""
    return tokens[:, None] * heads + numpy.arange(heads)[:, None]


def _flat(array: Array) -> Array:
    """Return an array as rows of its last axis."""
    *sizes, size = array.shape
    return tf.reshape(array, numpy.array([math.prod(sizes), size]))
