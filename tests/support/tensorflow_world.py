"""Create layers, tokens and gradients as tensors of TensorFlow."""

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

__all__ = [
    "cut_into_blocks",
    "floats",
    "heads",
    "operands",
    "sized",
    "tensors",
    "tokens",
    "with_gradients",
    "with_unknown_sizes",
]


def sized(dtype: str = "float64", **options: Any) -> Any:
    """Create a layer of which all sizes differ, with numbers in every parameter."""
    layer = MultiHeadAttention(layers.EMBED, layers.HEADS, dtype=dtype, **layers.SIZES | options)
    params = layers.parameters({variable.name: tuple(variable.shape) for variable in layer.trainable_weights})
    for variable in layer.trainable_weights:
        variable.assign(params[variable.name])
    return layer


def tokens(length: int = layers.LENGTH, size: int = layers.EMBED, seed: int = 5) -> tf.Tensor:
    """Create tokens of normal numbers."""
    return tf.constant(layers.tokens(length, size, seed))


def heads(length: int, seed: int = 5) -> tuple[tf.Tensor, tf.Tensor]:
    """Create keys and values for a cache."""
    key, value = layers.heads(length, seed)
    return tf.constant(key), tf.constant(value)


def operands(q_len: int = 32, kv_len: int = 32, dtype: str = "float32") -> list[tf.Tensor]:
    """Create query, key and value of a call of attention with 4 heads and 2 key/value heads."""
    shapes = (2, 4, q_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 8)
    return [tf.constant(numbers(*shape, seed=place), dtype) for place, shape in enumerate(shapes)]


def cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks."""
    for name, value in {"SCORES": 64, "LOWEST": 2, "HIGHEST": 4, "SHORTEST_RUN": 2, "BODIES": 2}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "COST_OF_BLOCK", -(2**40))


def tensors(tree: Any) -> Any:
    """Convert arrays of NumPy to tensors; leave everything else unchanged."""
    if isinstance(tree, dict):
        return {name: tensors(branch) for name, branch in tree.items()}
    return tf.constant(tree) if isinstance(tree, numpy.ndarray) else tree


def floats(tree: Any, dtype: str) -> Any:
    """Convert tensors of floats to another dtype; leave everything else unchanged."""

    def converted(leaf: Any) -> Any:
        return tf.cast(leaf, dtype) if tf.is_tensor(leaf) and leaf.dtype.is_floating else leaf

    return tf.nest.map_structure(converted, tree)


def with_gradients(call: Callable[[], Any], inputs: Any) -> list[tf.Tensor]:
    """Return the results of a function, and the gradients of a sum that weighs every element differently."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = tf.nest.flatten(call())
        total = tf.add_n([tf.reduce_sum(output * _uneven(output)) for output in outputs])
    return [*outputs, *map(tf.convert_to_tensor, tape.gradient(total, tf.nest.flatten(inputs)))]


def _uneven(output: tf.Tensor) -> tf.Tensor:
    """Return the weights of `layers.uneven` for a tensor whose size may be unknown."""
    steps = tf.linspace(tf.constant(-1, tf.float64), tf.constant(2, tf.float64), tf.size(output))
    return tf.reshape(tf.cast(steps, output.dtype), tf.shape(output))


def with_unknown_sizes(tensor: Any) -> Any:
    """Describe a tensor whose heads and vectors alone have a known size."""
    known = {4: (1, 2, 3), 3: (1, 2)}.get(len(tensor.shape), ())
    return tf.TensorSpec([size if axis in known else None for axis, size in enumerate(tensor.shape)], tensor.dtype)
