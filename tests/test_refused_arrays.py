"""Every backend refuses arrays of another library, tables that are none, and layers of other dtypes and keys."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import jax
import numpy
import pytest
import tensorflow as tf
import torch
from support.calls import operand
from support.layers import EMBED, SIZES, parameters, tokens
from support.libraries import MODULES, of_library

import mha_spec
from mha_spec import ArgumentTypeError, ArgumentValueError, BackendError, KVCache, PagedKVCache
from mha_spec.layer_object import LayerSettings

if TYPE_CHECKING:
    from collections.abc import Callable

FRAMEWORKS = {"mha_spec_torch": "torch", "mha_spec_jax": "jax", "mha_spec_tensorflow": "tensorflow"}
LAYERS = {"mha_spec_numpy": "numpy", **FRAMEWORKS}


def layer_call() -> dict[str, Any]:
    x, shapes = tokens().astype("float32"), LayerSettings.of(EMBED, 6, **SIZES).shapes()
    params = {name: array.astype("float32") for name, array in parameters(shapes).items()}
    return {"query": x, "key": x, "value": x, "params": params}


def appended() -> dict[str, Any]:
    cache = KVCache(operand(2, 3, 11, 5), operand(2, 3, 11, 5), [0, 0])
    return {"cache": cache, "key": operand(2, 3, 7, 5), "value": operand(2, 3, 7, 5)}


OF_NUMPY: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "multi_head_attention": ("query", layer_call),
    "multi_head_attention_and_weights": ("query", layer_call),
    "rotary_embedding": ("x", lambda: {"x": operand(1, 1, 2, 4), "positions": [0, 1]}),
    "alibi_bias": ("slopes", lambda: {"slopes": operand(5), "q_len": 3, "kv_len": 3}),
    "empty_cache": ("like", lambda: {"batch": 2, "kv_heads": 3, "capacity": 5, "qk_dim": 7, "like": operand(1)}),
    "append_cache": ("key", appended),
}


@pytest.mark.parametrize("function", OF_NUMPY)
@pytest.mark.parametrize("module", FRAMEWORKS)
def test_a_backend_takes_arrays_of_its_library(module: str, function: str) -> None:
    label, call = OF_NUMPY[function]
    function_of_backend = getattr(importlib.import_module(module), function)
    library = FRAMEWORKS[module]
    function_of_backend(**of_library(call(), library))
    with pytest.raises(ArgumentTypeError, match=f"^`{label}` must be an array of {library}, since its backend was "):
        function_of_backend(**call())


@pytest.mark.parametrize("module", FRAMEWORKS)
def test_numbers_of_the_host_stay_allowed(module: str) -> None:
    functions, library = importlib.import_module(module), FRAMEWORKS[module]
    call = of_library({"x": operand(1, 1, 2, 4)}, library)
    turned = functions.rotary_embedding(**call, positions=numpy.arange(2), frequencies=numpy.asarray([1.0, 0.5]))
    assert tuple(turned.shape) == (1, 1, 2, 4)
    slopes = of_library({"slopes": operand(5)}, library)
    assert tuple(functions.alibi_bias(**slopes, q_len=3, kv_len=7, q_offset=numpy.asarray([2, 4])).shape) == (
        2,
        5,
        3,
        7,
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_bias_has_a_head(module: str) -> None:
    call = of_library({"slopes": numpy.ones(0, "float32"), "q_len": 3, "kv_len": 3}, MODULES[module])
    with pytest.raises(ArgumentValueError, match=r"^`slopes` must be .* heads>=1, received .*shape=\(0,\)"):
        importlib.import_module(module).alibi_bias(**call)


TABLES: dict[str, tuple[Any, type[Exception]]] = {
    "number": (numpy.asarray(3), ArgumentValueError),
    "row": (numpy.ones(3, int), ArgumentValueError),
    "cube": (numpy.ones((2, 3, 5), int), ArgumentValueError),
    "floats": (numpy.ones((2, 3)), ArgumentTypeError),
    "flags": (numpy.ones((2, 3), bool), ArgumentTypeError),
    "words": (numpy.full((2, 3), "a"), ArgumentTypeError),
    "times": (numpy.full((2, 3), numpy.timedelta64(1)), ArgumentTypeError),
    "list": ([[1, 2]], ArgumentTypeError),
    "torch": (torch.ones((2, 3), dtype=torch.int64), ArgumentTypeError),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_paged_cache_is_made_with_a_table_of_integers(name: str) -> None:
    table, error = TABLES[name]
    with pytest.raises(error, match=r"^`block_table` must "):
        PagedKVCache.empty(table, 7, 2, 3, 5, like=operand(1))


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "tensorflow"])
def test_a_paged_cache_takes_a_table_of_its_library_and_of_the_host(library: str) -> None:
    table = numpy.ones((2, 3), "int32")
    for held in (table, of_library({"table": table}, library)["table"]):
        cache = PagedKVCache.empty(held, 7, 2, 3, 5, like=of_library({"like": operand(1)}, library)["like"])
        assert tuple(cache.key.shape) == (7, 2, 3, 5)
        assert cache.batch == 2


def made(module: str, **options: Any) -> Any:
    """Make the layer of a backend with what it needs."""
    needed: dict[str, Any] = {"key": jax.random.key(0)} if module == "mha_spec_jax" else {}
    return importlib.import_module(module).MultiHeadAttention(10, 5, **needed | options)


@pytest.mark.parametrize(
    "dtype",
    ["nope", "int32", "bool", "complex64", object, int, 3, [], numpy.int32, torch.int32, tf.bool],
)
@pytest.mark.parametrize("module", LAYERS)
def test_parameters_are_floats(module: str, dtype: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^`dtype` must be a dtype of float64, .*MHA-PROJ-4\]$"):
        made(module, dtype=dtype)


DTYPES: dict[str, list[Any]] = {
    "mha_spec_numpy": ["float16", numpy.float32, numpy.dtype("float64"), None, float],
    "mha_spec_torch": [torch.float16, torch.bfloat16, torch.float64, None],
    "mha_spec_jax": ["float16", jax.numpy.bfloat16, numpy.dtype("float32"), None],
    "mha_spec_tensorflow": ["float16", "mixed_bfloat16", "float64", tf.bfloat16, None],
}


@pytest.mark.parametrize("module", LAYERS)
def test_a_layer_takes_the_floating_dtypes_of_its_library(module: str) -> None:
    for dtype in DTYPES[module]:
        assert tuple(made(module, dtype=dtype).params["w_q"].shape) == (10, 5, 2)


def test_parameters_of_flax_are_floats() -> None:
    nnx = pytest.importorskip("flax.nnx")
    from mha_spec_jax.flax import MultiHeadAttention

    with pytest.raises(ArgumentTypeError, match=r"^`param_dtype` must be a dtype of float64"):
        MultiHeadAttention(10, 5, rngs=nnx.Rngs(0), param_dtype="int32")


@pytest.mark.parametrize("key", ["a", None, 0, jax.numpy.ones(2), jax.random.split(jax.random.key(0))])
def test_a_layer_of_jax_is_drawn_from_a_key(key: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^`key` must be a single key such as jax.random.key\(0\)"):
        made("mha_spec_jax", key=key)
    assert made("mha_spec_jax", key=jax.random.PRNGKey(0)).params["w_q"].shape == (10, 5, 2)


@pytest.mark.parametrize(
    ("rng", "error"), [("a", ArgumentTypeError), (1.5, ArgumentTypeError), (-1, ArgumentValueError)]
)
def test_a_layer_of_numpy_is_drawn_from_a_generator(rng: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^`rng` must be a numpy.random.Generator or a seed"):
        made("mha_spec_numpy", rng=rng)


@pytest.mark.parametrize("operand_of_another_kind", ["x", [[[0.0] * 10]], 3])
@pytest.mark.parametrize("label", ["query", "key", "value"])
def test_a_layer_of_keras_takes_arrays(label: str, operand_of_another_kind: Any) -> None:
    operands: dict[str, Any] = {"query": tf.ones((2, 3, 10)), "key": None, "value": None}
    operands[label] = operand_of_another_kind
    for call in (lambda layer: layer(*operands.values()), lambda layer: layer(**operands)):
        with pytest.raises(ArgumentTypeError, match=f"^`{label}` must be an array, received "):
            call(made("mha_spec_tensorflow"))


@pytest.mark.parametrize("name", [["numpy"], None, 3, numpy.ones(2)])
def test_a_backend_has_a_name(name: Any) -> None:
    with pytest.raises(BackendError, match=r"^`name` must be that of a backend, received name="):
        mha_spec.backend(name)
