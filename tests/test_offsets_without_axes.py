"""An offset in an array without axes is the offset of every entry, also where it is traced and changes (MHA-POS-1)."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import jax
import keras
import numpy
import pytest
import tensorflow as tf
import torch
from support.calls import BATCH, HEADS, KV_LEN, Q_LEN, V_DIM
from support.calls import arguments as narrow_arguments
from support.comparisons import assert_near, leaves
from support.layers import EMBED, parameters, tokens
from support.layers import KV_HEADS as LAYER_KV_HEADS
from support.layers import QK_DIM as LAYER_QK_DIM
from support.layers import SIZES as LAYER_SIZES
from support.layers import V_DIM as LAYER_V_DIM
from support.libraries import of_library, with_float64
from support.numbers import numbers
from support.tensorflow_world import with_unknown_sizes
from support.varlen import HEADS as PACKED_HEADS
from support.varlen import packed, paged
from torch._dynamo.testing import CompileCounter

import mha_spec_jax
import mha_spec_numpy
import mha_spec_tensorflow
import mha_spec_torch
from mha_spec import ArgumentTypeError, KVCache, MhaSpecError, PagedKVCache, WindowKVCache, reference
from mha_spec.layer_object import LayerSettings
from mha_spec_conformance.targets.conversion import to_library, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

Call = dict[str, Any]
MODULES: dict[str, ModuleType] = {
    "numpy": mha_spec_numpy,
    "torch": mha_spec_torch,
    "jax": mha_spec_jax,
    "tensorflow": mha_spec_tensorflow,
}
OFFSETS = (2, 1)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Enable float64 in JAX."""
    with with_float64("jax"):
        yield


def arguments(**options: Any) -> Call:
    """Return query, key and value in float64, and options."""
    return {name: x.astype("float64") for name, x in narrow_arguments().items()} | options


def layer(cache: Any = None, **options: Any) -> Call:
    """Return a call of the layer with three queries and, without a cache, five keys."""
    settings = LayerSettings.of(EMBED, 6, rotary={}, **LAYER_SIZES)
    call = {"query": tokens(3), "key": tokens(3), "value": tokens(3), "params": parameters(settings.shapes())}
    call |= {"key": tokens(5), "value": tokens(5)} if cache is None else {"cache": cache}
    return {**call, "causal": True, "rotary": {"base": 7.0}, **options}


def buffers(slots: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the keys and values of a cache in which every batch entry has some slots."""
    sizes = (LAYER_QK_DIM, LAYER_V_DIM)
    key, value = (numbers(2, LAYER_KV_HEADS, slots, size) for size in sizes)
    return key, value


def blocks() -> PagedKVCache:
    """Return a paged cache with 3 and 2 tokens."""
    key, value = (x.swapaxes(1, 2) for x in buffers(5))
    table = numpy.array([[1, 0, 2, 3], [4, 5, 6, 7]], "int32")
    key, value = (numpy.concatenate([x, x, x, x]) for x in (key, value))
    return PagedKVCache(key, value, numpy.array([3, 2], "int32"), table)


HELD = numpy.array([3, 2], "int32")
COTANGENT = {"grad_output": numbers(BATCH, HEADS, Q_LEN, V_DIM)}
CALLS: dict[str, tuple[str, Callable[[], Call]]] = {
    "attention": ("attention", lambda: arguments(causal=True)),
    "window": ("attention", lambda: arguments(window=(2, 1), sinks=numbers(HEADS))),
    "chunk": ("attention", lambda: arguments(chunk=3, prefix_lengths=numpy.array([1, 4]), causal=True)),
    "weights": ("attention_weights", lambda: {k: x for k, x in arguments(causal=True).items() if k != "value"}),
    "vjp": ("attention_vjp", lambda: COTANGENT | arguments(causal=True)),
    "layer": ("multi_head_attention", layer),
    "cache": ("multi_head_attention", lambda: layer(KVCache(*buffers(9), HELD))),
    "window cache": ("multi_head_attention", lambda: layer(WindowKVCache(*buffers(7), HELD), window=(3, 0))),
    "paged cache": ("multi_head_attention", lambda: layer(blocks())),
    "packed": ("varlen_attention", lambda: packed(causal=True)),
    "paged": ("varlen_attention", lambda: paged(alibi_slopes=abs(numbers(PACKED_HEADS)))),
    "alibi": ("alibi_bias", lambda: {"slopes": numbers(HEADS)}),
}
SIZES = {"alibi": {"q_len": Q_LEN, "kv_len": KV_LEN}}
"""Sizes that are no arrays."""


def _split(name: str, library: str) -> tuple[Callable[..., Any], Call]:
    """Return the function of a call over its arrays, and the arrays."""
    function, make = CALLS[name]
    call = of_library(make(), library)
    fixed = {key: x for key, x in call.items() if key in ("causal", "window", "chunk", "rotary") or x is None}
    arrays = {key: x for key, x in call.items() if key not in fixed}
    fixed |= SIZES.get(name, {})
    answer = getattr(MODULES[library], function)
    return lambda arrays, offset: answer(**arrays, **fixed, q_offset=offset), arrays


def _results(tree: Any) -> list[numpy.ndarray]:
    """Return the floating arrays of the results of a call; a cache also holds integers."""
    arrays = [to_numpy(array) for array in leaves(tree) if array is not None]
    return [array for array in arrays if array.dtype.kind == "f"]


def _expected(name: str, offset: int) -> list[numpy.ndarray]:
    function, make = CALLS[name]
    return _results(getattr(reference, function)(**make(), **SIZES.get(name, {}), q_offset=offset))


def _offset(number: int, library: str) -> Any:
    return to_library(numpy.array(number, "int32"), library)


EAGER = [*product(["numpy", "torch", "tensorflow"], CALLS), ("jax", "attention"), ("jax", "alibi")]
"""The calls without a trace; those of JAX take long, and all of them are traced, too."""


@pytest.mark.parametrize(("library", "name"), EAGER)
def test_an_offset_without_axes_is_that_of_every_entry(library: str, name: str) -> None:
    function, arrays = _split(name, library)
    for number in OFFSETS:
        assert_near(_results(function(arrays, _offset(number, library))), _expected(name, number))
    assert not numpy.allclose(_expected(name, OFFSETS[0])[0], _expected(name, OFFSETS[1])[0], equal_nan=True)


@pytest.mark.parametrize("library", MODULES)
def test_it_holds_integers(library: str) -> None:
    function, arrays = _split("attention", library)
    with pytest.raises(ArgumentTypeError, match="`q_offset` must hold integers"):
        function(arrays, to_library(numpy.array(2.0, "float32"), library))


@pytest.mark.parametrize("name", CALLS)
def test_jax_traces_it_once(name: str) -> None:
    function, arrays = _split(name, "jax")
    traces: list[Any] = []

    @jax.jit
    def program(arrays: Call, offset: Any) -> Any:
        traces.append(offset)
        return function(arrays, offset)

    for number in OFFSETS:
        assert_near(_results(program(arrays, number)), _expected(name, number))
    assert len(traces) == 1


@pytest.mark.parametrize("name", CALLS)
def test_torch_compiles_it_once(name: str) -> None:
    function, arrays = _split(name, "torch")
    torch._dynamo.reset()
    counter = CompileCounter()
    program = torch.compile(function, backend=counter, fullgraph=True)
    for number in OFFSETS:
        assert_near(_results(program(arrays, _offset(number, "torch"))), _expected(name, number))
    assert counter.frame_count == 1


def _tensorflow_traces_it_once(name: str, described: Callable[[tf.Tensor], tf.TensorSpec]) -> None:
    """Require that one trace of described arrays serves every offset."""
    function, arrays = _split(name, "tensorflow")
    traces: list[Any] = []

    def traced(arrays: Call, offset: Any) -> Any:
        traces.append(offset)
        return function(arrays, offset)

    params = {"params": tf.nest.map_structure(tf.TensorSpec.from_tensor, arrays.get("params", {}))}
    specs = tf.nest.map_structure(described, arrays) | ({} if "params" not in arrays else params)
    program = tf.function(traced, input_signature=[specs, described(_offset(0, "tensorflow"))])
    for number in OFFSETS:
        assert_near(_results(program(arrays, _offset(number, "tensorflow"))), _expected(name, number))
    assert len(traces) == 1


@pytest.mark.parametrize("name", CALLS)
def test_tensorflow_traces_it_once_for_all_sizes(name: str) -> None:
    _tensorflow_traces_it_once(name, with_unknown_sizes)


@pytest.mark.parametrize("name", ["attention", "cache", "packed", "alibi"])
def test_tensorflow_need_not_know_its_rank(name: str) -> None:
    def described(tensor: tf.Tensor) -> tf.TensorSpec:
        return with_unknown_sizes(tensor) if len(tensor.shape) > 2 else tf.TensorSpec(None, tensor.dtype)

    _tensorflow_traces_it_once(name, described)


@pytest.mark.parametrize("query", [3, tf.constant(2.0), tf.ragged.constant([[2.0]]), keras.KerasTensor((2, 3, 5, 7))])
def test_it_leaves_the_error_of_another_argument(query: Any) -> None:
    with pytest.raises(MhaSpecError, match="`query` must"):
        mha_spec_tensorflow.attention(query, query, query, causal=True, q_offset=_offset(2, "tensorflow"))
