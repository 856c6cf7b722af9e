"""Find the causal alignment of a target that accepts `causal` but no offset, by calls whose lengths differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.selection import probes
from mha_spec_conformance.judging.result import FAILING, WITHOUT_ARRAYS
from mha_spec_conformance.mistakes import MISTAKES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec_conformance.asking.question import Source
    from mha_spec_conformance.asking.selection import Selection
    from mha_spec_conformance.judging.judge import Judge
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

__all__ = ["Alignment", "find_alignment"]


@dataclass(frozen=True)
class Alignment:
    """The alignment that explains all probes, or None, and the probes that fail."""

    name: str | None = None
    note: str | None = None
    failures: tuple[Result, ...] = ()

    def declared_by(self, claims: Claims) -> Claims:
        """Return claims that declare the alignment, if it has a name."""
        if self.name is None:
            return claims
        return replace(claims, conventions={**claims.conventions, "causal_alignment": self.name})


def find_alignment(source: Source, suite: Suite, selection: Selection, judge: Judge) -> Alignment:
    """Ask the probes of every alignment, and choose that of which the largest share passes, if it is more than half.

    Of alignments with the same share, that with the most probes is chosen, because it explains more. A probe of another
    alignment fails only if the call did not return. If no alignment fits, the target is wrong under each, and the
    failures are those of the alignment under which a known mistake explains the largest share.
    """
    by_name = probes(suite.cases, source.claims, selection)
    asked = {ask.key: ask for asks in by_name.values() for ask in asks}
    results: dict[tuple[str, str], Result] = {}
    for question, answer in source.answers([ask.question() for ask in asked.values()]):
        result = judge.result(asked[question.id, question.dtype], answer)
        if result.outcome != "unsupported":
            results[result.ask.key] = result
    tried = {name: [results[ask.key] for ask in asks if ask.key in results] for name, asks in by_name.items()}
    fitting = max(tried, key=lambda name: (_share(tried[name]), len(tried[name])), default=None)
    fits = fitting is not None and _share(tried[fitting]) > 0.5
    lost = tuple(result for result in results.values() if result.outcome in WITHOUT_ARRAYS)
    if fits or not results:
        return Alignment(fitting if fits else None, None, lost)
    nearest = max(tried, key=lambda name: (_explained(tried[name], judge), _share(tried[name]), len(tried[name])))
    failures = tuple(r for r in tried[nearest] if r.outcome in FAILING and r not in lost)
    note = (
        f"the causal alignment of the target is none of {', '.join(by_name)}; the report shows the calls of {nearest}"
    )
    return Alignment(None, note, (*lost, *failures))


def _explained(results: Sequence[Result], judge: Judge) -> float:
    """Return the largest share of the failures that a known mistake of causal attention explains."""
    failing = [result.wrong for result in results if result.wrong is not None and result.outcome in FAILING]
    causal = [mistake for mistake in MISTAKES if "causal" in mistake.needs and mistake.convention is None]
    explained = max(sum(judge.recognition.explains(mistake, wrong) for wrong in failing) for mistake in causal)
    return explained / len(failing) if failing else 0.0


def _share(results: list[Result]) -> float:
    """Return the share of the results that pass."""
    return sum(result.outcome == "pass" for result in results) / len(results) if results else 0.0
