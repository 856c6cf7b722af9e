"""Reports for the tests of the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mha_spec_conformance.reporting.matrix import Matrix, matrix
from mha_spec_conformance.reporting.stored import read_report
from support.stored_reports import cause, entry, report, written

if TYPE_CHECKING:
    from pathlib import Path

BASIC = "attention/core/generic-1"
BASIC_CLAUSES = {"clauses": ["MHA-SCORE-2", "MHA-HEAD-1"], "features": ["core", "groups"]}
WINDOW_CLAUSES = {"clauses": ["MHA-WINDOW-1", "MHA-HEAD-1"], "features": ["window", "groups"]}
WINDOWS = [f"attention/window/{number}" for number in range(3)]


def named(name: str, *entries: dict[str, Any], **members: Any) -> dict[str, Any]:
    """Return the report of a target with this name."""
    content = report(*entries, **members)
    content["target"] = {**content["target"], "name": name, "features": ["mask", "window"]}
    return content


def basic(outcome: str = "pass", **members: Any) -> dict[str, Any]:
    return entry(outcome, BASIC, **{**BASIC_CLAUSES, **members})


def windows(outcome: str = "pass", dtype: str = "bfloat16", **members: Any) -> list[dict[str, Any]]:
    return [entry(outcome, name, dtype, **{**WINDOW_CLAUSES, **members}) for name in WINDOWS]


def field_reports() -> list[dict[str, Any]]:
    """Return reports in which each state occurs."""
    wrong = windows("fail", allowance_used=123.0, reason="`output` at (0, 1) must be 1, received 2")
    exclusive = windows("deviation", conventions=["window_left=exclusive"], reason="window_left=exclusive")
    crashed = windows("crash")
    blamed = {"clauses": ["MHA-WINDOW-1"], "features": ["window"]}
    return [
        named("folder/right.py", basic(), *windows(), *windows(dtype="float32"), entry("pass")),
        named(
            "wrong.py",
            basic(),
            *wrong,
            *windows(dtype="float32"),
            status=1,
            causes=[{**cause("window-ignored", *wrong), **blamed}],
            verdict="not conformant",
        ),
        named(
            "another folder/exclusive.py",
            basic(),
            *exclusive,
            status=1,
            causes=[{**cause("window_left=exclusive", *exclusive), **blamed}],
            verdict="not conformant",
        ),
        named("refuses.py", basic(), *windows("unsupported", reason="no window")),
        named(
            "crashes.py", basic(), *crashed, status=1, causes=[{**cause("a crash", *crashed, kind="error"), **blamed}]
        ),
        named("partial.py", *windows()[:1], complete=False, verdict="partial run: 1 of 1 passed"),
    ]


def read(folder: Path, *reports: dict[str, Any]) -> Matrix:
    return matrix([read_report(path) for path in written(folder, *reports)])
