"""Tell how the wrong numbers of a failure differ from the right ones.

They may be the right ones times a factor or plus a shift, the right ones of another place, 0, not finite, or as far
away as the roundings of a narrower dtype. A statement holds for every wrong element of a failure.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy

from .bounds import bounds, precision, unit_roundoff
from .compare import gate_b, in_full_shape, judge, wrong_elements
from .places import Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mha_spec_conformance.suite.cases import Expected

    from .bounds import Precision
    from .places import WrongElements
    from .recognition import Wrong

__all__ = ["NARROWER", "amounts", "common_factor", "common_shift", "rounded_to"]

FEWEST = 3
"""The number of elements from which a common factor or shift is not a coincidence."""

MOST_ROWS = 32
"""The number of wrong rows that are compared with the right rows of other places."""

NAMED_FACTORS = {
    -1.0: "the right number negated",
    math.log2(math.e): "to base 2",
    math.log(2): "ln 2 times the right number",
}

NARROWER = ("float32", "float16", "bfloat16")

MOST_UNITS, USUAL_UNITS = 16, 1
"""The largest error of rounding, in units of the narrower dtype at the size of the largest number; and the largest root
mean square of the errors of a result, because a wrong factor of the scores gives larger errors."""

FEWEST_OF_RULE, FEWEST_ROWS = 8, 2
"""The numbers of different numbers and of wrong rows from which errors that follow a rule are not roundings."""

NEAR, LEAST_NEAR = 0.25, 0.75
"""Errors follow a rule if this share of them is this near to the median; of truncations a fourth is."""


def amounts(failures: Sequence[WrongElements]) -> list[Place]:
    """Say how the wrong numbers differ from the right numbers, if a statement holds for most failures."""
    count: Counter[str] = Counter()
    order: dict[str, None] = {}
    for failure in failures:
        texts = dict.fromkeys(_statements(failure))
        order |= texts
        count.update(texts.keys())
    best = max(order, key=lambda text: count[text], default=None)
    if best is None or 2 * count[best] <= len(failures):
        return []
    return [Place(best, count[best], len(failures))]


def _statements(failure: WrongElements) -> Iterator[str]:
    """Yield the statements that hold for every wrong element of every output of a failure."""
    by_output = [list(dict.fromkeys(_of_output(failure, name))) for name in failure.outputs]
    yield from (text for text in by_output[0] if all(text in texts for texts in by_output)) if by_output else ()


def _of_output(failure: WrongElements, name: str) -> Iterator[str]:
    marks = failure.marks[name]
    expected, received = _full_expected(failure, name)[marks], failure.wrong.outputs[name].astype(numpy.float64)[marks]
    if numpy.isnan(received).all():
        yield "NaN"
    elif numpy.isinf(received).all():
        yield "infinite"
    elif not numpy.isfinite(received).any():
        yield "not finite"
    elif (received == 0).all():
        yield "0"
    elif numpy.isfinite(received).all() and numpy.isfinite(expected).all():
        yield from _of_numbers(failure, name, expected, received)


def _of_numbers(failure: WrongElements, name: str, expected: numpy.ndarray, received: numpy.ndarray) -> Iterator[str]:
    allowed = failure.wrong.allowances[name][failure.marks[name]]
    allowed = numpy.where(numpy.isfinite(allowed), allowed, 0.0)
    if (factor := common_factor(expected, received, allowed)) is not None:
        known = (text for value, text in NAMED_FACTORS.items() if abs(factor / value - 1) < 1e-4)
        yield next(known, f"{_rounded(factor)} times the right number")
        yield "a constant factor in each case"
    if name == "lse" and (shift := common_shift(expected, received, allowed)) is not None:
        yield f"the right number {'+' if shift > 0 else '-'} {_rounded(abs(shift))}"
        yield "a constant shift in each case"
    if (elsewhere := _elsewhere(failure, name)) is not None:
        yield elsewhere
    if numpy.ptp(received) == 0 and expected.size >= FEWEST and numpy.ptp(expected) > 0:
        yield "the same number everywhere"


def _rounded(number: float) -> str:
    return f"{number:.4g}"


def common_factor(expected: numpy.ndarray, received: numpy.ndarray, allowed: numpy.ndarray) -> float | None:
    """Return the constant factor between right and wrong numbers; None if there is none."""
    large = abs(expected) > 8 * allowed
    if large.sum() < FEWEST or numpy.ptp(abs(expected[large])) <= 8 * allowed[large].max():
        return None
    factor = float(numpy.median(received[large] / expected[large]))
    alike = abs(received - factor * expected) <= 2 * max(1.0, abs(factor)) * allowed
    return factor if alike.all() and factor else None


def common_shift(expected: numpy.ndarray, received: numpy.ndarray, allowed: numpy.ndarray) -> float | None:
    """Return the constant difference between right and wrong numbers; None if there is none."""
    if expected.size < FEWEST or numpy.ptp(expected) <= 8 * allowed.max():
        return None
    shift = float(numpy.median(received - expected))
    return shift if (abs(received - expected - shift) <= 2 * allowed).all() else None


def _elsewhere(failure: WrongElements, name: str) -> str | None:
    """Tell whether every wrong row is the right row of another place, and on which axes the places differ."""
    expected, received = _full_expected(failure, name), failure.wrong.outputs[name].astype(numpy.float64)
    axes = failure.axes(name)
    last = axes[-1] if axes and axes[-1] in ("component", "key") else None
    shape = expected.shape[:-1] if last else expected.shape
    rows, right = (x.reshape(math.prod(shape), -1) for x in (received, expected))
    allowed = failure.wrong.allowances[name].reshape(rows.shape)
    wrong = numpy.flatnonzero(failure.marks[name].reshape(rows.shape).any(axis=1))
    moved: set[str] = set()
    for row in wrong[:: max(1, len(wrong) // MOST_ROWS)]:
        with numpy.errstate(invalid="ignore"):
            same = (abs(right - rows[row]) <= allowed + allowed[row]).all(axis=1) & (abs(right).max(axis=1) > 0)
        if not 0 < same.sum() <= max(2, len(right) // 8):
            return None
        moved |= min((_moved(axes, shape, int(row), int(place)) for place in numpy.flatnonzero(same)), key=len)
    return f"the right numbers of another {' and '.join(axis for axis in axes if axis in moved)}" if moved else None


def _moved(axes: Sequence[str], shape: Sequence[int], row: int, place: int) -> set[str]:
    """Return the axes on which two places differ."""
    places = (numpy.unravel_index(index, shape) for index in (row, place))
    return {axis for axis, a, b in zip(axes, *places, strict=False) if a != b}


def _full_expected(failure: WrongElements, name: str) -> numpy.ndarray:
    """Return the expected output in its full shape, with NaN in the rows that the golden does not hold."""
    golden = failure.expected[name]
    return in_full_shape(golden.values, golden, numpy.nan)


def rounded_to(wrong: Wrong, profile: str = "standard") -> str | None:
    """Name the narrowest precision that the errors need: the dtype in which an attention may make errors of this size.

    None if the errors are larger than the roundings of bfloat16.
    """
    case, dtype = wrong.ask.case, wrong.ask.dtype
    run = precision(dtype, profile)
    narrower = [name for name in NARROWER if unit_roundoff(name) > run.u_a]
    if not narrower or not _are_roundings(wrong, unit_roundoff(narrower[-1]), run):
        return None
    evaluated = bounds(case.function, case.inputs(dtype), case.options, rows=case.sampled_rows)
    for name in narrower:
        unit = unit_roundoff(name)
        if not _are_roundings(wrong, unit, run):
            continue
        most = _units(wrong, MOST_UNITS * unit)
        # A sum that is too long for the narrower dtype has no finite allowance.
        allowed = {
            name: numpy.where(numpy.isfinite(array), array, most[name])
            for name, array in evaluated.allowances(_coarse(run, unit)).items()
            if name in most
        }
        if judge(case, wrong.ask.expected, wrong.outputs, allowed, run).passed:
            return _stored_in(wrong.outputs.values(), run.u_in) or name
    return None


def _are_roundings(wrong: Wrong, unit: float, run: Precision) -> bool:
    """Tell whether the errors are few units of a dtype at the size of the largest number, and most below a unit.

    Errors that follow the right numbers, as those of a wrong factor or a shift do, are not those of rounding.
    """
    expected = wrong.ask.expected
    if not judge(wrong.ask.case, expected, wrong.outputs, _units(wrong, MOST_UNITS * unit), run).passed:
        return False
    statistics = gate_b(expected, wrong.outputs, _units(wrong, unit))
    if any(of_output.rms > USUAL_UNITS for of_output in statistics.values()):
        return False
    return not any(_follows(name, golden, wrong, run) for name, golden in expected.items())


def _units(wrong: Wrong, unit: float) -> dict[str, numpy.ndarray]:
    """Return a share of the largest number of each output as the allowance of all its elements."""
    outputs = wrong.ask.expected.items()
    return {name: numpy.full(wrong.outputs[name].shape, unit * _largest(golden)) for name, golden in outputs}


def _follows(name: str, golden: Expected, wrong: Wrong, run: Precision) -> bool:
    """Tell whether the errors of several rows are nearly a constant factor of the right numbers, or nearly a shift.

    The errors of a single row may be a factor by rounding, that of the sum by which the row is divided.
    """
    marks, _ = wrong_elements(name, golden, wrong.outputs[name], wrong.allowances[name], run)
    if marks.reshape(-1, marks.shape[-1]).any(axis=1).sum() < FEWEST_ROWS:
        return False
    # The right elements between the wrong ones count, because all large errors of a truncation are alike.
    box = numpy.ix_(*map(numpy.unique, marks.nonzero()))
    expected = in_full_shape(golden.values, golden, numpy.nan)[box]
    received = wrong.outputs[name].astype(numpy.float64)[box]
    finite = numpy.isfinite(expected) & numpy.isfinite(received)
    expected, errors = expected[finite], received[finite] - expected[finite]
    # Numbers that round to the same number have nearly the same error.
    with numpy.errstate(over="ignore"):
        different = numpy.unique(expected.astype(_dtype(NARROWER[-1]))).size
    if different < FEWEST_OF_RULE:
        return False
    return _are_alike(errors[expected != 0] / expected[expected != 0]) or _are_alike(errors)


def _are_alike(numbers: numpy.ndarray) -> bool:
    """Tell whether most numbers are near their median; few large numbers do not count more than others."""
    middle = numpy.median(numbers) if numbers.size else 0.0
    near = abs(numbers - middle) <= NEAR * abs(middle)
    return bool(middle != 0 and near.sum() >= LEAST_NEAR * numbers.size)


def _coarse(run: Precision, unit: float) -> Precision:
    """Return a precision that computes and stores in a narrower dtype of this unit roundoff."""
    kept = max(run.u_p, unit)
    coarse = replace(run, u_in=max(run.u_in, unit), u_a=unit, u_p=kept, u_dp=kept, e_x=8 * unit, e_t=8 * unit)
    return replace(coarse, u_o=max(run.u_o, unit), u_l=max(run.u_l, unit))


def _stored_in(outputs: Iterable[numpy.ndarray], unit: float) -> str | None:
    """Name the narrowest dtype that holds every number exactly, if it is narrower than that of the run."""
    arrays = [array.astype(numpy.float64) for array in outputs if array.size]
    for narrower in reversed(NARROWER):
        if unit_roundoff(narrower) > unit:
            with numpy.errstate(over="ignore"):
                cast = [array.astype(_dtype(narrower)).astype(numpy.float64) for array in arrays]
            if all(((a == b) | ~numpy.isfinite(a)).all() for a, b in zip(arrays, cast, strict=True)):
                return narrower
    return None


def _dtype(name: str) -> numpy.dtype:
    """Return the dtype of NumPy or of ml-dtypes."""
    return numpy.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _largest(golden: Expected) -> float:
    """Return the largest finite number of an output."""
    return float(abs(golden.values[numpy.isfinite(golden.values)]).max(initial=0.0))
