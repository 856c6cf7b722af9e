"""Inputs that any language can generate: a counter, a 64-bit mix per element, an exact number.

Element n of an array (row-major, n from 0) is a function of the seed and n alone. All arithmetic is on unsigned 64-bit
integers and wraps around (SplitMix64: Steele, Lea and Flood 2014):

    z = seed + (n + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z =  z ^ (z >> 31)

The kind turns z into an integer k, and the element is k * unit, where unit is a power of two:

    "bell"      k = (sum of the eight 4-bit digits of z's low 32 bits) - 60; |k| <= 60, roughly normal, deviation 13
    "contrast"  the bell's k, times 8 where the highest four bits of z are 0: a sixteenth of the elements is large
    "full"      k = 2 * (z >> (64 - bits)) + 1 - 2**bits; odd, |k| < 2**bits, uniform: every bit is used

The first two are exact in bfloat16 and float16 for unit 2**-10 to 2**6; "full" is exact in a type whose significand has
`bits` bits (8 for bfloat16, 11 for float16, 24 for float32, 53 for float64).

Two kinds give 0 and 1, for masks:

    "bits"      k = 1 where z >> 56 is less than `share`, so that share / 256 of the elements are 1
    "tiles"     the same, but each tile of the last two axes has its own share, SHARES[w >> 62]; w is the word of the
                tile's number, (lead * 2**16 + tile row) * 2**16 + tile column, for the seed ~seed

Members that change the elements of the other kinds:

    levels      LEVELS[(row // levels) % 8] is added to k, where row is the index in the last axis but one
    mean        is added to the element
    hidden      the element is -inf where z >> 56 is less than `hidden`

    uint64_t mix(uint64_t z) {                          /* C: element n of "bell" is (k - 60) * unit */
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    z = mix(seed + (n + 1) * 0x9E3779B97F4A7C15u);
    for (k = 0, d = 0; d < 8; d++) k += (z >> (4 * d)) & 15;
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LEVELS", "generate", "words"]

LEVELS = (0, 2, -1, 3, -3, 1, 4, -2)
"""The numbers that are added to the rows of each block, so that sums over rows rise and fall from block to block."""

SHARES = (0, 64, 192, 256)
"""The shares of ones, of 256, that a tile can have: none, few, many or all."""

_GOLDEN_RATIO = numpy.uint64(0x9E3779B97F4A7C15)
_FIRST = numpy.uint64(0xBF58476D1CE4E5B9)
_SECOND = numpy.uint64(0x94D049BB133111EB)


def words(count: int, seed: int) -> numpy.ndarray:
    """Return the first `count` 64-bit words of the counter that starts at `seed`."""
    return _mixed(numpy.arange(count, dtype=numpy.uint64), seed)


def _mixed(numbers: numpy.ndarray, seed: int) -> numpy.ndarray:
    z = numpy.uint64(seed) + (numbers + numpy.uint64(1)) * _GOLDEN_RATIO
    z = (z ^ (z >> numpy.uint64(30))) * _FIRST
    z = (z ^ (z >> numpy.uint64(27))) * _SECOND
    return z ^ (z >> numpy.uint64(31))


def generate(
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
) -> numpy.ndarray:
    """Return the float64 array of a generator entry, whose members are the arguments."""
    z = words(math.prod(shape), seed)
    makers = {
        "bell": lambda: _bell(z),
        "contrast": lambda: _contrast(z),
        "full": lambda: _full(z, bits),
        "bits": lambda: (z >> numpy.uint64(56)) < numpy.uint64(share),
        "tiles": lambda: (z >> numpy.uint64(56)) < _shares(shape, seed, tile),
    }
    integers = makers[kind]()
    if levels:
        row = numpy.arange(z.size) // shape[-1] % shape[-2]
        integers = integers + numpy.asarray(LEVELS)[row // levels % len(LEVELS)]
    values = integers * unit + mean
    if hidden:
        values = numpy.where((z >> numpy.uint64(56)) < numpy.uint64(hidden), -numpy.inf, values)
    return values.reshape(tuple(shape))


def _shares(shape: Sequence[int], seed: int, tile: int) -> numpy.ndarray:
    """Return the share of the tile of each element."""
    n = numpy.arange(math.prod(shape), dtype=numpy.uint64)
    rows, columns, size = (numpy.uint64(x) for x in (shape[-2], shape[-1], tile))
    row, column, lead = n // columns % rows, n % columns, n // columns // rows
    number = (lead * numpy.uint64(2**16) + row // size) * numpy.uint64(2**16) + column // size
    return numpy.asarray(SHARES, dtype=numpy.uint64)[_mixed(number, seed ^ (2**64 - 1)) >> numpy.uint64(62)]


def _bell(z: numpy.ndarray) -> numpy.ndarray:
    digits = [(z >> numpy.uint64(4 * digit)) & numpy.uint64(15) for digit in range(8)]
    return numpy.asarray(numpy.sum(digits, axis=0, dtype=numpy.int64)) - 60


def _contrast(z: numpy.ndarray) -> numpy.ndarray:
    return _bell(z) * numpy.where(z >> numpy.uint64(60) == 0, 8, 1)


def _full(z: numpy.ndarray, bits: int) -> numpy.ndarray:
    return 2 * (z >> numpy.uint64(64 - bits)).astype(numpy.int64) + 1 - 2**bits
