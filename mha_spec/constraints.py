"""Conclusions about visibility that a backend draws from host data before it computes anything.

A list of integers has an integer for each batch entry; None stands for data that must not be read (MHA-LEN-3),
from which nothing follows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Bounds = tuple[int | None, int | None]
    Numbers = Sequence[int] | None

__all__ = [
    "PLAIN",
    "Indices",
    "Structure",
    "distances",
    "equal_entries",
    "key_range",
    "segment_keys",
    "segment_runs",
    "shown",
    "trimmed",
]


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


class Structure(NamedTuple):
    """The chunk and the numbers that change what positions show; None stands for numbers that must not be read."""

    chunk: int | None = None
    starts: Numbers = (0,)
    """kv_starts, an integer for each batch entry or for all; 0 without them (MHA-LEN-4)."""
    prefixes: Numbers = (0,)
    """prefix_lengths, likewise (MHA-CAUSAL-2)."""
    right: int | None = None
    """The right bound of the window, which a prefix does not lift, while it lifts the 0 of causal (MHA-CAUSAL-2)."""

    @property
    def by_distance(self) -> bool:
        """True if the distance of a pair alone decides whether positions show it."""
        return self.chunk is None and self.prefixes == (0,)


PLAIN = Structure()


def key_range(
    bounds: Bounds,
    queries: Indices,
    kv_len: int,
    offsets: Numbers = None,
    q_lengths: Numbers = None,
    kv_lengths: Numbers = None,
    structure: Structure = PLAIN,
) -> tuple[int, int]:
    """Return the start and stop of the keys that some of the queries may see.

    `bounds` are those of `Arguments.bounds` (MHA-WINDOW-1, MHA-WINDOW-2, MHA-LEN-1, MHA-LEN-2, MHA-LEN-4).
    """
    first, end = queries.start, queries.stop
    if q_lengths:
        end = min(end, max(q_lengths))
        if end <= first:
            return 0, 0
    start = max(0, min(structure.starts)) if structure.starts else 0
    stop = min(kv_len, max(kv_lengths)) if kv_lengths else kv_len
    if offsets:
        least, greatest = _reached(bounds, first, end - 1, offsets, structure)
        start = start if least is None else max(start, least)
        stop = stop if greatest is None else min(stop, greatest)
    stop = max(0, stop)
    return min(start, stop), stop


def _reached(bounds: Bounds, first: int, last: int, offsets: Sequence[int], structure: Structure) -> Bounds:
    """Return the start and stop of the keys that positions show to some of the queries `first` to `last`.

    A query sees a single range of keys, whose ends never decrease from a query to the next: the first query decides
    where the keys start, the last where they stop. None stands for no bound.
    """
    if structure.by_distance:
        return _window(bounds, min(offsets) + first, max(offsets) + last)
    if structure.starts is None:
        structure = structure._replace(chunk=None, starts=(0,))
    if structure.prefixes is None:
        bounds, structure = (bounds[0], structure.right), structure._replace(prefixes=(0,))
    entries = _entries(offsets, structure)
    starts = [_range_of(offset + first, start, prefix, bounds, structure)[0] for offset, start, prefix in entries]
    stops = [_range_of(offset + last, start, prefix, bounds, structure)[1] for offset, start, prefix in entries]
    return _extreme(min, starts), _extreme(max, stops)


def shown(bounds: Bounds, first: int, last: int, offsets: Sequence[int], structure: Structure) -> Bounds:
    """Return the start and stop of the keys that positions show to all of the queries `first` to `last`.

    Prefixes that must not be read only add keys; with unknown starts of chunks, no key is known to be shown.
    """
    if structure.by_distance:
        return _window(bounds, max(offsets) + last, min(offsets) + first)
    if structure.chunk is not None and structure.starts is None:
        return 0, 0
    structure = structure._replace(starts=structure.starts or (0,), prefixes=structure.prefixes or (0,))
    entries = _entries(offsets, structure)
    starts = [_range_of(offset + last, start, prefix, bounds, structure)[0] for offset, start, prefix in entries]
    stops = [_range_of(offset + first, start, prefix, bounds, structure)[1] for offset, start, prefix in entries]
    return _extreme(max, starts), _extreme(min, stops)


def _entries(offsets: Sequence[int], structure: Structure) -> list[tuple[int, int, int]]:
    """Return the offset, start and prefix of batch entries, or of those alone that decide about all."""
    # Only chunks use starts, and a batch without entries has none.
    starts = structure.starts if structure.chunk is not None and structure.starts else (0,)
    columns = [offsets, starts, structure.prefixes or (0,)]
    if len(columns[1]) == len(columns[2]) == 1:
        columns[0] = (min(offsets), max(offsets))
    batch = max(map(len, columns))
    offsets, starts, prefixes = (column if len(column) > 1 else column * batch for column in map(tuple, columns))
    return list(zip(offsets, starts, prefixes, strict=True))


def _range_of(position: int, start: int, prefix: int, bounds: Bounds, structure: Structure) -> Bounds:
    """Return the start and stop of the keys that positions show to a query; None stands for no bound."""
    first, stop = _window(bounds, position, position)
    starts = [] if first is None else [first]
    stops = [] if stop is None else [max(stop, prefix) if prefix else stop]
    if structure.right is not None:
        stops.append(position + structure.right + 1)
    if structure.chunk is not None:
        of_chunk = start + (position - start) // structure.chunk * structure.chunk
        starts.append(of_chunk)
        stops.append(of_chunk + structure.chunk)
    return max(starts, default=None), min(stops, default=None)


def _window(bounds: Bounds, first: int, last: int) -> Bounds:
    """Return the start of the keys that a window shows to position `first`, and the stop of those of `last`."""
    left, right = bounds
    return None if left is None else first - left, None if right is None else last + right + 1


def _extreme(choose: Callable[[list[int]], int], ends: list[int | None]) -> int | None:
    """Choose among ends, of which either all or none are None."""
    numbers = [end for end in ends if end is not None]
    return choose(numbers) if numbers else None


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
