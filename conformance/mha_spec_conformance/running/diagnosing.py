"""Name the mistakes that explain the failures of a run, when all answers are known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mha_spec_conformance.judging.naming import named

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mha_spec_conformance.asking.question import Source
    from mha_spec_conformance.judging.judge import Judge
    from mha_spec_conformance.judging.result import Result

    Key = tuple[str, str]

__all__ = ["diagnosed"]


def diagnosed(source: Source, judge: Judge, results: Mapping[Key, Result]) -> Iterator[Result]:
    """Yield the results that change, because mistakes explain them.

    A failure that an earlier, interrupted run judged has no answer any more, so it is asked again.
    """
    known = dict(results)
    for result in _with_answers(source, judge, results):
        known[result.ask.key] = result
    failing = {r.ask.key: r for r in known.values() if r.outcome == "fail" and r.wrong is not None}
    wrong = [result.wrong for result in failing.values() if result.wrong is not None]
    passing = [result.ask for result in known.values() if result.outcome == "pass"]
    without_values = {r.ask.key: r for r in known.values() if r.outcome == "error" or _is_malformed(r)}
    faults = [(r.ask, None if r.outcome == "error" else r.reason) for r in without_values.values()]
    names = named(wrong, passing, judge.recognition, faults=faults) if wrong or faults else {}
    for key, result in failing.items():
        if key in names or result is not results[key]:
            yield judge.explained(result, names.get(key, ()))
    for key, result in without_values.items():
        if key in names:
            yield replace(result, diagnosis=tuple(mistake.name for mistake in names[key]))


def _is_malformed(result: Result) -> bool:
    """Tell whether an answer has a wrong shape or dtype."""
    return (result.outcome, result.wrong, result.allowance_used) == ("fail", None, None) and (
        result.ask.case.expect != "error" and (result.reason or "").startswith("`")
    )


def _with_answers(source: Source, judge: Judge, results: Mapping[Key, Result]) -> Iterator[Result]:
    """Ask again the failures whose values are wrong and whose answers are not known; yield those that fail again."""
    asked = {
        key: result.ask
        for key, result in results.items()
        if result.wrong is None and result.outcome in ("fail", "deviation") and (result.allowance_used or 0) > 1
    }
    for question, answer in source.answers(*([ask.question()] for ask in asked.values())):
        result = judge.result(asked[question.id, question.dtype], answer)
        if result.wrong is not None and result.outcome == "fail":
            yield result
