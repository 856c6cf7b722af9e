"""Checks of the random keys from which dropout masks and parameters are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mha_spec.errors import refuse_type, refuse_value
from mha_spec.scalars import short_repr

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = ["check_key", "key_of"]


def key_of(a: Arguments) -> jax.Array | None:
    """Return the key of a call that draws a mask, else None; JAX has no global generator (MHA-DROP-4)."""
    if a.dropout_rate == 0 or a.dropout_mask is not None:
        return None
    if a.dropout_key is None:
        message = f"`dropout_key` must be a key of jax.random with dropout_rate={a.dropout_rate} and no dropout_mask"
        refuse_value("MHA-DROP-4", f"{message}, received dropout_key=None. jax has no global generator.")
    check_key("dropout_key", a.dropout_key, "MHA-DROP-4")
    return a.dropout_key


def check_key(label: str, key: object, clause: str) -> None:
    """Require a single key of jax.random."""
    if not isinstance(key, jax.Array) or not _is_key(key):
        wanted = "a single key such as jax.random.key(0), or numbers of uint32 as of jax.random.PRNGKey(0)"
        refuse_type(clause, f"`{label}` must be {wanted}, received {label}={short_repr(key)}.")


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
