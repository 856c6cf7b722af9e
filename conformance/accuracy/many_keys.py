"""Trials of the accuracy rule on 1,000 keys and more: kernels that read the keys in blocks or splits."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy
from problems import LONG_SHAPES, REGIMES, TRENDS, Problem, draw
from trials import Judge, Tally, judges
from variants import KERNELS, Variant, cubic_exp2_of_difference, with_form

from mha_spec.arguments import Arguments
from mha_spec.reference import Reference
from mha_spec_conformance.judging.bounds import bounds
from mha_spec_conformance.suite.cases import Expected, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mha_spec_conformance.suite.cases import Case

__all__ = ["try_many_keys"]

MANY_KEYS = 1000
"""Least number of keys of a case that is tried."""


def cases_of_many_keys() -> list[Case]:
    """Return the cases of attention in the suite that have many keys and expect a result."""
    cases = [case for case in load().cases if case.function == "attention" and case.expect != "error"]
    return [case for case in cases if case.shape_of("key")[2] >= MANY_KEYS]


def of_suite(dtype: str) -> Iterator[tuple[Problem, Judge]]:
    """Judge cases by their goldens, and what these do not hold (lse, other dtypes) by the evaluation in float64."""
    for case in cases_of_many_keys():
        arrays, options, rows = case.inputs(dtype), dict(case.options), case.sampled_rows
        evaluated = bounds("attention", arrays, options, rows=rows)
        expected = {name: _at_rows(values, rows) for name, values in evaluated.values.items()}
        if dtype in case.dtypes:
            expected |= case.expected
        problem = problem_of(case.id, dtype, arrays, options)
        yield problem, Judge(problem, "attention", expected, evaluated)


def _at_rows(values: numpy.ndarray, rows: numpy.ndarray | None) -> Expected:
    held = values if rows is None else values.reshape(-1, *values.shape[3:])[rows]
    return Expected(held, None, rows, values.shape)


def problem_of(name: str, dtype: str, arrays: dict[str, numpy.ndarray], options: dict[str, Any]) -> Problem:
    """Return the problem of a call: its visible pairs become a mask."""
    seen = Reference().visible(Arguments(**arrays, **options, function="attention"))
    shape = (*arrays["query"].shape[:3], arrays["key"].shape[2])
    visible = numpy.broadcast_to(seen, shape)
    kept = ("query", "key", "value", "bias", "sinks", "dropout_mask")
    numbers = {name: options[name] for name in ("scale", "softcap", "dropout_rate") if name in options}
    tensors = {name: array for name, array in arrays.items() if name in kept} | {"mask": visible}
    return Problem(dtype, name, tensors, numbers, visible)


def drawn(dtype: str, first: int, count: int) -> Iterator[tuple[Problem, Judge]]:
    """Draw problems with many keys, of which every other has scores that rise or fall along the keys."""
    for number in range(first, first + count):
        rng = numpy.random.default_rng([number, *dtype.encode(), MANY_KEYS])
        problem = draw(rng, dtype, shapes=LONG_SHAPES, regimes=TRENDS if number % 2 else REGIMES)
        for call in judges(problem):
            yield problem, call


def kernels_for(dtype: str) -> list[Variant]:
    """Return the kernels that are honest in a dtype: in float32, the rule allows no exponential of 13 bits."""
    return [k for k in KERNELS if dtype != "float32" or k.exponential is not cubic_exp2_of_difference]


def try_many_keys(dtype: str, first: int, count: int, each: int) -> Tally:
    """Try the suite's cases with many keys and `count` random problems, each on `each` kernels in turn."""
    result, kernels = Tally(), kernels_for(dtype)
    for number, (problem, call) in enumerate(chain(of_suite(dtype), drawn(dtype, first, count))):
        result.problems[dtype] += 1
        for i in range(number * each, (number + 1) * each):
            kernel = with_form(kernels[i % len(kernels)], i // len(kernels))
            call.add(kernel.name, kernel.profile, kernel.answer(call.function, problem), result)
    return result
