"""Trials of the accuracy rule: honest implementations compute random problems, and are judged as in the suite."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy
from merges import FORMS as MERGES
from merges import GRADIENTS as MERGE_GRADIENTS
from merges import MergeProblem, draw_merge
from problems import Problem, draw, overflows
from variants import VARIANTS, with_form

from mha_spec.reference import Reference
from mha_spec.steps import Steps
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.judging.compare import gate_b, judge
from mha_spec_conformance.suite.cases import Expected
from mha_spec_conformance.suite.functions import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from frameworks import Framework

    from mha_spec_conformance.judging.bounds import Bounds

    Arrays = Mapping[str, numpy.ndarray]

__all__ = ["Tally", "tally"]

WIDER = replace(
    Steps(),
    check=lambda a: a,
    check_halves=lambda *halves: None,
    check_merge_cotangents=lambda *cotangents: None,
    softmax_dtype=lambda name: "longdouble",
)
"""The specification in extended precision; results in float64 are compared with it."""

MANY = 1000
"""Least number of elements for which a root mean square is printed."""


@dataclass
class Tally:
    """The largest shares of the allowance and the largest errors in standard deviations, by dtype, output and name."""

    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of problems that an implementation answered, by dtype and implementation."""
    problems: Counter[str] = field(default_factory=Counter)
    elements: Counter[tuple[str, str]] = field(default_factory=Counter)
    used: dict[tuple[str, str], float] = field(default_factory=dict)
    used_by: dict[tuple[str, str], float] = field(default_factory=dict)
    largest: dict[tuple[str, str], float] = field(default_factory=dict)
    rms: dict[tuple[str, str], float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the tally of another part of the trials."""
        for name in ("runs", "problems", "elements"):
            getattr(self, name).update(getattr(other, name))
        for name in ("used", "used_by", "largest", "rms"):
            for key, value in getattr(other, name).items():
                raise_to(getattr(self, name), key, value)
        self.refused += other.refused


def raise_to(table: dict[tuple[str, str], float], key: tuple[str, str], value: float) -> None:
    """Raise the entry of a table to at least the value."""
    table[key] = max(table.get(key, 0.0), value)


@dataclass(frozen=True)
class Judge:
    """One problem with its expected values and its bounds."""

    problem: Problem | MergeProblem
    function: str
    expected: Mapping[str, Expected]
    bounds: Bounds

    @classmethod
    def of(cls, problem: Problem | MergeProblem, function: str, arrays: Arrays, options: Mapping[str, Any]) -> Judge:
        """Evaluate the problem once for every implementation."""
        evaluated = bounds(function, arrays, options)
        values = wider(function, arrays, options) if problem.dtype == "float64" else evaluated.values
        expected = {name: Expected(array, None, None, array.shape) for name, array in values.items()}
        return cls(problem, function, expected, evaluated)

    @cached_property
    def _by_profile(self) -> dict[str, tuple[Arrays, Arrays]]:
        """Allowances and, if statistics apply, deviations."""
        rules = {profile: precision(self.problem.dtype, profile) for profile in ("standard", "strict")}
        generic = self.problem.generic
        return {
            profile: (self.bounds.allowances(rule), self.bounds.deviations(rule) if generic else {})
            for profile, rule in rules.items()
        }

    def add(self, name: str, profile: str, outputs: Arrays, tally: Tally) -> None:
        """Judge one answer by the rule of its profile and record it in the tally."""
        dtype = self.problem.dtype
        allowances, deviations = self._by_profile[profile]
        tally.runs[dtype, name] += 1
        for output, array in outputs.items():
            wanted, label = {output: self.expected[output]}, f"{self.function.removesuffix('_attention')}: {output}"
            judgement = judge(self.problem, wanted, outputs, allowances, precision(dtype))
            tally.elements[dtype, label] += array.size
            raise_to(tally.used, (dtype, label), judgement.allowance_used)
            raise_to(tally.used_by, (dtype, name), judgement.allowance_used)
            if not judgement.passed:
                tally.refused.append(f"{name}, {self.problem.id}: {judgement.reason}")
            for statistics in gate_b(wanted, outputs, deviations).values() if deviations else ():
                raise_to(tally.largest, (dtype, label), statistics.largest)
                if statistics.elements >= MANY:
                    raise_to(tally.rms, (dtype, label), statistics.rms)


def wider(function: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
    """Compute the results in extended precision, rounded once to float64."""
    call, more = getattr(Reference(WIDER), function), dict.fromkeys(FUNCTIONS[function].optional.values(), True)
    if "merge" in FUNCTIONS[function].features:
        arrays = {name: array.astype(numpy.longdouble) for name, array in arrays.items()}
    results = call(**arrays, **options, **more)
    results = results if isinstance(results, tuple) else (results,)
    named = zip(FUNCTIONS[function].outputs, results, strict=True)
    return {name: array.astype(numpy.float64) for name, array in named if array is not None}


def judges(problem: Problem) -> Iterator[Judge]:
    """Yield the calls of a problem: forward, weights without dropout, and gradients unless they overflow."""
    yield Judge.of(problem, "attention", problem.forward_arrays(), problem.options)
    if "dropout_mask" not in problem.arrays:
        yield Judge.of(problem, "attention_weights", problem.weight_arrays(), problem.options)
    backward = Judge.of(problem, "attention_vjp", problem.arrays, problem.options)
    if not overflows({name: expected.values for name, expected in backward.expected.items()}, problem.dtype):
        yield backward


def tally(dtype: str, first: int, count: int, each: int, frameworks: Sequence[Framework]) -> Tally:
    """Try `count` random problems, each on `each` variants in turn and on every framework that supports it."""
    result = Tally()
    for number in range(first, first + count):
        rng = numpy.random.default_rng([number, *dtype.encode()])
        problem = draw(rng, dtype, plain=number % 4 == 0)
        result.problems[dtype] += 1
        variants = [with_form(VARIANTS[(number * each + i) % len(VARIANTS)], number + i) for i in range(each)]
        for call in judges(problem):
            for variant in variants:
                call.add(variant.name, variant.profile, variant.answer(call.function, problem), result)
            for framework in frameworks if call.function != "attention_weights" else ():
                if framework.supports(problem):
                    answer = framework.forward if call.function == "attention" else framework.backward
                    call.add(framework.name, framework.profile, answer(problem), result)
        try_merges(draw_merge(rng, dtype), result)
    return result


def try_merges(problem: MergeProblem, result: Tally) -> None:
    """Try every way to merge two halves, and every way to compute the gradients."""
    call = Judge.of(problem, "merge_attention", problem.arrays, {})
    for name, form in MERGES.items():
        call.add(f"merge by {name}", "strict", form(problem), result)
    call = Judge.of(problem, "merge_attention_vjp", problem.backward_arrays, {})
    for name, form in MERGE_GRADIENTS.items():
        call.add(f"merge gradients by {name}", "strict", form(problem), result)
