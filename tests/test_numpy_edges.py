"""mha_spec_numpy at the edges of its tiles, at the largest positions, and with segment ids of two integer types."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy
import pytest
from support.random_calls import OUTPUTS, ask, assert_allowed, assert_same_bits, converted, random_arrays, random_call

import mha_spec_numpy
from mha_spec_numpy import forward, strip, tiling

LENGTHS = ((127, 641), (256, 128), (129, 257), (513, 127), (255, 512), (640, 511), (128, 639))
"""Lengths of queries and keys at, before and after the edges of tiles."""
LARGEST = 2**30


def test_the_edges_are_those_of_the_tiles() -> None:
    assert {tiling.ROWS, tiling.ROWS // 2, forward.SCORES // tiling.ROWS, strip.SCORES // tiling.ROWS} <= {
        length for lengths in LENGTHS for length in lengths
    }


@pytest.mark.parametrize("seed", range(len(LENGTHS)))
@pytest.mark.parametrize("function", OUTPUTS)
def test_lengths_at_the_edges_of_tiles(function: str, seed: int) -> None:
    q_len, kv_len = LENGTHS[seed]
    call = converted(random_call(seed, batch=1, q_len=q_len, kv_len=kv_len), "float32")
    call["q_offset"] = numpy.random.default_rng(seed).integers(-q_len, kv_len + 1, 1)
    assert_allowed(function, call, ask(mha_spec_numpy, function, call))


@pytest.mark.parametrize("q_len", [127, 257])
@pytest.mark.parametrize("function", OUTPUTS)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (131, 3)}, {"window": (None, 0)}])
def test_positional_calls_agree_with_their_mask(function: str, options: dict[str, Any], q_len: int) -> None:
    arrays = converted(random_arrays(q_len, batch=1, q_len=q_len, kv_len=263), "float32")
    distance = numpy.arange(263) - numpy.arange(q_len)[:, None] - 263 + q_len
    left, right = options.get("window", (None, 0))
    mask = (distance <= right) & (distance >= (-263 if left is None else -left))
    got = ask(mha_spec_numpy, function, arrays | options | {"q_offset": "lower_right"})
    assert_allowed(function, arrays | {"mask": mask[None, None]}, got)


@pytest.mark.parametrize("function", OUTPUTS)
@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({"window": (None, LARGEST), "q_offset": LARGEST - 3}, 0, 41),
        ({"window": (LARGEST, LARGEST), "q_offset": -LARGEST}, 0, 1),
        ({"window": (LARGEST, None), "q_offset": LARGEST - 3}, 0, 41),
        ({"window": (LARGEST, None), "q_offset": LARGEST}, 0, 41),
        ({"causal": True, "q_offset": LARGEST}, 0, 41),
        ({"causal": True, "q_offset": -LARGEST}, 0, 0),
        ({"window": (5, 0), "q_offset": LARGEST}, 0, 0),
    ],
)
@pytest.mark.parametrize("entries", ["number", "list", "array"])
def test_positions_up_to_the_largest(
    function: str, options: dict[str, Any], first: int, last: int, entries: str
) -> None:
    """The first query of each batch entry sees the keys from `first` to `last`."""
    arrays = {name: array[:, :, :1] for name, array in random_arrays(1).items() if name not in {"key", "value"}}
    arrays |= {name: array for name, array in random_arrays(1).items() if name in {"key", "value"}}
    offset = options["q_offset"]
    q_offset = {"number": offset, "list": [offset, offset], "array": numpy.asarray([offset, offset], "int32")}[entries]
    mask = numpy.zeros((1, 1, 1, 41), bool)
    mask[..., first:last] = True
    got = ask(mha_spec_numpy, function, arrays | options | {"q_offset": q_offset})
    assert_allowed(function, arrays | {"mask": mask}, got)


TYPES = ("int8", "uint8", "int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("types", [*pairwise((*TYPES, "int8")), ("uint64", "int32"), ("uint32", "int64")])
@pytest.mark.parametrize("function", OUTPUTS)
def test_segment_ids_of_two_types_compare_by_value(function: str, types: tuple[str, str]) -> None:
    random, call = numpy.random.default_rng(3), random_arrays(3)
    all_bits, largest = numpy.asarray([-1]), (numpy.iinfo(dtype).max for dtype in types)
    q_ids, kv_ids = (
        random.choice(numpy.asarray([0, 7, top, all_bits.astype(dtype)[0]], dtype), (2, length))
        for dtype, top, length in zip(types, largest, (37, 41), strict=True)
    )
    mask = numpy.asarray(
        [
            [[int(query) == int(key) for key in keys] for query in queries]
            for queries, keys in zip(q_ids, kv_ids, strict=True)
        ]
    )[:, None]
    got = ask(mha_spec_numpy, function, call | {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids})
    assert_allowed(function, call | {"mask": mask}, got)
    assert_same_bits(got, ask(mha_spec_numpy, function, call | {"mask": mask}))
