"""Random dropout, whose mask depends on the seed and on the indices of a pair, not on how a call is cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.errors import refuse_type, refuse_value
from mha_spec.scalars import is_integer, plain, short_repr

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .tiling import Tile

__all__ = ["Dropout", "dropout_of"]

COLUMNS = 256
"""The number of keys with adjacent draws, for a query, in the stream."""
DRAWS_PER_STEP = 8
"""The number of draws of 32 bits that a step of Philox's counter gives."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """The draws of a call: each pair (b, h, i, j) has a fixed place in the stream of a counter-based generator."""

    seed: int
    rate: float
    heads: int
    q_len: int
    kv_len: int

    def block(self, tile: Tile, keys: range, xp: Any, device: object) -> Array:
        """Tell which weights of a block are kept, (entries, heads, queries, keys)."""
        first, last = keys.start // COLUMNS, -(-keys.stop // COLUMNS)
        within = slice(keys.start - first * COLUMNS, keys.stop - first * COLUMNS)
        columns = [
            [self._columns(entry * self.heads + head, column, tile.queries) for column in range(first, last)]
            for entry in tile.entries
            for head in tile.heads
        ]
        kept = numpy.stack([numpy.concatenate(blocks, axis=1)[:, within] for blocks in columns])
        return xp.asarray(kept.reshape(*tile.unfolded, len(keys)), device=device)

    def _columns(self, head: int, column: int, queries: range) -> numpy.ndarray:
        columns = -(-self.kv_len // COLUMNS)
        row = (head * columns + column) * self.q_len + queries.start
        stream = numpy.random.Philox(self.seed).advance(row * (COLUMNS // DRAWS_PER_STEP))
        draws = stream.random_raw(len(queries) * COLUMNS // 2).view(numpy.uint32)
        # Comparing whole numbers of 32 bits keeps a weight with a probability within 2^-32 of 1 - rate (MHA-DROP-4).
        return (draws >= self.rate * 2.0**32).reshape(len(queries), COLUMNS)


def dropout_of(a: Arguments) -> Dropout | None:
    """Return the dropout that a call has to draw, or None where it has a mask or a rate of 0 (MHA-DROP-4)."""
    if a.dropout_rate == 0 or a.dropout_mask is not None:
        return None
    return Dropout(_seed(a.dropout_key), a.dropout_rate, a.heads, a.q_len, a.kv_len)


def _seed(dropout_key: object) -> int:
    if dropout_key is None:
        return int(numpy.random.randint(0, 2**63 - 1, dtype=numpy.int64))  # noqa: NPY002 - the global generator is meant
    seed = plain(dropout_key)
    if not is_integer(seed):
        received = f"dropout_key={short_repr(seed)} of type {type(seed).__name__}"
        fix = "None draws a seed from numpy.random."
        refuse_type("MHA-DROP-4", f"`dropout_key` must be an integer seed, received {received}. {fix}")
    if seed < 0:
        refuse_value(
            "MHA-DROP-4",
            f"`dropout_key` must be a seed with dropout_key>=0, received dropout_key={short_repr(seed)}.",
        )
    return seed
