"""Proven numbers: exact integers, balls that contain the true value, and their rounding to float64.

A ball (`arb`, of python-flint) is a midpoint and a radius. Every operation on balls returns a ball that contains the
results for all numbers in its operands, so that a value is correctly rounded if both ends of its ball round to the same
float64. Operations on exact numbers whose result fits the precision are exact, with radius 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy
from flint import arb, arb_mat, ctx, fmpz_mat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["PRECISIONS", "InadmissibleError", "exact_product", "nearest", "product", "rounded"]

PRECISIONS = (128, 384, 1408, 4096)
"""Bits of the balls, raised until every element resolves.

A number that is 0 by cancellation resolves at 1408 bits, because its ball is within 2**-1075, which rounds to 0.
"""


MANTISSA_BITS = 53
"""Bits of the significand of a float64."""


class InadmissibleError(Exception):
    """A case cannot be admitted, because its expected values cannot be proven or its inputs are not exact."""


def nearest(ball: arb) -> float | None:
    """Round a ball to the float64 nearest to the true value, with +0 for zeros; None if the ball is too wide."""
    if not ball.is_finite():
        return None
    low, high = _nearest_of_exact(ball.lower()), _nearest_of_exact(ball.upper())
    return low + 0.0 if low == high and math.isfinite(low) else None


def _nearest_of_exact(number: arb) -> float:
    """Round mantissa * 2**exponent; Python's division of integers rounds correctly, even to subnormal numbers."""
    mantissa, exponent = (int(part) for part in number.man_exp())
    magnitude = mantissa.bit_length() + exponent
    if mantissa == 0 or magnitude < -1080:
        return 0.0
    if magnitude > 1025:
        return math.copysign(math.inf, mantissa)
    try:
        return float(mantissa << exponent) if exponent >= 0 else mantissa / (1 << -exponent)
    except OverflowError:
        return math.copysign(math.inf, mantissa)


def rounded(
    name: str, evaluate: Callable[[], Mapping[str, numpy.ndarray]], finite: Mapping[str, numpy.ndarray]
) -> dict[str, numpy.ndarray]:
    """Evaluate arrays of balls at rising precision until every element marked `finite` is proven; others are NaN.

    Raises:
        InadmissibleError: An element does not resolve at the highest precision.
    """
    unresolved = ""
    for bits in PRECISIONS:
        with ctx.workprec(bits):
            arrays = {output: _round_array(balls, finite[output]) for output, balls in evaluate().items()}
        unresolved = _first_unresolved(arrays, finite)
        if not unresolved:
            return arrays
    raise InadmissibleError(f"{name}: {unresolved} does not resolve at {PRECISIONS[-1]} bits")


def _round_array(balls: numpy.ndarray, finite: numpy.ndarray) -> numpy.ndarray:
    values = numpy.full(balls.shape, math.nan)
    for n in numpy.flatnonzero(finite):
        value = nearest(balls.flat[n])
        if value is not None:
            values.flat[n] = value
    return values


def _first_unresolved(arrays: Mapping[str, numpy.ndarray], finite: Mapping[str, numpy.ndarray]) -> str:
    for output, values in arrays.items():
        places = numpy.argwhere(numpy.isnan(values) & finite[output])
        if len(places):
            return f"{output}{places[0].tolist()}"
    return ""


def exact_product(left: numpy.ndarray, right: numpy.ndarray) -> tuple[list[list[int]], int]:
    """Multiply the rows of `left` by the rows of `right`, (n, d) and (m, d), exactly: integers and an exponent of two.

    Elements that are not finite count as 0; callers know the rows that contain them.
    """
    if 0 in (*left.shape, *right.shape):
        return [[0] * len(right) for _ in range(len(left))], 0
    (a, exponent_a), (b, exponent_b) = _integers(left), _integers(right)
    if _largest(a) * _largest(b) * left.shape[1] < 2**63:
        # Every partial sum fits 64 bits, so that NumPy's product of integers is exact.
        return (a.astype(numpy.int64) @ b.astype(numpy.int64).T).tolist(), exponent_a + exponent_b
    table = (fmpz_mat(a.tolist()) * fmpz_mat(b.tolist()).transpose()).tolist()
    return [[int(number) for number in row] for row in table], exponent_a + exponent_b


def _largest(integers: numpy.ndarray) -> int:
    return int(abs(integers).max())


def _integers(values: numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """Return integers and an exponent of two whose product are the values; they are Python integers beyond 2**53."""
    finite = numpy.where(numpy.isfinite(values), values, 0.0)
    largest = numpy.frexp(abs(finite).max())[1]
    exponent = 0
    while (scaled := numpy.ldexp(finite, -exponent) % 1).any() and largest - exponent < MANTISSA_BITS:
        exponent -= 1
    if not scaled.any() and largest - exponent < 63:
        return numpy.ldexp(finite, -exponent).astype(numpy.int64), exponent
    ratios = [[x.as_integer_ratio() for x in row] for row in finite.tolist()]
    shift = max(den.bit_length() - 1 for row in ratios for _, den in row)
    return numpy.array([[num << (shift - den.bit_length() + 1) for num, den in row] for row in ratios], object), -shift


def product(left: Sequence[Sequence[arb]], right: numpy.ndarray) -> numpy.ndarray:
    """Multiply balls (n, m) by floats (m, columns); floats that are not finite count as 0."""
    result = numpy.full((len(left), right.shape[1]), arb(0), dtype=object)
    if result.size and len(right):
        # Few values occur in many places, and a ball of each distinct value is made once.
        balls = {x: arb(x) if math.isfinite(x) else arb(0) for x in numpy.unique(right).tolist()}
        lost = arb(0)
        exact = [[balls.get(x, lost) for x in row] for row in right.tolist()]
        table = (arb_mat([list(row) for row in left]) * arb_mat(exact)).tolist()
        for index, row in enumerate(table):
            result[index, :] = row
    return result
