"""Mistakes of a backward pass over tiles: loops that start or end at the wrong tile, sums of a single tile, 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps

from .gradients import by_group
from .loops import ceiled
from .mistake import VJP, Compared, Mistake, Sizes, replacing

if TYPE_CHECKING:
    from collections.abc import Callable

    Keeping = Callable[[numpy.ndarray], numpy.ndarray]

__all__ = ["TILED_GRADIENTS"]

SIZE = 64

SECOND_TILE = Sizes(keys=SIZE)


def keeping(kept: Keeping, *names: str) -> steps.Steps:
    """Leave out, in the gradients `names`, the pairs that `kept` does not choose of those that are visible."""

    def of(name: str) -> Callable[..., numpy.ndarray]:
        def gradient(
            pairs: numpy.ndarray, operand: numpy.ndarray, visible: numpy.ndarray, *scale: float
        ) -> numpy.ndarray:
            chosen = visible & kept(visible)
            return getattr(steps, name)(numpy.where(chosen, pairs, 0.0), operand, chosen, *scale)

        return gradient

    return replacing(**{name: of(name) for name in names})


def rows_of(visible: numpy.ndarray) -> numpy.ndarray:
    """Return the indices of the rows, (q_len, 1)."""
    return numpy.arange(visible.shape[2])[:, None]


def keys_of(visible: numpy.ndarray) -> numpy.ndarray:
    """Return the indices of the keys, (kv_len,)."""
    return numpy.arange(visible.shape[3])


def last_start(length: int) -> int:
    """Return the first element of the last tile."""
    return (max(length, 1) - 1) // SIZE * SIZE


def started_late(visible: numpy.ndarray) -> numpy.ndarray:
    """Keep the rows from the first row that sees a tile of keys, rounded up to whole tiles of rows."""
    starts = numpy.arange(0, visible.shape[3], SIZE)
    seen = numpy.logical_or.reduceat(visible, starts, axis=3)
    first = ceiled(seen.argmax(axis=2), SIZE)
    return rows_of(visible) >= numpy.repeat(first, SIZE, axis=2)[:, :, None, : visible.shape[3]]


def in_half_tiles(
    grad_scores: numpy.ndarray, key: numpy.ndarray, visible: numpy.ndarray, scale: float
) -> numpy.ndarray:
    """Add the gradient of each tile of 16 keys to a sum in float16."""
    total = numpy.zeros((*grad_scores.shape[:3], key.shape[3]), numpy.float16)
    for first in range(0, key.shape[2], 16):
        tile = slice(first, first + 16)
        part = steps.grad_query(grad_scores[..., tile], key[:, :, tile], visible[..., tile], scale)
        total = (total + part).astype(numpy.float16)
    return total.astype(grad_scores.dtype)


def dot_of_the_tile(*operands: numpy.ndarray) -> numpy.ndarray:
    """Use the D of the first row of each tile of rows."""
    dot = steps.row_dot(*operands)
    return dot[:, :, numpy.arange(dot.shape[2]) // SIZE * SIZE]


def sinks_of_the_last_tile(sink_weights: numpy.ndarray, row_dot: numpy.ndarray) -> numpy.ndarray:
    """Compute the gradient of the sinks from the last tile of rows."""
    start = last_start(sink_weights.shape[2])
    return steps.grad_sinks(sink_weights[:, :, start:], row_dot[:, :, start:])


def bias_of_the_first_tile(grad_logits: numpy.ndarray, shape: tuple[int, ...]) -> numpy.ndarray:
    """Compute the gradient of the bias at the keys of the first tile, and leave 0 elsewhere."""
    kept = numpy.arange(grad_logits.shape[3]) < SIZE
    return steps.grad_bias(numpy.where(kept, grad_logits, 0.0), shape)


def mistake(
    name: str,
    title: str,
    clause: str,
    made: steps.Steps,
    *needs: str,
    bugs: tuple[str, ...] = (),
    past: Sizes = SECOND_TILE,
    **fields: Any,
) -> Mistake:
    """Return a mistake of the backward pass."""
    return Mistake(name, title, (clause,), made, needs, VJP, bugs=bugs, past=past, **fields)


TILED_GRADIENTS = (
    mistake(
        "key-gradients-start-late",
        "starts the sums over rows of a tile of keys at the first row that sees it, rounded up to tiles of 64 rows",
        "MHA-VJP-2",
        keeping(started_late, "grad_key", "grad_value"),
        past=Sizes(rows=1, keys=0),
    ),
    mistake(
        "key-gradients-without-the-last-rows",
        "leaves the rows that do not fill a tile of 64 out of the gradients of key and value",
        "MHA-VJP-3",
        keeping(
            lambda visible: rows_of(visible) < (visible.shape[2] // SIZE * SIZE or visible.shape[2]),
            "grad_key",
            "grad_value",
        ),
        bugs=("FlagOpen/FlagGems PR#898",),
        past=Sizes(rows=SIZE),
    ),
    mistake(
        "key-gradients-of-the-last-rows",
        "overwrites the gradients of key and value with those of the last tile of 64 rows",
        "MHA-VJP-3",
        keeping(lambda visible: rows_of(visible) >= last_start(visible.shape[2]), "grad_key", "grad_value"),
        past=Sizes(rows=SIZE),
    ),
    mistake(
        "value-gradient-of-the-last-rows",
        "overwrites the gradient of value with that of the last tile of 64 rows",
        "MHA-VJP-3",
        keeping(lambda visible: rows_of(visible) >= last_start(visible.shape[2]), "grad_value"),
        past=Sizes(rows=SIZE),
    ),
    mistake(
        "query-gradient-of-the-last-tile",
        "overwrites the gradient of query with that of the last tile of 64 keys",
        "MHA-VJP-2",
        keeping(lambda visible: keys_of(visible) >= last_start(visible.shape[3]), "grad_query"),
    ),
    mistake(
        "query-gradient-of-the-first-tile",
        "computes the gradient of query from the first 64 keys alone",
        "MHA-VJP-2",
        keeping(lambda visible: keys_of(visible) < SIZE, "grad_query"),
    ),
    mistake(
        "query-gradient-without-the-last-keys",
        "leaves the keys that do not fill a tile of 64 out of the gradient of query",
        "MHA-VJP-2",
        keeping(lambda visible: keys_of(visible) < visible.shape[3] // SIZE * SIZE, "grad_query"),
        bugs=("FlagOpen/FlagGems PR#898",),
    ),
    mistake(
        "key-gradient-of-the-first-tile",
        "leaves the gradients of key and value 0 from key 64 on",
        "MHA-VJP-2",
        keeping(lambda visible: keys_of(visible) < SIZE, "grad_key", "grad_value"),
    ),
    mistake(
        "query-gradient-summed-in-16-bits",
        "adds the gradients of query of each tile of keys in float16",
        "MHA-ACC-1",
        replacing(grad_query=in_half_tiles),
        past=Sizes(keys=16),
        native=True,
        compared=Compared.BY_SIZE_OF_ERRORS,
    ),
    mistake(
        "row-dot-of-a-tile",
        "uses the D of the first of 64 rows for the whole tile",
        "MHA-VJP-1",
        replacing(row_dot=dot_of_the_tile),
        past=Sizes(rows=1),
        bugs=("SHI-Labs/NATTEN#347",),
    ),
    mistake(
        "sink-gradient-of-the-last-tile",
        "overwrites the gradient of the sinks with that of the last tile of 64 rows",
        "MHA-VJP-6",
        replacing(grad_sinks=sinks_of_the_last_tile),
        "sinks",
        past=Sizes(rows=SIZE),
    ),
    mistake(
        "bias-gradient-of-the-first-tile",
        "leaves the gradient of the bias 0 from key 64 on",
        "MHA-VJP-5",
        replacing(grad_bias=bias_of_the_first_tile),
        "bias",
    ),
    mistake(
        "group-gradient-of-the-first-heads",
        "keeps the gradients of key and value of the first kv_heads query heads, without a sum over the group",
        "MHA-VJP-4",
        replacing(sum_group=lambda x, kv_heads: x[:, :kv_heads]),
        bugs=("ooples/AiDotNet.Tensors#633",),
        past=Sizes(heads=1),
    ),
    mistake(
        "group-gradient-of-the-next-group",
        "returns the gradients of key and value of the next key/value head",
        "MHA-VJP-4",
        replacing(sum_group=lambda x, kv_heads: numpy.roll(steps.sum_group(x, kv_heads), -1, axis=1)),
        past=Sizes(heads=1),
    ),
    mistake(
        "group-gradient-of-the-first-head",
        "returns the gradients of key and value from the first query head of the group",
        "MHA-VJP-4",
        replacing(sum_group=by_group(lambda x: x[:, :, 0])),
        bugs=("stanford-crfm/levanter PR#449",),
        past=Sizes(heads=1),
    ),
)
