"""Print a run: its failures by kind, each with an example and the clause that it breaks, and the verdict."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mha_spec_conformance.judging.result import FAILING, OUTCOMES, Result
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from mha_spec_conformance.judging.causes import Cause, Findings
    from mha_spec_conformance.judging.compare import Worst
    from mha_spec_conformance.running.run import Run

__all__ = ["COLOURS", "Bar", "call_of", "console", "details", "example_of", "print_run", "remarks", "title_of"]

MOST_CAUSES = 8
"""The number of causes that are printed; the JSON report has all of them."""

MOST_NAMES = 4

MOST_LETTERS = 60
"""The length to which the text of an exception is cut in the first line."""

SECONDS_BETWEEN_LINES = 30.0
"""The time between two lines of progress, if the console is not a terminal."""

COLOURS = {
    "pass": "green",
    "fail": "red",
    "error": "red",
    "crash": "red",
    "timeout": "red",
    "deviation": "yellow",
    "unsupported": "dim",
    "internal": "red",
}


class Screen(Console):
    """A console whose reader may leave early, as `head` does; the exit status stays that of the run."""

    def on_broken_pipe(self) -> None:
        """Discard the rest of the output."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """Return the console; if it is not a terminal, lines are neither wrapped nor coloured."""
    screen = Screen(highlight=False, emoji=False)
    if not screen.is_terminal:
        screen = Screen(highlight=False, emoji=False, soft_wrap=True)
    return screen


class Bar:
    """Shows a progress bar with the number of failures; if the console is not a terminal, a line from time to time."""

    def __init__(self, screen: Console, target: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self._task = self._bar.add_task(escape(target), total=None, failed="")
        self._screen = screen
        self._in_lines = not screen.is_terminal
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, failed: int) -> None:
        """Show the numbers of results and of failures."""
        self._bar.update(
            self._task, completed=done, total=total, failed=f"[red]{failed} failed[/red]" if failed else ""
        )
        if self._in_lines and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            _line(self._screen, f"{done} of {total} questions, {failed} failed")


def print_run(screen: Console, run: Run) -> None:
    """Print what the failures share, their causes, a table of the features that failed, and the verdict."""
    for line in _summary(run.findings):
        _line(screen, line, "bold")
    for note in run.notes:
        _line(screen, f"Note: {note}.")
    causes = run.findings.causes
    if causes:
        _line(screen, "")
    for number, cause in enumerate(causes[:MOST_CAUSES], 1):
        _print_cause(screen, run, cause, f"Cause {number} of {len(causes)}" if len(causes) > 1 else "Cause")
    if len(causes) > MOST_CAUSES:
        hidden = sum(len(cause.results) for cause in causes[MOST_CAUSES:])
        number = len(causes) - MOST_CAUSES
        _line(screen, f"{hidden} failures of {number} other causes are not shown; --json FILE writes all failures.\n")
    for result in run.internal:
        _print_example(screen, run, result)
    if causes:
        _print_features(screen, run)
    if run.laws:
        _print_laws(screen, run)
    for line in remarks(run):
        _line(screen, line)
    colour = "green" if run.status == 0 else "red"
    screen.print(f"[bold {colour}]{escape(run.claims.name)}: {escape(run.verdict)}[/]")


def _summary(findings: Findings) -> list[str]:
    """Describe all failures in at most two lines: their causes, what they share, and where they are wrong."""
    if findings.story is None:
        return []
    causes = findings.causes
    named = ", ".join(f"{_short(cause)} ({len(cause.results)})" for cause in causes[:MOST_NAMES])
    more = f" and {len(causes) - MOST_NAMES} more" if len(causes) > MOST_NAMES else ""
    counted = _counted(sum(len(cause.results) for cause in causes))
    number = f"of {len(causes)} causes" if len(causes) > 1 else "of 1 cause"
    story = [f"What they share: {findings.story.share}."] if findings.story.share else []
    story += [f"Where they are wrong: {findings.story.where}."] if findings.story.where else []
    return [f"{counted} {number}: {named}{more}.", *([" ".join(story)] if story else [])]


def _short(cause: Cause) -> str:
    """Name a cause in a few words; if it has no name, by the properties that its failures share."""
    if cause.kind == "unknown":
        return f"unknown, for {' and '.join(cause.story.share.properties)}" if cause.story.share else "unknown"
    return textwrap.shorten(cause.title, MOST_LETTERS, placeholder="...")


def _line(screen: Console, text: str, style: str | None = None) -> None:
    screen.print(text, style=style, markup=False)


def _print_cause(screen: Console, run: Run, cause: Cause, label: str) -> None:
    """Print a cause: its name, what its failures share, where they are wrong, an example, and the other cases."""
    _line(screen, f"{label}: {title_of(cause)} ({_counted(len(cause.results))})", "bold")
    lines = [f"What they share: {cause.story.share}."] if cause.story.share and len(cause.results) > 1 else []
    lines += [f"Where they are wrong: {cause.story.where}."] if cause.story.where else []
    lines += [f"The cases do not distinguish it from {', '.join(cause.others[:MOST_NAMES])}."] if cause.others else []
    for line in lines:
        _line(screen, f"  {line}")
    example = example_of(cause)
    _print_example(screen, run, example)
    others = dict.fromkeys(r.ask.case.id for r in cause.results if r.ask.case.id != example.ask.case.id)
    if others:
        more = f" and {len(others) - MOST_NAMES} more" if len(others) > MOST_NAMES else ""
        _line(screen, f"  Other cases: {', '.join(list(others)[:MOST_NAMES])}{more}")
    _line(screen, "")


def _counted(number: int) -> str:
    return f"{number} failures" if number > 1 else "1 failure"


def title_of(cause: Cause) -> str:
    """Write the name of a cause as a sentence."""
    if cause.kind == "mistake":
        sentences = [text for name in (cause.name or "").split(" + ") for text in _mistakes([name])[:1]]
        return " and ".join(sentences) or f"the convention {cause.name}"
    if cause.kind == "rounding":
        return f"the errors are as large as those of numbers that are stored in {cause.name}"
    return cause.title if cause.name else "no known mistake has these results"


def example_of(cause: Cause, least: int = 0) -> Result:
    """Return a small failure of a cause: if possible, with its answer, at least `least` numbers, in float32."""
    return min(cause.results, key=lambda r: (r.wrong is None, _size(r) < least, r.ask.dtype != "float32", _size(r)))


def _size(result: Result) -> int:
    return sum(math.prod(shape) for shape in result.ask.case.input_shapes.values())


def _print_example(screen: Console, run: Run, example: Result) -> None:
    """Print a failure in full."""
    excuse = run.excuse(example)
    label = example.outcome.upper() + (f" ({excuse})" if excuse else "")
    screen.print(f"  [bold {COLOURS[example.outcome]}]{label}[/]  {escape(example.ask.case.id)}  {example.ask.dtype}")
    for line in details(replace(example, diagnosis=())):
        _line(screen, f"    {line}")


def details(result: Result, option: str = "--accept") -> list[str]:
    """Describe a result in lines: the clause, the call, the worst element and the mistakes that explain it.

    `option` accepts a convention on the command line that ran the case.
    """
    first = _broken(result)
    lines = [f"{clause}: {sentence}" for clause, sentence in _sentences(first)]
    if first and (others := [clause for clause in result.clauses if clause not in first]):
        lines.append(f"The case also cites {', '.join(others)}.")
    lines.append(f"Call: {call_of(result)}")
    wrong_value = result.conventions and result.worst is not None and (result.allowance_used or 0.0) > 1
    lines.append(f"Result: {_element(result.worst) if wrong_value and result.worst else result.reason}")
    if result.conventions:
        accepting = " ".join(f"{option} {convention}" for convention in result.conventions)
        lines.append(f"This is another known convention; if you intend it, pass {accepting}")
    lines += [f"It looks like the mistake {mistake}." for mistake in _mistakes(result.diagnosis)]
    return [*lines, f"To see the case in numbers, run: mha-spec explain {result.ask.case.id}"]


def _broken(result: Result) -> tuple[str, ...]:
    """Name the clauses to read first: those of the mistake that explains the answer, else the first clause of the case.

    If no output could be compared, the failure breaks no particular clause, and none is named.
    """
    if not result.compared:
        return ()
    mistake = next((mistake for mistake in MISTAKES if mistake.name in result.diagnosis[:1]), None)
    if mistake is None:
        return result.clauses[:1]
    return tuple(clause for clause in mistake.clauses if clause in result.clauses) or mistake.clauses


def _sentences(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return clauses with their normative sentences."""
    by_id = clauses()
    return [(name, by_id[name].sentence) for name in names if name in by_id]


def call_of(result: Result) -> str:
    """Write the call in a line."""
    case, arrays = result.ask.case, result.ask.case.inputs(result.ask.dtype)
    shown = [f"{name} {tuple(array.shape)}" for name, array in arrays.items() if name not in result.ask.omitted]
    shown += [f"{name}={value!r}" for name, value in case.options.items() if name not in result.ask.omitted]
    return f"{case.function}({', '.join(shown)}) in {result.ask.dtype}"


def _element(worst: Worst) -> str:
    index = ", ".join(str(i) for i in worst.index)
    return f"{worst.output}[{index}] = {worst.got:.9g}, expected {worst.expected:.9g}, allowance {worst.allowance:.2g}"


def _mistakes(names: Sequence[str]) -> list[str]:
    """Describe mistakes and conventions, each with the bugs that made it."""
    mistakes = [mistake for name in names for mistake in MISTAKES if name in (mistake.name, mistake.variant)]
    return [mistake.sentence for mistake in mistakes[:MOST_NAMES]]


def _print_features(screen: Console, run: Run) -> None:
    """Print a table of outcomes by feature, for the features that failed."""
    from rich.table import Table

    table = Table("feature", *OUTCOMES, box=None, pad_edge=False)
    for feature in run.failing_features:
        tally = run.tally_of(feature)
        if any(tally[outcome] for outcome in FAILING):
            table.add_row(feature, *(str(tally[outcome] or "") for outcome in OUTCOMES))
    if table.row_count:
        screen.print(table)
        screen.print()


def _print_laws(screen: Console, run: Run) -> None:
    """Print in how many cases the target keeps each law; the verdict does not count them."""
    from rich.table import Table

    table = Table("law", "same bits", "within the allowance", "broken", box=None, pad_edge=False)
    for law in run.laws:
        table.add_row(law.name, *(str(number or "") for number in (law.same, law.close, len(law.broken))))
    screen.print(table)
    screen.print()


def remarks(run: Run) -> list[str]:
    """Return remarks; only those about stale known failures count for the verdict."""
    should = [result for result in run.results if not result.must]
    refusals = Counter(result.reason or "" for result in run.results if result.outcome == "unsupported")
    lines = [f"Unsupported, {number} times: {reason}" for reason, number in refusals.most_common(MOST_NAMES)]
    if should:
        tally = run.tally(should)
        counted = ", ".join(f"{number} {outcome}" for outcome, number in tally.items() if number)
        lines.append(f"SHOULD cases do not count for the verdict: {counted}.")
    if run.alignment is not None:
        lines.append(
            f"The causal alignment of the target was found to be {run.alignment}, and the cases with that offset were "
            "asked; declare it in `conventions` to fix it."
        )
    passed = [r for r in run.results if r.outcome == "pass" and r.allowance_used is not None]
    if passed:
        worst = max(passed, key=lambda r: r.allowance_used or 0.0)
        lines.append(
            f"The results that passed use at most {worst.allowance_used:.2f} of their allowance,"
            f" in {worst.ask.case.id} {worst.ask.dtype}."
        )
    if run.statistics:
        lines.append(
            f"In {len(run.statistics)} cases the errors are too large for independent roundings (SHOULD, MHA-ACC-2), "
            f"for example {run.statistics[0]}."
        )
    if differing := [f"{r.ask.case.id} {r.ask.dtype}" for r in run.results if r.deterministic is False]:
        more = f" and {len(differing) - MOST_NAMES} more" if len(differing) > MOST_NAMES else ""
        lines.append(f"Two runs of the same call give different bits in {', '.join(differing[:MOST_NAMES])}{more}.")
    return lines + run.stale
