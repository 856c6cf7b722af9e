"""Generate the inputs that the goldens store as a seed and a kind; docs/goldens.md states the rule for any language.

The generator of the goldens implements the rule independently. The sha256 in the index proves that both agree.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arrays import Array

__all__ = ["KINDS", "generated"]

KINDS = ("bell", "contrast", "full", "bits", "tiles")
"""Kinds of numbers: small integers with a bell-shaped distribution; the same, but a random sixteenth times 8; odd
integers; 0 and 1 with the same share of ones everywhere, or with a share for each tile of the last two axes."""

LEVELS = numpy.array([0, 2, -1, 3, -3, 1, 4, -2])
"""The numbers that are added to the blocks of rows of a generator with `levels`."""

SHARES = numpy.array([0, 64, 192, 256])
"""The shares of ones that a tile can have, in parts of 256."""


def generated(
    shape: Sequence[int],
    seed: int,
    kind: str,
    unit: float = 1.0,
    *,
    bits: int = 8,
    share: int = 0,
    tile: int = 1,
    levels: int = 0,
    mean: float = 0.0,
    hidden: int = 0,
) -> Array:
    """Return the float64 array: element n is `mean` plus unit times an integer made from word n of the counter."""
    count = math.prod(shape)
    word = _words(numpy.arange(count), seed).reshape(tuple(shape))
    highest = (word >> numpy.uint64(56)).astype(numpy.int64)
    if kind == "full":
        integers = ((word >> numpy.uint64(64 - bits)) * numpy.uint64(2)).astype(numpy.int64) + (1 - 2**bits)
    elif kind == "bits":
        integers = highest < share
    elif kind == "tiles":
        integers = highest < _shares_of_tiles(shape, seed, tile)
    else:
        integers = _sum_of_digits(word) - 60
        if kind == "contrast":
            integers = numpy.where(word < numpy.uint64(2**60), 8 * integers, integers)
    if levels:
        integers = integers + LEVELS[numpy.arange(shape[-2]) // levels % len(LEVELS)][:, None]
    return numpy.where(highest < hidden, -numpy.inf, integers * unit + mean)


def _sum_of_digits(word: Array) -> Array:
    """Return the sum of the lowest eight hexadecimal digits of each word: all bytes at once, then the sum of bytes."""
    digits = numpy.uint64(0x0F0F0F0F)
    pairs = (word & digits) + ((word >> numpy.uint64(4)) & digits)
    sums = pairs * numpy.uint64(0x01010101)
    return ((sums >> numpy.uint64(24)) & numpy.uint64(0xFF)).astype(numpy.int64)


def _shares_of_tiles(shape: Sequence[int], seed: int, tile: int) -> Array:
    """Draw the share of each tile by a separate counter, whose seed is the complement."""
    lead = numpy.arange(math.prod(shape[:-2])).reshape((*shape[:-2], 1, 1))
    row, column = numpy.arange(shape[-2])[:, None] // tile, numpy.arange(shape[-1]) // tile
    word = _words((lead * 2**16 + row) * 2**16 + column, 2**64 - 1 - seed)
    return SHARES[(word >> numpy.uint64(62)).astype(numpy.int64)]


def _words(numbers: Array, seed: int) -> Array:
    """SplitMix64: mix a counter of 64 bits, wrapping around."""
    word = (numbers.astype(numpy.uint64) + numpy.uint64(1)) * numpy.uint64(0x9E3779B97F4A7C15) + numpy.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> numpy.uint64(shift))) * numpy.uint64(factor)
    return word ^ (word >> numpy.uint64(31))
