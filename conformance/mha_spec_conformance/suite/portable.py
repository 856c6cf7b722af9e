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

KINDS = ("bell", "contrast", "full")
"""Kinds of numbers: bell-shaped small integers; the same, but every sixteenth on average eightfold; odd integers."""


def generated(shape: Sequence[int], seed: int, kind: str, unit: float, bits: int = 8) -> Array:
    """Give the float64 array: element n is unit times an integer made from the n-th word of the counter."""
    word = _words(math.prod(shape), seed)
    if kind == "full":
        integers = ((word >> numpy.uint64(64 - bits)) * numpy.uint64(2)).astype(numpy.int64) + (1 - 2**bits)
    else:
        digits = [(word >> numpy.uint64(4 * n)) % numpy.uint64(16) for n in range(8)]
        integers = numpy.stack(digits).astype(numpy.int64).sum(axis=0) - 60
        if kind == "contrast":
            integers = numpy.where(word < numpy.uint64(2**60), 8 * integers, integers)
    return (integers * unit).reshape(tuple(shape))


def _words(count: int, seed: int) -> Array:
    """SplitMix64: mix a counter of 64 bits, wrapping around."""
    word = numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15) + numpy.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> numpy.uint64(shift))) * numpy.uint64(factor)
    return word ^ (word >> numpy.uint64(31))
