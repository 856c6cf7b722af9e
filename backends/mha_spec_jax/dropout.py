"""Checks of the random key from which dropout masks are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.scalars import short_repr

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = ["key_of"]


def key_of(a: Arguments) -> jax.Array | None:
    """Return the key of a call that draws a mask, else None; JAX has no global generator (MHA-DROP-4)."""
    if a.dropout_rate == 0 or a.dropout_mask is not None:
        return None
    if a.dropout_key is None:
        message = f"`dropout_key` must be a key of jax.random with dropout_rate={a.dropout_rate} and no dropout_mask"
        raise ArgumentValueError(f"{message}, received dropout_key=None. jax has no global generator. [MHA-DROP-4]")
    if not isinstance(a.dropout_key, jax.Array) or not _is_key(a.dropout_key):
        wanted = "a single key such as jax.random.key(0), or numbers of uint32 as of jax.random.PRNGKey(0)"
        received = f"received dropout_key={short_repr(a.dropout_key)}"
        raise ArgumentTypeError(f"`dropout_key` must be {wanted}, {received}. [MHA-DROP-4]")
    return a.dropout_key


def _is_key(array: jax.Array) -> bool:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array.shape == ()
    return array.dtype == jnp.uint32 and array.ndim == 1 and _has_default_size(array)


def _has_default_size(numbers: jax.Array) -> bool:
    """Tell whether an array has as many numbers as a key of the default implementation, which JAX takes it for."""
    try:
        jax.random.wrap_key_data(numbers)
    except TypeError:
        return False
    return True
