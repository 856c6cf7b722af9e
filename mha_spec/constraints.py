"""Conclusions about visibility that a backend draws from host data before it computes anything.

A list of integers has an integer for each batch entry; None stands for data that must not be read (MHA-LEN-3),
from which nothing follows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Bounds = tuple[int | None, int | None]
    Numbers = Sequence[int] | None

__all__ = ["Indices", "distances", "equal_entries", "key_range", "segment_keys", "segment_runs", "trimmed"]


class Indices(Protocol):
    """Consecutive indices: a range, or a backend's class, whose ends may be unknown in a trace."""

    @property
    def start(self) -> int:
        """The first index."""
        ...

    @property
    def stop(self) -> int:
        """The last index plus 1."""
        ...


def key_range(
    bounds: Bounds,
    queries: Indices,
    kv_len: int,
    offsets: Numbers = None,
    q_lengths: Numbers = None,
    kv_lengths: Numbers = None,
) -> tuple[int, int]:
    """Return the start and stop of the keys that some of the queries may see.

    `bounds` are those of `Arguments.bounds` (MHA-WINDOW-1, MHA-WINDOW-2, MHA-LEN-1, MHA-LEN-2).
    """
    (left, right), first, end = bounds, queries.start, queries.stop
    if q_lengths:
        end = min(end, max(q_lengths))
        if end <= first:
            return 0, 0
    start, stop = 0, min(kv_len, max(kv_lengths)) if kv_lengths else kv_len
    if offsets and left is not None:
        start = max(start, min(offsets) + first - left)
    if offsets and right is not None:
        stop = min(stop, max(offsets) + end + right)
    stop = max(0, stop)
    return min(start, stop), stop


def distances(offsets: Sequence[int], queries: Indices, keys: Indices) -> tuple[int, int]:
    """Return the least and the greatest distance j - p between keys j and query positions p (MHA-POS-1)."""
    return keys.start - max(offsets) - (queries.stop - 1), keys.stop - 1 - min(offsets) - queries.start


def equal_entries(batch: int, constraints: Iterable[Sequence[int] | numpy.ndarray]) -> list[tuple[int, int]]:
    """Cut batch entries into runs with equal constraints; a constraint has a number or a row for every entry."""
    changes = zip(*map(_changes, constraints), strict=True)
    starts = [entry for entry, changed in enumerate(changes, start=1) if any(changed)]
    return list(pairwise([0, *starts, batch]))


def _changes(constraint: Sequence[int] | numpy.ndarray) -> list[bool]:
    """Tell for every batch entry but the first whether its constraint differs from that of the entry before."""
    if isinstance(constraint, numpy.ndarray):
        return (constraint[1:] != constraint[:-1]).any(axis=1).tolist()
    return [number != before for before, number in pairwise(constraint)]


def segment_runs(ids: numpy.ndarray, shortest: int) -> list[tuple[int, int]] | None:
    """Cut the ids of a batch entry into runs of equal ids; None if the mean length is below `shortest`.

    For short segments, comparing ids costs less than a separate computation for each.
    """
    starts = numpy.flatnonzero(ids[1:] != ids[:-1]) + 1
    if len(starts) * shortest > len(ids):
        return None
    return list(pairwise([0, *starts.tolist(), len(ids)]))


def segment_keys(q_ids: numpy.ndarray, kv_ids: numpy.ndarray) -> numpy.ndarray:
    """Tell which keys (kv_len,) have the id of a query of the same batch entry, in any entry (MHA-SEG-1)."""
    seen = numpy.zeros(kv_ids.shape[1], bool)
    for queries, keys in zip(q_ids, kv_ids, strict=True):
        seen |= numpy.isin(keys, numpy.unique(queries))
    return seen


def trimmed(keys: range, seen: numpy.ndarray) -> range:
    """Return the keys from the first to the last that is seen."""
    places = numpy.flatnonzero(seen)
    return keys[int(places[0]) : int(places[-1]) + 1] if places.size else range(0)
