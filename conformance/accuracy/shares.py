"""Trials of a function whose problems only honest implementations and planted mistakes answer: shares of allowances."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.judging.compare import judge
from mha_spec_conformance.suite.cases import Expected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Results = Mapping[str, numpy.ndarray]

__all__ = ["PLANTED_PROBLEMS", "REFUSED_IN", "Implementation", "SharedProblem", "Shares", "share_of", "try_each"]

REFUSED_IN = ("float32", "float16")
"""Dtypes in which every planted mistake must exceed the allowance; bfloat16 is only printed."""

PLANTED_PROBLEMS = 5
"""The number of problems in which each mistake is planted."""


@dataclass(frozen=True)
class SharedProblem:
    """A call of one function, with its arrays stored in the dtype of the run."""

    dtype: str
    arrays: Mapping[str, numpy.ndarray]
    options: Mapping[str, Any]
    function: str

    @property
    def id(self) -> str:
        """The name of the problem in messages."""
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
        return f"{self.dtype}, {self.function}, {shapes}, {self.options}"


@dataclass(frozen=True)
class Implementation:
    """A way to compute a problem, and the profile whose allowance it must keep."""

    answer: Callable[[Any], Results]
    profile: str = "standard"


@dataclass
class Shares:
    """The largest share of the allowance of each implementation, the least of each mistake, and the refusals."""

    subject: str
    used: dict[tuple[str, str], float] = field(default_factory=dict)
    least: dict[tuple[str, str], float] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)

    def add(self, other: Shares) -> None:
        """Add the shares of another dtype."""
        self.used |= other.used
        self.least |= other.least
        self.answers.update(other.answers)
        self.refused += other.refused

    def judge(self, p: SharedProblem, honest: Mapping[str, Implementation]) -> None:
        """Judge the answers of the implementations to a problem."""
        shares = {profile: share_of(p, profile) for profile in {i.profile for i in honest.values()}}
        for name, implementation in honest.items():
            largest = shares[implementation.profile](implementation.answer(p))
            self.used[p.dtype, name] = max(self.used.get((p.dtype, name), 0.0), largest)
            self.answers[p.dtype] += 1
            self.refused += [] if largest <= 1 else [f"{name}, {p.id}: {largest:.3g} of the allowance"]

    def plant(self, p: SharedProblem, mistakes: Mapping[str, Callable[[Any], Results]]) -> None:
        """Judge the answers of mistakes to a problem."""
        share = share_of(p)
        for name, mistake in mistakes.items():
            self.least[p.dtype, name] = min(self.least.get((p.dtype, name), numpy.inf), share(mistake(p)))

    @property
    def overlooked(self) -> list[str]:
        """The planted mistakes that stayed within an allowance which they must exceed."""
        lost = [key for key, share in self.least.items() if share <= 1 and key[0] in REFUSED_IN]
        return [f"{name} is within the allowance of {self.subject} in {dtype}" for dtype, name in lost]


def share_of(p: SharedProblem, profile: str = "standard") -> Callable[[Results], float]:
    """Return a function that computes the largest share of the allowance that the results use."""
    case, rule = bounds(p.function, p.arrays, p.options), precision(p.dtype, profile)
    allowances = case.allowances(rule)
    values = {name: Expected(array, None, None, array.shape) for name, array in case.values.items()}

    def share(results: Results) -> float:
        expected = {name: values[name] for name in results}
        return judge(p, expected, results, allowances, precision(p.dtype)).allowance_used

    return share


def try_each(
    shares: Shares,
    dtype: str,
    numbers: range,
    draw: Callable[[numpy.random.Generator, str], SharedProblem],
    honest: Mapping[str, Implementation],
) -> None:
    """Ask every implementation random problems of a dtype."""
    for number in numbers:
        shares.judge(draw(numpy.random.default_rng([number, *dtype.encode()]), dtype), honest)
