"""Derivatives of mha_spec_tensorflow that the goldens do not test, and its random dropout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_equal, assert_near, assert_same
from support.numbers import numbers
from support.tensorflow_world import cut_into_blocks, operands

import mha_spec_tensorflow
from mha_spec.errors import ArgumentTypeError
from mha_spec_tensorflow import plan

if TYPE_CHECKING:
    from collections.abc import Callable

attention: Callable[..., Any] = mha_spec_tensorflow.attention
gradient_of: Callable[..., Any] = tf.GradientTape.gradient
GENERATOR_SEED = 20261123


def inputs(dtype: str = "float64") -> list[tf.Tensor]:
    """Draw query, key, value, bias and sinks."""
    shapes = (2, 4, 7, 5), (2, 2, 7, 5), (2, 2, 7, 3), (1, 4, 1, 7), (4,)
    return [tf.constant(numbers(*shape), dtype) for shape in shapes]


def ours(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor, sinks: tf.Tensor) -> Any:
    return attention(query, key, value, bias=bias, sinks=sinks, causal=True, softcap=3.0, return_lse=True)


def plain(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor, sinks: tf.Tensor) -> Any:
    """Compute output and lse in plain operations."""
    key, value = tf.repeat(key, 2, 1), tf.repeat(value, 2, 1)
    scores = 3 * tf.tanh(tf.matmul(query, key, transpose_b=True) / 5**0.5 / 3) + bias
    scores = tf.where(numpy.tril(numpy.ones((7, 7), bool)), scores, -math.inf)
    scores = tf.concat([scores, tf.broadcast_to(sinks[None, :, None, None], (2, 4, 7, 1))], -1)
    lse = tf.reduce_logsumexp(scores, -1)
    return tf.matmul(tf.exp(scores - lse[..., None])[..., :-1], value), lse


def second(call: Callable[..., Any], operands: list[tf.Tensor]) -> list[tf.Tensor]:
    """Compute second derivatives of a number that is not linear in either result."""
    with tf.GradientTape() as outer:
        outer.watch(operands)
        with tf.GradientTape() as inner:
            inner.watch(operands)
            output, lse = call(*operands)
            number = tf.reduce_sum(tf.sin(output)) + tf.reduce_sum(tf.cos(lse))
        gradients = gradient_of(inner, number, operands)
        number = tf.add_n([tf.reduce_sum(tf.sin(3 * gradient)) for gradient in gradients])
    return gradient_of(outer, number, operands)


def pushed(call: Callable[..., Any], operands: list[tf.Tensor]) -> Any:
    """Compute directional derivatives in forward mode."""
    with tf.autodiff.ForwardAccumulator(operands, [tf.cos(7 * operand) for operand in operands]) as accumulator:
        results = call(*operands)
    return accumulator.jvp(results)


def assert_same_derivatives(derive: Callable[..., Any]) -> None:
    """Require that our derivatives, eager and traced, equal those of plain operations."""
    expected = derive(plain, inputs())
    assert_same(lambda dtype: derive(ours, inputs(dtype)), expected)
    traced = tf.function(lambda *operands: derive(ours, list(operands)))
    assert_same(lambda dtype: traced(*inputs(dtype)), expected)


def test_second_derivatives() -> None:
    assert_same_derivatives(second)


def test_second_derivatives_in_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HIGHEST": 4, "LOWEST": 4, "SCORES": 16}.items():
        monkeypatch.setattr(plan, name, value)
    assert_same_derivatives(second)


def test_forward_mode() -> None:
    assert_same_derivatives(pushed)
    traced = tf.function(ours)
    assert_same(lambda dtype: pushed(traced, inputs(dtype)), pushed(plain, inputs()))


def test_a_persistent_tape_can_be_asked_twice() -> None:
    operands = inputs()
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(operands)
        output, _ = ours(*operands)
    assert_equal(gradient_of(tape, output, operands), gradient_of(tape, output, operands))


def test_a_variable_has_a_gradient() -> None:
    query, key, value, *_ = inputs()
    variable = tf.Variable(query)
    with tf.GradientTape() as tape:
        output = attention(variable, key, value)
    assert gradient_of(tape, output, variable).shape == query.shape


def test_merging_has_gradients_where_halves_are_empty() -> None:
    output_a, output_b = (tf.constant(numpy.random.default_rng(seed).normal(size=(1, 1, 3, 2))) for seed in (1, 2))
    lse_a, lse_b = (tf.constant([[row]]) for row in ([0.5, -math.inf, -math.inf], [0.25, 1.5, -math.inf]))
    halves = [tf.cast(array, tf.float64) for array in (output_a, lse_a, output_b, lse_b)]
    with tf.GradientTape() as tape:
        tape.watch(halves)
        output, lse = mha_spec_tensorflow.merge_attention(*halves)
        number = tf.reduce_sum(output) + tf.reduce_sum(lse[..., :2])
    gradients = gradient_of(tape, number, halves)
    assert all(bool(tf.reduce_all(tf.math.is_finite(gradient))) for gradient in gradients)
    assert bool(tf.reduce_all(gradients[0][..., 1:, :] == 0))


def test_random_dropout_keeps_at_its_rate() -> None:
    """Allow 6.2 standard deviations of a binomial, a false alarm once in 10^9 runs."""
    pairs = 4 * 512 * 512
    query, key = tf.zeros((1, 4, 512, 8)), tf.zeros((1, 4, 512, 8))
    value = tf.broadcast_to(tf.eye(512), (1, 4, 512, 512))
    for rate in (0.1, 0.5, 0.9):
        output = attention(query, key, value, dropout_rate=rate, dropout_key=GENERATOR_SEED).numpy()
        kept = numpy.count_nonzero(output)
        assert abs(kept - pairs * (1 - rate)) <= 6.2 * math.sqrt(pairs * rate * (1 - rate))
        numpy.testing.assert_allclose(output[output != 0], 1 / 512 / (1 - rate), rtol=1e-6)


def test_random_dropout_depends_only_on_its_seed() -> None:
    arrays = operands()

    def draw(seed: Any) -> numpy.ndarray:
        return attention(*arrays, dropout_rate=0.5, dropout_key=seed).numpy()

    assert (draw(1) == draw(1)).all()
    assert (draw(1) == draw(tf.constant(1))).all()
    assert (draw(1) != draw(2)).any()
    tf.random.set_seed(GENERATOR_SEED)
    first = draw(None), draw(None)
    assert (first[0] != first[1]).any()
    tf.random.set_seed(GENERATOR_SEED)
    assert (draw(None) == first[0]).all()
    with pytest.raises(ArgumentTypeError, match=r"dropout_key=0\.5"):
        draw(0.5)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks."""
    cut_into_blocks(monkeypatch)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("trace", [False, True])
def test_random_dropout_has_the_gradients_of_its_mask(trace: bool) -> None:
    query, key, value = operands(7, 5, "float64")

    def call(value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(value)
            output = attention(query, key, value, dropout_rate=0.3, dropout_key=5)
        return output, gradient_of(tape, output, value, tf.cos(output))

    output, gradient = (tf.function(call) if trace else call)(value)
    assert_near(tf.reduce_sum(gradient * value), tf.reduce_sum(tf.cos(output) * output))
