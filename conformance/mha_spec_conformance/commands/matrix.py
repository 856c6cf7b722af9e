"""`mha-spec matrix`: put the reports of several targets side by side, as a page, as Markdown and as a badge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec_conformance.reporting.badge import BADGE, badge_of
from mha_spec_conformance.reporting.files import write_text
from mha_spec_conformance.reporting.markdown import append, cell
from mha_spec_conformance.reporting.matrix import STATES, matrix
from mha_spec_conformance.reporting.matrix_page import FORMAT, matrix_page
from mha_spec_conformance.reporting.stored import read_report
from mha_spec_conformance.reporting.terminal import console
from mha_spec_conformance.suite.text import one_line

from .reports import UsageError, check_output, writing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mha_spec_conformance.reporting.matrix import Cell, Matrix

__all__ = ["show_matrix"]

SIGNS: dict[str, str] = dict(zip(STATES, ("✅", "🔀", "❌", "💥", "⛔", "·"), strict=True))

MOST_COLUMNS = 12
"""The number of implementations up to which the Markdown has a cell for each clause."""


def show_matrix(
    paths: Sequence[Path],
    html: Path | None = None,
    markdown: Path | None = None,
    badges: Sequence[Path] = (),
) -> int:
    """Write the files, print a line for each implementation, and return the exit status, which is 0.

    Raises:
        ReportError: A file is not a report, or the reports are of different suites.
        UsageError: A file cannot be written, or the name of a badge ends neither in .svg nor in .json.
    """
    check_output("--html", html, FORMAT.encode())
    check_output("--markdown", markdown)
    for path in badges:
        if path.suffix not in (".svg", ".json"):
            raise UsageError(f"--badge must end in .svg or .json, received {path}")
        check_output("--badge", path, BADGE.encode() if path.suffix == ".svg" else b"schemaVersion")
    field = matrix([read_report(path) for path in paths])
    if html is not None:
        with writing("--html", html):
            write_text(html, matrix_page(field))
    if markdown is not None:
        with writing("--markdown", markdown):
            append(markdown, "\n".join(markdown_lines(field)) + "\n")
    badge = badge_of(field)
    for path in badges:
        with writing("--badge", path):
            write_text(path, badge.svg if path.suffix == ".svg" else badge.endpoint)
    screen = console()
    for line in text_lines(field):
        screen.print(line, markup=False)
    return 0


def text_lines(field: Matrix) -> Iterator[str]:
    """Describe each implementation in a line: its verdict, and the numbers of clauses in each state."""
    for number, column in enumerate(field.columns):
        counts = ", ".join(f"{count} {state}" for state, count in field.tally(number).items() if count)
        yield one_line(f"{column.name} ({column.report.versions}): {column.description}; clauses: {counts}", 300)


def markdown_lines(field: Matrix) -> Iterator[str]:
    """Write the implementations and, if there are few, the clauses, as tables of Markdown."""
    yield from ("## Attention by clause", "", f"{cell(field.columns[0].report.suite)}.", "")
    yield f"| implementation | versions | run | {' | '.join(STATES)} |"
    yield f"| --- | --- | --- |{' ---: |' * len(STATES)}"
    for number, column in enumerate(field.columns):
        names = (column.name, column.report.versions, column.description)
        counts = (str(count or "") for count in field.tally(number).values())
        yield f"| {' | '.join(cell(one_line(name, 200)) for name in names)} | {' | '.join(counts)} |"
    if len(field.columns) > MOST_COLUMNS:
        return
    yield from ("", f"Signs: {', '.join(f'{sign} {state}' for state, sign in SIGNS.items())}.", "")
    for theme, rows in field.themes.items():
        yield from (f"<details><summary>{cell(theme)}</summary>", "")
        yield f"| clause | {' | '.join(cell(one_line(column.name, 60)) for column in field.columns)} |"
        yield f"| --- |{' --- |' * len(field.columns)}"
        for row in rows:
            title = cell(one_line(f"{row.clause.id} {row.clause.title}", 200))
            yield f"| {title} | {' | '.join(map(_sign, row.cells))} |"
        yield from ("", "</details>", "")


def _sign(content: Cell) -> str:
    return f"{SIGNS[content.state]} {cell(' '.join(content.conventions))}".strip()
