"""Find the causal alignment of a target that accepts `causal` but no offset, by calls whose lengths differ."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.selection import probes
from mha_spec_conformance.judging.result import FAILING, WITHOUT_ARRAYS

if TYPE_CHECKING:
    from mha_spec_conformance.asking.question import Source
    from mha_spec_conformance.asking.selection import Selection
    from mha_spec_conformance.judging.judge import Judge
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Suite

__all__ = ["Alignment", "find_alignment"]


@dataclass(frozen=True)
class Alignment:
    """The alignment that explains all probes, or None, and the probes that fail."""

    name: str | None = None
    note: str | None = None
    failures: tuple[Result, ...] = ()


def find_alignment(source: Source, suite: Suite, selection: Selection, judge: Judge) -> Alignment:
    """Ask the probes of every alignment, and choose the first alignment whose probes all pass.

    A probe of another alignment fails only if the call did not return. If no alignment fits, every probe fails that is
    wrong.
    """
    asked = {
        ask.key: (name, ask) for name, asks in probes(suite.cases, source.claims, selection).items() for ask in asks
    }
    results: defaultdict[str, list[Result]] = defaultdict(list)
    for question, answer in source.answers([ask.question() for _, ask in asked.values()]):
        name, ask = asked[question.id, question.dtype]
        result = judge.result(ask, answer)
        if result.outcome != "unsupported":
            results[name].append(result)
    fitting = next((name for name, tried in results.items() if all(result.outcome == "pass" for result in tried)), None)
    counting = FAILING | WITHOUT_ARRAYS if fitting is None else WITHOUT_ARRAYS
    failures = tuple(result for tried in results.values() for result in tried if result.outcome in counting)
    if fitting is not None or not results:
        return Alignment(fitting, None, failures)
    return Alignment(None, f"the causal alignment of the target is none of {', '.join(results)}", failures)
