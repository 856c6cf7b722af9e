"""Comparison of what came with what was expected, place by place: by kind first, then by the allowance."""

from __future__ import annotations

from dataclasses import dataclass
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
    "Statistics",
    "Worst",
    "gate_b",
    "judge",
    "picked",
]

FINITE, EXACT, NAN, NON_FINITE, ANY = range(5)
"""The kinds of places: within the allowance, equal, NaN, NaN or infinite, not compared."""

LARGEST_DEVIATION = 6.0
"""Gate B: no element lies further from the true value, in standard deviations."""

LARGEST_RMS = 1.25
"""Gate B: the root mean square over many elements."""

MANY = 1000
"""How many elements an output needs for its root mean square to say something."""


class Named(Protocol):
    """What is judged, by the name that a message gives it: a case of the suite, or a random one."""

    @property
    def id(self) -> str:
        """Its name."""
        ...


@dataclass(frozen=True)
class Worst:
    """The place where an answer is worst, or uses most of its allowance."""

    output: str
    index: tuple[int, ...]
    expected: float
    got: float
    allowance: float


@dataclass(frozen=True)
class Judgement:
    """Gate A: whether every element lies within its allowance, and how much of it the worst one used."""

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
        """What is remarkable about them; None where they are what independent roundings give."""
        if not self.largest <= LARGEST_DEVIATION:
            return f"the largest of {self.elements} errors is {self.largest:.1f} standard deviations"
        if self.elements >= MANY and not self.rms <= LARGEST_RMS:
            return f"the root mean square of {self.elements} errors is {self.rms:.2f} standard deviations"
        return None


@dataclass(frozen=True)
class _Places:
    """The compared places of one output, sampled rows picked, as flat arrays in float64."""

    output: str
    expected: numpy.ndarray
    got: numpy.ndarray
    kinds: numpy.ndarray
    allowance: numpy.ndarray
    shape: tuple[int, ...]
    rows: numpy.ndarray | None

    def index(self, place: int) -> tuple[int, ...]:
        """The index of a flat place in the full output."""
        if self.rows is not None:
            width = self.expected.size // len(self.rows)
            row, column = divmod(place, width)
            place = int(self.rows[row]) * width + column
        return tuple(int(i) for i in numpy.unravel_index(place, self.shape))

    def at(self, place: int) -> Worst:
        """What stands at a flat place."""
        values = (float(x[place]) for x in (self.expected, self.got, self.allowance))
        return Worst(self.output, self.index(place), *values)


def judge(
    case: Named,
    expected: Mapping[str, Expected],
    outputs: Mapping[str, numpy.ndarray],
    allowances: Mapping[str, numpy.ndarray],
    precision: Precision,
) -> Judgement:
    """Compare every place of every expected output (MHA-ACC-1).

    Places that must be exact, NaN or non-finite come first. At the others |got - expected| <= allowance; where
    |expected| + allowance reaches the overflow threshold of the dtype an infinity of that sign is right too. The share
    of the allowance is 0 where nothing is allowed and nothing is wrong, and infinite where something is. A NaN never
    passes for a number, nor a number for a NaN.

    Args:
        case: The case that was asked.
        expected: What must come, by output name; nothing else is compared.
        outputs: What came, full arrays.
        allowances: Of the full outputs.
        precision: Of the run.
    """
    judged: list[tuple[float, _Places, int]] = []
    for name, wanted in expected.items():
        if name not in outputs:
            return Judgement(False, numpy.inf, None, f"`{name}` is missing")
        if tuple(outputs[name].shape) != tuple(wanted.shape):
            shapes = f"shape={tuple(wanted.shape)}, received shape={outputs[name].shape}"
            return Judgement(False, numpy.inf, None, f"`{name}` must have {shapes}")
        places = _places(name, wanted, outputs[name], allowances[name])
        wrong = _wrong_kind(places)
        if wrong.any():
            return _refused(case, places, int(numpy.argmax(wrong)), numpy.inf)
        if places.expected.size:
            used = _used(places, overflow_threshold(name, outputs[name], precision))
            judged.append((float(used.max()), places, int(used.argmax())))
    if not judged:
        return Judgement(True, 0.0, None, None)
    used, places, place = max(judged, key=lambda one: one[0])
    return Judgement(True, used, places.at(place), None) if used <= 1 else _refused(case, places, place, used)


def gate_b(
    expected: Mapping[str, Expected], outputs: Mapping[str, numpy.ndarray], deviations: Mapping[str, numpy.ndarray]
) -> dict[str, Statistics]:
    """The statistics of each output over the places that are held to an allowance (MHA-ACC-2)."""
    found: dict[str, Statistics] = {}
    for name, wanted in expected.items():
        places = _places(name, wanted, outputs[name], deviations[name])
        free = (places.kinds == FINITE) & (places.allowance > 0)
        z = (places.got[free] - places.expected[free]) / places.allowance[free]
        if z.size:
            found[name] = Statistics(z.size, float(abs(z).max()), float(numpy.sqrt(numpy.mean(z**2))))
    return found


def overflow_threshold(name: str, output: numpy.ndarray, precision: Precision) -> float:
    """From here on a number rounds to infinity, in the type that came or in that of the run, if it is narrower."""
    own = softmax_dtype_name(precision.dtype) if "lse" in name else precision.dtype
    return min(_overflow_threshold(dtype) for dtype in (own, output.dtype))


def _overflow_threshold(dtype: str | numpy.dtype) -> float:
    if numpy.dtype(dtype).kind in "iu":
        return numpy.inf
    limits = ml_dtypes.finfo(dtype)
    unit = float(limits.eps) / 2
    return float(limits.max) + float(limits.max) * unit / (2 - 2 * unit)


def _places(name: str, wanted: Expected, output: numpy.ndarray, allowance: numpy.ndarray) -> _Places:
    got, allowed = (picked(x.astype(numpy.float64), wanted).ravel() for x in (output, allowance))
    values = numpy.ravel(wanted.values)
    kinds = numpy.zeros(values.shape, dtype=numpy.uint8) if wanted.kinds is None else numpy.ravel(wanted.kinds)
    return _Places(name, values, got, kinds, allowed, tuple(wanted.shape), wanted.rows)


def picked(output: numpy.ndarray, wanted: Expected) -> numpy.ndarray:
    """The rows of an output that the golden holds; the output itself where it holds all."""
    if wanted.rows is None:
        return output
    return output.reshape(-1, wanted.values.size // max(len(wanted.rows), 1))[wanted.rows]


def _wrong_kind(places: _Places) -> numpy.ndarray:
    """Where a place that must be exact, NaN or non-finite is not; a kind that nobody defined is never right."""
    kinds, got = places.kinds, places.got
    right = [kinds == FINITE, got == places.expected, numpy.isnan(got), ~numpy.isfinite(got), kinds == ANY]
    return ~numpy.choose(numpy.minimum(kinds, len(right)), [*right, numpy.zeros(kinds.shape, dtype=bool)])


def _used(places: _Places, threshold: float) -> numpy.ndarray:
    """The share of the allowance that each place uses; what overflowed counts as the overflow threshold."""
    finite = places.kinds == FINITE
    overflowed = numpy.isinf(places.got) & numpy.isfinite(threshold)
    got = numpy.where(overflowed, numpy.copysign(threshold, places.got), places.got)
    with numpy.errstate(all="ignore"):
        used = numpy.where(places.got == places.expected, 0.0, abs(got - places.expected) / places.allowance)
    used = numpy.where(numpy.isnan(used) | ~numpy.isfinite(places.allowance), numpy.inf, used)
    return numpy.where(finite, used, 0.0)


def _refused(case: Named, places: _Places, place: int, used: float) -> Judgement:
    worst = places.at(place)
    reason = _reason(case, int(places.kinds[place]), worst, used)
    return Judgement(False, used, worst, f"`{worst.output}` at {worst.index} {reason}")


def _reason(case: Named, kind: int, worst: Worst, used: float) -> str:
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
    return f"must be {allowed}, received {worst.got:.9g}, {used:.3g} times the allowance"
