"""One run of the suite against one target: what it counts for, and how it is written down."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING

from . import diagnosis
from .accuracy import RULE_VERSION
from .known import excuse, is_open, untrue
from .outcome import FAILING, OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .asking import Selection
    from .cases import Suite
    from .known import Known
    from .outcome import Result
    from .question import Claims

__all__ = ["SCHEMA", "Run", "write_json"]

SCHEMA = "mha-spec-report/1"


@dataclass(frozen=True)
class Run:
    """Everything that a run found, and what it was to be measured by."""

    suite: Suite
    claims: Claims
    selection: Selection
    results: tuple[Result, ...]
    finished: bool
    alignment: str | None = None
    notes: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    accepted: frozenset[tuple[str, str]] = frozenset()
    known: tuple[Known, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything that the target claims was asked."""
        return self.finished and self.selection.everything

    @cached_property
    def judged(self) -> list[Result]:
        """The results of what the target did not refuse as unsupported."""
        return [result for result in self.results if result.outcome != "unsupported"]

    @cached_property
    def musts(self) -> list[Result]:
        """Those that decide: of MUST cases."""
        return [result for result in self.judged if result.must]

    def excuse(self, result: Result) -> str | None:
        """Why a failing result does not count: its conventions are accepted, or it is known."""
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
        """Entries of known failures that are not so."""
        return untrue(self.known, self.results, (case.id for case in self.suite.cases), self.complete)

    @property
    def status(self) -> int:
        """0: nothing failed that is not accepted or known, and all required was asked; 1: not; 2: nothing judged.

        Only MUST cases decide: where none of them was judged, nothing was.
        """
        if not self.musts:
            return 2
        return int(bool(self.failures or self.missing or self.untrue))

    def tally(self, results: Iterable[Result]) -> dict[str, int]:
        """How many results had each outcome."""
        count = Counter(result.outcome for result in results)
        return {outcome: count[outcome] for outcome in OUTCOMES}

    @property
    def summary(self) -> dict[str, int]:
        """The tally of what counts."""
        return self.tally(result for result in self.results if result.must)

    @property
    def conventions(self) -> dict[str, str]:
        """The conventions that the target was seen to follow, where they are not the specification's."""
        seen = dict(pair for result in self.results for pair in result.conventions)
        return seen | ({"causal_alignment": self.alignment} if self.alignment else {})

    @cached_property
    def statistics(self) -> list[str]:
        """Cases whose errors, each within its allowance, are together larger than independent roundings make them."""
        return [f"{r.ask.case.id} {r.ask.dtype}: {r.note}" for r in self.results if r.note is not None]

    @property
    def verdict(self) -> str:
        """One sentence; only a complete run without an open failure says "conformant" of the target."""
        refused = len(self.results) - len(self.judged)
        parts = [self._head() if self.musts else self._nothing()]
        parts += [f"unsupported: {refused}"] if refused else []
        parts += [f"not asked: {', '.join(self.not_asked)}"] if self.not_asked and self.complete else []
        parts += [f"required but not asked: {', '.join(self.missing)}"] if self.missing else []
        return "; ".join(parts)

    def _nothing(self) -> str:
        """What was asked instead of anything that decides."""
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
        accepting = sorted({"=".join(pair) for r in self.judged for pair in self.accepted.intersection(r.conventions)})
        features = dict.fromkeys(feature for result in self.musts for feature in result.ask.features)
        return f"conformant on {', '.join(features)} ({count})" + (
            f", accepting {', '.join(accepting)}" if accepting else ""
        )

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        musts = [result for result in self.results if result.must]
        claims = self.claims
        features = {feature for result in musts for feature in result.ask.features}
        deterministic = [result.deterministic for result in self.results if result.deterministic is not None]
        return {
            "schema": SCHEMA,
            "spec_version": self.suite.spec_version,
            "suite": {
                "version": self.suite.version,
                "goldens_sha256": self.suite.goldens_sha256,
                "accuracy_rule": RULE_VERSION,
            },
            "environment": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "device": claims.hardware,
                "libraries": dict(claims.versions),
            },
            "target": {
                "name": claims.name,
                "versions": dict(claims.versions),
                "features": list(claims.features),
                "dtypes": list(claims.dtypes),
                "conventions": dict(claims.conventions),
                "profile": claims.profile,
                "deterministic": all(deterministic) if deterministic else None,
            },
            "selection": {"only": list(self.selection.only), "dtypes": list(self.selection.dtypes)},
            "complete": self.complete,
            "verdict": self.verdict,
            "status": self.status,
            "accepted": ["=".join(pair) for pair in sorted(self.accepted)],
            "known": [{"id": entry.id, "dtype": entry.dtype, "reason": entry.reason} for entry in self.known],
            "summary": self.summary,
            "should": self.tally(result for result in self.results if not result.must),
            "features": {name: self.tally(r for r in musts if name in r.ask.features) for name in sorted(features)},
            "conventions": self.conventions,
            "diagnosis": diagnosis.summarise(self.results),
            "notes": [*self.notes, *self.statistics, *self.untrue],
            "cases": [_case(result) for result in self.results],
        }


def _case(result: Result) -> dict[str, object]:
    worst = result.worst
    return {
        "id": result.ask.case.id,
        "function": result.ask.case.function,
        "dtype": result.ask.dtype,
        "clauses": list(result.clauses),
        "features": list(result.ask.features),
        "level": result.ask.case.level,
        "outcome": result.outcome,
        "reason": result.reason,
        "allowance_used": _number(result.allowance_used),
        "worst": worst
        and {
            "output": worst.output,
            "index": [int(i) for i in worst.index],
            "expected": _number(worst.expected),
            "got": _number(worst.got),
            "allowance": _number(worst.allowance),
        },
        "diagnosis": list(result.diagnosis),
        "seconds": round(result.seconds, 6),
    }


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they are written as text."""
    return None if value is None else float(value) if math.isfinite(value) else str(float(value))


def write_json(run: Run, path: Path) -> None:
    """Write the report of a run to a file."""
    path.write_text(json.dumps(run.as_json(), indent=1, allow_nan=False) + "\n")
