"""Layers, tokens and gradients in the tensors of TensorFlow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import tensorflow as tf

from mha_spec_tensorflow import MultiHeadAttention, plan
from support import layers
from support.numbers import numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

__all__ = ["cut_into_blocks", "floats", "heads", "operands", "sized", "tensors", "tokens", "with_gradients"]


def sized(dtype: str = "float64", **options: Any) -> Any:
    """A layer in which every size is another, with numbers in every parameter."""
    layer = MultiHeadAttention(layers.EMBED, layers.HEADS, dtype=dtype, **layers.SIZES | options)
    found = layers.parameters({one.name: tuple(one.shape) for one in layer.trainable_weights})
    for variable in layer.trainable_weights:
        variable.assign(found[variable.name])
    return layer


def tokens(length: int = layers.LENGTH, size: int = layers.EMBED, seed: int = 5) -> tf.Tensor:
    """Tokens of normal numbers."""
    return tf.constant(layers.tokens(length, size, seed))


def heads(length: int, seed: int = 5) -> list[tf.Tensor]:
    """Keys and values for a cache."""
    return [tf.constant(one) for one in layers.heads(length, seed)]


def operands(q_len: int = 32, kv_len: int = 32, dtype: str = "float32") -> list[tf.Tensor]:
    """Query, key and value of a call of attention, 2 x 4 heads over 2."""
    shapes = (2, 4, q_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 8)
    return [tf.constant(numbers(*shape, seed=place), dtype) for place, shape in enumerate(shapes)]


def cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks."""
    for name, value in {"SCORES": 64, "LOWEST": 2, "HIGHEST": 4, "SHORTEST_RUN": 2, "BODIES": 2}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "COST_OF_BLOCK", -(2**40))


def tensors(tree: Any) -> Any:
    """Arrays of NumPy as tensors, everything else as it is."""
    if isinstance(tree, dict):
        return {name: tensors(one) for name, one in tree.items()}
    return tf.constant(tree) if isinstance(tree, numpy.ndarray) else tree


def floats(tree: Any, dtype: str) -> Any:
    """Tensors of floats in another dtype, everything else as it is."""

    def converted(one: Any) -> Any:
        return tf.cast(one, dtype) if tf.is_tensor(one) and one.dtype.is_floating else one

    return tf.nest.map_structure(converted, tree)


def with_gradients(call: Callable[[], Any], given: Any) -> list[tf.Tensor]:
    """What a function gives, and the gradients of a sum in which every element counts differently."""
    with tf.GradientTape() as tape:
        tape.watch(given)
        outputs = tf.nest.flatten(call())
        total = tf.add_n([tf.reduce_sum(one * _uneven(one)) for one in outputs])
    return [*outputs, *map(tf.convert_to_tensor, tape.gradient(total, tf.nest.flatten(given)))]


def _uneven(one: tf.Tensor) -> tf.Tensor:
    """As `layers.uneven`, of a size that may not be known."""
    steps = tf.linspace(tf.constant(-1, tf.float64), tf.constant(2, tf.float64), tf.size(one))
    return tf.reshape(tf.cast(steps, one.dtype), tf.shape(one))
