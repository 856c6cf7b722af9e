"""Layers, tokens and gradients in the arrays of JAX."""

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
    """A layer in which every size is another, with numbers in every parameter."""
    layer = MultiHeadAttention(layers.EMBED, layers.HEADS, key=jax.random.key(0), **layers.SIZES | options)
    found = layers.parameters({name: one.shape for name, one in layer.params.items()})
    return layer.replace(**{name: jnp.asarray(one, dtype) for name, one in found.items()})


def tokens(length: int = layers.LENGTH, size: int = layers.EMBED, seed: int = 5) -> Array:
    """Tokens of normal numbers."""
    return jnp.asarray(layers.tokens(length, size, seed))


def heads(length: int, seed: int = 5) -> list[Array]:
    """Keys and values for a cache."""
    return [jnp.asarray(one) for one in layers.heads(length, seed)]


def parts(x: Array, lengths: Sequence[int]) -> list[Array]:
    """Tokens cut into parts of these lengths."""
    ends = [sum(lengths[:count]) for count in range(1, len(lengths))]
    return jnp.split(x, ends, axis=1)


def operands(q_len: int = 5, kv_len: int = 7, dtype: str = "float64") -> list[Array]:
    """Query, key and value of a call of attention, 2 x 6 heads over 3."""
    shapes = (2, 6, q_len, 11), (2, 3, kv_len, 11), (2, 3, kv_len, 13)
    return [jnp.asarray(numbers(*shape), dtype) for shape in shapes]


def floats(tree: Any, dtype: str) -> Any:
    """Arrays of floats in another dtype, everything else as it is."""

    def converted(one: Any) -> Any:
        return one.astype(dtype) if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jnp.floating) else one

    return jax.tree.map(converted, tree)


def with_gradients(call: Callable[..., Any], *given: Any) -> list[Array]:
    """What a function gives, and the gradients of a sum in which every element counts differently."""
    outputs, pull = jax.vjp(call, *given)
    cotangents = jax.tree.map(lambda one: jnp.asarray(layers.uneven(one.shape), one.dtype), outputs)
    return jax.tree.leaves((outputs, pull(cotangents)))
