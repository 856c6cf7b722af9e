"""What is subtracted from logits before exp: any number will do that keeps the exponentials of a row within range."""

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
"""Exponentials of logits up to this are between 2^-24 and 2^24: they need no anchor beside factors up to `LARGEST`."""
LARGEST = 2.0**40
"""Products of two such factors and 2^24, summed, overflow nowhere; what underflows beside them is at most the smallest
normal number of float32."""
FEWEST_ROWS = 64
"""Below so many rows, to look at the factors costs more than a maximum of each row."""


def anchor_of(block: Block, *factors: Array) -> Array | None:
    """The maximum of each row, as a finite number; 0 in matrices of small logits, and None where all are such.

    `factors` are what exponentials are multiplied with. Nothing invisible has a say: where a pair is hidden, every row
    has its maximum.
    """
    small = _small_matrices(block, factors)
    if small is not None and small.all():
        return None
    maximum = row_maximum(block.logits)
    if block.visible is not None:
        return finite_anchor(maximum)
    return maximum if small is None else numpy.where(small, 0.0, maximum)


def finite_anchor(maximum: Array) -> Array:
    """A maximum, or the lowest number where it is -inf, since -inf - -inf is NaN."""
    if isinstance(maximum, numpy.ndarray):
        return numpy.maximum(maximum, _LOWEST[maximum.dtype])
    xp: Any = namespace_of(maximum)
    return xp.where(maximum == -math.inf, xp.finfo(maximum.dtype).min, maximum)


_LOWEST = {numpy.dtype(name): numpy.finfo(name).min for name in ("float32", "float64")}


def _small_matrices(block: Block, factors: tuple[Array, ...]) -> numpy.ndarray | None:
    """Which matrices have small logits and factors, (entries, kv_heads, 1, 1); None where that is not looked at."""
    if not isinstance(block.logits, numpy.ndarray) or block.visible is not None or block.tile.rows < FEWEST_ROWS:
        return None
    small = _within(block.logits, SMALL)
    for factor in factors:
        small &= _within(factor, LARGEST)
    return small


def _within(matrices: numpy.ndarray, limit: float) -> numpy.ndarray:
    """Which matrices have numbers from -limit to limit alone, NaN aside: it makes NaN of what it meets in any case."""
    above = numpy.fmax.reduce(matrices, axis=(-2, -1), keepdims=True) > limit
    return ~(above | (numpy.fmin.reduce(matrices, axis=(-2, -1), keepdims=True) < -limit))
