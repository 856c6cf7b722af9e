"""Positions and lengths may exceed the narrow integer type that offsets and lengths have (MHA-POS-1)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_near, leaves
from support.layers import BATCH, EMBED, HEADS, KV_HEADS, QK_DIM, SIZES, V_DIM, parameters, tokens
from support.libraries import MODULES, of_library, with_float64
from support.numbers import numbers
from support.tensorflow_world import with_unknown_sizes

import mha_spec_tensorflow
from mha_spec import KVCache, PagedKVCache, WindowKVCache, reference
from mha_spec.layer_object import LayerSettings
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Iterator

Call = dict[str, Any]
STARTS = {"int8": [3, 125], "uint8": [253, 3], "int16": [3, 2**15 - 2], "uint16": [2**16 - 2, 3]}
"""For each type, a position whose distance to a later key is negative, and a position whose next tokens leave it."""
LENGTH, CAPACITY, BLOCK, COLUMNS = 5, 11, 53, 5
COUNTS = numpy.array([5, 4], "int32")


def layer(**options: Any) -> Call:
    """Return a call of the layer that rotates five tokens."""
    x, shapes = tokens(LENGTH), LayerSettings.of(EMBED, HEADS, rotary={}, **SIZES).shapes()
    call = {"query": x, "key": x, "value": x, "params": parameters(shapes), "rotary": {"base": 7.0}}
    return {**call, "causal": True, **options}


def buffers(*sizes: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    return numbers(*sizes, QK_DIM, seed=QK_DIM), numbers(*sizes, V_DIM, seed=V_DIM)


def cached(name: str, lengths: numpy.ndarray) -> Any:
    """Return a cache that holds so many tokens."""
    if name == "window cache":
        return WindowKVCache(*buffers(BATCH, KV_HEADS, CAPACITY), lengths)
    if name == "paged cache":
        table = numpy.arange(BATCH * COLUMNS, dtype="int32").reshape(BATCH, COLUMNS)
        key, value = (pool.swapaxes(1, 2) for pool in buffers(BATCH * COLUMNS, KV_HEADS, BLOCK))
        return PagedKVCache(key, value, lengths, table)
    return KVCache(*buffers(BATCH, KV_HEADS, BLOCK * COLUMNS), lengths)


def call_of(name: str, starts: numpy.ndarray) -> tuple[str, Call]:
    """Return the name of a function, and its arguments."""
    if name == "alibi":
        return "alibi_bias", {"slopes": numbers(HEADS), "q_len": LENGTH, "kv_len": 7, "q_offset": starts}
    if name == "layer":
        return "multi_head_attention", layer(q_offset=starts)
    cache, _, argument = name.partition(", ")
    window = {"window": (CAPACITY - 1, 0)} if cache == "window cache" else {}
    if argument == "offset":
        held = numpy.array([3, 7], "int32")
        return "multi_head_attention", layer(cache=cached(cache, held), q_offset=starts, **window)
    further: Call = {"counts": {"kv_lengths": COUNTS.astype(starts.dtype)}, "reading": {"q_offset": "lower_right"}}
    return "multi_head_attention", layer(cache=cached(cache, starts), **further.get(argument, {}), **window)


TRACED = ("query", "key", "value", "cache", "q_offset")
CACHES = ("cache", "window cache", "paged cache")
ARGUMENTS = [f"{cache}{argument}" for cache in CACHES for argument in ("", ", offset", ", counts")]
CASES = [(name, dtype) for name in ("alibi", "layer") for dtype in STARTS]
CASES += [(name, "uint8") for name in (*ARGUMENTS, "cache, reading")] + [(name, "int8") for name in CACHES]


def results(tree: Any) -> list[numpy.ndarray]:
    """Return outputs and caches as arrays of NumPy; integers, whose type differs by library, as float64."""
    arrays = [to_numpy(array) for array in leaves(tree)]
    return [array if array.dtype.kind == "f" else array.astype("float64") for array in arrays]


def expected(name: str, dtype: str) -> list[numpy.ndarray]:
    function, call = call_of(name, numpy.array(STARTS[dtype], "int64"))
    return results(getattr(reference, function)(**call))


@pytest.fixture(params=[*MODULES.items(), ("mha_spec.reference", "torch")], ids=" of ".join)
def module(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    name, library = request.param
    with with_float64(library):
        yield importlib.import_module(name), library


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_positions_and_lengths_do_not_wrap(module: tuple[Any, str], name: str, dtype: str) -> None:
    functions, library = module
    function, call = call_of(name, numpy.array(STARTS[dtype], dtype))
    assert_near(results(getattr(functions, function)(**of_library(call, library))), expected(name, dtype))


@pytest.mark.parametrize("name", ["alibi", "layer", *CACHES])
def test_tensorflow_computes_them_in_a_graph_of_unknown_sizes(name: str) -> None:
    function, call = call_of(name, numpy.array(STARTS["uint8"], "uint8"))
    arrays = {key: of_library(call.pop(key), "tensorflow") for key in TRACED if key in call}
    fixed = of_library(call, "tensorflow")

    def traced(arrays: Call) -> Any:
        return getattr(mha_spec_tensorflow, function)(**arrays, **fixed)

    program = tf.function(traced, input_signature=[tf.nest.map_structure(with_unknown_sizes, arrays)])
    assert_near(results(program(arrays)), expected(name, "uint8"))
