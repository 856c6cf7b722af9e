"""The angles of rotary positions in arrays of jax, as right in float32 as those that float64 gives on the host.

An angle is worth no more than its part of a whole turn. With turns counted in units of 2^-32, that part of an integer
times a frequency is a product of integers modulo 2^32, which hardware gives exactly.
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
"""How many units a turn has."""


def positions(offset: Array | Sequence[int] | int, length: int, like: Array) -> Array | numpy.ndarray:
    """Token i sits at offset + i (MHA-POS-1); int32, whatever the type of an offset in an array of jax."""
    if host_integers(offset) is not None and are_known(length):
        return layer_steps.positions(offset, length, like)
    return jnp.asarray(offset, jnp.int32)[..., None] + jnp.arange(length, dtype=jnp.int32)


def turns(positions: Array | Sequence[float], frequencies: numpy.ndarray, like: Array) -> tuple[Array, Array]:
    """Cosine and sine of position * frequency in the softmax's type (MHA-ROTARY-5)."""
    if not isinstance(positions, jax.Array) or softmax_dtype_name(like.dtype.name) == "float64":
        return layer_steps.turns(positions, frequencies, like)
    units, rest = numpy.divmod(numpy.remainder(frequencies / (2 * math.pi), 1.0) * UNITS, 1.0)
    return _turns(positions, units.astype(numpy.uint32), *(one.astype(numpy.float32) for one in (rest, frequencies)))


@jax.jit
def _turns(
    positions: Array, units: numpy.ndarray, rest: numpy.ndarray, frequencies: numpy.ndarray
) -> tuple[Array, Array]:
    """Cosine and sine of a frequency given in units, the rest of a unit, and in radians."""
    positions = positions[..., None]
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
