"""Layers, tokens and gradients as arrays of JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mha_spec_jax import MultiHeadAttention
from support import layers
from support.numbers import numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jax import Array

__all__ = ["floats", "heads", "operands", "parts", "sized", "tokens", "with_gradients"]


def sized(dtype: str = "float64", **options: Any) -> Any:
    """Make a layer whose sizes are all different, with numbers in every parameter."""
    layer = MultiHeadAttention(layers.EMBED, layers.HEADS, key=jax.random.key(0), **layers.SIZES | options)
    arrays = layers.parameters({name: array.shape for name, array in layer.params.items()})
    return layer.replace(**{name: jnp.asarray(array, dtype) for name, array in arrays.items()})


def tokens(length: int = layers.LENGTH, size: int = layers.EMBED, seed: int = 5) -> Array:
    """Draw tokens from the normal distribution."""
    return jnp.asarray(layers.tokens(length, size, seed))


def heads(length: int, seed: int = 5) -> list[Array]:
    """Draw keys and values for a cache."""
    return [jnp.asarray(array) for array in layers.heads(length, seed)]


def parts(x: Array, lengths: Sequence[int]) -> list[Array]:
    """Cut tokens into parts of these lengths."""
    ends = [sum(lengths[:count]) for count in range(1, len(lengths))]
    return jnp.split(x, ends, axis=1)


def operands(q_len: int = 5, kv_len: int = 7, dtype: str = "float64") -> list[Array]:
    """Draw query, key and value of a call of attention with 6 heads and 3 key/value heads."""
    shapes = (2, 6, q_len, 11), (2, 3, kv_len, 11), (2, 3, kv_len, 13)
    return [jnp.asarray(numbers(*shape), dtype) for shape in shapes]


def floats(tree: Any, dtype: str) -> Any:
    """Convert floating arrays to another dtype, and leave the other leaves unchanged."""

    def converted(array: Any) -> Any:
        return (
            array.astype(dtype) if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.floating) else array
        )

    return jax.tree.map(converted, tree)


def with_gradients(call: Callable[..., Any], *arguments: Any) -> list[Array]:
    """Return the outputs of a function, and gradients for cotangents of which every element differs."""
    outputs, pull = jax.vjp(call, *arguments)
    cotangents = jax.tree.map(lambda array: jnp.asarray(layers.uneven(array.shape), array.dtype), outputs)
    return jax.tree.leaves((outputs, pull(cotangents)))
