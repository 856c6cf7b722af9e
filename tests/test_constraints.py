"""The conclusions that backends draw from host data agree with comparing every pair."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from mha_spec.constraints import (
    Structure,
    distances,
    equal_entries,
    key_range,
    segment_keys,
    segment_runs,
    shown,
    trimmed,
)

Q_LEN, KV_LEN = 7, 11


@pytest.mark.parametrize("seed", range(40))
def test_the_range_of_keys_is_the_smallest_that_holds_every_visible_key(seed: int) -> None:
    rng = numpy.random.default_rng(seed)
    left, right = (None if rng.random() < 0.3 else int(rng.integers(0, 5)) for _ in range(2))
    offsets, q_lengths, kv_lengths = (
        [int(rng.integers(low, high))] for low, high in ((-9, 12), (0, Q_LEN + 1), (0, KV_LEN + 1))
    )
    first, stop = sorted(int(end) for end in rng.choice(Q_LEN + 1, 2, replace=False))
    queries, keys = numpy.arange(first, stop)[:, None], numpy.arange(KV_LEN)
    distance = keys - (offsets[0] + queries)
    visible = (queries < q_lengths[0]) & (keys < kv_lengths[0])
    visible &= True if left is None else distance >= -left
    visible &= True if right is None else distance <= right
    seen = numpy.flatnonzero(visible.any(axis=0))
    expected = set(range(seen[0], seen[-1] + 1)) if seen.size else set()
    received = key_range((left, right), range(first, stop), KV_LEN, offsets, q_lengths, kv_lengths)
    assert set(range(*received)) == expected


def structured(seed: int, entries: int) -> tuple[dict[str, Any], numpy.ndarray, Structure]:
    """Draw constraints of positions with a structure, and tell which pairs they show, (entries, Q_LEN, KV_LEN)."""
    rng = numpy.random.default_rng(seed)
    left, right = (None if rng.random() < 0.4 else int(rng.integers(0, 7)) for _ in range(2))
    chunk = None if rng.random() < 0.3 else int(rng.integers(1, 9))
    offsets, starts, prefixes = (rng.integers(low, high, entries) for low, high in ((-9, 12), (0, KV_LEN), (0, KV_LEN)))
    causal, positions = rng.random() < 0.7, offsets[:, None, None] + numpy.arange(Q_LEN)[:, None]
    keys = numpy.arange(KV_LEN)
    shows = numpy.ones((entries, Q_LEN, KV_LEN), bool)
    if causal:
        shows &= (keys <= positions) | (keys < prefixes[:, None, None])
    shows &= True if left is None else keys - positions >= -left
    shows &= True if right is None else keys - positions <= right
    if chunk is not None:
        first = starts[:, None, None]
        shows &= numpy.floor((positions - first) / chunk) == numpy.floor((keys - first) / chunk)
    numbers = prefixes.tolist() if causal else (0,)
    structure = Structure(chunk, starts.tolist(), numbers, right if causal else None)
    call = {"bounds": (left, 0 if causal else right), "offsets": offsets.tolist()}
    return call, shows, structure


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("entries", [1, 3])
def test_the_range_of_a_structure_holds_every_visible_key(seed: int, entries: int) -> None:
    call, shows, structure = structured(seed, entries)
    for queries in (range(Q_LEN), range(2, 5), range(3, 4)):
        pairs = shows[:, queries.start : queries.stop] & (numpy.arange(KV_LEN) >= min(structure.starts))
        seen = set(numpy.flatnonzero(pairs.any(axis=(0, 1))).tolist())
        received = key_range(**call, queries=queries, kv_len=KV_LEN, structure=structure)
        assert seen <= set(range(*received))
        if len(queries) == entries == 1:
            assert seen == set(range(*received)), "the range of a row is exact"
        for unread in (structure._replace(starts=None), structure._replace(prefixes=None)):
            assert seen <= set(range(*key_range(**call, queries=queries, kv_len=KV_LEN, structure=unread)))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("entries", [1, 3])
def test_the_keys_that_a_structure_shows_to_all_are_known(seed: int, entries: int) -> None:
    call, shows, structure = structured(seed, entries)
    for queries in (range(Q_LEN), range(2, 5)):
        every = set(numpy.flatnonzero(shows[:, queries.start : queries.stop].all(axis=(0, 1))).tolist())

        def known(structure: Structure, queries: range = queries) -> set[int]:
            start, stop = shown(**call, first=queries[0], last=queries[-1], structure=structure)
            return set(range(KV_LEN)[max(0, start or 0) : KV_LEN if stop is None else max(0, stop)])

        assert known(structure) == every
        assert known(structure._replace(starts=None)) <= every
        assert known(structure._replace(prefixes=None)) <= every


def test_lengths_that_must_not_be_read_bound_nothing() -> None:
    assert key_range((2, 0), range(3, 5), KV_LEN) == (0, KV_LEN)


def test_several_entries_see_the_keys_of_all() -> None:
    assert key_range((1, 0), range(2, 4), KV_LEN, [0, 5], None, [3, 10]) == (1, 9)


def test_distances_are_those_of_the_corners() -> None:
    offsets, queries, keys = [-2, 5], range(2, 7), range(3, 11)
    every = [key - (offset + query) for offset in offsets for query in queries for key in keys]
    assert distances(offsets, queries, keys) == (min(every), max(every))


def test_equal_entries_are_runs_of_equal_rows() -> None:
    ids = numpy.asarray([[1, 2], [1, 2], [1, 3], [1, 3], [1, 3]])
    assert equal_entries(5, [[0, 0, 0, 0, 7], ids]) == [(0, 2), (2, 4), (4, 5)]
    assert equal_entries(5, []) == [(0, 5)]


def test_segments_are_cut_where_the_id_changes_unless_they_are_short() -> None:
    ids = numpy.repeat([3, 1, 3], [5, 2, 4])
    assert segment_runs(ids, 3) == [(0, 5), (5, 7), (7, 11)]
    assert segment_runs(ids, 6) is None


def test_keys_of_segments_have_an_id_of_a_query_of_their_entry() -> None:
    q_ids = numpy.asarray([[1, 1], [2, 3], [5, 5]])
    kv_ids = numpy.asarray([[0, 1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 4]])
    seen = segment_keys(q_ids, kv_ids)
    assert seen.tolist() == [False, True, True, False]
    assert trimmed(range(10, 14), seen) == range(11, 13)
    assert len(trimmed(range(10, 14), numpy.zeros(4, bool))) == 0
