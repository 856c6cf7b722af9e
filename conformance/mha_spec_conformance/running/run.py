"""One run of the suite against one target: its results, what counts, and the verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec_conformance.judging.result import FAILING, OUTCOMES

from .known import excuse, is_open, untrue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mha_spec_conformance.asking.selection import Selection
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.suite.conventions import Convention
    from mha_spec_conformance.targets.claims import Claims

    from .known import Known

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """The results of a run and the options that decide what counts."""

    suite: Suite
    claims: Claims
    selection: Selection
    results: tuple[Result, ...]
    finished: bool
    alignment: str | None = None
    notes: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    accepted: frozenset[Convention] = frozenset()
    known: tuple[Known, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything that the target claims was asked."""
        return self.finished and self.selection.everything

    @cached_property
    def judged(self) -> list[Result]:
        """The results that are not `unsupported`."""
        return [result for result in self.results if result.outcome != "unsupported"]

    @cached_property
    def musts(self) -> list[Result]:
        """The judged results of MUST cases, which decide."""
        return [result for result in self.judged if result.must]

    def excuse(self, result: Result) -> str | None:
        """Give the reason why a failing result does not count; see `known.excuse`."""
        return excuse(result, self.accepted, self.known)

    @cached_property
    def failures(self) -> list[Result]:
        """The results that make the target fail: of MUST cases, neither accepted nor known."""
        return [result for result in self.results if is_open(result, self.accepted, self.known)]

    @cached_property
    def asked_features(self) -> tuple[str, ...]:
        """The features of which at least one case was judged, in the order of the suite."""
        return tuple(dict.fromkeys(feature for result in self.judged for feature in result.ask.features))

    @cached_property
    def not_asked(self) -> tuple[str, ...]:
        """The features and dtypes of the suite that were not judged."""
        features = dict.fromkeys(feature for case in self.suite.cases for feature in case.features)
        if not self.claims.registered:
            features.pop("errors", None)
        dtypes = {result.ask.dtype for result in self.judged}
        return (*(f for f in features if f not in self.asked_features), *(d for d in FLOATING if d not in dtypes))

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """The required features that were not judged."""
        return tuple(name for name in self.required if name in self.not_asked or not self.judged)

    @cached_property
    def untrue(self) -> list[str]:
        """Descriptions of the entries of known failures that did not fail."""
        return untrue(self.known, self.results, (case.id for case in self.suite.cases), self.complete)

    @property
    def status(self) -> int:
        """0: all failures are accepted or known, and all required features were asked; 1: otherwise; 2: nothing judged.

        Only MUST cases decide; if none was judged, nothing was.
        """
        if not self.musts:
            return 2
        return int(bool(self.failures or self.missing or self.untrue))

    def tally(self, results: Iterable[Result]) -> dict[str, int]:
        """Count the results of each outcome."""
        count = Counter(result.outcome for result in results)
        return {outcome: count[outcome] for outcome in OUTCOMES}

    @property
    def summary(self) -> dict[str, int]:
        """The tally of the MUST cases."""
        return self.tally(result for result in self.results if result.must)

    @property
    def conventions(self) -> dict[str, str]:
        """The conventions that the results follow, other than the specification's."""
        seen = dict(pair for result in self.results for pair in result.conventions)
        return seen | ({"causal_alignment": self.alignment} if self.alignment else {})

    @cached_property
    def statistics(self) -> list[str]:
        """Notes on cases whose errors are allowed one by one but too large for independent roundings."""
        return [f"{r.ask.case.id} {r.ask.dtype}: {r.note}" for r in self.results if r.note is not None]

    @property
    def verdict(self) -> str:
        """One sentence; it says "conformant" only after a complete run without an open failure."""
        refused = len(self.results) - len(self.judged)
        parts = [self._head() if self.musts else self._nothing()]
        parts += [f"unsupported: {refused}"] if refused else []
        parts += [f"not asked: {', '.join(self.not_asked)}"] if self.not_asked and self.complete else []
        parts += [f"required but not asked: {', '.join(self.missing)}"] if self.missing else []
        return "; ".join(parts)

    def _nothing(self) -> str:
        """Say why no judged result decides."""
        reason = next((result.reason for result in self.results if result.outcome == "unsupported"), None)
        if self.judged:
            return f"nothing judged that decides: {len(self.judged)} SHOULD cases and no MUST case"
        return f"nothing judged: the target refused all {len(self.results)} questions as unsupported: {reason}"

    def _head(self) -> str:
        passed, total = sum(result.outcome == "pass" for result in self.musts), len(self.musts)
        failing = [result for result in self.musts if result.outcome in FAILING]
        excused = Counter(self.excuse(result) for result in failing)
        details = [f"{excused[kind]} {kind}" for kind in ("accepted", "known") if excused[kind]]
        count = f"{passed} of {total}" + "".join(f", {detail}" for detail in details)
        if not self.complete:
            return (
                f"partial run: {count} passed"
                if passed == total
                else f"partial run: {count}, {len(self.failures)} failed"
            )
        if self.failures or excused["known"]:
            features = dict.fromkeys(f for r in failing if self.excuse(r) != "accepted" for f in r.ask.features)
            return f"not conformant on {', '.join(features)} ({count}, {len(self.failures)} failed)"
        accepting = sorted({str(c) for result in self.judged for c in self.accepted.intersection(result.conventions)})
        features = dict.fromkeys(feature for result in self.musts for feature in result.ask.features)
        return f"conformant on {', '.join(features)} ({count})" + (
            f", accepting {', '.join(accepting)}" if accepting else ""
        )
