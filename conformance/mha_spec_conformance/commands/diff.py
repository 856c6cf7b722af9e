"""`mha-spec diff`: print what changed between two reports of a target."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mha_spec_conformance.reporting.difference import KINDS, difference
from mha_spec_conformance.reporting.markdown import append, cell
from mha_spec_conformance.reporting.stored import read_report
from mha_spec_conformance.reporting.terminal import console
from mha_spec_conformance.suite.text import one_line

from .reports import check_output, writing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mha_spec_conformance.reporting.difference import Difference, Group

__all__ = ["diff"]

HEADINGS = dict(zip(KINDS, ("Regressions", "Mends", "Other changes"), strict=True))

MOST_GROUPS = 20
"""The number of groups of each kind that are shown."""

MOST_CASES = 5
"""The number of cases of a group that are shown."""

MOST_CHARACTERS = 300
"""The length to which a text of a report is cut."""


def diff(old: Path, new: Path, markdown: Path | None = None) -> int:
    """Print what changed from the old report to the new one, and return the exit status.

    Raises:
        ReportError: A file is not a report, or the reports are of different suites or selections.
        UsageError: The Markdown cannot be written.
    """
    check_output("--markdown", markdown)
    changed = difference(read_report(old), read_report(new))
    if markdown is not None:
        with writing("--markdown", markdown):
            append(markdown, "\n".join(markdown_lines(changed)) + "\n")
    screen = console()
    for line in text_lines(changed):
        screen.print(line, markup=False, style="bold" if line and not line.startswith(" ") else None)
    return changed.status


def text_lines(changed: Difference) -> Iterator[str]:
    """Describe a difference in lines for the terminal."""
    yield from _facts(changed)
    for kind in KINDS:
        groups = [group for group in changed.groups if group.kind == kind]
        if groups:
            yield from ("", f"{HEADINGS[kind]} ({changed.count(kind)})")
        for group in groups[:MOST_GROUPS]:
            yield f"  {_heading(group)}"
            yield from (f"    {line}" for line in _cases(changed, group))
        if len(groups) > MOST_GROUPS:
            yield f"  {_more(groups)}"
    yield from ("", changed.summary)


def markdown_lines(changed: Difference) -> Iterator[str]:
    """Describe a difference in lines of Markdown."""
    sign = "❌" if changed.status else "✅"
    yield from (f"## {sign} {cell(_line(changed.new.name))}: {changed.summary}", "")
    yield from (f"{cell(line)}  " for line in _facts(changed))
    for kind in KINDS:
        groups = [group for group in changed.groups if group.kind == kind]
        if groups:
            yield from ("", f"### {HEADINGS[kind]} ({changed.count(kind)})", "")
        for group in groups[:MOST_GROUPS]:
            yield f"- {cell(_heading(group))}"
            yield from (f"  - {cell(line)}" for line in _cases(changed, group))
        if len(groups) > MOST_GROUPS:
            yield f"- {cell(_more(groups))}"


def _facts(changed: Difference) -> Iterator[str]:
    """Describe the two runs."""
    for label, report in (("Old", changed.old), ("New", changed.new)):
        yield _line(f"{label}: {report.name} ({report.versions}): {report.data['verdict']}")
    yield _line(f"Both: {changed.new.suite}")
    yield from map(_line, changed.remarks)


def _heading(group: Group) -> str:
    clauses = f" [{', '.join(group.clauses[:3])}]" if group.clauses else ""
    title = f": {group.title}" if group.title else ""
    return _line(f"{group.transition}{title}{clauses} ({len(group.changes)})")


def _cases(changed: Difference, group: Group) -> Iterator[str]:
    """Describe the first cases of a group, and the command that shows the first regression without the suite."""
    cases = group.cases
    for name, changes in list(cases.items())[:MOST_CASES]:
        reason = changes[0].latest.reason
        dtypes = ", ".join(change.key[1] for change in changes)
        yield _line(f"{name} {dtypes}{f': {reason}' if reason and reason != group.title else ''}")
    if len(cases) > MOST_CASES:
        yield f"and {len(cases) - MOST_CASES} more cases"
    first = group.changes[0]
    if group.kind == "regression" and first.new is not None and first.new.failing:
        name, dtype = first.key
        yield _line(f"To reproduce: mha-spec repro {shlex.quote(changed.new.name)} {name} --dtype {dtype}")


def _more(groups: list[Group]) -> str:
    hidden = sum(len(group.changes) for group in groups[MOST_GROUPS:])
    return f"and {hidden} more of {len(groups) - MOST_GROUPS} other causes"


def _line(text: str) -> str:
    return one_line(text, MOST_CHARACTERS)
