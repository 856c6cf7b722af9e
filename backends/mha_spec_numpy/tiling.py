"""The pieces of a call: tiles, which are boxes of batch entries, heads and queries, and blocks of keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import device_of, namespace_of

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

__all__ = [
    "Assembly",
    "Tile",
    "blocks",
    "cut",
    "cut_pairs",
    "fold",
    "part",
    "rows_of",
    "stacks",
    "tiles",
    "unfold",
]

ROWS = 512
"""The largest number of rows of a matrix."""
STACK = 2**16
"""The number of scores of all matrices of a stack. Every operation costs some microseconds however small its
arrays are, so that small matrices are stacked as long as they stay in a core's cache."""


@dataclass(slots=True, eq=False)
class Tile:
    """A box of the call: some queries, in some batch entries, of all heads that read some key/value heads.

    It is computed as a stack of matrices (entries, kv_heads, rows, size). The rows of a matrix are the queries of every
    head that reads the same key/value head, so that keys and values are never repeated (MHA-HEAD-1).
    """

    entries: range
    kv_heads: range
    group: int
    queries: range
    folded: tuple[int, int, int] = field(init=False)
    """The shape of the stack of matrices without their columns: (entries, kv_heads, rows)."""
    unfolded: tuple[int, int, int] = field(init=False)
    """The same with heads and queries on separate axes: (entries, heads, queries)."""
    box: tuple[slice, slice, slice] = field(init=False)
    """The index of the tile in an array with the axes (batch, heads, q_len)."""
    matrices: tuple[slice, slice] = field(init=False)
    """The index of its keys and values in an array with the axes (batch, kv_heads)."""

    def __post_init__(self) -> None:
        entries, kv_heads, queries = len(self.entries), len(self.kv_heads), len(self.queries)
        self.folded = entries, kv_heads, self.group * queries
        self.unfolded = entries, kv_heads * self.group, queries
        self.matrices = part(self.entries), part(self.kv_heads)
        self.box = self.matrices[0], part(self.heads), part(self.queries)

    @property
    def heads(self) -> range:
        """The query heads that read the key/value heads."""
        return range(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    @property
    def rows(self) -> int:
        """The number of rows of each matrix."""
        return self.folded[2]


class Assembly:
    """A result that is written box by box.

    In an array of NumPy, each thread writes its boxes directly. Arrays of other libraries may be immutable: their boxes
    are kept, in the order of the tiles, and joined at the end.
    """

    def __init__(self, shape: tuple[int, ...], like: Array, memory: numpy.ndarray | None = None) -> None:
        """Write into `memory` of the shape and the type of `like` if it is passed."""
        self._shape, self._like = shape, like
        self._parts: list[tuple[tuple[slice, ...], Array]] = []
        self._whole = numpy.empty(shape, like.dtype) if memory is None and isinstance(like, numpy.ndarray) else memory

    def place(self, tile: Tile) -> Array | None:
        """Return the memory of a tile's matrices, or None where `put` must write them, or writes faster."""
        if self._whole is None or not self._whole.flags.c_contiguous:
            return None
        place = self._whole[tile.box]
        # Only in this case folding does not copy: `place` has the order of the matrices.
        adjacent = tile.group == 1 or len(tile.queries) == self._shape[2]
        return fold(place, tile) if adjacent else None

    def put(self, box: tuple[slice, ...], array: Array) -> None:
        """Write a box of the first axes from an array of any shape."""
        if self._whole is not None:
            place = self._whole[box]
            place[...] = array.reshape(place.shape)
        else:
            xp: Any = namespace_of(array)
            shape = (*(indices.stop - indices.start for indices in box), *self._shape[len(box) :])
            self._parts.append((box, xp.reshape(array, shape)))

    def whole(self) -> Array:
        """Return the whole result, or zeros if no box was written."""
        if self._whole is not None:
            return self._whole
        if self._parts:
            return _joined(self._parts, 0)
        xp: Any = namespace_of(self._like)
        return xp.zeros(self._shape, dtype=self._like.dtype, device=device_of(self._like))


def _joined(parts: list[tuple[tuple[slice, ...], Array]], axis: int) -> Array:
    """Join boxes that differ only in this axis and later axes."""
    box, array = parts[0]
    if axis == len(box):
        return array
    xp: Any = namespace_of(array)
    same = groupby(parts, key=lambda item: item[0][axis])
    return xp.concat([_joined(list(inner), axis + 1) for _, inner in same], axis=axis)


def stacks(a: Arguments) -> list[Tile]:
    """Cut a call into tiles of all queries, each with heads of a batch entry or all heads of several entries."""
    return _boxes(a, [range(a.q_len)])


def tiles(a: Arguments, rows: int) -> list[Tile]:
    """Cut a call into tiles whose matrices have at most `rows` rows; tiles of the same heads are consecutive."""
    return _boxes(a, blocks(range(a.q_len), max(1, rows // (a.heads // a.kv_heads))))


def _boxes(a: Arguments, queries: list[range]) -> list[Tile]:
    kv_heads, group = a.kv_heads, a.heads // a.kv_heads
    matrices = max(1, STACK // max(1, group * a.q_len * a.kv_len))
    entries = blocks(range(a.batch), max(1, matrices // kv_heads))
    return [Tile(*box) for box in product(entries, blocks(range(kv_heads), matrices), (group,), queries)]


def cut(stack: Tile, rows: int) -> list[Tile]:
    """Cut the queries of a stack into tiles whose matrices have at most `rows` rows."""
    queries = blocks(stack.queries, max(1, rows // stack.group))
    return [Tile(stack.entries, stack.kv_heads, stack.group, block) for block in queries]


def blocks(indices: range, length: int) -> list[range]:
    """Cut consecutive indices into blocks of `length`; the last may be shorter."""
    if 0 < len(indices) <= length:
        return [indices]
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def part(indices: range) -> slice:
    """Return the slice of consecutive indices."""
    return slice(indices.start, indices.stop)


def cut_pairs(array: Array, tile: Tile, keys: range) -> Array:
    """Cut a mask or a bias to a block, (entries, heads, queries, keys), with size 1 where it broadcasts."""
    block = (tile.entries, tile.heads, tile.queries, keys)
    return array[
        tuple(part(index) if size > 1 else slice(None) for index, size in zip(block, array.shape, strict=True))
    ]


def rows_of(array: Array, tile: Tile) -> Array:
    """Cut an array (batch, heads, q_len, size) to the matrices of a tile, (entries, kv_heads, rows, size)."""
    return fold(array[(*tile.box, ...)], tile)


def fold(array: Array, tile: Tile) -> Array:
    """Reshape (entries, heads, queries, size) to the matrices of a tile."""
    return array if tile.group == 1 else _reshaped(array, (*tile.folded, array.shape[3]))


def unfold(matrices: Array, tile: Tile) -> Array:
    """Reshape the matrices of a tile to (entries, heads, queries, size)."""
    return matrices if tile.group == 1 else _reshaped(matrices, (*tile.unfolded, matrices.shape[3]))


def _reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    if isinstance(array, numpy.ndarray):
        return array.reshape(shape)
    xp: Any = namespace_of(array)
    return xp.reshape(array, shape)
