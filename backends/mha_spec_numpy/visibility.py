"""Which keys a tile sees, block by block; nothing of q_len x kv_len is ever held, and unseen blocks are skipped.

Numbers, sequences and NumPy arrays are read, and say beforehand which blocks matter. Arrays of other libraries may be
traced or lie on a device: they are compared, never read (MHA-LEN-3).
"""

from __future__ import annotations

from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, host_integers, namespace_of, segment_ids

from .tiling import ROWS, blocks, cut_pairs, part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .tiling import Tile

__all__ = ["Visibility"]

BANDS = 8
"""How many bands a call keeps."""


class PerEntry:
    """One integer for each batch entry: read where it lies on the host, else an array."""

    def __init__(self, value: Array | Sequence[int] | int, batch: int) -> None:
        self._value: Array = value
        numbers = host_integers(value)
        self._numbers = numbers * batch if isinstance(value, int) and numbers else numbers

    def span(self, entries: range) -> tuple[int, int] | None:
        """The least and the greatest integer of some batch entries, or None where they must not be read."""
        if self._numbers is None:
            return None
        numbers = self._numbers[part(entries)]
        return min(numbers), max(numbers)

    def get(self, entries: range, like: Array) -> Array | int:
        """The integers of some batch entries, as a number where it is the same for all, or (entries, 1, 1, 1)."""
        span = self.span(entries)
        if span is not None and span[0] == span[1]:
            return span[0]
        xp: Any = namespace_of(like)
        integers = xp.asarray(self._value if span is None else self._numbers, device=device_of(like))
        return xp.reshape(xp.astype(integers[part(entries)], xp.arange(0).dtype), (-1, 1, 1, 1))


class Visibility:
    """The constraints of one call."""

    def __init__(self, a: Arguments) -> None:
        self.a = a
        self.left, self.right = a.bounded_window or (None, None)
        if a.causal:
            self.right = 0
        self.whole = not a.positional and a.mask is a.q_lengths is a.kv_lengths is a.q_segment_ids is None
        """Whether every row sees every key, unless a bias hides one."""

    @cached_property
    def offset(self) -> PerEntry:
        """The position of query 0 (MHA-POS-1)."""
        return PerEntry(steps.offset_of(self.a), self.a.batch)

    @cached_property
    def q_lengths(self) -> PerEntry:
        """How many queries are there (MHA-LEN-2)."""
        return PerEntry(self.a.q_len if self.a.q_lengths is None else self.a.q_lengths, self.a.batch)

    @cached_property
    def kv_lengths(self) -> PerEntry:
        """How many keys are there (MHA-LEN-1)."""
        return PerEntry(self.a.kv_len if self.a.kv_lengths is None else self.a.kv_lengths, self.a.batch)

    @cached_property
    def band(self) -> Callable[[int, int, int], Array]:
        """What positions show of a block, from the shift of its keys, its queries and its keys; heads share it."""
        return lru_cache(maxsize=BANDS)(partial(_band, self.a.query, self.left, self.right))

    @property
    def rows(self) -> int:
        """How many rows a tile should have: beside a band of keys lie as many in vain as the tile is high."""
        if self.left is None and self.right is None:
            return ROWS
        if self.left is None or self.right is None:
            return ROWS // 2
        return min(ROWS // 2, max(ROWS // 8, (self.left + self.right) // 2))

    def key_blocks(self, tile: Tile, length: int) -> list[range]:
        """Name the blocks of keys of which a row of the tile may see one; all that is left out is invisible."""
        if self.whole:
            return blocks(range(self.a.kv_len), length)
        every = self._key_range(tile)
        seen = self._seen_keys(tile, every)
        if seen is None:
            return self._cut(tile, every, length)
        used = numpy.flatnonzero(seen)
        keys = every[used[0] : used[-1] + 1] if used.size else range(0)
        cut = self._cut(tile, keys, length)
        return [block for block in cut if seen[block.start - every.start : block.stop - every.start].any()]

    def _cut(self, tile: Tile, keys: range, length: int) -> list[range]:
        """Cut keys into blocks; those that no position hides go apart where they fill one, and need no mask."""
        offset, pieces = self.offset.span(tile.entries), [keys]
        if offset is not None:
            first = keys.start if self.left is None else max(keys.start, offset[1] + tile.queries[-1] - self.left)
            last = keys.stop if self.right is None else min(keys.stop, offset[0] + tile.queries[0] + self.right + 1)
            if last - first >= length:
                pieces = [range(keys.start, first), range(first, last), range(last, keys.stop)]
        return [block for piece in pieces for block in blocks(piece, length)]

    def visible(self, tile: Tile, keys: range, bias: Array | None) -> Array | None:
        """Which pairs of a block are visible, broadcastable to (entries, heads, queries, keys); None where all are."""
        if self.whole and bias is None:
            return None
        constraints = [
            *self._see_positions(tile, keys),
            *self._see_lengths(tile, keys),
            *self._see_segments(tile, keys),
        ]
        if self.a.mask is not None:
            constraints.append(steps.see_mask(cut_pairs(self.a.mask, tile, keys)))
        if bias is not None:
            constraints.append(steps.see_bias(bias))
        constraints = [
            constraint for constraint in constraints if not (isinstance(constraint, numpy.ndarray) and constraint.all())
        ]
        return steps.all_of(constraints) if constraints else None

    def _key_range(self, tile: Tile) -> range:
        """The keys between the first and the last that positions and lengths let the tile see."""
        q_lengths, kv_lengths = self.q_lengths.span(tile.entries), self.kv_lengths.span(tile.entries)
        queries = tile.queries if q_lengths is None else tile.queries[: max(0, q_lengths[1] - tile.queries.start)]
        if not queries:
            return range(0)
        start, stop = 0, self.a.kv_len if kv_lengths is None else kv_lengths[1]
        offset = self.offset.span(tile.entries)
        if offset is not None and self.left is not None:
            start = max(start, offset[0] + queries[0] - self.left)
        if offset is not None and self.right is not None:
            stop = min(stop, offset[1] + queries[-1] + self.right + 1)
        return range(start, max(start, stop))

    def _seen_keys(self, tile: Tile, keys: range) -> numpy.ndarray | None:
        """Which of the keys the segments and the mask let some row see, where they can be read."""
        a, seen = self.a, None
        if isinstance(a.q_segment_ids, numpy.ndarray) and isinstance(a.kv_segment_ids, numpy.ndarray):
            q_ids, kv_ids = a.q_segment_ids[:, part(tile.queries)], a.kv_segment_ids[:, part(keys)]
            seen = numpy.any([numpy.isin(kv_ids[entry], q_ids[entry]) for entry in tile.entries], axis=0)
        if isinstance(a.mask, numpy.ndarray):
            of_mask = numpy.broadcast_to(cut_pairs(a.mask, tile, keys).any(axis=(0, 1, 2)), (len(keys),))
            seen = of_mask if seen is None else seen & of_mask
        return seen

    def _see_positions(self, tile: Tile, keys: range) -> Iterator[Array]:
        if self.left is None and self.right is None:
            return
        offset = self.offset.span(tile.entries)
        if offset is not None:
            nearest, farthest = keys.start - offset[1] - tile.queries[-1], keys[-1] - offset[0] - tile.queries[0]
            seen_before = self.left is None or -self.left <= nearest
            if seen_before and (self.right is None or farthest <= self.right):
                return
        shift = keys.start - tile.queries.start - self.offset.get(tile.entries, self.a.query)
        band = self.band if isinstance(shift, int) else partial(_band, self.a.query, self.left, self.right)
        yield band(shift, len(tile.queries), len(keys))

    def _see_lengths(self, tile: Tile, keys: range) -> Iterator[Array]:
        q_lengths, kv_lengths = self.q_lengths.span(tile.entries), self.kv_lengths.span(tile.entries)
        if q_lengths is None or q_lengths[0] < tile.queries.stop:
            lengths = self.q_lengths.get(tile.entries, self.a.query)
            yield steps.see_q_lengths(self._indices(tile.queries)[:, None], lengths)
        if kv_lengths is None or kv_lengths[0] < keys.stop:
            yield steps.see_kv_lengths(self._indices(keys), self.kv_lengths.get(tile.entries, self.a.query))

    def _see_segments(self, tile: Tile, keys: range) -> Iterator[Array]:
        if self.a.q_segment_ids is None or self.a.kv_segment_ids is None:
            return
        q_ids = self.a.q_segment_ids[part(tile.entries), part(tile.queries)]
        kv_ids = self.a.kv_segment_ids[part(tile.entries), part(keys)]
        for of_queries, of_keys in segment_ids(q_ids, kv_ids, self._indices(keys)):
            yield steps.see_segments(of_queries[:, None, :, None], of_keys[:, None, None, :])

    def _indices(self, indices: range) -> Array:
        return _indices(self.a.query, indices)


def _indices(like: Array, indices: range) -> Array:
    """Consecutive positions in int32, in which distances fit and are computed twice as fast as in int64."""
    xp: Any = namespace_of(like)
    return xp.arange(indices.start, indices.stop, dtype=xp.int32, device=device_of(like))


def _band(like: Array, left: int | None, right: int | None, shift: Array | int, queries: int, keys: int) -> Array:
    """Which of so many keys so many queries see by their positions, of which the first differ by `shift`."""
    distance = _indices(like, range(keys)) - (_indices(like, range(queries))[:, None] - shift)
    constraints: list[Array] = []
    if left is not None:
        constraints.append(steps.see_window_left(distance, left))
    if right is not None:
        constraints.append(steps.see_window_right(distance, right))
    return steps.all_of(constraints)
