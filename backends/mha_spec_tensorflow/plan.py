"""The order of the work: blocks of queries, and for each the stretch of keys outside of which it sees nothing.

Numbers, sequences, NumPy arrays and, in eager mode, tensors on the CPU are read. What is traced or lies on an
accelerator is compared, never read (MHA-LEN-3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy
import tensorflow as tf

from mha_spec.arrays import host_integers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

__all__ = ["Group", "Known", "Run", "plan_of"]

SCORES = 2**23
"""How many scores a block holds at most, as long as its queries keep within the bounds: 32 MiB in float32."""
LOWEST, HIGHEST = 64, 512
"""Bounds of a block's queries."""
SHORTEST_RUN = 64
"""Packed sequences that are shorter on average are compared in blocks, not worked one by one."""
COST_OF_BLOCK = 2**17
"""How many scores are worked in the time that one more block costs."""
BODIES = 8
"""How many blocks of different shapes a graph holds, each written out; of more, the sizes are rounded."""


@dataclass(frozen=True)
class Group:
    """Consecutive blocks of queries of one shape."""

    first: int
    rows: int
    keys: int
    starts: tuple[int, ...]
    """For each block the first key of its stretch."""


@dataclass(frozen=True)
class Run:
    """Consecutive batch entries with the same blocks, `count` times `entries` of them."""

    first: int
    count: int
    entries: int
    groups: tuple[Group, ...]

    @property
    def scores(self) -> int:
        """How many pairs of one head are worked."""
        return self.count * self.entries * sum(len(one.starts) * one.rows * one.keys for one in self.groups)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.count * sum(len(one.starts) for one in self.groups)


class Settled(NamedTuple):
    """Which constraints are known to hide nothing in a block."""

    left: bool = False
    right: bool = False
    q_lengths: bool = False
    kv_lengths: bool = False
    segments: bool = False


class Known:
    """What the host knows of a call's constraints; None for what must not be read."""

    def __init__(self, a: Arguments) -> None:
        """Read what may be read; causal is the window (None, 0) (MHA-CAUSAL-1, MHA-WINDOW-2)."""
        self.a = a
        left, right = a.bounded_window or (None, None)
        self.left, self.right = left, 0 if a.causal else right
        self.offset = self._numbers(0 if a.q_offset is None else a.q_offset)
        self.q_lengths, self.kv_lengths = self._numbers(a.q_lengths), self._numbers(a.kv_lengths)
        q_ids, kv_ids = _read(a.q_segment_ids), _read(a.kv_segment_ids)
        read = isinstance(q_ids, numpy.ndarray) and isinstance(kv_ids, numpy.ndarray)
        self.ids: tuple[numpy.ndarray, numpy.ndarray] | None = (q_ids, kv_ids) if read else None
        """The segment ids of queries and of keys."""

    def _numbers(self, value: Array | Sequence[int] | int | None) -> list[int] | None:
        found = None if value is None else host_integers(_read(value))
        return found * self.batch if isinstance(value, int) and found else found

    @property
    def batch(self) -> int:
        """Number of batch entries; where it is not known all are one."""
        return 1 if self.a.batch is None else self.a.batch

    @property
    def band(self) -> int | None:
        """How many keys one row sees, less one, where a window bounds both sides."""
        return None if self.left is None or self.right is None else self.left + self.right

    def seen(self, entries: range, queries: range) -> range:
        """The keys between the first and the last that some of the queries see, as far as the host knows."""
        start, stop = 0, self.a.kv_len
        offset, q_lengths, kv_lengths = (_of(one, entries) for one in (self.offset, self.q_lengths, self.kv_lengths))
        if offset and self.left is not None:
            start = max(start, min(offset) + queries[0] - self.left)
        if offset and self.right is not None:
            stop = min(stop, max(offset) + queries[-1] + self.right + 1)
        if kv_lengths:
            stop = min(stop, max(kv_lengths))
        if q_lengths and max(q_lengths) <= queries[0]:
            stop = 0
        stop = max(stop, 0)
        return self._seen_by_segments(entries, queries, range(min(start, stop), stop))

    def _seen_by_segments(self, entries: range, queries: range, keys: range) -> range:
        if self.ids is None:
            return keys
        q_ids, kv_ids = self.ids
        seen = numpy.zeros(len(keys), bool)
        for entry in entries:
            ids = numpy.unique(q_ids[entry, queries.start : queries.stop])
            seen |= numpy.isin(kv_ids[entry, keys.start : keys.stop], ids)
        used = numpy.flatnonzero(seen)
        return keys[int(used[0]) : int(used[-1]) + 1] if used.size else range(0)

    def settled(self, *block: object) -> Settled:
        """Which constraints hide nothing in a block, given by its first entry and their number, queries, and keys."""
        places = [one for one in block if isinstance(one, int)]
        if len(places) != len(block) or 0 in places[1::2]:
            return Settled()
        entries, queries, keys = (range(places[at], places[at] + places[at + 1]) for at in (0, 2, 4))
        offset, q_lengths, kv_lengths = (_of(one, entries) for one in (self.offset, self.q_lengths, self.kv_lengths))
        return Settled(
            bool(offset) and self.left is not None and keys[0] >= max(offset) + queries[-1] - self.left,
            bool(offset) and self.right is not None and keys[-1] <= min(offset) + queries[0] + self.right,
            bool(q_lengths) and queries[-1] < min(q_lengths),
            bool(kv_lengths) and keys[-1] < min(kv_lengths),
            self._one_segment(entries, queries, keys),
        )

    def _one_segment(self, entries: range, queries: range, keys: range) -> bool:
        if self.ids is None or len(entries) > 1:
            return False
        q_ids, kv_ids = (one[entries[0]] for one in self.ids)
        first = q_ids[queries[0]]
        return bool(
            (q_ids[queries.start : queries.stop] == first).all() and (kv_ids[keys.start : keys.stop] == first).all()
        )

    def alike(self) -> list[range]:
        """Consecutive batch entries that have the same constraints."""
        lists = [one for one in (self.offset, self.q_lengths, self.kv_lengths) if one]
        starts = [
            entry
            for entry in range(1, self.batch)
            if any(one[entry] != one[entry - 1] for one in lists)
            or any((one[entry] != one[entry - 1]).any() for one in self.ids or ())
        ]
        return [range(*ends) for ends in pairwise([0, *starts, self.batch])]

    def stretches(self, entries: range) -> list[range]:
        """Cut queries where their segment ends, unless the segments are too short for that."""
        queries = range(self.a.q_len)
        if self.ids is None:
            return [queries]
        ids = self.ids[0][entries[0]]
        starts = numpy.flatnonzero(ids[1:] != ids[:-1]) + 1
        if len(starts) * SHORTEST_RUN > len(queries):
            return [queries]
        return [range(*ends) for ends in pairwise([0, *starts.tolist(), len(queries)])]


def _read(value: Array) -> Array:
    """A tensor on the CPU as NumPy's, in eager mode; anything else as it is."""
    if not tf.is_tensor(value) or not tf.executing_eagerly() or "CPU" not in value.device:
        return value
    return value.numpy()


def _of(numbers: list[int] | None, entries: range) -> list[int] | None:
    return None if numbers is None else numbers[entries.start : entries.stop]


def plan_of(known: Known) -> tuple[Run, ...]:
    """Cut a call whose sizes are known into blocks, leaving out what is not seen where that saves time."""
    whole = _plan(known, [range(known.batch)])
    exact = _plan(known, known.alike())
    bodies = sum(len(run.groups) for run in exact)
    if not tf.executing_eagerly() and bodies > BODIES:
        exact = whole
    saved = (sum(run.scores for run in whole) - sum(run.scores for run in exact)) * known.a.heads
    return exact if saved > COST_OF_BLOCK * (sum(run.blocks for run in exact) - 1) else whole


def _plan(known: Known, runs: list[range]) -> tuple[Run, ...]:
    return tuple(_run(known, entries) for entries in runs if entries)


def _run(known: Known, entries: range) -> Run:
    rows = _height(known)
    bounds = [block for run in known.stretches(entries) for block in _blocks(run, rows)]
    groups = _groups(known, bounds, [known.seen(entries, block) for block in bounds])
    most = max((known.a.heads * one.rows * one.keys for one in groups), default=0)
    together = _divisor(len(entries), SCORES // max(1, most))
    return Run(entries.start, len(entries) // together, together, groups)


def _blocks(indices: range, length: int) -> list[range]:
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def _divisor(number: int, largest: int) -> int:
    return next(one for one in range(max(1, min(number, largest)), 0, -1) if number % one == 0)


def _height(known: Known) -> int:
    """The queries of a block, a power of two; beside a band of keys lie as many in vain as the block is high."""
    a, highest, keys = known.a, HIGHEST, known.a.kv_len
    if known.band is not None:
        highest = min(HIGHEST, max(LOWEST, known.band))
        keys = min(keys, highest + known.band)
    wanted = min(highest, max(LOWEST, SCORES // max(1, a.heads * keys)))
    return 1 << (wanted.bit_length() - 1)


def _groups(known: Known, bounds: list[range], seen: list[range]) -> tuple[Group, ...]:
    """Group blocks of one shape: under a window the stretches are made equal, and in a graph rounded where many."""
    if known.band is not None and known.ids is None:
        seen = _widened(seen, [max(map(len, seen), default=0)] * len(seen), known.a.kv_len)
    groups = _alike(bounds, seen)
    if len(groups) <= BODIES or tf.executing_eagerly():
        return groups
    unit = max(1, -(-known.a.kv_len // BODIES))
    return _alike(bounds, _widened(seen, [-(-len(keys) // unit) * unit for keys in seen], known.a.kv_len))


def _widened(seen: list[range], sizes: list[int], kv_len: int) -> list[range]:
    starts = [max(0, min(keys.start, kv_len - size)) for keys, size in zip(seen, sizes, strict=True)]
    return [range(start, min(start + size, kv_len)) for start, size in zip(starts, sizes, strict=True)]


def _alike(bounds: list[range], seen: list[range]) -> tuple[Group, ...]:
    blocks = [Group(one.start, len(one), len(keys), (keys.start,)) for one, keys in zip(bounds, seen, strict=True)]
    found: list[Group] = []
    for _, run in groupby(blocks, lambda one: (one.rows, one.keys)):
        same = list(run)
        found.append(replace(same[0], starts=tuple(one.starts[0] for one in same)))
    return tuple(found)
