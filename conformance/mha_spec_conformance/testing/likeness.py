"""Find what a wrong result looks like: a known mistake, the right result of another place, a factor, or rounding.

Every statement holds for the wrong rows that were looked at; their number is limited.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.layer_steps import LayerSteps
from mha_spec.steps import Steps
from mha_spec_conformance.judging.amounts import common_factor, common_shift
from mha_spec_conformance.judging.bounds import bounds, unit_roundoff
from mha_spec_conformance.judging.compare import FINITE, kinds_of_values
from mha_spec_conformance.mistakes import MISTAKES, Mistake
from mha_spec_conformance.mistakes import Compared as HowCompared

from .part import Part
from .results import Values, forward, gradient_of_query, shares_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mha_spec.arguments import Arguments
    from mha_spec_conformance.judging.bounds import Precision

    from .problem import Problem
    from .results import Compared

__all__ = ["Likeness", "likeness", "rotary_likeness"]

SECONDS = 8.0
"""The time after which no further mistakes are tried, and then no further places."""

MOST_HEADS, MOST_WRONG, MOST_RIGHT = 3, 6, 3
"""The numbers of heads, and of wrong and right rows in each, with which mistakes are compared."""

MOST_MISTAKES = 3
"""The number of mistakes that are named; several are named where the rows do not distinguish them."""

SHIFTS = (1, 8, 16, 32, 64, 128, 256)
"""The distances of rows whose right results are compared with a wrong row."""

MOST_ROUNDINGS = 4
"""The largest error that may come from a lower precision, in roundings of bfloat16, or of float32 for float64."""

CANNOT_ANSWER = (ArithmeticError, IndexError, MemoryError, TypeError, ValueError)
"""The exceptions of a mistaken reference in a problem to which the mistake does not apply."""

HERE = (0, 0, 0)
"""The batch entry, head and row of a right result, relative to the wrong row."""

BY_ROW = ("output", "lse", "grad_query")
"""The results whose rows can be evaluated alone."""


@dataclass(frozen=True)
class Likeness:
    """The mistakes that a wrong result may show, in sentences, and the clauses that they break."""

    sentences: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()


def likeness(comparisons: Sequence[Compared], problem: Problem, run: Precision) -> Likeness:
    """Return the first explanation that holds."""
    wrong = [comparison for comparison in comparisons if comparison.wrong.any()]
    if (like := _constant(wrong)) is not None:
        return like
    by_row = [comparison for comparison in comparisons if comparison.name in BY_ROW]
    if any(comparison.wrong.any() for comparison in by_row):
        rows = _Rows(by_row, problem, run)
        for explain in (rows.mistakes, rows.elsewhere):
            if (like := explain()) is not None:
                return like
    return _factor(wrong) or _shift(wrong) or _rounding(wrong, run) or Likeness()


class _Rows:
    """Some wrong and some right rows, with the received results."""

    def __init__(self, comparisons: Sequence[Compared], problem: Problem, run: Precision) -> None:
        self.comparisons, self.problem, self.run = comparisons, problem, run
        self.end = time.monotonic() + SECONDS
        self.index = {c.name: {tuple(place): i for i, place in enumerate(c.places.tolist())} for c in comparisons}
        self.wrong: dict[tuple[int, int], set[int]] = {}
        for comparison in comparisons:
            for entry, head, row in comparison.places[comparison.wrong].tolist():
                self.wrong.setdefault((entry, head), set()).add(row)
        most = sorted(self.wrong, key=lambda place: -len(self.wrong[place]))[:MOST_HEADS]
        self.heads = {place: _spread(sorted(self.wrong[place]), MOST_WRONG) for place in most}
        self.right = {place: _spread(self._right_rows(*place), MOST_RIGHT) for place in most}

    def _right_rows(self, entry: int, head: int) -> list[int]:
        rows = {row for e, h, row in self.comparisons[0].places.tolist() if (e, h) == (entry, head)}
        return sorted(rows - self.wrong[entry, head])

    def mistakes(self) -> Likeness | None:
        """Name the known mistakes whose results equal those of all rows, or else those of the wrong rows."""
        whole = self.problem.arguments
        function = "attention" if self.comparisons[0].name != "grad_query" else "attention_vjp"
        explaining: dict[str, tuple[Mistake, ...]] = {"all": (), "wrong": ()}
        for mistake in MISTAKES:
            if time.monotonic() > self.end:
                break
            steps = mistake.steps
            if not isinstance(steps, Steps) or mistake.native or function not in mistake.functions:
                continue
            if _applies(mistake, whole) and self._agrees(steps, self.heads):
                kind = "all" if self._agrees(steps, self.right) else "wrong"
                explaining[kind] = (*explaining[kind], mistake)
        named = explaining["all"] or explaining["wrong"]
        if not named:
            return None
        intro = "It looks like the mistake" if explaining["all"] else "The wrong rows look like the mistake"
        return _named(intro, named)

    def _agrees(self, steps: Steps, rows: Mapping[tuple[int, int], Sequence[int]]) -> bool:
        """Tell whether every wrong result agrees at the rows with that of mistaken steps."""
        try:
            with numpy.errstate(all="ignore"):
                whole = steps.check(replace(self.problem.arguments))
                keys = numpy.arange(whole.kv_len)
                return all(
                    self._matches(Part(whole, entry, (head,), numpy.asarray(chosen), keys, steps))
                    for (entry, head), chosen in rows.items()
                    if chosen
                )
        except CANNOT_ANSWER:
            return False

    def _matches(self, part: Part, place: tuple[int, int, int] = HERE) -> bool:
        """Tell whether the received results are within the allowance of those of a part, moved by `place`."""
        values = self._evaluate(part)
        return all(
            self._alike(comparison, part, values[comparison.name], place)
            for comparison in self.comparisons
            if comparison.wrong.any()
        )

    def _evaluate(self, part: Part) -> Mapping[str, Values]:
        problem = replace(self.problem, arguments=part.whole)
        if self.comparisons[0].name == "grad_query":
            return {"grad_query": gradient_of_query(part, problem, self.run)}
        return forward(part, problem, self.run)

    def _alike(self, comparison: Compared, part: Part, values: Values, place: tuple[int, int, int]) -> bool:
        """Tell whether the received rows have the values."""
        at = self.index[comparison.name]
        entry, head, shift = part.entry + place[0], part.heads[0] + place[1], place[2]
        got = comparison.got[[at[entry, head, int(row) + shift] for row in part.rows]]
        as_received = replace(values, kinds=kinds_of_values(values.expected))
        return bool((shares_of(comparison.name, got, as_received, self.run) <= 1).all())

    def elsewhere(self) -> Likeness | None:
        """Tell whether the wrong rows of a head have the right results of another head, entry or row."""
        a = self.problem.arguments
        (entry, head), rows = next(iter(self.heads.items()))
        self.end = time.monotonic() + SECONDS
        for place, label, clause in self._candidates(entry, head):
            if time.monotonic() > self.end:
                break
            moved = numpy.asarray(rows) - place[2]
            moved = moved[(moved >= 0) & (moved < a.q_len)]
            if 2 * len(moved) < len(rows):
                continue
            part = Part(a, entry - place[0], (head - place[1],), moved)
            if self._matches(part, place):
                return Likeness((f"The wrong rows of head {head} in batch entry {entry} are {label}",), (clause,))
        return None

    def _candidates(self, entry: int, head: int) -> Iterator[tuple[tuple[int, int, int], str, str]]:
        a = self.problem.arguments
        for other in range(a.heads):
            if other != head:
                yield (0, head - other, 0), f"the right results of head {other}", "MHA-HEAD-1"
        for other in range(a.batch):
            if other != entry:
                yield (entry - other, 0, 0), f"the right results of batch entry {other}", "MHA-SHAPE-1"
        for shift in SHIFTS:
            for side, word in ((shift, "before"), (-shift, "after")):
                yield (0, 0, side), f"the right results of the row {shift} {word}", "MHA-SCORE-1"


def _named(intro: str, mistakes: Sequence[Mistake]) -> Likeness:
    """Name mistakes that explain the wrong rows, with the bugs that were this mistake."""
    sentences = tuple(f"{intro} {mistake.sentence}" for mistake in mistakes[:MOST_MISTAKES])
    return Likeness(sentences, mistakes[0].clauses[:1])


def rotary_likeness(
    comparison: Compared, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], run: Precision
) -> Likeness:
    """Name the mistakes of rotary_embedding whose results equal all compared results."""
    named: list[Mistake] = []
    for mistake in MISTAKES:
        steps = mistake.steps
        if "rotary_embedding" not in mistake.functions or mistake.native or not isinstance(steps, LayerSteps):
            continue
        try:
            mistaken = bounds("rotary_embedding", arrays, options, steps)
            expected, allowed = mistaken.values["output"], mistaken.allowances(run)["output"]
        except CANNOT_ANSWER:
            continue
        shape = comparison.got.shape
        if expected.size == comparison.got.size:
            expected, allowed = expected.reshape(shape), allowed.reshape(shape)
            values = Values(expected, kinds_of_values(expected), allowed)
            named += [mistake] if (shares_of("output", comparison.got, values, run) <= 1).all() else []
    if named:
        return _named("It looks like the mistake", named)
    return _constant([comparison]) or _factor([comparison]) or _rounding([comparison], run) or Likeness()


def _applies(mistake: Mistake, whole: Arguments) -> bool:
    """Tell whether the call has every argument that the mistake needs, and the mistake is recognised by its values."""
    if mistake.compared is HowCompared.BY_SIZE_OF_ERRORS:
        return False
    values = (getattr(whole, name) for name in mistake.needs if hasattr(whole, name))
    return all(value is not None and value is not False for value in values)


def _spread(rows: Sequence[int], most: int) -> list[int]:
    """Return at most so many rows, from the first to the last."""
    if len(rows) <= most:
        return list(rows)
    return sorted({rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)})


def _constant(wrong: Sequence[Compared]) -> Likeness | None:
    """Tell whether the wrong rows of every wrong result hold only zeros, or only NaN."""
    sentences: list[str] = []
    for comparison in wrong:
        got = comparison.got[comparison.wrong].astype(numpy.float64)
        if not ((got == 0).all() or numpy.isnan(got).all()):
            return None
        value = "NaN" if numpy.isnan(got).all() else "0"
        sentences.append(f"Every element of the wrong rows of `{comparison.name}` is {value}")
    return Likeness(tuple(sentences))


def _factor(wrong: Sequence[Compared]) -> Likeness | None:
    """Tell whether the wrong rows of every wrong result are a constant times the expected values."""
    factors: list[str] = []
    for comparison in wrong:
        factor = common_factor(*_finite(comparison))
        if factor is None:
            return None
        factors.append(f"`{comparison.name}` is {factor:.6g} times the expected values in the wrong rows")
    return Likeness(tuple(factors)) if factors else None


def _shift(wrong: Sequence[Compared]) -> Likeness | None:
    """Tell whether the wrong values of lse differ from the right values by a constant."""
    if [comparison.name for comparison in wrong] != ["lse"]:
        return None
    shift = common_shift(*_finite(wrong[0]))
    if not shift:
        return None
    return Likeness((f"`lse` is the expected value plus {shift:.6g} in the wrong rows",))


def _finite(comparison: Compared) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Return the expected and received values and the allowances of the wrong rows, where all are finite."""
    rows = comparison.wrong
    expected, allowed = comparison.values.expected[rows].ravel(), comparison.values.allowance[rows].ravel()
    got = comparison.got[rows].astype(numpy.float64).ravel()
    if not numpy.isfinite(got).all():
        nothing = numpy.empty(0)
        return nothing, nothing, nothing
    finite = (comparison.values.kinds[rows].ravel() == FINITE) & numpy.isfinite(expected)
    return expected[finite], got[finite], allowed[finite]


def _rounding(wrong: Sequence[Compared], run: Precision) -> Likeness | None:
    """Tell whether all errors are small enough to be roundings of a lower precision."""
    lower = unit_roundoff("float32") if run.dtype == "float64" else unit_roundoff("bfloat16")
    for comparison in wrong:
        expected, got, _ = _finite(comparison)
        if not expected.size or abs(got - expected).max() > MOST_ROUNDINGS * lower * abs(expected).max():
            return None
    largest = max(float(comparison.shares.max()) for comparison in wrong)
    sentence = f"The errors are small: they are at most {largest:.3g} times the allowance, as if a step rounds too much"
    return Likeness((sentence,), ("MHA-ACC-1",))
