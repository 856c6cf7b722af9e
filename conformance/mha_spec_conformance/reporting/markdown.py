"""Write a run as Markdown, for the summary of a CI job: the verdict, a table by feature, and the failures by cause."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mha_spec_conformance.judging.result import OUTCOMES
from mha_spec_conformance.suite.text import printable

from .terminal import details

if TYPE_CHECKING:
    from pathlib import Path

    from mha_spec_conformance.running.run import Run

__all__ = ["append", "cell", "markdown", "write_markdown"]

MOST_FAILURES = 5
"""The number of failures that are described; each has another function or first clause."""


def markdown(run: Run) -> str:
    """Return the report of a run as Markdown."""
    sign = "✅" if run.status == 0 else "❌"
    lines = [f"## {sign} {cell(run.claims.name)}", "", cell(run.verdict), "", *_table(run)]
    examples = {(r.ask.case.function, r.diagnosis[:1] or r.clauses[:1]): r for r in reversed(run.failures)}
    counts = Counter((r.ask.case.function, r.diagnosis[:1] or r.clauses[:1]) for r in run.failures)
    for key, number in counts.most_common(MOST_FAILURES):
        result = examples[key]
        lines += ["", f"<details><summary>{cell(result.ask.case.id)} {result.ask.dtype} (1 of {number})</summary>", ""]
        lines += [
            "```text",
            *(printable(line).replace("```", "` ` `") for line in details(result)),
            "```",
            "",
            "</details>",
        ]
    if len(counts) > MOST_FAILURES:
        lines += ["", f"{len(counts) - MOST_FAILURES} further kinds of failure are not shown."]
    return "\n".join(lines) + "\n"


def _table(run: Run) -> list[str]:
    """Return a table of the outcomes of MUST cases by feature, with the outcomes that occurred."""
    tallies = {name: run.tally_of(name) for name in run.asked_features}
    total = run.summary
    shown = [outcome for outcome in OUTCOMES if total[outcome]]
    lines = [f"| feature | {' | '.join(shown)} |", f"| --- |{' ---: |' * len(shown)}"]
    for name, tally in [*tallies.items(), ("all", total)]:
        lines.append(f"| {name} | {' | '.join(str(tally[outcome] or '') for outcome in shown)} |")
    return lines


def cell(text: str) -> str:
    """Escape what Markdown would read as markup."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return "".join(f"\\{character}" if character in "*_`[]" else character for character in escaped)


def write_markdown(run: Run, path: Path) -> None:
    """Append the report of a run to a file; see `append`.

    Raises:
        OSError: The file cannot be written.
    """
    append(path, markdown(run))


def append(path: Path, text: str) -> None:
    """Append a text to a file, because the summary of a job on GitHub has texts of several steps.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
