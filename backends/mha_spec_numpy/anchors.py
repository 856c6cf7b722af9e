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

__all__ = ["anchor_of", "finite_anchor", "large_factors"]

SMALL = 16.0
"""Logits up to this have exponentials from 2^-24 to 2^24, which need no anchor if their factors are up to `LARGEST`."""
LARGEST = 2.0**40
"""Sums of products of 2^24 and two such factors do not overflow float32, and a product that underflows is too small to
change a row by more than the smallest normal number."""
FEWEST_ROWS = 64
"""With fewer rows than this, the maximum of each row costs less than the range of all logits."""


def anchor_of(block: Block, needed: Array | bool = False) -> Array | None:
    """Return the maximum of each row, made finite; 0 in a row of small logits; None if all logits are small.

    `needed` marks rows, (entries, kv_heads, rows or 1, 1), with an anchor in any case. Each row decides for itself,
    and only with its visible pairs (MHA-PURE-3, MHA-POISON-2).
    """
    ranged = isinstance(block.logits, numpy.ndarray) and block.tile.rows >= FEWEST_ROWS and needed is not True
    if ranged and needed is False and _all_are_small(block):
        return None
    maximum = row_maximum(block.logits)
    anchor = maximum if block.visible is None else finite_anchor(maximum)
    return numpy.where(_small_rows(block, maximum) & ~numpy.asarray(needed), 0.0, anchor) if ranged else anchor


def finite_anchor(maximum: Array) -> Array:
    """Return a maximum, or the lowest finite number where it is -inf, since -inf - -inf is NaN."""
    if isinstance(maximum, numpy.ndarray):
        return numpy.maximum(maximum, _LOWEST[maximum.dtype])
    xp: Any = namespace_of(maximum)
    return xp.where(maximum == -math.inf, xp.finfo(maximum.dtype).min, maximum)


_LOWEST = {numpy.dtype(name): numpy.finfo(name).min for name in ("float32", "float64")}


def large_factors(*factors: Array) -> numpy.ndarray | bool:
    """Mark the matrices whose exponentials need an anchor, because they are multiplied with large numbers.

    NaN is ignored, since every sum that it enters is NaN with and without an anchor.
    """
    if not all(isinstance(factor, numpy.ndarray) for factor in factors):
        return True
    large: numpy.ndarray | bool = False
    for factor in factors:
        large |= numpy.fmax.reduce(factor, axis=(-2, -1), keepdims=True) > LARGEST
        large |= numpy.fmin.reduce(factor, axis=(-2, -1), keepdims=True) < -LARGEST
    return large if numpy.any(large) else False


def _all_are_small(block: Block) -> bool:
    """Return True if the logits of all visible pairs are from -SMALL to SMALL; NaN, which stays NaN, is ignored."""
    logits = block.logits
    if not numpy.fmax.reduce(logits, axis=None) <= SMALL:
        return False
    if block.visible is None:
        return bool(numpy.fmin.reduce(logits, axis=None) >= -SMALL)
    return numpy.count_nonzero(logits < -SMALL) == logits.size - block.visible.count(logits.size)


def _small_rows(block: Block, maximum: numpy.ndarray) -> numpy.ndarray:
    """Mark the rows, (entries, kv_heads, rows, 1), whose logits of visible pairs are from -SMALL to SMALL."""
    small = maximum <= SMALL
    if not small.any():
        return small
    low = block.logits < -SMALL
    if block.visible is not None:
        low &= block.visible_pairs()
    return small & ~low.any(axis=-1, keepdims=True)
