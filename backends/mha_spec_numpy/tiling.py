"""The pieces in which a call is worked: boxes of batch entries, heads and queries, against a block of keys."""

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
    "stack_size",
    "stacks",
    "tiles",
    "unfold",
]

ROWS = 512
"""How many rows a matrix has at most."""
STACK = 2**16
"""How many scores the matrices of a stack have together: an operation on a stack costs microseconds, however small,
so that small matrices are worked together, as long as they stay in a core's cache."""


@dataclass(slots=True)
class Tile:
    """Some queries of some batch entries, of every head that reads some key/value heads: a box of the call.

    It is worked as a stack of matrices, (entries, kv_heads, rows, size): the heads that read one key/value head lie one
    under another as rows of one matrix, so that keys and values are never repeated (MHA-HEAD-1).
    """

    entries: range
    kv_heads: range
    group: int
    queries: range
    folded: tuple[int, int, int] = field(init=False)
    """The shape of the stack of matrices, but for their columns."""
    unfolded: tuple[int, int, int] = field(init=False)
    """The same with a head on an axis of its own: (entries, heads, queries)."""
    box: tuple[slice, slice, slice] = field(init=False)
    """Where the tile lies in what has the axes (batch, heads, q_len)."""
    matrices: tuple[slice, slice] = field(init=False)
    """Where its keys and values lie in what has the axes (batch, kv_heads)."""

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
        """Number of rows of one matrix."""
        return self.folded[2]


class Assembly:
    """An array that comes box by box.

    NumPy's is written where it belongs at once, from any thread, so that it is fresh memory only once. Arrays of other
    libraries may never change: their boxes come in order, and are joined in the end.
    """

    def __init__(self, shape: tuple[int, ...], like: Array) -> None:
        self._shape, self._like = shape, like
        self._parts: list[tuple[tuple[slice, ...], Array]] = []
        self._whole = numpy.empty(shape, like.dtype) if isinstance(like, numpy.ndarray) else None

    def place(self, tile: Tile) -> Array | None:
        """Where the matrices of a tile belong, to be written directly; None where they must be put."""
        if self._whole is None:
            return None
        place = self._whole[tile.box]
        adjacent = tile.group == 1 or len(tile.queries) == self._shape[2]
        return fold(place, tile) if adjacent else None

    def put(self, box: tuple[slice, ...], array: Array) -> None:
        """Take what belongs in a box of the first axes, in any shape."""
        if self._whole is not None:
            place = self._whole[box]
            place[...] = array.reshape(place.shape)
        else:
            xp: Any = namespace_of(array)
            shape = (*(indices.stop - indices.start for indices in box), *self._shape[len(box) :])
            self._parts.append((box, xp.reshape(array, shape)))

    def whole(self) -> Array:
        """What all boxes gave, zeros where there was none."""
        if self._whole is not None:
            return self._whole
        if self._parts:
            return _joined(self._parts, 0)
        xp: Any = namespace_of(self._like)
        return xp.zeros(self._shape, dtype=self._like.dtype, device=device_of(self._like))


def _joined(parts: list[tuple[tuple[slice, ...], Array]], axis: int) -> Array:
    """Join boxes that differ in this axis and those behind it alone."""
    box, array = parts[0]
    if axis == len(box):
        return array
    xp: Any = namespace_of(array)
    same = groupby(parts, key=lambda item: item[0][axis])
    return xp.concat([_joined(list(inner), axis + 1) for _, inner in same], axis=axis)


def stack_size(a: Arguments) -> int:
    """How many key/value heads are worked together, whatever batch entry they belong to."""
    return max(1, STACK // max(1, a.heads // a.kv_heads * a.q_len * a.kv_len))


def stacks(a: Arguments) -> list[Tile]:
    """Cut a call into tiles of all queries: heads of one batch entry, or all heads of several."""
    return _boxes(a, [range(a.q_len)])


def tiles(a: Arguments, rows: int) -> list[Tile]:
    """Cut a call into tiles whose matrices have at most so many rows, those of a stack one after another."""
    return _boxes(a, blocks(range(a.q_len), max(1, rows // (a.heads // a.kv_heads))))


def _boxes(a: Arguments, queries: list[range]) -> list[Tile]:
    together = stack_size(a)
    entries = blocks(range(a.batch), max(1, together // a.kv_heads))
    kv_heads = blocks(range(a.kv_heads), together)
    return [Tile(*box) for box in product(entries, kv_heads, (a.heads // a.kv_heads,), queries)]


def cut(stack: Tile, rows: int) -> list[Tile]:
    """Cut the queries of a stack so that no matrix has more than so many rows."""
    queries = blocks(stack.queries, max(1, rows // stack.group))
    return [Tile(stack.entries, stack.kv_heads, stack.group, block) for block in queries]


def blocks(indices: range, length: int) -> list[range]:
    """Cut consecutive indices into blocks of `length`, the last one shorter."""
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def part(indices: range) -> slice:
    """Say consecutive indices as a slice."""
    return slice(indices.start, indices.stop)


def cut_pairs(array: Array, tile: Tile, keys: range) -> Array:
    """Cut from a mask or a bias what speaks of a block: (entries, heads, queries, keys), 1 where it broadcasts."""
    wanted = (tile.entries, tile.heads, tile.queries, keys)
    return array[
        tuple(part(index) if size > 1 else slice(None) for index, size in zip(wanted, array.shape, strict=True))
    ]


def rows_of(array: Array, tile: Tile) -> Array:
    """Cut from (batch, heads, q_len, size) the matrices of a tile, (entries, kv_heads, rows, size)."""
    return fold(array[(*tile.box, ...)], tile)


def fold(array: Array, tile: Tile) -> Array:
    """Lay the heads of a group one under another: (entries, heads, queries, size) to matrices of a tile."""
    return _reshaped(array, (*tile.folded, array.shape[3]))


def unfold(matrices: Array, tile: Tile) -> Array:
    """Give rows back their heads: (entries, heads, queries, size)."""
    return _reshaped(matrices, (*tile.unfolded, matrices.shape[3]))


def _reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    if isinstance(array, numpy.ndarray):
        return array.reshape(shape)
    xp: Any = namespace_of(array)
    return xp.reshape(array, shape)
