"""The pieces in which a call is worked: rows of one key/value head's group, against a block of its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import device_of, namespace_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

__all__ = ["Assembly", "Tile", "block_of", "blocks", "fold", "heads", "part", "stacked", "tiles", "unfold"]

SCORES = 2**18
"""How many scores a block has at most: 1 MiB in float32, which stays in a core's cache."""
ROWS = 512
"""How many rows a tile has at most, those of all heads of the group counted."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Consecutive queries of one batch entry, of every head that reads one key/value head.

    The heads lie one under another as rows of one matrix, so that keys and values are never repeated (MHA-HEAD-1).
    """

    batch: int
    kv_head: int
    group: int
    queries: range

    @property
    def heads(self) -> range:
        """The query heads that read this key/value head."""
        return range(self.kv_head * self.group, (self.kv_head + 1) * self.group)

    @property
    def rows(self) -> int:
        """Number of rows, those of all heads counted."""
        return self.group * len(self.queries)


class Assembly:
    """An array (batch, heads, q_len, *shape) that comes tile by tile.

    NumPy's is written where it belongs at once, from any thread, so that it is fresh memory only once. Arrays of other
    libraries may never change: their tiles come in order, and are joined in the end.
    """

    def __init__(self, a: Arguments, shape: tuple[int, ...], like: Array) -> None:
        self._a, self._shape, self._like = a, (a.batch, a.heads, a.q_len, *shape), like
        self._parts: list[Array] = []
        self._whole = numpy.empty(self._shape, like.dtype) if isinstance(like, numpy.ndarray) else None

    def put(self, tile: Tile, rows: Array) -> None:
        """Take what a tile gave, (rows, size)."""
        xp: Any = namespace_of(rows)
        part_of = xp.reshape(rows, (tile.group, len(tile.queries), *self._shape[3:]))
        if self._whole is None:
            self._parts.append(part_of)
        else:
            self._whole[tile.batch, part(tile.heads), part(tile.queries)] = part_of

    def whole(self) -> Array:
        """What all tiles gave."""
        if self._whole is not None:
            return self._whole
        xp: Any = namespace_of(self._like)
        per_head = max(1, len(self._parts) // max(1, self._a.batch * self._a.kv_heads))
        firsts = range(0, len(self._parts), per_head)
        return stacked(
            [xp.concat(self._parts[first : first + per_head], axis=1) for first in firsts], self._shape, self._like
        )


def heads(a: Arguments) -> list[tuple[int, int]]:
    """Every batch entry with every key/value head."""
    return [(batch, kv_head) for batch in range(a.batch) for kv_head in range(a.kv_heads)]


def tiles(a: Arguments, of: list[tuple[int, int]], rows: int) -> list[Tile]:
    """Cut the queries of the heads named into tiles of at most so many rows; those of a head follow one another."""
    group = a.heads // a.kv_heads
    queries = blocks(range(a.q_len), max(1, rows // group))
    return [Tile(batch, kv_head, group, block) for batch, kv_head in of for block in queries]


def stacked(parts: Sequence[Array], shape: tuple[int, ...], like: Array) -> Array:
    """Join equal parts along new leading axes; zeros where there are none."""
    xp: Any = namespace_of(like)
    if not parts:
        return xp.zeros(shape, dtype=like.dtype, device=device_of(like))
    return xp.reshape(xp.stack(parts), shape)


def blocks(indices: range, length: int) -> list[range]:
    """Cut consecutive indices into blocks of `length`, the last one shorter."""
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def part(indices: range) -> slice:
    """Say consecutive indices as a slice."""
    return slice(indices.start, indices.stop)


def block_of(array: Array, tile: Tile, keys: range) -> Array:
    """Cut from a mask or a bias what speaks of a block: (group, queries, keys), 1 where it broadcasts (MHA-MASK-2)."""
    wanted = (part(tile.heads), part(tile.queries), part(keys))
    batch = tile.batch if array.shape[0] > 1 else 0
    return array[
        (batch, *(index if size > 1 else slice(None) for index, size in zip(wanted, array.shape[1:], strict=True)))
    ]


def fold(array: Array, tile: Tile) -> Array:
    """Cut from (batch, heads, q_len, size) the rows of a tile, (rows, size)."""
    xp: Any = namespace_of(array)
    return xp.reshape(array[tile.batch, part(tile.heads), part(tile.queries), :], (tile.rows, array.shape[3]))


def unfold(rows: Array, tile: Tile) -> Array:
    """Give rows back their heads: (group, queries, size)."""
    xp: Any = namespace_of(rows)
    return xp.reshape(rows, (tile.group, len(tile.queries), -1))
