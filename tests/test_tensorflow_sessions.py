"""mha_spec_tensorflow in a graph of TensorFlow 1, where `==` compares the identity of tensors."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_near
from support.numbers import numbers, pattern

import mha_spec_tensorflow

Arrays = dict[str, Any]

OPERANDS = {"query": numbers(2, 6, 5, 11), "key": numbers(2, 3, 7, 11, seed=4), "value": numbers(2, 3, 7, 13, seed=5)}
POSITIONS = {"causal": True, "q_offset": numpy.asarray([2, 1]), "kv_starts": numpy.asarray([1, 0])}
BIAS = numpy.where(pattern(2, 1, 5, 7), numbers(2, 1, 5, 7), -numpy.inf)
BIAS[0, 0, 3] = -numpy.inf
OPTIONS: dict[str, Arrays] = {
    "segments": {
        "q_segment_ids": numpy.arange(10).reshape(2, 5) // 2,
        "kv_segment_ids": numpy.arange(14).reshape(2, 7) // 2,
    },
    "chunks": {"chunk": 3, **POSITIONS},
    "a bias of -inf": {"bias": BIAS, "sinks": numbers(6)},
    "a diagonal of lengths": {"causal": True, "q_offset": "lower_right", "kv_lengths": numpy.asarray([7, 4])},
}
HALVES = {
    "output_a": numbers(2, 6, 5, 13),
    "lse_a": numpy.where(pattern(2, 6, 5), numbers(2, 6, 5), -numpy.inf),
    "output_b": numbers(2, 6, 5, 13, seed=4),
    "lse_b": numpy.where(pattern(6, 5, 2).T.reshape(2, 6, 5), numbers(2, 6, 5, seed=4), -numpy.inf),
}


def in_a_session(call: Any, arrays: Arrays, *, sizes_are_known: bool) -> list[numpy.ndarray]:
    """Compute a call of placeholders; if sizes are unknown, only the heads and components of operands are known."""
    with tf.Graph().as_default():
        placeholders = {name: _placeholder(name, array, sizes_are_known) for name, array in arrays.items()}
        results = [result for result in call(**placeholders) if result is not None]
        with tf.compat.v1.Session() as session:
            return session.run(results, {placeholders[name]: array for name, array in arrays.items()})


def _placeholder(name: str, array: numpy.ndarray, sizes_are_known: bool) -> tf.Tensor:
    of_operand = [None, array.shape[1], None, array.shape[-1]] if name in OPERANDS else None
    return tf.compat.v1.placeholder(array.dtype, array.shape if sizes_are_known else of_operand)


@pytest.mark.parametrize("sizes_are_known", [True, False])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_session_has_the_results_of_an_eager_call(name: str, sizes_are_known: bool) -> None:
    arrays = {key: value for key, value in OPTIONS[name].items() if isinstance(value, numpy.ndarray)}
    rest = {key: value for key, value in OPTIONS[name].items() if key not in arrays}

    def call(**tensors: Any) -> tuple[Any, ...]:
        output, lse = mha_spec_tensorflow.attention(**tensors, **rest, return_lse=True)
        return output, lse, *mha_spec_tensorflow.attention_vjp(output, **tensors, **rest)

    expected = call(**{key: tf.constant(array) for key, array in (OPERANDS | arrays).items()})
    results = in_a_session(call, OPERANDS | arrays, sizes_are_known=sizes_are_known)
    assert_near(results, [result.numpy() for result in expected if result is not None])


@pytest.mark.parametrize("sizes_are_known", [True, False])
def test_a_session_merges_halves(sizes_are_known: bool) -> None:
    def call(**tensors: Any) -> tuple[Any, ...]:
        merged = mha_spec_tensorflow.merge_attention(**tensors)
        return *merged, *mha_spec_tensorflow.merge_attention_vjp(merged[0], **tensors)

    expected = call(**{name: tf.constant(array) for name, array in HALVES.items()})
    results = in_a_session(call, HALVES, sizes_are_known=sizes_are_known)
    assert_near(results, [result.numpy() for result in expected])
