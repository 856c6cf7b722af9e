"""The conclusions that backends draw from host data agree with comparing every pair."""

from __future__ import annotations

import numpy
import pytest

from mha_spec.constraints import distances, equal_entries, key_range, segment_keys, segment_runs, trimmed

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
