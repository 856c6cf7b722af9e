"""A call without keys: every row is empty, whatever hides pairs, and a sink takes all of its weight (MHA-EMPTY-2)."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from support.comparisons import assert_equal
from support.numbers import numbers

import mha_spec
from mha_spec import reference
from mha_spec_conformance.targets.conversion import to_library

BATCH, HEADS, KV_HEADS, Q_LEN, QK_DIM, V_DIM = 2, 6, 3, 5, 7, 11

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "q_offset": 3},
    "window": {"window": (2, 1), "q_offset": 3},
    "q_lengths": {"q_lengths": [3, 0]},
    "kv_lengths": {"kv_lengths": [0, 0]},
    "lengths on the device": {"q_lengths": numpy.array([3, 0], "int32"), "kv_lengths": numpy.array([0, 0], "int32")},
    "mask": {"mask": numpy.ones((1, 1, Q_LEN, 1), bool)},
    "bias": {"bias": numbers(1, HEADS, Q_LEN, 1)},
    "segments": {
        "q_segment_ids": numpy.ones((BATCH, Q_LEN), "int32"),
        "kv_segment_ids": numpy.ones((BATCH, 0), "int32"),
    },
    "softcap": {"softcap": 2.0, "scale": 0.5},
}


@pytest.mark.parametrize("has_sinks", [False, True], ids=["without sinks", "with sinks"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "tensorflow"])
def test_every_row_is_empty(backend: str, options: str, *, has_sinks: bool) -> None:
    arrays = {
        "query": numbers(BATCH, HEADS, Q_LEN, QK_DIM).astype("float32"),
        "key": numbers(BATCH, KV_HEADS, 0, QK_DIM).astype("float32"),
        "value": numbers(BATCH, KV_HEADS, 0, V_DIM).astype("float32"),
        **({"sinks": numbers(HEADS).astype("float32")} if has_sinks else {}),
    }
    arguments = {**arrays, **OPTIONS[options]}
    expected = reference.attention(**arguments, return_lse=True)
    assert not expected[0].any()
    converted = {
        name: to_library(value, backend) if isinstance(value, numpy.ndarray) else value
        for name, value in arguments.items()
    }
    output, lse = mha_spec.backend(backend).attention(**converted, return_lse=True)
    assert_equal((output, lse), tuple(to_library(result, backend) for result in expected))
