"""The kinds of elements of an answer, which say how each is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

__all__ = ["ANY", "EXACT", "FINITE_VALUE", "NAN_VALUE", "NON_FINITE", "Marked"]

FINITE_VALUE, EXACT, NAN_VALUE, NON_FINITE, ANY = range(5)
"""Within the allowance; equal to the golden; NaN; NaN or infinite; not compared."""


@dataclass(frozen=True)
class Marked:
    """Values and their kinds, in the same shape."""

    values: numpy.ndarray
    kinds: numpy.ndarray

    @classmethod
    def fill(cls, values: numpy.ndarray, kinds: numpy.ndarray, exact: float) -> Marked:
        """Set exact elements to `exact`, and elements without a finite value to NaN."""
        values = numpy.where(kinds == EXACT, exact, numpy.where(kinds == FINITE_VALUE, values, math.nan))
        return cls(values, kinds)

    def put(self, place: tuple[int, ...], value: float | numpy.ndarray, kind: int | numpy.ndarray) -> None:
        """Set the value and the kind of an element, or of all elements of a row."""
        self.values[place] = value
        self.kinds[place] = kind
