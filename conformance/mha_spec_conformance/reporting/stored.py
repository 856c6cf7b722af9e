"""Read the JSON report of a run again.

The file may come from another machine, so every member that is used is checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.judging.causes import Cause, Story
from mha_spec_conformance.judging.result import FAILING, INTERNAL, OUTCOMES
from mha_spec_conformance.running.known import Known, excuse
from mha_spec_conformance.suite.conventions import Convention, parse_convention
from mha_spec_conformance.suite.form import are_texts, is_text

from .report import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Key = tuple[str, str]

__all__ = ["ReportError", "StoredReport", "StoredResult", "read_report", "require_same_suite"]


class ReportError(MhaSpecError):
    """A file is not a report, or reports cannot be compared."""


@dataclass(frozen=True)
class StoredResult:
    """The outcome of a case in a dtype, as a report has it."""

    data: Mapping[str, Any]

    @property
    def key(self) -> Key:
        """The id and dtype."""
        return self.data["id"], self.data["dtype"]

    @property
    def outcome(self) -> str:
        """One of OUTCOMES, or INTERNAL."""
        return self.data["outcome"]

    @property
    def failing(self) -> bool:
        """True if the outcome makes a target not conformant."""
        return self.outcome in FAILING

    @property
    def must(self) -> bool:
        """True if the result counts for the verdict."""
        return self.data["level"] == "MUST"

    @property
    def clauses(self) -> list[str]:
        """The clauses that the case cites, those of its cause first."""
        return self.data["clauses"]

    @property
    def reason(self) -> str | None:
        """The reason of the outcome; None for a pass."""
        return self.data["reason"]

    @cached_property
    def share(self) -> float | None:
        """The share of the allowance that the worst element uses; None if no number was compared."""
        used = self.data["allowance_used"]
        return None if used is None else float(used)

    @property
    def conventions(self) -> tuple[Convention, ...]:
        """The conventions that give this result."""
        return tuple(parse_convention(text) for text in self.data["conventions"])


@dataclass(frozen=True)
class StoredReport:
    """The report of a run, as `as_json` returned it."""

    path: Path
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the target."""
        return self.data["target"]["name"]

    @property
    def versions(self) -> str:
        """The versions of the target's libraries in a line."""
        versions = self.data["target"]["versions"]
        return ", ".join(f"{name} {version}" for name, version in versions.items()) or "no version"

    @property
    def suite(self) -> str:
        """The versions of the suite in a line."""
        suite = self.data["suite"]
        return (
            f"specification {self.data['spec_version']}, suite {suite['version']}, accuracy rule "
            f"{suite['accuracy_rule']}, goldens {suite['goldens_sha256'][:12]}"
        )

    @cached_property
    def results(self) -> dict[Key, StoredResult]:
        """The results by id and dtype."""
        return {result.key: result for result in map(StoredResult, self.data["cases"])}

    @cached_property
    def causes(self) -> dict[Key, Cause]:
        """The cause of each failure that has one; a cause has no results, which need the answers."""
        return {
            (case["id"], case["dtype"]): cause
            for entry in self.data["causes"]
            for cause in [_cause(entry)]
            for case in entry["cases"]
        }

    def excuse(self, result: StoredResult) -> str | None:
        """Return the reason why a failing result does not count; see `known.excuse`."""
        return excuse(result, self._accepted, self._known)

    @cached_property
    def _accepted(self) -> frozenset[Convention]:
        return frozenset(parse_convention(text) for text in self.data["accepted"])

    @cached_property
    def _known(self) -> tuple[Known, ...]:
        names = ("id", "reason", "dtype", "outcome")
        return tuple(Known(*(entry[name] for name in names)) for entry in self.data["known"])


def _cause(entry: Mapping[str, Any]) -> Cause:
    others, clauses, features = (tuple(entry[name]) for name in ("others", "clauses", "features"))
    return Cause(entry["kind"], entry["name"], (), Story(None), others, clauses, features)


def read_report(path: Path) -> StoredReport:
    """Read a report.

    Raises:
        ReportError: The file cannot be read, does not hold a report, or a member has a wrong form.
    """
    data = _read_data(path)
    _check(path, "", data, REPORT)
    for part, form in (("suite", SUITE), ("target", TARGET), ("selection", SELECTION)):
        _check(path, f"{part}.", data[part], form)
    for part, form in (("cases", RESULT), ("causes", CAUSE), ("known", KNOWN)):
        for number, entry in enumerate(data[part]):
            _check(path, f"{part}[{number}].", entry, form)
    report = StoredReport(path, data)
    if len(report.results) < len(data["cases"]):
        raise ReportError(f"{path}: a case occurs twice in the same dtype")
    return report


def _read_data(path: Path) -> dict[str, Any]:
    """Return the members of a report, which are not checked except for the schema."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path}: cannot be read as a report: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ReportError(f"{path}: the file does not hold {SCHEMA}; `mha-spec check TARGET --json FILE` writes it")
    return data


def require_same_suite(reports: Sequence[StoredReport]) -> None:
    """Raise if reports are of different suites, because their results cannot be compared."""
    first = reports[0]
    for report in reports[1:]:
        if any(report.data[name] != first.data[name] for name in ("spec_version", "suite")):
            raise ReportError(
                f"the reports are of different suites: {first.path} of {first.suite}; {report.path} of {report.suite}; "
                "judge both targets with the same version of mha-spec"
            )


def _check(path: Path, place: str, data: Any, form: Form) -> None:
    """Raise if a member does not have its form."""
    if not isinstance(data, dict):
        raise ReportError(f"{path}: `{place[:-1]}` must be an object, received {data!r:.100}")
    for name, (expected, holds) in form.items():
        if name not in data or not holds(data[name]):
            received = f"received {data[name]!r:.100}" if name in data else "which is missing"
            raise ReportError(f"{path}: `{place}{name}` must be {expected}, {received}")


def _is_text_or_null(value: Any) -> bool:
    return value is None or is_text(value)


def _are_conventions(value: Any) -> bool:
    try:
        return are_texts(value) and all(map(parse_convention, value))
    except MhaSpecError:
        return False


def _is_share(value: Any) -> bool:
    """Tell whether a value is a number as `report` writes it, with NaN and infinities as texts."""
    return value is None or type(value) in (int, float) or value in ("nan", "inf", "-inf")


def _are_labelled(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_text, value.values()))


def _are_asked(value: Any) -> bool:
    """Tell whether a value is a list of objects with an id and a dtype."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and is_text(item.get("id")) and is_text(item.get("dtype")) for item in value
    )


Form = dict[str, tuple[str, "Callable[[Any], bool]"]]
"""The members of an object: what each must be, and the test of it."""

_TEXT = "a string", is_text
_TEXTS = "a list of strings", are_texts
_OPTIONAL = "a string or null", _is_text_or_null
_CONVENTIONS = "a list of conventions", _are_conventions
_LIST = "a list", lambda value: isinstance(value, list)
_OBJECT = "an object", lambda value: isinstance(value, dict)
_ASKED = "a list of objects with id and dtype", _are_asked

REPORT: Form = {
    **dict.fromkeys(("spec_version", "verdict"), _TEXT),
    **dict.fromkeys(("causes", "known"), _LIST),
    **dict.fromkeys(("suite", "target", "selection"), _OBJECT),
    "accepted": _CONVENTIONS,
    "complete": ("true or false", lambda value: isinstance(value, bool)),
    "status": ("0, 1 or 2", lambda value: type(value) is int and value in (0, 1, 2)),
    "cases": _ASKED,
}
SUITE: Form = dict.fromkeys(("version", "goldens_sha256", "accuracy_rule"), _TEXT)
TARGET: Form = {
    **dict.fromkeys(("name", "profile"), _TEXT),
    "dtypes": _TEXTS,
    "features": _TEXTS,
    **dict.fromkeys(("versions", "conventions"), ("an object of strings", _are_labelled)),
}
SELECTION: Form = {
    **dict.fromkeys(("only", "dtypes", "exclude"), _TEXTS),
    "shard": ("null or two numbers", lambda value: value is None or (isinstance(value, list) and len(value) == 2)),
}
RESULT: Form = {
    **dict.fromkeys(("id", "dtype", "function"), _TEXT),
    **dict.fromkeys(("clauses", "features", "diagnosis"), _TEXTS),
    "level": ("MUST or SHOULD", lambda value: value in ("MUST", "SHOULD")),
    "outcome": (f"one of {', '.join(OUTCOMES)}", lambda value: value in (*OUTCOMES, INTERNAL)),
    "reason": _OPTIONAL,
    "allowance_used": ("a number or null", _is_share),
    "conventions": _CONVENTIONS,
}
CAUSE: Form = {
    "kind": _TEXT,
    "name": _OPTIONAL,
    **dict.fromkeys(("others", "clauses", "features"), _TEXTS),
    "cases": _ASKED,
}
KNOWN: Form = {**dict.fromkeys(("id", "reason"), _TEXT), **dict.fromkeys(("dtype", "outcome"), _OPTIONAL)}
