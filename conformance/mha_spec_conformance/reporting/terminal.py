"""Print a run: a progress bar on a terminal, plain lines elsewhere, and a verdict to act on."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mha_spec_conformance.judging.result import FAILING, OUTCOMES, Result
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from mha_spec_conformance.judging.compare import Worst
    from mha_spec_conformance.running.run import Run

__all__ = ["Bar", "console", "print_run"]

MOST_GROUPS = 8
"""The number of kinds of failure that are printed in full; the report has all of them."""

MOST_NAMES = 4

COLOURS = {
    "pass": "green",
    "fail": "red",
    "error": "red",
    "crash": "red",
    "timeout": "red",
    "deviation": "yellow",
    "unsupported": "dim",
}


def console() -> Console:
    """Give the terminal; elsewhere lines are neither wrapped nor coloured."""
    screen = Console(highlight=False, emoji=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, emoji=False, soft_wrap=True)
    return screen


class Bar:
    """A progress bar with the number of failures, on a terminal only."""

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

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, failed: int) -> None:
        """Show the number of results, and of those that make the target fail."""
        self._bar.update(
            self._task, completed=done, total=total, failed=f"[red]{failed} failed[/red]" if failed else ""
        )


def print_run(screen: Console, run: Run) -> None:
    """Print the failures by kind, a table of the features that failed, and the verdict."""
    for note in run.notes:
        _line(screen, f"note: {note}")
    failing = [r for r in run.results if r.outcome in FAILING and r.must]
    groups = _groups(failing)
    for members in groups[:MOST_GROUPS]:
        _print_group(screen, run, members)
    if len(groups) > MOST_GROUPS:
        hidden = sum(len(members) for members in groups[MOST_GROUPS:])
        _line(screen, f"and {hidden} more in {len(groups) - MOST_GROUPS} other kinds; --json FILE writes them all\n")
    if failing:
        _print_features(screen, run)
    for line in _remarks(run):
        _line(screen, line)
    colour = "green" if run.status == 0 else "red"
    screen.print(f"[bold {colour}]{escape(run.claims.name)}: {escape(run.verdict)}[/]")


def _line(screen: Console, text: str, style: str | None = None) -> None:
    screen.print(text, style=style, markup=False)


def _groups(failing: list[Result]) -> list[list[Result]]:
    """Group the failures that look like one mistake, the most frequent first."""
    groups: defaultdict[tuple[str, object], list[Result]] = defaultdict(list)
    for result in failing:
        named = result.conventions or result.diagnosis[:1]
        raised = None if result.compared else result.reason
        groups[result.outcome, raised or named or result.clauses[:1]].append(result)
    return sorted(groups.values(), key=len, reverse=True)


def _print_group(screen: Console, run: Run, members: list[Result]) -> None:
    """One example in full, and the names of the others."""
    example = min(
        members, key=lambda r: (r.ask.dtype != "float32", sum(a.size for a in r.ask.case.inputs(r.ask.dtype).values()))
    )
    excuse = run.excuse(example)
    label = example.outcome.upper() + (f" ({excuse})" if excuse else "")
    screen.print(
        f"[bold {COLOURS[example.outcome]}]{label}[/]  {escape(example.ask.case.id)}  {example.ask.dtype}"
        + f"  ({len(members)} like it)" * (len(members) > 1)
    )
    for line in details(replace(example, diagnosis=_shared(example, members))):
        _line(screen, f"  {line}")
    others = dict.fromkeys(r.ask.case.id for r in members if r.ask.case.id != example.ask.case.id)
    if others:
        more = f" and {len(others) - MOST_NAMES} more" if len(others) > MOST_NAMES else ""
        _line(screen, f"  also: {', '.join(list(others)[:MOST_NAMES])}{more}")
    _line(screen, "")


def _shared(example: Result, members: list[Result]) -> tuple[str, ...]:
    """Name the mistakes that explain all members of a group; if there are none, those that explain the example."""
    shared = tuple(name for name in example.diagnosis if all(name in member.diagnosis for member in members))
    return shared or example.diagnosis


def details(result: Result) -> list[str]:
    """Give lines with the clause, the call, the worst element and the mistakes that explain it."""
    first = broken(result)
    lines = [f"{clause}: {sentence}" for clause, sentence in sentences(first)]
    if first and (others := [clause for clause in result.clauses if clause not in first]):
        lines.append(f"cites also {', '.join(others)}")
    lines.append(f"asked: {asked(result)}")
    wrong_value = result.conventions and result.worst is not None and (result.allowance_used or 0.0) > 1
    lines.append(f"came:  {_place(result.worst) if wrong_value and result.worst else result.reason}")
    if result.conventions:
        accepting = " ".join(f"--accept {convention}" for convention in result.conventions)
        lines.append(f"this is another known convention; if you intend it, pass {accepting}")
    lines += [f"looks like: {name}" for name in _titles(result)]
    return [*lines, f"see:   mha-spec explain {result.ask.case.id}"]


def broken(result: Result) -> tuple[str, ...]:
    """Name the clauses to read first: those of the mistake that explains the answer, else the first of the case.

    There are none if no output could be compared, because no clause is about the reason.
    """
    if not result.compared:
        return ()
    mistake = next((mistake for mistake in MISTAKES if mistake.name in result.diagnosis[:1]), None)
    if mistake is None:
        return result.clauses[:1]
    return tuple(clause for clause in mistake.clauses if clause in result.clauses) or mistake.clauses


def sentences(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Give clauses with their normative sentences."""
    known = clauses()
    return [(name, known[name].sentence) for name in names if name in known]


def asked(result: Result) -> str:
    """Write the call in one line."""
    case, arrays = result.ask.case, result.ask.case.inputs(result.ask.dtype)
    shown = [f"{name} {tuple(array.shape)}" for name, array in arrays.items() if name not in result.ask.omitted]
    shown += [f"{name}={value!r}" for name, value in case.options.items() if name not in result.ask.omitted]
    return f"{case.function}({', '.join(shown)}) in {result.ask.dtype}"


def _place(worst: Worst) -> str:
    index = ", ".join(str(i) for i in worst.index)
    return f"{worst.output}[{index}] = {worst.got:.9g}, expected {worst.expected:.9g}, allowance {worst.allowance:.2g}"


def _titles(result: Result) -> list[str]:
    by_name = {mistake.name: mistake for mistake in MISTAKES}
    mistakes = [by_name[name] for name in result.diagnosis[:MOST_NAMES] if name in by_name]
    return [
        f"{mistake.name}: {mistake.title}" + (f" ({', '.join(mistake.bugs)})" if mistake.bugs else "")
        for mistake in mistakes
    ]


def _print_features(screen: Console, run: Run) -> None:
    """Print the outcomes of each feature that failed."""
    from rich.table import Table

    table = Table("feature", *OUTCOMES, box=None, pad_edge=False)
    for feature in run.asked_features:
        tally = run.tally(r for r in run.results if r.must and feature in r.ask.features)
        if any(tally[outcome] for outcome in FAILING):
            table.add_row(feature, *(str(tally[outcome] or "") for outcome in OUTCOMES))
    if table.row_count:
        screen.print(table)
        screen.print()


def _refusals(run: Run) -> Counter[str]:
    return Counter(result.reason or "" for result in run.results if result.outcome == "unsupported")


def _remarks(run: Run) -> list[str]:
    """Give remarks that do not decide the verdict."""
    should = [result for result in run.results if not result.must]
    lines = [f"unsupported, {number} times: {reason}" for reason, number in _refusals(run).most_common(MOST_NAMES)]
    if should:
        tally = run.tally(should)
        counted = ", ".join(f"{number} {outcome}" for outcome, number in tally.items() if number)
        lines.append(f"SHOULD cases, which do not count: {counted}")
    if run.alignment is not None:
        lines.append(
            f"causal diagonal where lengths differ: {run.alignment} (read off; judged where `conventions` says so)"
        )
    passed = [r for r in run.results if r.outcome == "pass" and r.allowance_used is not None]
    if passed:
        worst = max(passed, key=lambda r: r.allowance_used or 0.0)
        lines.append(
            f"largest share of an allowance among what passed: {worst.allowance_used:.2f}"
            f" in {worst.ask.case.id} {worst.ask.dtype}"
        )
    if run.statistics:
        lines.append(
            "errors larger than independent roundings make them (SHOULD, MHA-ACC-2): "
            f"{len(run.statistics)} cases, as {run.statistics[0]}"
        )
    if any(result.deterministic is False for result in run.results):
        lines.append("two runs of one call do not agree to the bit")
    return lines + run.untrue
