"""Compare the outputs with the expected values, element by element: first by kind, then within the allowance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import ml_dtypes
import numpy

from mha_spec.arrays import softmax_dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec_conformance.suite.cases import Expected

    from .bounds import Precision

__all__ = [
    "ANY",
    "EXACT",
    "FINITE",
    "NAN",
    "NON_FINITE",
    "Judgement",
    "Worst",
    "gate_b",
    "golden_rows",
    "in_full_shape",
    "judge",
    "kinds_of_values",
    "shares",
    "wrong_elements",
]

FINITE, EXACT, NAN, NON_FINITE, ANY = range(5)
"""Kinds of elements: within the allowance, equal, NaN, NaN or infinite, not compared."""

LARGEST_DEVIATION = 6.0
"""Gate B: the largest distance of an element from the true value, in standard deviations."""

LARGEST_RMS = 1.25
"""Gate B: the largest root mean square over many elements."""

MANY = 1000
"""The number of elements from which the root mean square of an output is tested."""


class HasId(Protocol):
    """A case of the suite or a random case, whose id appears in messages."""

    @property
    def id(self) -> str:
        """The id of the case."""
        ...


@dataclass(frozen=True)
class Worst:
    """The element that is wrong, or that uses the largest share of its allowance."""

    output: str
    index: tuple[int, ...]
    expected: float
    got: float
    allowance: float


@dataclass(frozen=True)
class Judgement:
    """Gate A: the comparison of all elements, and the share of its allowance that the worst element uses."""

    passed: bool
    allowance_used: float
    worst: Worst | None
    reason: str | None


@dataclass(frozen=True)
class Statistics:
    """Gate B: the errors of a generic case in standard deviations."""

    elements: int
    largest: float
    rms: float

    @property
    def note(self) -> str | None:
        """A remark on errors that are too large for independent roundings, or None."""
        if not self.largest <= LARGEST_DEVIATION:
            return f"the largest of {self.elements} errors is {self.largest:.1f} standard deviations"
        if self.elements >= MANY and not self.rms <= LARGEST_RMS:
            return f"the root mean square of {self.elements} errors is {self.rms:.2f} standard deviations"
        return None


@dataclass(frozen=True)
class _Elements:
    """The compared elements of an output, only the rows that the golden holds, as flat arrays in float64."""

    output: str
    expected: numpy.ndarray
    got: numpy.ndarray
    kinds: numpy.ndarray
    allowance: numpy.ndarray
    shape: tuple[int, ...]
    rows: numpy.ndarray | None
    all_finite: bool
    """True if every element has the kind FINITE."""

    def index(self, position: int) -> tuple[int, ...]:
        """Return the index in the full output of an element at a flat position."""
        if self.rows is not None:
            width = self.expected.size // len(self.rows)
            row, column = divmod(position, width)
            position = int(self.rows[row]) * width + column
        return tuple(int(i) for i in numpy.unravel_index(position, self.shape))

    def at(self, position: int) -> Worst:
        """Describe the element at a flat position."""
        values = (float(x[position]) for x in (self.expected, self.got, self.allowance))
        return Worst(self.output, self.index(position), *values)


def judge(
    case: HasId,
    expected: Mapping[str, Expected],
    outputs: Mapping[str, numpy.ndarray],
    allowances: Mapping[str, numpy.ndarray],
    precision: Precision,
) -> Judgement:
    """Compare every element of every expected output (MHA-ACC-1).

    Elements that must be exact, NaN or non-finite are compared first. The others must satisfy
    |got - expected| <= allowance; if |expected| + allowance reaches the overflow threshold of the dtype, an infinity of
    the same sign is also right. For an allowance of 0 the share is 0 if the element is right, and infinite if not. A
    NaN never passes for a number, nor a number for a NaN.

    Args:
        case: The case that was asked.
        expected: The expected outputs by name; other outputs are not compared.
        outputs: The outputs that were returned, as full arrays.
        allowances: The allowances of the full outputs.
        precision: The precision of the run.
    """
    judged: list[tuple[float, _Elements, int]] = []
    for name, wanted in expected.items():
        if name not in outputs:
            return Judgement(False, numpy.inf, None, f"`{name}` is missing")
        if tuple(outputs[name].shape) != tuple(wanted.shape):
            shapes = f"shape={tuple(wanted.shape)}, received shape={outputs[name].shape}"
            return Judgement(False, numpy.inf, None, f"`{name}` must have {shapes}")
        elements = _elements(name, wanted, outputs[name], allowances[name])
        wrong = _wrong_kind(elements)
        if wrong.any():
            return _failed(case, elements, int(numpy.argmax(wrong)), numpy.inf)
        if elements.expected.size:
            shares = _shares(elements, overflow_threshold(name, outputs[name], precision))
            judged.append((float(shares.max()), elements, int(shares.argmax())))
    if not judged:
        return Judgement(True, 0.0, None, None)
    share, elements, position = max(judged, key=lambda output: output[0])
    if share > 1:
        return _failed(case, elements, position, share)
    return Judgement(True, share, elements.at(position), None)


def shares(
    name: str, wanted: Expected, output: numpy.ndarray, allowance: numpy.ndarray, precision: Precision
) -> numpy.ndarray:
    """Return the share of its allowance that each element of an output uses, infinity if it has a wrong kind."""
    elements = _elements(name, wanted, output, allowance)
    used = _shares(elements, overflow_threshold(name, output, precision))
    return numpy.where(_wrong_kind(elements), numpy.inf, used).reshape(numpy.shape(wanted.values))


def gate_b(
    expected: Mapping[str, Expected], outputs: Mapping[str, numpy.ndarray], deviations: Mapping[str, numpy.ndarray]
) -> dict[str, Statistics]:
    """Return the statistics of each output over the elements that have an allowance (MHA-ACC-2)."""
    statistics: dict[str, Statistics] = {}
    for name, wanted in expected.items():
        elements = _elements(name, wanted, outputs[name], deviations[name])
        free = (elements.kinds == FINITE) & (elements.allowance > 0)
        z = (elements.got[free] - elements.expected[free]) / elements.allowance[free]
        if z.size:
            statistics[name] = Statistics(z.size, float(abs(z).max()), float(numpy.sqrt(numpy.mean(z**2))))
    return statistics


def wrong_elements(
    name: str, wanted: Expected, output: numpy.ndarray, allowance: numpy.ndarray, precision: Precision
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Mark the wrong elements and the compared elements of an output, both in its full shape."""
    elements = _elements(name, wanted, output, allowance)
    shares = _shares(elements, overflow_threshold(name, output, precision))
    wrong = _wrong_kind(elements) | (shares > 1)
    return in_full_shape(wrong, wanted, False), in_full_shape(elements.kinds != ANY, wanted, False)


def in_full_shape(held: numpy.ndarray, wanted: Expected, elsewhere: float) -> numpy.ndarray:
    """Put the elements of the rows that the golden holds into an array of the full shape, filled with `elsewhere`."""
    if wanted.rows is None:
        return held.reshape(wanted.shape)
    width = held.size // max(len(wanted.rows), 1)
    rows = numpy.full((math.prod(wanted.shape) // max(width, 1), width), elsewhere, held.dtype)
    rows[wanted.rows] = held.reshape(-1, width)
    return rows.reshape(wanted.shape)


def overflow_threshold(name: str, output: numpy.ndarray, precision: Precision) -> float:
    """Return the smallest number that rounds to infinity in the dtype of the output or of the run."""
    expected_dtype = softmax_dtype_name(precision.dtype) if "lse" in name else precision.dtype
    return min(_overflow_threshold(dtype) for dtype in (expected_dtype, output.dtype))


@lru_cache
def _overflow_threshold(dtype: str | numpy.dtype) -> float:
    if numpy.dtype(dtype).kind in "iu":
        return numpy.inf
    limits = ml_dtypes.finfo(dtype)
    unit = float(limits.eps) / 2
    return float(limits.max) + float(limits.max) * unit / (2 - 2 * unit)


def _elements(name: str, wanted: Expected, output: numpy.ndarray, allowance: numpy.ndarray) -> _Elements:
    got, allowed = (golden_rows(x, wanted).astype(numpy.float64, copy=False).ravel() for x in (output, allowance))
    values = numpy.ravel(wanted.values)
    kinds = numpy.zeros(values.shape, dtype=numpy.uint8) if wanted.kinds is None else numpy.ravel(wanted.kinds)
    return _Elements(name, values, got, kinds, allowed, tuple(wanted.shape), wanted.rows, wanted.kinds is None)


def golden_rows(output: numpy.ndarray, wanted: Expected) -> numpy.ndarray:
    """Return the rows of an output that the golden holds, or the whole output if it holds all rows."""
    if wanted.rows is None:
        return output
    return output.reshape(-1, wanted.values.size // max(len(wanted.rows), 1))[wanted.rows]


def kinds_of_values(values: numpy.ndarray) -> numpy.ndarray:
    """Return the kinds of the elements of an expected output by its values alone: NaN, exact if infinite, or finite."""
    kinds = numpy.where(numpy.isnan(values), NAN, numpy.where(numpy.isinf(values), EXACT, FINITE))
    return kinds.astype(numpy.uint8)


def _wrong_kind(elements: _Elements) -> numpy.ndarray:
    """Mark the elements that must be exact, NaN or non-finite and are not; an undefined kind is never right."""
    kinds, got = elements.kinds, elements.got
    if elements.all_finite:
        return numpy.zeros(kinds.shape, dtype=bool)
    right = [kinds == FINITE, got == elements.expected, numpy.isnan(got), ~numpy.isfinite(got), kinds == ANY]
    return ~numpy.choose(numpy.minimum(kinds, len(right)), [*right, numpy.zeros(kinds.shape, dtype=bool)])


def _shares(elements: _Elements, threshold: float) -> numpy.ndarray:
    """Return the share of the allowance that each element uses.

    An infinity counts as the overflow threshold, or as the size of the expected value if that is larger.
    """
    expected, got, allowance = elements.expected, elements.got, elements.allowance
    overflowed = numpy.isinf(got)
    if overflowed.any() and numpy.isfinite(threshold):
        got = numpy.where(overflowed, numpy.copysign(numpy.maximum(threshold, abs(expected)), got), got)
    with numpy.errstate(all="ignore"):
        shares = abs(got - expected) / allowance
    shares[elements.got == expected] = 0.0
    shares[numpy.isnan(shares) | ~numpy.isfinite(allowance)] = numpy.inf
    if not elements.all_finite:
        shares[elements.kinds != FINITE] = 0.0
    return shares


def _failed(case: HasId, elements: _Elements, position: int, share: float) -> Judgement:
    worst = elements.at(position)
    reason = _reason(case, int(elements.kinds[position]), worst, share)
    return Judgement(False, share, worst, f"`{worst.output}` at {worst.index} {reason}")


def _reason(case: HasId, kind: int, worst: Worst, share: float) -> str:
    if kind == EXACT:
        return f"must be exactly {worst.expected:g}, received {worst.got:g}"
    if kind in (NAN, NON_FINITE):
        return f"must be NaN{' or infinite' if kind == NON_FINITE else ''}, received {worst.got:g}"
    if not numpy.isfinite(worst.allowance):
        return f"has no finite allowance: case {case.id} must not be asked in this dtype"
    if not numpy.isfinite(worst.got):
        return f"must be {worst.expected:.9g}, received {worst.got:g}"
    if worst.allowance == 0:
        return f"must be exactly {worst.expected:.9g}, received {worst.got:.9g}"
    allowed = f"{worst.expected:.9g} within {worst.allowance:.2g}"
    return f"must be {allowed}, received {worst.got:.9g}, {share:.3g} times the allowance"
