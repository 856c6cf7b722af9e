"""Two halves of one softmax, in operations whose gradients are right for empty halves as well."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import tensorflow as tf

if TYPE_CHECKING:
    from mha_spec.arrays import Array

__all__ = ["merge"]


def merge(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """lse = ln(exp lse_a + exp lse_b); each output by its share, an empty half not at all (MHA-MERGE-1 to -3)."""
    zero, nothing = tf.zeros((), lse_a.dtype), tf.constant(-math.inf, lse_a.dtype)
    maximum = tf.stop_gradient(tf.maximum(lse_a, lse_b))
    anchor = tf.where(maximum == nothing, zero, maximum)
    parts = [tf.exp(lse - anchor) for lse in (lse_a, lse_b)]
    total = parts[0] + parts[1]
    empty = total == 0
    total = tf.where(empty, tf.ones((), total.dtype), total)
    outputs = [
        tf.where((lse == nothing)[..., None], zero, (part / total)[..., None] * tf.cast(output, total.dtype))
        for lse, part, output in zip((lse_a, lse_b), parts, (output_a, output_b), strict=True)
    ]
    merged = tf.where(empty, nothing, anchor + tf.math.log(total))
    return tf.cast(outputs[0] + outputs[1], output_a.dtype), merged
