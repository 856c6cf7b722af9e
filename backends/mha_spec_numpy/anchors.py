"""Anchors, which are subtracted from logits before exp; an anchor is any number that keeps exponentials in range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import namespace_of

from .operations import row_maximum

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .problem import Block

__all__ = ["anchor_of", "finite_anchor"]

SMALL = 16.0
"""Logits up to this have exponentials from 2^-24 to 2^24, which need no anchor if their factors are up to `LARGEST`."""
LARGEST = 2.0**40
"""Sums of products of 2^24 and two such factors do not overflow float32, and a product that underflows is too small to
change a row by more than the smallest normal number."""
FEWEST_ROWS = 64
"""With fewer rows than this, the maximum of each row costs less than the range of the factors."""


def anchor_of(block: Block, *factors: Array) -> Array | None:
    """Give the maximum of each row, made finite; 0 in a matrix of small logits; None if all logits are small.

    The exponentials are multiplied with `factors`, which must be small, too.
    """
    # An invisible pair must not change the anchor: if a pair is invisible, every row has its maximum (MHA-POISON-1).
    small = _small_matrices(block, factors)
    if small is not None and small.all():
        return None
    maximum = row_maximum(block.logits)
    if block.visible is not None:
        return finite_anchor(maximum)
    return maximum if small is None else numpy.where(small, 0.0, maximum)


def finite_anchor(maximum: Array) -> Array:
    """Give a maximum, or the lowest finite number where it is -inf, since -inf - -inf is NaN."""
    if isinstance(maximum, numpy.ndarray):
        return numpy.maximum(maximum, _LOWEST[maximum.dtype])
    xp: Any = namespace_of(maximum)
    return xp.where(maximum == -math.inf, xp.finfo(maximum.dtype).min, maximum)


_LOWEST = {numpy.dtype(name): numpy.finfo(name).min for name in ("float32", "float64")}


def _small_matrices(block: Block, factors: tuple[Array, ...]) -> numpy.ndarray | None:
    """Tell which matrices have small logits and factors, (entries, kv_heads, 1, 1); None if that is not computed."""
    if not isinstance(block.logits, numpy.ndarray) or block.visible is not None or block.tile.rows < FEWEST_ROWS:
        return None
    small = _within(block.logits, SMALL)
    for factor in factors:
        small &= _within(factor, LARGEST)
    return small


def _within(matrices: numpy.ndarray, limit: float) -> numpy.ndarray:
    """Tell which matrices hold only numbers from -limit to limit.

    NaN is ignored, since every sum that it enters is NaN with and without an anchor.
    """
    above = numpy.fmax.reduce(matrices, axis=(-2, -1), keepdims=True) > limit
    return ~(above | (numpy.fmin.reduce(matrices, axis=(-2, -1), keepdims=True) < -limit))
