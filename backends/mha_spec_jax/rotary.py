"""Angles of rotary positions in arrays of JAX, in float32 as accurate as float64 on the host.

Only the fraction of a whole turn matters. In units of 2^-32 turns, the fraction of position * frequency is a product of
integers modulo 2^32, which hardware computes exactly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy

from mha_spec import layer_steps
from mha_spec.arrays import host_integers, softmax_dtype_name

from .plan import are_known

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax import Array

__all__ = ["positions", "turns"]

UNITS = 2.0**32
"""The number of units in a turn."""


def positions(offset: Array | Sequence[int] | int, length: int, like: Array) -> Array | numpy.ndarray:
    """Return the position of token i, offset + i, as int32 where the host does not know it (MHA-POS-1)."""
    if host_integers(offset) is not None and are_known(length):
        return layer_steps.positions(offset, length, like)
    return jnp.asarray(offset, jnp.int32)[..., None] + jnp.arange(length, dtype=jnp.int32)


def turns(positions: Array | Sequence[float], frequencies: numpy.ndarray | Array, like: Array) -> tuple[Array, Array]:
    """Compute cosine and sine of position * frequency in the softmax's type (MHA-ROTARY-5)."""
    on_host = not isinstance(positions, jax.Array)
    if on_host or isinstance(frequencies, jax.Array) or softmax_dtype_name(like.dtype.name) == "float64":
        return layer_steps.turns(positions, frequencies, like)
    units, rest = numpy.divmod(numpy.remainder(frequencies / (2 * math.pi), 1.0) * UNITS, 1.0)
    return _turns(positions, units.astype(numpy.uint32), rest.astype(numpy.float32), frequencies.astype(numpy.float32))


@jax.jit
def _turns(
    positions: Array, units: numpy.ndarray, rest: numpy.ndarray, frequencies: numpy.ndarray
) -> tuple[Array, Array]:
    """Compute cosine and sine; a frequency consists of whole units, the fraction of a unit, and radians."""
    positions = layer_steps.for_each_pair(positions)
    whole, fraction = positions, None
    if jnp.issubdtype(positions.dtype, jnp.floating):
        nearest = jnp.round(jax.lax.stop_gradient(positions))
        whole, fraction = nearest.astype(jnp.int32), (positions - nearest).astype(jnp.float32)
    product = (whole.astype(jnp.uint32) * units).astype(jnp.int32)
    angles = (product.astype(jnp.float32) + whole.astype(jnp.float32) * rest) * numpy.float32(2 * math.pi / UNITS)
    if fraction is not None:
        angles = angles + fraction * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return (cosine[:, None, :, :], sine[:, None, :, :]) if cosine.ndim == 3 else (cosine, sine)
