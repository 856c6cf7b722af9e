"""Merging: its edge cases, and its gradients compared with torch's derivatives of the formula."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.comparisons import assert_equal, assert_near, assert_same
from support.numbers import numbers

import mha_spec
from mha_spec import ArgumentTypeError, ArgumentValueError, reference
from mha_spec.arrays import dtype_name
from mha_spec.steps import Steps

if TYPE_CHECKING:
    from types import ModuleType

BATCH, HEADS, Q_LEN, V_DIM = 2, 3, 5, 7
ROWS = (BATCH, HEADS, Q_LEN)
HALVES = ("output_a", "lse_a", "output_b", "lse_b")
INF, NAN = numpy.inf, numpy.nan


def halves(dtype: str = "float64") -> dict[str, numpy.ndarray]:
    """Draw two halves in which all numbers differ."""
    outputs = {name: numbers(*ROWS, V_DIM, seed=seed) for seed, name in enumerate(("output_a", "output_b"))}
    lses = {name: 3 * numbers(*ROWS, seed=seed) for seed, name in enumerate(("lse_a", "lse_b"), start=7)}
    return {name: (outputs | lses)[name].astype(dtype) for name in HALVES}


def cotangents(dtype: str = "float64") -> dict[str, numpy.ndarray]:
    return {
        "grad_output": numbers(*ROWS, V_DIM, seed=11).astype(dtype),
        "grad_lse": numbers(*ROWS, seed=13).astype(dtype),
    }


@pytest.fixture(params=["mha_spec.reference", "mha_spec"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Return the functions of the specification: the reference's and the public functions."""
    return reference if request.param == "mha_spec.reference" else mha_spec


def derivatives(inputs: dict[str, numpy.ndarray], grad_output: Any, grad_lse: Any) -> tuple[numpy.ndarray, ...]:
    """Differentiate the formula in float64 with torch's autograd."""
    torch = pytest.importorskip("torch")
    operands = [torch.tensor(inputs[name].astype("float64"), requires_grad=True) for name in HALVES]
    output_a, lse_a, output_b, lse_b = operands
    lse = torch.logaddexp(lse_a, lse_b)
    output = torch.exp(lse_a - lse)[..., None] * output_a + torch.exp(lse_b - lse)[..., None] * output_b
    results, cotangents_of = ([output], [grad_output]) if grad_lse is None else ([output, lse], [grad_output, grad_lse])
    return tuple(
        array.numpy() for array in torch.autograd.grad(results, operands, [torch.tensor(g) for g in cotangents_of])
    )


@pytest.mark.parametrize("with_lse", [True, False])
def test_gradients_are_the_derivatives_of_the_formula(module: ModuleType, with_lse: bool) -> None:
    inputs = cotangents() if with_lse else {"grad_output": cotangents()["grad_output"], "grad_lse": None}
    rounded = {name: None if array is None else array.astype("float32") for name, array in inputs.items()}
    exact = {
        name: None if array is None else array.astype("float32").astype("float64") for name, array in inputs.items()
    }
    sources = {"float64": halves("float32"), "float32": halves("float32")}

    def ours(dtype: str) -> tuple[numpy.ndarray, ...]:
        operands = {name: array.astype(dtype) for name, array in sources[dtype].items()}
        return module.merge_attention_vjp(**operands, **(exact if dtype == "float64" else rounded))

    assert_same(ours, derivatives(halves("float32"), **exact))


def test_a_mistake_in_a_step_changes_the_gradient() -> None:
    right = reference.merge_attention_vjp(**halves(), **cotangents())
    for step in ("merge_grad_output", "merge_row_dot", "merge_grad_share", "merge_grad_lse"):
        wrong = replace(Steps(), **{step: lambda *inputs, step=step: 2 * getattr(Steps(), step)(*inputs)})
        results = reference.Reference(wrong).merge_attention_vjp(**halves(), **cotangents())
        assert any(not numpy.allclose(array, other) for array, other in zip(results, right, strict=True)), step


@pytest.mark.parametrize("empty", ["a", "b"])
def test_a_half_merged_with_an_empty_half_receives_the_cotangents(module: ModuleType, empty: str) -> None:
    inputs, other = halves(), "b" if empty == "a" else "a"
    inputs[f"lse_{empty}"][:] = -INF
    inputs[f"output_{empty}"][:] = NAN
    gradients = dict(zip(HALVES, module.merge_attention_vjp(**inputs, **cotangents()), strict=True))
    assert not gradients[f"output_{empty}"].any()
    assert not gradients[f"lse_{empty}"].any()
    assert_equal(gradients[f"output_{other}"], cotangents()["grad_output"])
    assert_equal(gradients[f"lse_{other}"], cotangents()["grad_lse"])


def test_two_empty_halves_have_no_gradient(module: ModuleType) -> None:
    inputs = halves()
    for name in HALVES:
        inputs[name][0] = -INF if name.startswith("lse") else NAN
    gradients = module.merge_attention_vjp(**inputs, **cotangents())
    beside = module.merge_attention_vjp(**halves(), **cotangents())
    for array, other in zip(gradients, beside, strict=True):
        assert not array[0].any()
        assert_equal(array[1:], other[1:])


@pytest.mark.parametrize("output", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cotangent", ["float64", "float32", "float16", "bfloat16"])
def test_each_gradient_has_the_dtype_of_its_operand(module: ModuleType, output: str, cotangent: str) -> None:
    import ml_dtypes

    types = {"bfloat16": ml_dtypes.bfloat16}
    inputs = halves("float32")
    inputs |= {name: inputs[name].astype(types.get(output, output)) for name in ("output_a", "output_b")}
    gradients = module.merge_attention_vjp(**inputs, **cotangents(types.get(cotangent, cotangent)))
    assert [dtype_name(array) for array in gradients] == [output, "float32", output, "float32"]
    assert [array.shape for array in gradients] == [inputs[name].shape for name in HALVES]


@pytest.mark.parametrize(
    ("changed", "error", "argument"),
    [
        ({"grad_output": numbers(*ROWS)}, ArgumentValueError, "grad_output"),
        ({"grad_output": numbers(*ROWS, V_DIM).astype(int)}, ArgumentTypeError, "grad_output"),
        ({"grad_output": None}, ArgumentTypeError, "grad_output"),
        ({"grad_lse": numbers(*ROWS, 1)}, ArgumentValueError, "grad_lse"),
        ({"grad_lse": [0.0]}, ArgumentTypeError, "grad_lse"),
        ({"lse_b": numbers(*ROWS, 1)}, ArgumentValueError, "lse_b"),
        ({"output_b": None}, ArgumentTypeError, "output_b"),
        ({"lse": numbers(*ROWS)}, ArgumentTypeError, "lse"),
    ],
)
def test_cotangents_and_halves_fit(
    module: ModuleType, changed: dict[str, Any], error: type[Exception], argument: str
) -> None:
    with pytest.raises(error, match=f"`{argument}` "):
        module.merge_attention_vjp(**(halves() | cotangents() | changed))


@pytest.mark.parametrize("beside", [0.5, INF])
@pytest.mark.parametrize("half", ["a", "b"])
def test_an_infinite_lse_merged_with_another_half_is_nan(module: ModuleType, half: str, beside: float) -> None:
    inputs, other = halves(), "b" if half == "a" else "a"
    inputs[f"lse_{half}"][0, 1, 2], inputs[f"lse_{other}"][0, 1, 2] = INF, beside
    output, lse = module.merge_attention(**inputs)
    assert numpy.isnan(lse[0, 1, 2])
    assert numpy.isnan(output[0, 1, 2]).all()
    for result, expected in zip((output, lse), module.merge_attention(**halves()), strict=True):
        others = numpy.ones(ROWS, bool)
        others[0, 1, 2] = False
        assert_equal(result[others], expected[others])


def test_an_infinite_lse_merged_with_an_empty_half_is_unchanged(module: ModuleType) -> None:
    inputs = halves()
    inputs["lse_a"][:], inputs["lse_b"][:], inputs["output_b"][:] = INF, -INF, NAN
    output, lse = module.merge_attention(**inputs)
    assert_equal(output, inputs["output_a"])
    assert_equal(lse, inputs["lse_a"])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("distance", [0.0, 30.0, 2000.0])
def test_a_non_finite_output_shows_at_every_share(module: ModuleType, value: float, distance: float) -> None:
    inputs = halves()
    inputs["lse_b"] = inputs["lse_a"] + distance
    inputs["output_a"][0, 1, 2, 3] = value
    output, lse = module.merge_attention(**inputs)
    assert not numpy.isfinite(output[0, 1, 2, 3])
    others = numpy.ones((*ROWS, V_DIM), bool)
    others[0, 1, 2, 3] = False
    finite = inputs | {"output_a": numpy.where(numpy.isfinite(inputs["output_a"]), inputs["output_a"], 0.0)}
    expected, expected_lse = module.merge_attention(**finite)
    assert_equal(output[others], expected[others])
    assert_near(lse, expected_lse)
