"""Cut a call into blocks of queries, each with the range of keys outside of which it sees none.

Numbers, sequences, NumPy arrays and, in eager mode, tensors on the CPU are read. Tensors that are traced or lie on an
accelerator are compared, never read (MHA-LEN-3). Where a size is unknown when a call is traced, tensors hold the number
and the sizes of the blocks; XLA compiles them, since no size differs between the steps of a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy
import tensorflow as tf

from mha_spec.arguments import offset_of_reading
from mha_spec.arrays import host_integers
from mha_spec.constraints import PLAIN, Structure, equal_entries, key_range, segment_keys, segment_runs, shown, trimmed

from .unknown import sizes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .unknown import Size

__all__ = ["COST_OF_BLOCK", "Group", "Known", "Run", "as_int64", "offset_of", "plan_of", "unknown_plan"]

SCORES = 2**23
"""The most scores that are computed at a time, unless the least number of queries has more: 32 MiB in float32."""
LOWEST, HIGHEST = 64, 512
"""The least and the most queries of a block."""
SHORTEST_RUN = 64
"""Packed sequences that are shorter on average share blocks; longer ones have separate blocks."""
COST_OF_BLOCK = 2**18
"""The number of scores that take the time of starting a block, in which each product waits for all threads."""
CAUSAL_BLOCKS = 4
"""The most blocks of causal queries that only the skipped keys pay for."""
BODIES = 8
"""The most shapes of blocks in a graph, which holds the operations for each; if there are more, sizes are rounded."""
WIDEST = 2**30
"""A range of this width has all keys, and its width plus a block's fits into int32."""


@dataclass(frozen=True)
class Group:
    """Consecutive blocks of queries of the same shape."""

    first: Size
    rows: Size
    keys: Size
    count: Size
    starts: tuple[int, ...] | Array | None
    """The first key of each block's range; None if all ranges begin at key 0."""

    def key(self, index: Size) -> Size:
        """Return the first key of a block's range."""
        if self.starts is None:
            return 0
        return self.starts[index] if isinstance(index, int) else tf.gather(self.starts, index)


@dataclass(frozen=True)
class Run:
    """`count` times `entries` consecutive batch entries with the same blocks."""

    first: int
    count: Size
    entries: Size
    groups: tuple[Group, ...]
    at_once: bool = False
    """True if the blocks of an entry are computed at the same time, since they are few and fit into memory together."""

    @property
    def scores(self) -> Size:
        """The number of pairs that are computed for a head."""
        return self.count * self.entries * sum(group.count * group.rows * group.keys for group in self.groups)

    @property
    def blocks(self) -> Size:
        """The number of blocks."""
        return self.count * sum(group.count for group in self.groups)


class Inactive(NamedTuple):
    """Flags of the constraints; True if a constraint is known to hide no pair of a block."""

    left: bool = False
    right: bool = False
    chunk: bool = False
    kv_starts: bool = False
    q_lengths: bool = False
    kv_lengths: bool = False
    segments: bool = False


class Known:
    """The constraints of a call as far as the host knows them; None for arrays that must not be read."""

    def __init__(self, a: Arguments) -> None:
        """Read the constraints that may be read."""
        self.a = a
        self.left, self.right = a.bounds
        self.offset = self._numbers(0 if a.q_offset is None else a.q_offset)
        self.q_lengths, self.kv_lengths = self._numbers(a.q_lengths), self._numbers(a.kv_lengths)
        self.kv_starts, self.prefixes = self._numbers(a.kv_starts), self._numbers(a.prefix_lengths)
        self.kv_starts = self.kv_starts and [max(0, start) for start in self.kv_starts]
        self.ids = _numbered(_read(a.q_segment_ids), _read(a.kv_segment_ids))
        """The segment ids of queries and of keys, renumbered from 0."""

    def _numbers(self, value: Array | Sequence[int] | int | None) -> list[int] | None:
        numbers = None if value is None else host_integers(_read(value))
        return numbers * self.batch if isinstance(value, int) and numbers else numbers

    @property
    def batch(self) -> int:
        """The number of batch entries; 1 if it is unknown, because all entries are then treated alike."""
        return 1 if self.a.batch is None else self.a.batch

    @property
    def band(self) -> int | None:
        """The number of keys that a row sees, minus 1, if a window bounds both sides."""
        return None if self.a.band is None else min(self.a.band, WIDEST)

    def structure(self, entries: range) -> Structure:
        """Return the chunk, starts and prefixes of batch entries."""
        a = self.a
        if not a.is_structured and a.kv_starts is None:
            return PLAIN
        starts = (0,) if a.kv_starts is None else _of(self.kv_starts, entries)
        prefixes = (0,) if a.prefix_lengths is None else _of(self.prefixes, entries)
        return Structure(a.chunk, starts, prefixes, a.unlifted_right)

    def seen(self, entries: range, queries: range) -> range:
        """Return the keys from the first to the last that the queries see, as far as the host knows."""
        bounds, structure = (self.left, self.right), self.structure(entries)
        keys = range(*key_range(bounds, queries, self.a.kv_len, *self._host_data(entries), structure))
        if self.ids is None:
            return keys
        q_ids, kv_ids = (ids[entries.start : entries.stop] for ids in self.ids)
        return trimmed(keys, segment_keys(q_ids[:, queries.start : queries.stop], kv_ids[:, keys.start : keys.stop]))

    def inactive(self, *block: object) -> Inactive:
        """Return the constraints that hide no pair of a block: the first index and the number of each of its axes."""
        ranges = _ranges(block)
        if ranges is None:
            return Inactive()
        entries, queries, keys = ranges
        offset, q_lengths, kv_lengths = self._host_data(entries)
        structure = self.structure(entries)
        left = right = False
        if offset:
            start, stop = shown((self.left, self.right), queries[0], queries[-1], offset, structure)
            left, right = start is None or start <= keys[0], stop is None or keys[-1] < stop
        if self.a.is_structured:
            left = right = left and right
        return Inactive(
            left=left,
            right=right,
            chunk=left and right,
            kv_starts=structure.starts is not None and max(structure.starts) <= keys[0],
            q_lengths=bool(q_lengths) and queries[-1] < min(q_lengths),
            kv_lengths=bool(kv_lengths) and keys[-1] < min(kv_lengths),
            segments=self._one_segment(entries, queries, keys),
        )

    def every_row_sees(self, *block: object) -> bool:
        """Return True if each row of a block is known to see a key of the block, without a mask and a bias."""
        ranges = _ranges(block)
        if ranges is None or not self._all_read or self.a.is_structured or self.a.kv_starts is not None:
            return False
        entries, queries, keys = ranges
        offset, q_lengths, kv_lengths = self._host_data(entries)
        last = min(keys[-1], min(kv_lengths) - 1) if kv_lengths else keys[-1]
        lowest = keys[0] if self.left is None or offset is None else max(offset) + queries[-1] - self.left
        highest = last if self.right is None or offset is None else min(offset) + queries[0] + self.right
        return (
            (self.band is None or self.band >= 0)
            and keys[0] <= min(last, highest)
            and lowest <= last
            and (q_lengths is None or queries[-1] < min(q_lengths))
            and (self.ids is None or self._one_segment(entries, queries, keys))
        )

    @property
    def _all_read(self) -> bool:
        """Return True if no constraint is an array that must not be read."""
        a, bounded = self.a, self.left is not None or self.right is not None
        return (
            not (bounded and self.offset is None)
            and (a.q_lengths is None or self.q_lengths is not None)
            and (a.kv_lengths is None or self.kv_lengths is not None)
            and (a.q_segment_ids is None or self.ids is not None)
        )

    def _host_data(self, entries: range) -> tuple[list[int] | None, list[int] | None, list[int] | None]:
        """Return the offsets, q_lengths and kv_lengths of batch entries; None for those that must not be read."""
        offset, q_lengths, kv_lengths = (
            _of(numbers, entries) for numbers in (self.offset, self.q_lengths, self.kv_lengths)
        )
        return offset, q_lengths, kv_lengths

    def _one_segment(self, entries: range, queries: range, keys: range) -> bool:
        if self.ids is None or len(entries) > 1:
            return False
        q_ids, kv_ids = (ids[entries[0]] for ids in self.ids)
        first = q_ids[queries[0]]
        return bool(
            (q_ids[queries.start : queries.stop] == first).all() and (kv_ids[keys.start : keys.stop] == first).all()
        )

    def equal_entries(self) -> list[range]:
        """Return ranges of consecutive batch entries that have the same constraints."""
        per_entry = (self.offset, self.q_lengths, self.kv_lengths, self.kv_starts, self.prefixes)
        numbers = [numbers for numbers in per_entry if numbers]
        return [range(*ends) for ends in equal_entries(self.batch, [*numbers, *(self.ids or ())])]

    def cut_at_segments(self, entries: range) -> list[range]:
        """Cut the queries where a segment ends, unless the segments are too short for blocks."""
        runs = None if self.ids is None else segment_runs(self.ids[0][entries[0]], SHORTEST_RUN)
        return [range(self.a.q_len)] if runs is None else [range(*ends) for ends in runs]


def _read(value: Array) -> Array:
    """Convert a tensor on the CPU to NumPy in eager mode; return anything else unchanged."""
    if not tf.is_tensor(value) or not tf.executing_eagerly() or "CPU" not in value.device:
        return value
    return value.numpy()


def as_int64(value: Array | Sequence[int] | int) -> Array:
    """Convert integers of any type to int64; larger numbers become the largest int64."""
    numbers = tf.convert_to_tensor(value)
    wide = tf.cast(numbers, tf.int64)
    return tf.where(wide < 0, tf.int64.max, wide) if numbers.dtype == tf.uint64 else wide


def offset_of(
    reading: str,
    q_lengths: Array | Sequence[int] | None,
    kv_lengths: Array | Sequence[int] | None,
    query: Array,
    key: Array,
) -> Array | int:
    """Return the position of query 0 from the name of an alignment (MHA-POS-2).

    It is a scalar tensor if there are no lengths and a size is unknown.
    """
    lengths = _clamped(q_lengths, sizes_of(query)[2]), _clamped(kv_lengths, sizes_of(key)[2])
    return offset_of_reading(reading, *lengths)


def _clamped(lengths: Array | Sequence[int] | None, size: Size) -> Array | int:
    """Clamp lengths to 0 and the size of their axis, the default; int64, on the host where that is possible."""
    if isinstance(size, int):
        if lengths is None:
            return size
        numbers = host_integers(_read(lengths))
        if numbers is not None:
            return numpy.clip(numpy.asarray(numbers, dtype=object), 0, size).astype(numpy.int64)
    size = tf.cast(size, tf.int64)
    return size if lengths is None else tf.clip_by_value(as_int64(lengths), 0, size)


def _numbered(q_ids: Array | None, kv_ids: Array | None) -> tuple[numpy.ndarray, numpy.ndarray] | None:
    """Renumber segment ids of NumPy; two numbers are equal where the ids have the same value (MHA-SEG-1)."""
    if not (isinstance(q_ids, numpy.ndarray) and isinstance(kv_ids, numpy.ndarray)):
        return None
    common = numpy.result_type(q_ids, kv_ids)
    # No integer type of NumPy holds both uint64 and a signed type: their common type is a float, which rounds.
    ids = numpy.concatenate([q_ids.ravel(), kv_ids.ravel()], dtype=object if common.kind == "f" else common)
    numbers = numpy.unique(ids, return_inverse=True)[1].astype(numpy.int32)
    return numbers[: q_ids.size].reshape(q_ids.shape), numbers[q_ids.size :].reshape(kv_ids.shape)


def _ranges(block: Sequence[object]) -> tuple[range, range, range] | None:
    """Return the entries, queries and keys of a block; None if any of its places is a tensor, or an axis is empty."""
    places = [place for place in block if isinstance(place, int)]
    if len(places) != len(block) or 0 in places[1::2]:
        return None
    entries, queries, keys = (range(places[at], places[at] + places[at + 1]) for at in (0, 2, 4))
    return entries, queries, keys


def _of(numbers: list[int] | None, entries: range) -> list[int] | None:
    return None if numbers is None else numbers[entries.start : entries.stop]


def plan_of(known: Known) -> tuple[Run, ...]:
    """Cut a call of known sizes into blocks; treat batch entries separately where that saves time."""
    whole, equal = _plan(known, [range(known.batch)]), known.equal_entries()
    if len(equal) == 1:
        return whole
    exact = _plan(known, equal)
    bodies = sum(len(run.groups) for run in exact)
    if not tf.executing_eagerly() and bodies > BODIES:
        exact = whole
    saved = (sum(run.scores for run in whole) - sum(run.scores for run in exact)) * known.a.heads
    return exact if saved > COST_OF_BLOCK * (sum(run.blocks for run in exact) - 1) else whole


def unknown_plan(known: Known, batch: Size, q_len: Size, kv_len: Size) -> tuple[Run, ...]:
    """Cut a call into blocks where a tensor holds a size.

    If only the batch is unknown, the graph has no loop over the entries unless a block holds only a single entry.
    """
    if not (isinstance(q_len, int) and isinstance(kv_len, int)):
        return (_run(known, 0, batch, _unknown_groups(known, q_len, kv_len)),)
    groups = _known_groups(known, range(1))
    together, at_once = _together(known, groups), _at_once(known, groups)
    count, entries = (batch, 1) if together == 1 else (1, batch)
    return (Run(0, count, entries, groups, at_once),)


def _plan(known: Known, runs: list[range]) -> tuple[Run, ...]:
    return tuple(_run(known, run.start, len(run), _known_groups(known, run)) for run in runs if run)


def _run(known: Known, first: int, entries: Size, groups: tuple[Group, ...]) -> Run:
    """Compute as many entries at once as fit into memory, the same number in each step."""
    together = _divisor(entries, _together(known, groups))
    return Run(first, entries // together, together, groups, _at_once(known, groups))


def _together(known: Known, groups: tuple[Group, ...]) -> Size:
    """Return the number of entries whose block, or all blocks where these are computed at once, fit into memory."""
    sizes = [group.rows * group.keys for group in groups]
    if _at_once(known, groups):
        largest = sum(group.count * size for group, size in zip(groups, sizes, strict=True))
    else:
        largest = max(sizes) if all(isinstance(size, int) for size in sizes) else sizes[0]
    return _most(1, SCORES // known.a.heads // _most(1, largest))


def _at_once(known: Known, groups: tuple[Group, ...]) -> bool:
    """Return True if the blocks of an entry are few, large enough for a thread each, and fit into memory together.

    TensorFlow computes the products of a small block on a single thread, so that blocks in sequence would leave the
    other threads idle.
    """
    if not all(isinstance(size, int) for group in groups for size in (group.rows, group.keys, group.count)):
        return False
    blocks = sum(group.count for group in groups)
    scores = known.a.heads * sum(group.count * group.rows * group.keys for group in groups)
    return 1 < blocks <= CAUSAL_BLOCKS and blocks * COST_OF_BLOCK <= scores <= SCORES


def _known_groups(known: Known, entries: range) -> tuple[Group, ...]:
    rows = _height(known, known.a.kv_len)
    bounds = [block for run in known.cut_at_segments(entries) for block in _blocks(run, rows)]
    return _groups(known, bounds, [known.seen(entries, block) for block in bounds])


def _unknown_groups(known: Known, q_len: Size, kv_len: Size) -> tuple[Group, ...]:
    """Return blocks of the same shape, and a last block of the remaining queries."""
    if isinstance(q_len, int) and q_len <= LOWEST:
        return (_unknown_group(known, kv_len, 0, q_len, 1),)
    rows = _least(_most(1, q_len), _height(known, kv_len))
    count = q_len // rows
    rest = q_len - count * rows
    groups = (0, rows, count), (count * rows, rest, _least(1, rest))
    return tuple(_unknown_group(known, kv_len, *group) for group in groups)


def _unknown_group(known: Known, kv_len: Size, first: Size, rows: Size, count: Size) -> Group:
    """Return blocks with all keys or, under a window, with the range that the offsets of all entries leave."""
    if known.band is None or not known.offset:
        return Group(first, rows, kv_len, count, None)
    keys = _least(kv_len, rows + min(known.band + max(known.offset) - min(known.offset), WIDEST))
    starts = min(known.offset) - (known.left or 0) + first + rows * tf.range(count)
    return Group(first, rows, keys, count, tf.clip_by_value(starts, 0, kv_len - keys))


def _blocks(indices: range, length: int) -> list[range]:
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def _divisor(number: Size, largest: Size) -> Size:
    """Return the largest divisor that is at most `largest`, or 1."""
    if isinstance(number, int) and number == 1:
        return 1
    if isinstance(number, int) and isinstance(largest, int):
        return next(divisor for divisor in range(max(1, min(number, largest)), 0, -1) if number % divisor == 0)
    numbers = tf.range(1, _most(1, number) + 1)
    return tf.reduce_max(tf.where(tf.equal(number % numbers, 0) & (numbers <= largest), numbers, 1))


def _power(number: Size, highest: int) -> Size:
    """Return the largest power of two that is at most `number`, which is at most `highest`."""
    if isinstance(number, int):
        return 1 << (number.bit_length() - 1)
    powers = tf.constant([1 << exponent for exponent in range(highest.bit_length())])
    return tf.reduce_max(tf.where(powers <= number, powers, 1))


def _least(first: Size, second: Size) -> Size:
    return min(first, second) if isinstance(first, int) and isinstance(second, int) else tf.minimum(first, second)


def _most(first: Size, second: Size) -> Size:
    return max(first, second) if isinstance(first, int) and isinstance(second, int) else tf.maximum(first, second)


def _height(known: Known, keys: Size) -> Size:
    """Return the number of queries of a block, a power of two.

    Under a window, the number of hidden keys in a block's range grows with the number of its queries.
    """
    highest = _highest_without_left_bound(known) if known.band is None else HIGHEST
    if known.band is not None:
        highest = min(HIGHEST, max(LOWEST, known.band))
        keys = _least(keys, highest + known.band)
    if known.a.chunk is not None:
        highest = min(highest, max(LOWEST, known.a.chunk))
    wanted = _most(LOWEST, SCORES // known.a.heads // _most(1, keys))
    return _power(_least(highest, wanted), highest)


def _highest_without_left_bound(known: Known) -> int:
    """Return the most queries of a block without a left bound: with more blocks, the first blocks skip more keys."""
    q_len, kv_len = known.a.q_len, known.a.kv_len
    if known.right is None or not known.offset or q_len is None or kv_len is None:
        return HIGHEST
    scores, blocks = known.a.heads * q_len * kv_len, 1
    # To double the blocks skips scores / (4 * blocks) more scores, and starts as many blocks again.
    while blocks < CAUSAL_BLOCKS and scores >= 4 * blocks * blocks * COST_OF_BLOCK:
        blocks *= 2
    return HIGHEST if blocks == 1 else max(LOWEST, min(HIGHEST, q_len // blocks))


def _groups(known: Known, bounds: list[range], seen: list[range]) -> tuple[Group, ...]:
    """Group blocks of the same shape; a window makes all widths equal, and a graph with many shapes rounds them."""
    if known.band is not None and known.ids is None:
        seen = _widened(seen, [max(map(len, seen), default=0)] * len(seen), known.a.kv_len)
    groups = _grouped(bounds, seen)
    if len(groups) <= BODIES or tf.executing_eagerly():
        return groups
    unit = max(1, -(-known.a.kv_len // BODIES))
    return _grouped(bounds, _widened(seen, [-(-len(keys) // unit) * unit for keys in seen], known.a.kv_len))


def _widened(seen: list[range], sizes: list[int], kv_len: int) -> list[range]:
    starts = [max(0, min(keys.start, kv_len - size)) for keys, size in zip(seen, sizes, strict=True)]
    return [range(start, min(start + size, kv_len)) for start, size in zip(starts, sizes, strict=True)]


def _grouped(bounds: list[range], seen: list[range]) -> tuple[Group, ...]:
    groups: list[Group] = []
    blocks = zip(bounds, seen, strict=True)
    for (rows, width), run in groupby(blocks, lambda block: (len(block[0]), len(block[1]))):
        same = list(run)
        starts = tuple(keys.start for _, keys in same)
        groups.append(Group(same[0][0].start, rows, width, len(same), starts if any(starts) else None))
    return tuple(groups)
