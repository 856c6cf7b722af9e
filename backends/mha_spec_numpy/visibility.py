"""The visible pairs of each block; no array of q_len x kv_len is made, and blocks that no query sees are skipped.

Numbers, sequences and NumPy arrays are read, and decide beforehand which blocks are computed. Arrays of other libraries
may be traced or lie on a device: they are compared, never read (MHA-LEN-3).
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, host_integers, namespace_of, segment_ids
from mha_spec.constraints import PLAIN, Structure, key_range, segment_keys, shown, trimmed

from .tiling import ROWS, blocks, cut_pairs, part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .tiling import Tile

    Ends = tuple[int | None, int | None]
    """Start and stop of keys; None bounds nothing."""

__all__ = ["Visibility", "VisiblePairs"]

BANDS = 3
"""The number of NumPy bands that are kept for later tiles and calls."""


class VisiblePairs:
    """The visible pairs of a block; if many blocks share them, the ceiling is kept."""

    def __init__(self, pairs: Array, *, shared: bool = False) -> None:
        self.pairs = pairs
        """Boolean, broadcastable to (entries, heads, queries, keys)."""
        self._shared = shared
        self._ceiling: numpy.ndarray | None = None

    @property
    def ceiling(self) -> numpy.ndarray:
        """The greatest logit of each pair on NumPy: -inf where it is invisible, else NaN, which `fmin` ignores.

        A minimum with it takes a third of the time of a copy under a mask.
        """
        if self._ceiling is not None:
            return self._ceiling
        ceiling = ~self.pairs * numpy.float32(-math.inf)  # 0 * -inf is NaN.
        if self._shared:
            self._ceiling = ceiling
        return ceiling

    def count(self, size: int) -> int:
        """Count the visible pairs of a block of `size` pairs on NumPy."""
        return numpy.count_nonzero(self.pairs) * (size // self.pairs.size)


class PerEntry:
    """An integer for each batch entry, which is read only if the host holds it."""

    def __init__(self, value: Array | Sequence[int] | int) -> None:
        self._value: Array = value
        self._numbers = host_integers(value)
        self._common = (value, value) if isinstance(value, int) else None

    def span(self, entries: range) -> tuple[int, int] | None:
        """Return the least and the greatest integer of some batch entries, or None where they must not be read."""
        if self._common is not None or self._numbers is None:
            return self._common
        numbers = self._numbers[part(entries)]
        return min(numbers), max(numbers)

    def numbers(self, entries: range) -> Sequence[int] | None:
        """Return the integers of some batch entries, or their common integer; None if they must not be read."""
        if self._common is not None or self._numbers is None:
            return self._common and self._common[:1]
        return self._numbers[part(entries)]

    def get(self, entries: range, like: Array) -> Array | int:
        """Return the integers of some batch entries: a number if all are equal, else an array (entries, 1, 1, 1)."""
        span = self.span(entries)
        if span is not None and span[0] == span[1]:
            return span[0]
        xp: Any = namespace_of(like)
        integers = xp.asarray(self._value if span is None else self._numbers, device=device_of(like))
        return xp.reshape(xp.astype(integers[part(entries)], xp.arange(0).dtype), (-1, 1, 1, 1))


class Visibility:
    """The constraints of a call."""

    def __init__(self, a: Arguments) -> None:
        self.a = a
        self.left, self.right = a.bounds
        self.positional = a.positional
        self.q_lengths = None if a.q_lengths is None else PerEntry(a.q_lengths)
        self.kv_lengths = None if a.kv_lengths is None else PerEntry(a.kv_lengths)
        self.kv_starts = None if a.kv_starts is None else PerEntry(a.kv_starts)
        self.prefixes = None if a.prefix_lengths is None else PerEntry(a.prefix_lengths)
        self.positions_only = a.mask is a.q_lengths is a.kv_lengths is a.kv_starts is a.q_segment_ids is None
        """True if nothing but positions and a bias hides pairs."""
        self.whole = self.positions_only and not self.positional
        """True if every row sees every key unless a bias hides it."""
        # By value, because a shared plan meets new tiles of the same box in every call.
        self._key_blocks: dict[tuple[range, range, range, int], list[range]] = {}
        self._key_ranges: dict[tuple[range, range], range] = {}
        self._shown_keys: dict[tuple[range, range], Ends] = {}

    @cached_property
    def offset(self) -> PerEntry:
        """The position of query 0 (MHA-POS-1)."""
        return PerEntry(steps.offset_of(self.a))

    @property
    def rows(self) -> int:
        """The number of rows of a tile; a taller tile computes more hidden scores outside the band."""
        if not self.positional:
            return ROWS
        widths = [width for width in (self.a.band, self.a.chunk) if width is not None]
        return min([ROWS // 2, *(max(ROWS // 8, width // 2) for width in widths)])

    def key_blocks(self, tile: Tile, length: int) -> list[range]:
        """Cut the keys that a row of the tile may see into blocks; all keys outside them are invisible."""
        box = tile.entries, tile.kv_heads, tile.queries, length
        known = self._key_blocks.get(box)
        if known is None:
            known = self._key_blocks[box] = self._cut_keys(tile, length)
        return known

    def _cut_keys(self, tile: Tile, length: int) -> list[range]:
        if self.whole:
            return blocks(range(self.a.kv_len), length)
        every = self._key_range(tile)
        seen = self._seen_keys(tile, every)
        if seen is None:
            return self._cut(tile, every, length)
        cut = self._cut(tile, trimmed(every, seen), length)
        return [block for block in cut if seen[block.start - every.start : block.stop - every.start].any()]

    def _cut(self, tile: Tile, keys: range, length: int) -> list[range]:
        """Cut keys into blocks; keys that positions show to every row are separated if they fill a block.

        Such keys need no mask, but a further block costs as much as the mask of a smaller block.
        """
        start, stop = self._shown(tile)
        first = keys.start if start is None else max(keys.start, start)
        last = keys.stop if stop is None else min(keys.stop, stop)
        if last - first < length:
            return blocks(keys, length)
        pieces = range(keys.start, first), range(first, last), range(last, keys.stop)
        return [block for piece in pieces for block in blocks(piece, length)]

    def visible(self, tile: Tile, keys: range, bias: Array | None) -> VisiblePairs | None:
        """Return the pairs of a block that are visible, or None where all are."""
        if self.whole and bias is None:
            return None
        band = self._band(tile, keys) if self.positional else None
        if self.positions_only and bias is None:
            return band
        constraints = [*self._see_lengths(tile, keys), *self._see_segments(tile, keys)]
        if self.a.mask is not None:
            constraints.append(steps.see_mask(cut_pairs(self.a.mask, tile, keys)))
        if bias is not None:
            constraints.append(steps.see_bias(bias))
        constraints = [
            constraint for constraint in constraints if not (isinstance(constraint, numpy.ndarray) and constraint.all())
        ]
        if not constraints:
            return band
        return VisiblePairs(steps.all_of(constraints if band is None else [band.pairs, *constraints]))

    def _key_range(self, tile: Tile) -> range:
        """Return the keys between the first and the last that positions and lengths let the tile see."""
        box = tile.entries, tile.queries
        known = self._key_ranges.get(box)
        if known is None:
            known = self._key_ranges[box] = self._keys_between(tile)
        return known

    def _keys_between(self, tile: Tile) -> range:
        q_lengths, kv_lengths = (
            None if lengths is None else lengths.span(tile.entries) for lengths in (self.q_lengths, self.kv_lengths)
        )
        offsets, structure = self._offsets(tile), self._structure(tile)
        bounds = self.left, self.right
        return range(*key_range(bounds, tile.queries, self.a.kv_len, offsets, q_lengths, kv_lengths, structure))

    def _shown(self, tile: Tile) -> Ends:
        """Return the start and stop of the keys that positions show to every row of a tile; None bounds nothing."""
        if not self.positional:
            return None, None
        box = tile.entries, tile.queries
        known = self._shown_keys.get(box)
        if known is None:
            known = self._shown_keys[box] = self._shown_to_all(tile)
        return known

    def _shown_to_all(self, tile: Tile) -> Ends:
        offsets, (first, last) = self._offsets(tile), (tile.queries[0], tile.queries[-1])
        if offsets is None:
            return 0, 0
        return shown((self.left, self.right), first, last, offsets, self._structure(tile))

    def _offsets(self, tile: Tile) -> Sequence[int] | None:
        """Return the offsets of a tile's entries, or the least and the greatest where only they matter."""
        if not self.positional:
            return None
        return self.offset.numbers(tile.entries) if self.a.is_structured else self.offset.span(tile.entries)

    def _structure(self, tile: Tile) -> Structure:
        if not self.a.is_structured and self.kv_starts is None:
            return PLAIN
        starts, prefixes = (
            (0,) if numbers is None else numbers.numbers(tile.entries) for numbers in (self.kv_starts, self.prefixes)
        )
        return Structure(self.a.chunk, starts, prefixes, self.a.unlifted_right)

    def _seen_keys(self, tile: Tile, keys: range) -> numpy.ndarray | None:
        """Mark the keys that segments and mask let some row see; None where neither can be read."""
        a, seen = self.a, None
        if isinstance(a.q_segment_ids, numpy.ndarray) and isinstance(a.kv_segment_ids, numpy.ndarray):
            entries = part(tile.entries)
            seen = segment_keys(a.q_segment_ids[entries, part(tile.queries)], a.kv_segment_ids[entries, part(keys)])
        if isinstance(a.mask, numpy.ndarray):
            of_mask = numpy.broadcast_to(cut_pairs(a.mask, tile, keys).any(axis=(0, 1, 2)), (len(keys),))
            seen = of_mask if seen is None else seen & of_mask
        return seen

    def _band(self, tile: Tile, keys: range) -> VisiblePairs | None:
        """Return the pairs that positions show, or None where they show all; tiles with equal shifts share them."""
        first, last = self._shown(tile)
        if (first is None or first <= keys.start) and (last is None or keys.stop <= last):
            return None
        if self.a.is_structured:
            return VisiblePairs(self._structured_pairs(tile, keys))
        shift = keys.start - tile.queries.start - self.offset.get(tile.entries, self.a.query)
        bounds, sizes = (self.left, self.right), (len(tile.queries), len(keys))
        if isinstance(shift, int) and isinstance(self.a.query, numpy.ndarray):
            return _shared_band(bounds, shift, sizes)
        return VisiblePairs(_pairs_within(bounds, shift, *map(self._indices, map(range, sizes))))

    def _structured_pairs(self, tile: Tile, keys: range) -> Array:
        """Compare positions where a chunk or a prefix makes more than the distance decide."""
        a, key_indices = self.a, self._indices(keys)
        positions = self._indices(tile.queries)[:, None] + self.offset.get(tile.entries, a.query)
        distance = key_indices - positions
        causal = steps.see_causal(distance)
        if self.prefixes is not None:
            causal = steps.see_prefix(causal, key_indices, self.prefixes.get(tile.entries, a.query))
        constraints: list[Array] = [causal] if a.causal else []
        left, right = a.window or (None, None)
        if left is not None:
            constraints.append(steps.see_window_left(distance, left))
        if right is not None:
            constraints.append(steps.see_window_right(distance, right))
        if a.chunk is not None:
            constraints.append(steps.see_chunk(positions, key_indices, a.chunk, self._starts_of_chunks(tile)))
        return steps.all_of(constraints)

    def _starts_of_chunks(self, tile: Tile) -> Array | int:
        """Return the starts in 0..kv_len (MHA-LEN-5); those that have been checked are there already."""
        if self.kv_starts is None:
            return 0
        starts = self.kv_starts.get(tile.entries, self.a.query)
        return starts if isinstance(starts, int) else namespace_of(starts).clip(starts, 0, self.a.kv_len)

    def _see_lengths(self, tile: Tile, keys: range) -> Iterator[Array]:
        like = self.a.query
        if self.q_lengths is not None:
            span = self.q_lengths.span(tile.entries)
            if span is None or span[0] < tile.queries.stop:
                yield steps.see_q_lengths(self._indices(tile.queries)[:, None], self.q_lengths.get(tile.entries, like))
        if self.kv_lengths is not None:
            span = self.kv_lengths.span(tile.entries)
            if span is None or span[0] < keys.stop:
                yield steps.see_kv_lengths(self._indices(keys), self.kv_lengths.get(tile.entries, like))
        if self.kv_starts is not None:
            span = self.kv_starts.span(tile.entries)
            if span is None or span[1] > keys.start:
                yield steps.see_kv_starts(self._indices(keys), self.kv_starts.get(tile.entries, like))

    def _see_segments(self, tile: Tile, keys: range) -> Iterator[Array]:
        if self.a.q_segment_ids is None or self.a.kv_segment_ids is None:
            return
        q_ids = self.a.q_segment_ids[part(tile.entries), part(tile.queries)]
        kv_ids = self.a.kv_segment_ids[part(tile.entries), part(keys)]
        for of_queries, of_keys in segment_ids(q_ids, kv_ids, self._indices(keys)):
            yield steps.see_segments(of_queries[:, None, :, None], of_keys[:, None, None, :])

    def _indices(self, indices: range) -> Array:
        """Return consecutive integers in int32, which is computed twice as fast as int64."""
        xp: Any = namespace_of(self.a.query)
        return xp.arange(indices.start, indices.stop, dtype=xp.int32, device=device_of(self.a.query))


@lru_cache(maxsize=BANDS)
def _shared_band(bounds: tuple[int | None, int | None], shift: int, sizes: tuple[int, int]) -> VisiblePairs:
    queries, keys = (numpy.arange(size, dtype=numpy.int32) for size in sizes)
    return VisiblePairs(_pairs_within(bounds, shift, queries, keys), shared=True)


def _pairs_within(bounds: tuple[int | None, int | None], shift: Array | int, queries: Array, keys: Array) -> Array:
    """Compare the distances of a block with the window's bounds; `shift` is the distance of its first pair."""
    # Indices count from the block's first pair, so that int32 holds every distance (MHA-POS-1).
    distance = keys - (queries[:, None] - shift)
    left, right = bounds
    constraints: list[Array] = []
    if left is not None:
        constraints.append(steps.see_window_left(distance, left))
    if right is not None:
        constraints.append(steps.see_window_right(distance, right))
    return steps.all_of(constraints)
