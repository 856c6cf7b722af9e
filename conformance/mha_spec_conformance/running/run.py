"""A run of the suite against a target: its results, the failures that count, and the verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec_conformance.judging.causes import find_causes
from mha_spec_conformance.judging.result import FAILING, INTERNAL, OUTCOMES

from .known import excuse, is_open, stale_entries

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mha_spec_conformance.asking.selection import Selection
    from mha_spec_conformance.judging.causes import Cause, Findings
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.suite.conventions import Convention
    from mha_spec_conformance.targets.claims import Claims

    from .known import Known
    from .laws import Law

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """The results of a run, and the options that decide which failures count."""

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
    laws: tuple[Law, ...] = ()
    fault: str | None = None
    """The reason why the target could not be asked at all."""
    located: Findings | None = None
    """The causes with the keys that have wrong weights, if the target was asked again."""

    @property
    def complete(self) -> bool:
        """True if everything that the target claims was asked."""
        return self.finished and self.selection.everything

    @cached_property
    def musts(self) -> list[Result]:
        """The results of MUST cases."""
        return [result for result in self.results if result.must]

    @cached_property
    def judged(self) -> list[Result]:
        """The results of answers that were judged."""
        return [result for result in self.results if result.outcome not in ("unsupported", INTERNAL)]

    @cached_property
    def deciding(self) -> list[Result]:
        """The judged results of MUST cases, which decide the verdict."""
        return [result for result in self.judged if result.must]

    def excuse(self, result: Result) -> str | None:
        """Return the reason why a failing result does not count; see `known.excuse`."""
        return excuse(result, self.accepted, self.known)

    @cached_property
    def failures(self) -> list[Result]:
        """The failing results of MUST cases that are neither accepted nor known."""
        return [result for result in self.results if is_open(result, self.accepted, self.known)]

    @cached_property
    def findings(self) -> Findings:
        """The causes of the failures of MUST cases."""
        return self.located or find_causes(self.results, self.claims.profile)

    @cached_property
    def open_causes(self) -> list[Cause]:
        """The causes of failures that are not accepted."""
        return [cause for cause in self.findings.causes if any(self.excuse(r) != "accepted" for r in cause.results)]

    @cached_property
    def failing_features(self) -> tuple[str, ...]:
        """The features of the open causes, in the order of the suite."""
        blamed = {feature for cause in self.open_causes for feature in cause.features}
        return tuple(feature for feature in self.asked_features if feature in blamed)

    @cached_property
    def asked_features(self) -> tuple[str, ...]:
        """The features that a judged case has, in the order of the suite."""
        return tuple(dict.fromkeys(feature for result in self.judged for feature in result.ask.features))

    @cached_property
    def not_asked(self) -> tuple[str, ...]:
        """The features and dtypes of the suite that were not judged."""
        features = [name for name in self.suite.features if name != "errors" or self.claims.registered]
        dtypes = {result.ask.dtype for result in self.judged}
        return (*(f for f in features if f not in self.asked_features), *(d for d in FLOATING if d not in dtypes))

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """The required features that were not judged."""
        return tuple(name for name in self.required if name in self.not_asked or not self.judged)

    @cached_property
    def refused(self) -> dict[str, tuple[int, int]]:
        """The features and dtypes of MUST cases that the target refused, each with the numbers refused and asked."""
        asked = Counter(name for result in self.musts for name in _names(result))
        refused = Counter(name for result in self.musts if result.outcome == "unsupported" for name in _names(result))
        return {name: (refused[name], asked[name]) for name in asked if refused[name]}

    @cached_property
    def required_but_refused(self) -> tuple[str, ...]:
        """The required features that were judged only in part."""
        return tuple(name for name in self.required if name in self.refused and name not in self.missing)

    @cached_property
    def refused_layouts(self) -> dict[str, tuple[int, int]]:
        """The memory layouts that the target refused, each with the numbers of calls refused and made."""
        refused = Counter(layout for result in self.judged for layout in result.refused)
        made = sum(result.ask.every_layout for result in self.judged)
        return {layout: (number, made) for layout, number in refused.items()}

    @cached_property
    def internal(self) -> list[Result]:
        """The results that could not be judged because of a fault of the suite."""
        return [result for result in self.results if result.outcome == INTERNAL]

    @cached_property
    def stale(self) -> list[str]:
        """Descriptions of the entries of known failures that did not fail."""
        return stale_entries(self.known, self.results, (case.id for case in self.suite.cases), self.complete)

    @property
    def status(self) -> int:
        """The exit status: 2 if no MUST case was judged or the suite has a fault, 1 if the target fails, else 0.

        A target fails if a failure is neither accepted nor known, a required feature was not asked or a case of it was
        refused, or an entry of the known failures is stale.
        """
        if not self.deciding or self.internal:
            return 2
        return int(bool(self.failures or self.missing or self.required_but_refused or self.stale))

    def tally(self, results: Iterable[Result]) -> dict[str, int]:
        """Count the results of each outcome; faults of the suite are counted only if there are any."""
        count = Counter(result.outcome for result in results)
        return {outcome: count[outcome] for outcome in (*OUTCOMES, *([INTERNAL] if count[INTERNAL] else []))}

    @property
    def summary(self) -> dict[str, int]:
        """The tally of the MUST cases."""
        return self.tally(self.musts)

    def tally_of(self, feature: str) -> dict[str, int]:
        """Count the results of the MUST cases that have a feature."""
        return self.tally(result for result in self.musts if feature in result.ask.features)

    @property
    def conventions(self) -> dict[str, str]:
        """The conventions of the results that differ from the specification."""
        seen = dict(pair for result in self.results for pair in result.conventions)
        return seen | ({"causal_alignment": self.alignment} if self.alignment else {})

    @cached_property
    def statistics(self) -> list[str]:
        """Notes on cases whose errors are all allowed, but too large for independent roundings."""
        return [f"{r.ask.case.id} {r.ask.dtype}: {r.note}" for r in self.results if r.note is not None]

    @property
    def verdict(self) -> str:
        """One sentence; it begins with "conformant" only after a complete run without an open failure."""
        unsupported = sum(result.outcome == "unsupported" for result in self.results)
        parts = [self._decision() if self.deciding else self._without_decision()]
        parts += [f"faults of the suite: {len(self.internal)}"] if self.internal else []
        parts += [f"unsupported: {unsupported}{_of(self.refused)}"] if unsupported else []
        parts += [f"refused memory layouts:{_of(self.refused_layouts)}"] if self.refused_layouts else []
        parts += [f"not asked: {', '.join(self.not_asked)}"] if self.not_asked and self.complete else []
        parts += [f"required but not asked: {', '.join(self.missing)}"] if self.missing else []
        required = {name: self.refused[name] for name in self.required_but_refused}
        parts += [f"required but refused:{_of(required)}"] if required else []
        return "; ".join(parts)

    @property
    def _declared(self) -> str:
        """Write profile, layout and ranks of a target in parentheses, if they are not those of the specification."""
        named = [f"profile {self.claims.profile}"] if self.claims.profile != "standard" else []
        named += [f"layout {self.claims.layout}"] if self.claims.layout != "bhsd" else []
        named += [f"merges of {self.claims.ranks} ranks"] if self.claims.shards else []
        return f" ({', '.join(named)})" if named else ""

    def _without_decision(self) -> str:
        """Return the reason why no MUST case was judged."""
        if self.fault is not None:
            return f"no case was judged: {self.fault}"
        reason = next((result.reason for result in self.results if result.outcome == "unsupported"), None)
        if self.judged:
            return f"no MUST case was judged, only {len(self.judged)} SHOULD cases"
        return f"no case was judged: the target refused all {len(self.results)} questions as unsupported: {reason}"

    def _decision(self) -> str:
        passed, total = sum(result.outcome == "pass" for result in self.deciding), len(self.deciding)
        failing = [result for result in self.deciding if result.outcome in FAILING]
        excused = Counter(self.excuse(result) for result in failing)
        details = [f"{excused[kind]} {kind}" for kind in ("accepted", "known") if excused[kind]]
        count = ", ".join([f"{passed} of {total} passed", *details])
        if not self.complete:
            return f"partial run: {count}" + (f", {len(self.failures)} failed" if passed < total else "")
        if self.failures or excused["known"] or self.internal:
            on = ", ".join(self.failing_features)
            return f"not conformant{self._declared} on {on} ({count}, {len(self.failures)} failed)"
        accepting = sorted({str(c) for result in self.judged for c in self.accepted.intersection(result.conventions)})
        features = dict.fromkeys(feature for result in self.deciding for feature in result.ask.features)
        return f"conformant{self._declared} on {', '.join(features)} ({count})" + (
            f", accepting {', '.join(accepting)}" if accepting else ""
        )


def _names(result: Result) -> tuple[str, ...]:
    """Name the features and the dtype of a result, which the user may require."""
    return (*result.ask.features, result.ask.dtype)


def _of(counts: Mapping[str, tuple[int, int]]) -> str:
    """Write counts in parentheses."""
    return f" ({', '.join(f'{name} {part} of {whole}' for name, (part, whole) in counts.items())})" if counts else ""
