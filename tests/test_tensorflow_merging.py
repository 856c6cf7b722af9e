"""mha_spec_tensorflow merges halves and differentiates the result, in eager mode, in graphs and compiled by XLA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_equal, assert_same
from support.numbers import numbers

import mha_spec_tensorflow
from mha_spec import reference

if TYPE_CHECKING:
    from collections.abc import Callable

merge: Callable[..., Any] = mha_spec_tensorflow.merge_attention
gradients_of: Callable[..., Any] = tf.GradientTape.gradient
ROWS, V_DIM = (2, 3, 5), 7
INF, NAN = math.inf, math.nan
WORLDS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "eager": lambda call: call,
    "function": lambda call: tf.function(call, autograph=False),
    "unknown sizes": lambda call: tf.function(call, autograph=False, input_signature=SIGNATURE),
    "xla": lambda call: tf.function(call, autograph=False, jit_compile=True),
}
SHAPES = {"output": (None,) * 4, "lse": (None,) * 3}
SIGNATURE = [tf.TensorSpec(SHAPES[name], tf.float64) for name in ("output", "lse") * 3]


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a way to call a function of six tensors."""
    return WORLDS[request.param]


def halves() -> list[numpy.ndarray]:
    """Draw output and lse of two halves; each is empty in some rows, and a row is empty in both."""
    lse_a, lse_b = (3 * numbers(*ROWS, seed=seed) for seed in (7, 8))
    lse_a[0, 0], lse_b[1, 1], lse_a[1, 1, 2] = -INF, -INF, -INF
    return [numbers(*ROWS, V_DIM, seed=1), lse_a, numbers(*ROWS, V_DIM, seed=2), lse_b]


def cotangents() -> list[numpy.ndarray]:
    """Draw cotangents of the output and of the lse."""
    return [numbers(*ROWS, V_DIM, seed=11), numbers(*ROWS, seed=13)]


def tensors(arrays: list[numpy.ndarray], dtype: str = "float64") -> list[tf.Tensor]:
    return [tf.constant(array, dtype) for array in arrays]


def by_tape(grad_output: tf.Tensor, grad_lse: tf.Tensor, *halves: tf.Tensor) -> list[tf.Tensor]:
    """Compute the gradients with a tape."""
    with tf.GradientTape() as tape:
        tape.watch(halves)
        results = merge(*halves)
    return list(gradients_of(tape, results, halves, [grad_output, grad_lse]))


def by_function(grad_output: tf.Tensor, grad_lse: tf.Tensor, *halves: tf.Tensor) -> list[tf.Tensor]:
    """Compute the gradients with `merge_attention_vjp`."""
    return list(mha_spec_tensorflow.merge_attention_vjp(grad_output, *halves, grad_lse=grad_lse))


def merged(_: tf.Tensor, __: tf.Tensor, *halves: tf.Tensor) -> list[tf.Tensor]:
    """Compute output and lse; the cotangents are not used."""
    return list(merge(*halves))


@pytest.mark.parametrize("gradients", [by_tape, by_function])
@pytest.mark.parametrize("name", ["eager", "function", "xla"])
def test_gradients_of_merging_are_those_of_the_reference(gradients: Callable[..., Any], name: str) -> None:
    """The halves are empty in some rows, whose output is NaN (MHA-MERGE-7)."""
    inputs, call = halves(), WORLDS[name](gradients)
    for output, lse in (inputs[:2], inputs[2:]):
        output[numpy.isneginf(lse)] = NAN
    expected = reference.merge_attention_vjp(cotangents()[0], *inputs, grad_lse=cotangents()[1])
    assert_same(lambda dtype: call(*tensors([*cotangents(), *inputs], dtype)), tensors(list(expected)))


@pytest.mark.parametrize("gradients", [by_tape, by_function])
def test_an_empty_half_leaves_the_cotangents_to_the_other(world: Any, gradients: Callable[..., Any]) -> None:
    """Two empty halves have gradients of 0 (MHA-MERGE-7)."""
    grad_output, grad_lse = cotangents()
    grad_a, grad_lse_a, grad_b, grad_lse_b = (
        gradient.numpy() for gradient in world(gradients)(*tensors([grad_output, grad_lse, *halves()]))
    )
    assert not any(gradient[0, 0].any() for gradient in (grad_a, grad_lse_a))
    assert_equal([grad_b[0, 0], grad_lse_b[0, 0]], [grad_output[0, 0], grad_lse[0, 0]])
    assert not any(gradient[1, 1].any() for gradient in (grad_b, grad_lse_b))
    assert not any(gradient[1, 1, 2].any() for gradient in (grad_a, grad_lse_a))
    assert_equal([grad_a[1, 1, :2], grad_lse_a[1, 1, :2]], [grad_output[1, 1, :2], grad_lse[1, 1, :2]])


def test_a_tape_of_the_output_alone_has_no_cotangent_of_lse(world: Any) -> None:
    def of_output(grad_output: tf.Tensor, _: tf.Tensor, *halves: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(halves)
            output, _ = merge(*halves)
        return list(gradients_of(tape, output, halves, grad_output))

    expected = reference.merge_attention_vjp(cotangents()[0], *halves())
    for gradient, other in zip(world(of_output)(*tensors([*cotangents(), *halves()])), expected, strict=True):
        assert numpy.allclose(gradient, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("other", [0.5, INF])
@pytest.mark.parametrize("half", [1, 3])
def test_an_infinite_lse_with_another_half_is_nan(world: Any, half: int, other: float) -> None:
    """Every other row is unchanged (MHA-MERGE-5)."""
    inputs = halves()
    inputs[half][0, 1, 2], inputs[4 - half][0, 1, 2] = INF, other
    call, rows = world(merged), numpy.ones(ROWS, bool)
    rows[0, 1, 2] = False
    results = [result.numpy() for result in call(*tensors([*cotangents(), *inputs]))]
    assert all(numpy.isnan(result[~rows]).all() for result in results)
    for result, expected in zip(results, call(*tensors([*cotangents(), *halves()])), strict=True):
        assert_equal(result[rows], expected.numpy()[rows])


def test_an_infinite_lse_with_an_empty_half_is_unchanged(world: Any) -> None:
    """The output of the empty half has no part in the result (MHA-MERGE-2, MHA-MERGE-5)."""
    inputs = halves()
    inputs[1][:], inputs[3][:], inputs[2][:] = INF, -INF, NAN
    for result, expected in zip(world(merged)(*tensors([*cotangents(), *inputs])), inputs[:2], strict=True):
        assert_equal(result.numpy(), expected)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("distance", [0.0, 2000.0])
def test_an_output_that_is_not_finite_shows_whatever_its_share(world: Any, value: float, distance: float) -> None:
    """It changes no other component (MHA-MERGE-6)."""
    inputs, call = halves(), world(merged)
    inputs[1] = 3 * numbers(*ROWS, seed=7)
    inputs[3] = inputs[1] + distance
    expected = [result.numpy() for result in call(*tensors([*cotangents(), *inputs]))]
    inputs[0][0, 1, 2, 3] = value
    output, lse = (result.numpy() for result in call(*tensors([*cotangents(), *inputs])))
    assert not numpy.isfinite(output[0, 1, 2, 3])
    output[0, 1, 2, 3] = expected[0][0, 1, 2, 3]
    assert_equal([output, lse], expected)
