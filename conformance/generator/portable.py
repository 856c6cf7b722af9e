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

__all__ = ["generate", "words"]

_GOLDEN_RATIO = numpy.uint64(0x9E3779B97F4A7C15)
_FIRST = numpy.uint64(0xBF58476D1CE4E5B9)
_SECOND = numpy.uint64(0x94D049BB133111EB)


def words(count: int, seed: int) -> numpy.ndarray:
    """Return the first `count` 64-bit words of the counter that starts at `seed`."""
    z = numpy.uint64(seed) + numpy.arange(1, count + 1, dtype=numpy.uint64) * _GOLDEN_RATIO
    z = (z ^ (z >> numpy.uint64(30))) * _FIRST
    z = (z ^ (z >> numpy.uint64(27))) * _SECOND
    return z ^ (z >> numpy.uint64(31))


def generate(shape: Sequence[int], seed: int, kind: str, unit: float, bits: int = 8) -> numpy.ndarray:
    """Return the float64 array of a generator entry; only the kind "full" uses `bits`."""
    z = words(math.prod(shape), seed)
    integers = {"bell": _bell, "contrast": _contrast, "full": lambda z: _full(z, bits)}[kind](z)
    return (integers * unit).reshape(tuple(shape))


def _bell(z: numpy.ndarray) -> numpy.ndarray:
    digits = [(z >> numpy.uint64(4 * digit)) & numpy.uint64(15) for digit in range(8)]
    return numpy.asarray(numpy.sum(digits, axis=0, dtype=numpy.int64)) - 60


def _contrast(z: numpy.ndarray) -> numpy.ndarray:
    return _bell(z) * numpy.where(z >> numpy.uint64(60) == 0, 8, 1)


def _full(z: numpy.ndarray, bits: int) -> numpy.ndarray:
    return 2 * (z >> numpy.uint64(64 - bits)).astype(numpy.int64) + 1 - 2**bits
