"""Merge two halves of a softmax, and compute the gradients of merging in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

from mha_spec.arrays import dtype_name, softmax_dtype_name

if TYPE_CHECKING:
    from mha_spec.arrays import Array

__all__ = ["gradients", "log_add_exp", "merge"]


class Halves(NamedTuple):
    """Both halves in the softmax's type, with 0 for the output of an empty half (MHA-MERGE-2)."""

    outputs: tuple[Array, Array]
    lse: tuple[Array, Array]
    empty: tuple[Array, Array]


def log_add_exp(first: Array, second: Array) -> Array:
    """Compute ln(exp first + exp second) relative to the larger, which cancels in the gradient (MHA-MERGE-1)."""
    larger = tf.stop_gradient(tf.maximum(first, second))
    anchor = tf.where(_is_empty(larger), tf.zeros((), larger.dtype), larger)
    return anchor + tf.math.log(tf.exp(first - anchor) + tf.exp(second - anchor))


def _is_empty(lse: Array) -> Array:
    """Return True for each lse of -inf; `==` compares the identity of tensors in a graph of TensorFlow 1."""
    return tf.equal(lse, -math.inf)


def merge(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Compute the softmax over both halves (MHA-MERGE-1 to MHA-MERGE-6), with the gradients of MHA-MERGE-7."""

    @tf.custom_gradient
    def call(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> tuple:
        halves = _halves(output_a, lse_a, output_b, lse_b)
        lse, shares = _merged_lse(halves)
        parts = [share * output for share, output in zip(shares, halves.outputs, strict=True)]
        output = tf.cast(parts[0] + parts[1], output_a.dtype)

        def pull(grad_output: Array, grad_lse: Array) -> tuple[Array, ...]:
            grad_output.set_shape(output.shape)  # The rank of a caller's gradient may be unknown.
            grad_lse.set_shape(lse_a.shape)
            return gradients(grad_output, output_a, lse_a, output_b, lse_b, grad_lse)

        return (output, tf.cast(tf.squeeze(lse, -1), lse_a.dtype)), pull

    return call(output_a, lse_a, output_b, lse_b)


def gradients(
    grad_output: Array, output_a: Array, lse_a: Array, output_b: Array, lse_b: Array, grad_lse: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Compute the gradients of output_a, lse_a, output_b and lse_b, each in its operand's type (MHA-MERGE-7)."""
    halves = _halves(output_a, lse_a, output_b, lse_b)
    _, shares = _merged_lse(halves)
    dtype, zero = shares[0].dtype, tf.zeros((), shares[0].dtype)
    grad_output = tf.cast(grad_output, dtype)
    grad_lse = tf.zeros_like(shares[0]) if grad_lse is None else tf.expand_dims(tf.cast(grad_lse, dtype), -1)
    row_dot = tf.reduce_sum(grad_output * (halves.outputs[0] - halves.outputs[1]), axis=-1, keepdims=True)
    grad_share = tf.where(halves.empty[0] | halves.empty[1], zero, shares[0] * shares[1] * row_dot)
    grad_outputs = [
        tf.where(empty, zero, share * grad_output) for empty, share in zip(halves.empty, shares, strict=True)
    ]
    grad_lses = [
        tf.squeeze(tf.where(empty, zero, share * grad_lse + sign * grad_share), -1)
        for empty, share, sign in zip(halves.empty, shares, (1, -1), strict=True)
    ]
    return (
        tf.cast(grad_outputs[0], output_a.dtype),
        tf.cast(grad_lses[0], lse_a.dtype),
        tf.cast(grad_outputs[1], output_b.dtype),
        tf.cast(grad_lses[1], lse_b.dtype),
    )


def _halves(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> Halves:
    wide = "float64" in (dtype_name(output_a), dtype_name(lse_a))
    dtype = softmax_dtype_name("float64" if wide else "float32")
    first, second = (tf.expand_dims(tf.cast(lse, dtype), -1) for lse in (lse_a, lse_b))
    empty = _is_empty(first), _is_empty(second)
    zero = tf.zeros((), dtype)
    output_a, output_b = (
        tf.where(is_empty, zero, tf.cast(output, dtype))
        for is_empty, output in zip(empty, (output_a, output_b), strict=True)
    )
    return Halves((output_a, output_b), (first, second), empty)


def _merged_lse(halves: Halves) -> tuple[Array, tuple[Array, Array]]:
    """Compute the lse of both halves, and the share of each, which is 1 where the other is empty (MHA-MERGE-2)."""
    first, second = halves.lse
    both = tf.where(halves.empty[1], first, log_add_exp(first, second))
    lse = tf.where(halves.empty[0], second, both)
    full = tf.ones((), lse.dtype)
    share_a, share_b = (tf.where(tf.equal(half, lse), full, tf.exp(half - lse)) for half in (first, second))
    return lse, (share_a, share_b)
