"""`mha-spec fuzz`: make random calls until the time is over, and print the faults."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hypothesis.configuration import set_hypothesis_home_dir
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from mha_spec.arrays import FLOATING
from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.process import adopt_orphans
from mha_spec_conformance.fuzzing.asking import Asker
from mha_spec_conformance.fuzzing.case import case_of, save
from mha_spec_conformance.fuzzing.script import script_of
from mha_spec_conformance.fuzzing.search import RoundIsOver, Search
from mha_spec_conformance.fuzzing.worlds import world_of
from mha_spec_conformance.reporting.terminal import COLOURS, console, details
from mha_spec_conformance.suite.conventions import parse_convention

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from rich.console import Console

    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.fuzzing.search import Finding, Outcome

__all__ = ["fuzz"]

LOADER_IN_WORLD = "mha_spec_conformance.fuzzing.worlds:load_in_world"

LEAST_SECONDS = 1.0
"""The least time limit of a call, however little time is left."""

SECONDS_BETWEEN_LINES = 60.0
"""The time between two lines of progress, if the console is not a terminal."""


def fuzz(
    *,
    target: str,
    seconds: float = 60.0,
    seed: int = 0,
    world: str | None = None,
    functions: tuple[str, ...] = (),
    accepted: Iterable[str] = (),
    folder: Path | None = None,
    max_fail: int | None = None,
    most_calls: int | None = None,
    limit: float = 60.0,
) -> int:
    """Search for wrong answers of a target, print each fault once, save them as cases; return the exit status."""
    screen, name = console(), target if world is None else f"{target} in {world}"
    entered = None if world is None else world_of(target, world)
    loading = () if world is None else (LOADER_IN_WORLD, world)
    adopt_orphans()
    with (
        TemporaryDirectory() as home,
        Pool(target, limit=limit, loading=loading) as pool,
        Clock(screen, seconds) as clock,
    ):
        set_hypothesis_home_dir(home)

        def answered(question: Question) -> Answer:
            # The first answer may need a long compilation; without it the search would judge nothing.
            return _answer(pool, question, search.left if search.outcome.judged else limit, limit)

        def report(finding: Finding) -> None:
            print_finding(screen, finding, script_of(finding, target, pool.claims.arrays, world))

        asker = Asker(pool.claims, answered, frozenset(parse_convention(text) for text in accepted))
        search = Search(
            asker,
            seed,
            seconds,
            functions=functions,
            world=entered,
            most=max_fail,
            most_calls=most_calls,
            progress=clock,
            report=report,
        )
        outcome = search.run()
    if folder is not None and outcome.findings:
        save([case_of(finding.call, f"fuzz/seed-{seed}/{n}") for n, finding in enumerate(outcome.findings)], folder)
        screen.print(f"saved: mha-spec check {target} --cases {folder}", markup=False)
    print_summary(screen, name, outcome)
    return outcome.status


def _answer(pool: Pool, question: Question, left: float, limit: float) -> Answer:
    """Ask a question in the time that is left; raise RoundIsOver if a time shorter than the limit ends the call."""
    pool.limit = min(limit, max(left, LEAST_SECONDS))
    ((_, answer),) = pool.answers([question])
    if answer.kind == "timeout" and pool.limit < limit:
        raise RoundIsOver
    return answer


class Clock:
    """Shows a progress bar over the time on a terminal, and otherwise prints a line from time to time."""

    def __init__(self, screen: Console, seconds: float) -> None:
        self._screen = screen
        self._seconds = seconds
        self._next_line = SECONDS_BETWEEN_LINES
        columns = (TextColumn("{task.fields[text]}"), BarColumn())
        self._bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self._task = self._bar.add_task("", total=seconds, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, outcome: Outcome) -> None:
        """Show the numbers of judged calls and of faults."""
        text = f"{outcome.judged.total()} calls, {len(outcome.findings)} faults"
        self._bar.update(self._task, completed=outcome.seconds, text=text)
        if not self._screen.is_terminal and outcome.seconds >= self._next_line:
            self._next_line += SECONDS_BETWEEN_LINES
            self._screen.print(f"{outcome.seconds:.0f} s: {text}", markup=False)


def print_finding(screen: Console, finding: Finding, script: str) -> None:
    """Print a fault as `check` prints a failure, with a script that reproduces it."""
    result, call = finding.result, finding.call
    label = f"[bold {COLOURS[result.outcome]}]{result.outcome.upper()}[/]"
    screen.print(f"{label}  {escape(call.function)}  {call.dtype}")
    *lines, _ = details(result)
    passed = [f"{name} as {form}" for forms in (call.host, call.layouts) for name, form in forms.items()]
    lines += [f"passed: {', '.join(passed)}"] if passed else []
    for line in [*lines, "script:", *(f"    {line}" for line in script.splitlines())]:
        screen.print(f"  {line}", markup=False)
    screen.print()


def print_summary(screen: Console, name: str, outcome: Outcome) -> None:
    """Print the number of calls by function and dtype, the seed, and the verdict."""
    dtypes = [dtype for dtype in FLOATING if any(dtype == used for _, used in outcome.judged)]
    for function in dict.fromkeys(function for function, _ in outcome.judged):
        counts = ", ".join(f"{outcome.judged[function, dtype]} {dtype}" for dtype in dtypes)
        screen.print(f"{function}: {counts}", markup=False)
    if outcome.unsupported:
        screen.print(f"unsupported: {outcome.unsupported} calls", markup=False)
    if outcome.should:
        should = f"{outcome.should} calls failed a SHOULD clause, which does not count (MHA-POISON-2)"
        screen.print(should, markup=False)
    verdict = {0: "no fault found", 1: f"{len(outcome.findings)} faults", 2: "no call could be judged"}[outcome.status]
    colour = "green" if outcome.status == 0 else "red"
    figures = f"{outcome.judged.total()} calls in {outcome.seconds:.0f} s, seed {outcome.seed}"
    screen.print(f"[bold {colour}]{escape(name)}: {verdict} in {figures}[/]")
