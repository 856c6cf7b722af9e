"""Sinks are converted to the type of the softmax, which decides what is no sink (MHA-SINK-1, MHA-SINK-2, MHA-VJP-6)."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support import varlen
from support.calls import BATCH, HEADS, Q_LEN, V_DIM, arguments
from support.comparisons import assert_equal, leaves
from support.libraries import MODULES, of_library, with_float64
from support.numbers import numbers

from mha_spec_conformance.fuzzing.call import Call, Recipe
from mha_spec_conformance.fuzzing.expected import expect
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDE = 2
"""The head whose sink is beyond the range of float32."""

FUNCTIONS = ("attention", "attention_weights", "attention_vjp", "varlen_attention", "varlen_attention_vjp")


def with_sink(value: float) -> numpy.ndarray:
    """Return sinks in float64, one of them with this value."""
    return numpy.where(numpy.arange(HEADS) == WIDE, value, numbers(HEADS))


def answer(module: str, function: str, dtype: str, sinks: numpy.ndarray) -> Any:
    """Call a function of a module with operands of a dtype and these sinks."""
    dense = arguments()
    packed = varlen.packed()
    operands = {
        "attention": dense | {"return_lse": True},
        "attention_weights": {name: dense[name] for name in ("query", "key")},
        "attention_vjp": {
            "grad_output": numbers(BATCH, HEADS, Q_LEN, V_DIM),
            **dense,
            "grad_lse": numbers(BATCH, HEADS, Q_LEN),
        },
        "varlen_attention": packed | {"return_lse": True},
        "varlen_attention_vjp": {"grad_output": numbers(*packed["query"].shape[:2], varlen.V_DIM), **packed},
    }[function]
    typed = {
        name: value.astype(dtype) if getattr(value, "dtype", numpy.dtype(int)).kind == "f" else value
        for name, value in operands.items()
    }
    library = MODULES[module]
    with with_float64(library):
        results = getattr(importlib.import_module(module), function)(**of_library(typed | {"sinks": sinks}, library))
        return [
            result for result in leaves(results if isinstance(results, tuple) else (results,)) if result is not None
        ]


@pytest.mark.parametrize("value", [-1e300, -3.5e38])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("module", MODULES)
def test_a_sink_that_converts_to_minus_infinity_is_no_sink(module: str, function: str, value: float) -> None:
    results, absent = (answer(module, function, "float32", with_sink(sink)) for sink in (value, -numpy.inf))
    for result, expected in zip(results, absent, strict=True):
        assert_equal(result, expected)
    if function.endswith("_vjp"):
        of_sinks = to_numpy(results[-1])
        assert of_sinks.shape == (HEADS,)
        assert of_sinks[WIDE] == 0
        assert of_sinks.astype(bool).sum() == HEADS - 1


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("module", MODULES)
def test_a_sink_that_converts_to_infinity_leaves_the_other_heads_as_they_are(module: str, function: str) -> None:
    results, expected = (answer(module, function, "float32", with_sink(sink)) for sink in (1e300, 0.5))
    for result, other in zip(results, expected, strict=True):
        group_of_wide = [WIDE] if HEADS in result.shape else [WIDE // 2]
        axis = next(axis for axis in range(result.ndim) if result.shape[axis] in (HEADS, HEADS // 2))
        kept, wanted = (numpy.delete(to_numpy(array), group_of_wide, axis=axis) for array in (result, other))
        assert wanted.any()
        assert numpy.array_equal(kept, wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("module", MODULES)
def test_the_lse_of_an_empty_row_is_the_converted_sink(module: str, dtype: str) -> None:
    library = MODULES[module]
    call = {name: array.astype(dtype) for name, array in arguments().items()}
    hidden = {"mask": numpy.zeros((1, 1, 1, 1), bool), "sinks": with_sink(-1e300)}
    with with_float64(library):
        attention = importlib.import_module(module).attention
        lse = to_numpy(attention(**of_library(call | hidden, library), return_lse=True)[1])
    assert lse.dtype == dtype
    assert lse.shape == (BATCH, HEADS, Q_LEN)
    assert (lse[:, WIDE] == (-1e300 if dtype == "float64" else -numpy.inf)).all()


def drawn(function: str, dtype: str, value: float) -> Call:
    """Return a drawn call with such a sink."""
    recipes = {name: Recipe(f"numpy.ones({array.shape})", dtype) for name, array in arguments().items()} | {
        "sinks": Recipe(f"numpy.array({[0.5] * (HEADS - 1) + [value]})", "float64")
    }
    if function == "attention_weights":
        del recipes["value"]
    if function == "attention_vjp":
        recipes["grad_output"] = Recipe(f"numpy.ones({(BATCH, HEADS, Q_LEN, V_DIM)})", dtype)
    return Call(function, dtype, recipes)


def kinds(function: str, dtype: str, value: float) -> Iterator[tuple[str, numpy.ndarray]]:
    """Return the kinds of the results that belong to the head with such a sink."""
    for name, kind in expect(drawn(function, dtype, value))[1].items():
        if HEADS in kind.shape:
            yield name, numpy.take(kind, HEADS - 1, axis=kind.shape.index(HEADS))


@pytest.mark.parametrize("function", FUNCTIONS[:3])
def test_the_suite_leaves_open_what_a_sink_does_that_converts_to_infinity(function: str) -> None:
    assert all((kind == ANY).all() for _, kind in kinds(function, "float32", 1e300))
    assert not any((kind == ANY).all() for _, kind in kinds(function, "float32", -1e300))


def test_the_suite_expects_a_gradient_of_exactly_0_for_a_sink_that_converts_to_minus_infinity() -> None:
    assert dict(kinds("attention_vjp", "float32", -1e300))["grad_sinks"] == EXACT


def test_the_suite_leaves_open_the_gradient_of_an_infinite_sink_that_has_only_empty_rows() -> None:
    call = drawn("attention_vjp", "float32", 1e300)
    hidden = {"mask": Recipe("numpy.zeros((1, 1, 1, 1))", "bool")}
    gradient = expect(replace(call, recipes={**call.recipes, **hidden}))[1]["grad_sinks"]
    assert gradient.tolist() == [EXACT] * (HEADS - 1) + [ANY]


@pytest.mark.parametrize("value", [-1e300, 1e300])
def test_the_suite_leaves_open_what_an_infinite_sink_does_in_the_layer(value: float) -> None:
    """The output of a token is a sum over all heads."""
    operands = {"query": (1, 2, 3), "key": (1, 2, 3), "value": (1, 2, 3)}
    parameters = {"w_q": (3, 2, 4), "w_k": (3, 1, 4), "w_v": (3, 1, 5), "w_o": (2, 5, 7)}
    recipes = {name: Recipe(f"numpy.ones({shape})", "float32") for name, shape in (operands | parameters).items()}
    recipes["sinks"] = Recipe(f"numpy.array([0.5, {value}])", "float64")
    mask = {"mask": Recipe("numpy.zeros((1, 1, 2, 1))", "bool")}
    for hidden, seen in (({}, FINITE), (mask, EXACT)):
        by_name = expect(Call("multi_head_attention_and_weights", "float32", recipes | hidden))[1]
        assert numpy.unique(by_name["weights"][:, 0]).tolist() == [seen]
        assert numpy.unique(by_name["weights"][:, 1]).tolist() == [ANY if value > 0 else seen]
        assert numpy.unique(by_name["output"]).tolist() == [ANY if value > 0 else seen]


@pytest.mark.parametrize("function", ["attention_vjp", "varlen_attention_vjp"])
def test_the_suite_leaves_open_the_gradient_of_an_infinite_sink_without_queries(function: str) -> None:
    recipes = {"sinks": Recipe("numpy.array([0.5, 1e300])", "float64")}
    if function == "attention_vjp":
        shapes = {"query": (1, 2, 0, 4), "key": (1, 1, 3, 4), "value": (1, 1, 3, 4), "grad_output": (1, 2, 0, 4)}
    else:
        shapes = {"query": (1, 2, 4), "key": (0, 1, 4), "value": (0, 1, 4), "grad_output": (1, 2, 4)}
        bounds = Recipe("numpy.array([0, 0, 0], dtype='int64')", "int32")
        recipes |= {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds}
    recipes |= {name: Recipe(f"numpy.ones({shape})", "float32") for name, shape in shapes.items()}
    _, kinds, _ = expect(Call(function, "float32", recipes))
    assert kinds["grad_sinks"].tolist() == [EXACT, ANY]
