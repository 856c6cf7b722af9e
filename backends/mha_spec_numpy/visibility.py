"""Which keys a tile sees, block by block; nothing of q_len x kv_len is ever held, and unseen blocks are skipped.

Numbers, sequences and NumPy arrays are read, and say beforehand which blocks matter. Arrays of other libraries may be
traced or lie on a device: they are compared, never read (MHA-LEN-3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, host_integers, namespace_of, segment_ids

from .tiling import ROWS, block_of, blocks, part

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
        self.value: Array = value
        numbers = host_integers(value)
        self.numbers = numbers * batch if isinstance(value, int) and numbers else numbers

    def known(self, batch: int) -> int | None:
        """The integer of a batch entry, or None where it must not be read."""
        return None if self.numbers is None else self.numbers[batch]

    def get(self, batch: int) -> Array | int:
        """The integer of a batch entry, as a number or as an array without axes."""
        if self.numbers is not None:
            return self.numbers[batch]
        xp: Any = namespace_of(self.value)
        return xp.astype(self.value[batch], xp.arange(0).dtype)


@dataclass(frozen=True, slots=True)
class Visibility:
    """The constraints of one call."""

    a: Arguments
    offset: PerEntry
    q_lengths: PerEntry
    kv_lengths: PerEntry
    left: int | None
    right: int | None
    band: Callable[[int, int, int], Array]
    """What positions show of a block, from the shift of its keys, its queries and its keys; heads have it in common."""

    @classmethod
    def of(cls, a: Arguments) -> Visibility:
        """Read the constraints of a call; causal is the window (None, 0) (MHA-CAUSAL-1, MHA-WINDOW-2)."""
        left, right = a.bounded_window or (None, None)
        offset = PerEntry(steps.offset_of(a), a.batch)
        q_lengths = PerEntry(a.q_len if a.q_lengths is None else a.q_lengths, a.batch)
        kv_lengths = PerEntry(a.kv_len if a.kv_lengths is None else a.kv_lengths, a.batch)
        right = 0 if a.causal else right
        band = lru_cache(maxsize=BANDS)(partial(_band, a.query, left, right))
        return cls(a, offset, q_lengths, kv_lengths, left, right, band)

    @property
    def whole(self) -> bool:
        """Whether every row sees every key, unless a bias hides one."""
        a = self.a
        constraints = (a.mask, a.q_lengths, a.kv_lengths, a.q_segment_ids, self.left, self.right)
        return all(one is None for one in constraints)

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
        offset, pieces = self.offset.known(tile.batch), [keys]
        if offset is not None:
            first = keys.start if self.left is None else max(keys.start, offset + tile.queries[-1] - self.left)
            last = keys.stop if self.right is None else min(keys.stop, offset + tile.queries[0] + self.right + 1)
            if last - first >= length:
                pieces = [range(keys.start, first), range(first, last), range(last, keys.stop)]
        return [block for piece in pieces for block in blocks(piece, length)]

    def visible(self, tile: Tile, keys: range, bias: Array | None) -> Array | None:
        """Which pairs of a block are visible, broadcastable to (group, queries, keys); None where all are."""
        if self.whole and bias is None:
            return None
        constraints = [
            *self._see_positions(tile, keys),
            *self._see_lengths(tile, keys),
            *self._see_segments(tile, keys),
        ]
        if self.a.mask is not None:
            constraints.append(steps.see_mask(block_of(self.a.mask, tile, keys)))
        if bias is not None:
            constraints.append(steps.see_bias(bias))
        constraints = [
            constraint for constraint in constraints if not (isinstance(constraint, numpy.ndarray) and constraint.all())
        ]
        return steps.all_of(constraints) if constraints else None

    def _key_range(self, tile: Tile) -> range:
        """The keys between the first and the last that positions and lengths let the tile see."""
        q_length, stop = self.q_lengths.known(tile.batch), self.kv_lengths.known(tile.batch)
        queries = tile.queries if q_length is None else tile.queries[: max(0, q_length - tile.queries.start)]
        offset = self.offset.known(tile.batch)
        start, stop = 0, self.a.kv_len if stop is None else stop
        if not queries:
            return range(0)
        if offset is not None and self.left is not None:
            start = max(start, offset + queries[0] - self.left)
        if offset is not None and self.right is not None:
            stop = min(stop, offset + queries[-1] + self.right + 1)
        return range(start, max(start, stop))

    def _seen_keys(self, tile: Tile, keys: range) -> numpy.ndarray | None:
        """Which of the keys the segments and the mask let some row see, where they can be read."""
        a, seen = self.a, None
        if isinstance(a.q_segment_ids, numpy.ndarray) and isinstance(a.kv_segment_ids, numpy.ndarray):
            seen = numpy.isin(a.kv_segment_ids[tile.batch, part(keys)], a.q_segment_ids[tile.batch, part(tile.queries)])
        if isinstance(a.mask, numpy.ndarray):
            of_mask = numpy.broadcast_to(block_of(a.mask, tile, keys).any(axis=(0, 1)), (len(keys),))
            seen = of_mask if seen is None else seen & of_mask
        return seen

    def _see_positions(self, tile: Tile, keys: range) -> Iterator[Array]:
        offset = self.offset.known(tile.batch)
        nearest, farthest = (
            (-math.inf, math.inf)
            if offset is None
            else (keys.start - offset - tile.queries[-1], keys[-1] - offset - tile.queries[0])
        )
        left, right = (-math.inf if self.left is None else -self.left), (math.inf if self.right is None else self.right)
        if left <= nearest and farthest <= right:
            return
        shift = keys.start - tile.queries.start - self.offset.get(tile.batch)
        sizes = len(tile.queries), len(keys)
        yield _band(self.a.query, self.left, self.right, shift, *sizes) if offset is None else self.band(shift, *sizes)

    def _see_lengths(self, tile: Tile, keys: range) -> Iterator[Array]:
        q_length, kv_length = (lengths.known(tile.batch) for lengths in (self.q_lengths, self.kv_lengths))
        if q_length is None or q_length < tile.queries.stop:
            yield steps.see_q_lengths(self._indices(tile.queries)[:, None], self.q_lengths.get(tile.batch))
        if kv_length is None:
            yield steps.see_kv_lengths(self._indices(keys), self.kv_lengths.get(tile.batch))

    def _see_segments(self, tile: Tile, keys: range) -> Iterator[Array]:
        if self.a.q_segment_ids is None or self.a.kv_segment_ids is None:
            return
        q_ids = self.a.q_segment_ids[tile.batch, part(tile.queries)]
        kv_ids = self.a.kv_segment_ids[tile.batch, part(keys)]
        for q_part, kv_part in segment_ids(q_ids, kv_ids, self._indices(keys)):
            yield steps.see_segments(q_part[:, None], kv_part[None, :])

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
