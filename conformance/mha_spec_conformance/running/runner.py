"""Run the suite: load the target, try the smoke cases, ask all that it claims, and judge each answer on arrival."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.selection import Selection, asks, probes, tried_in_every_layout
from mha_spec_conformance.judging.judge import Judge

from .known import is_open
from .run import Run
from .smoke import NothingToJudge, try_smoke_cases

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from mha_spec_conformance.asking.question import Question
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.suite.conventions import Convention
    from mha_spec_conformance.targets.claims import Claims

    from .known import Known

__all__ = ["NothingToJudge", "Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """The options of a run."""

    selection: Selection = field(default_factory=Selection)
    required: tuple[str, ...] = ()
    accepted: frozenset[Convention] = frozenset()
    known: tuple[Known, ...] = ()
    max_fail: int | None = None
    jobs: int = 1
    limit: float = 60.0


def run(
    target: str,
    suite: Suite,
    settings: Settings,
    progress: Callable[[int, int, int], None] = lambda done, total, failed: None,
) -> Run:
    """Judge `target`; `progress` is called with the numbers of results, of questions and of failures.

    Raises:
        TargetError: The target cannot be loaded.
        NothingToJudge: The target claims nothing that is selected, or none of its answers can be compared.
    """
    with Pool(target, settings.jobs, settings.limit) as pool:
        asked = tried_in_every_layout(asks(suite.cases, pool.claims, settings.selection))
        if not asked:
            raise NothingToJudge(
                f"target {target} has nothing to judge: {_why_nothing(suite, pool.claims, settings.selection)}"
            )
        judge = Judge(pool.claims, settings.accepted)
        notes = try_smoke_cases(suite, pool, judge)
        alignment, alignment_note = _alignment(pool, suite, settings.selection, judge)
        progress(0, len(asked), 0)
        results, finished = _results(pool, asked, settings, judge, progress)
        order = {ask.key: number for number, ask in enumerate(asked)}
        return Run(
            suite=suite,
            claims=pool.claims,
            selection=settings.selection,
            results=tuple(sorted(results, key=lambda result: order[result.ask.key])),
            finished=finished,
            alignment=alignment,
            notes=(*notes, *alignment_note),
            required=settings.required,
            accepted=settings.accepted,
            known=settings.known,
        )


def _why_nothing(suite: Suite, claims: Claims, selection: Selection) -> str:
    """Give the reason why the target cannot be asked any selected case."""
    if not any(selection.asks_in(dtype) for dtype in claims.dtypes):
        return f"it claims {', '.join(claims.dtypes)}; --dtypes asks {', '.join(selection.dtypes)}"
    functions = dict.fromkeys(case.function for case in suite.cases if selection.takes(case))
    if not functions.keys() & claims.keywords.keys():
        return f"it does not define {', '.join(functions)}"
    return "every selected case needs a feature that it does not claim"


def _results(
    pool: Pool, asked: list[Ask], settings: Settings, judge: Judge, progress: Callable[[int, int, int], None]
) -> tuple[list[Result], bool]:
    """Give the results in the order of the answers, and whether all questions were asked before too many failed."""
    by_key = {ask.key: ask for ask in asked}
    results: list[Result] = []
    failed = 0
    for question, answer in pool.answers(*_groups(asked)):
        result = judge.result(by_key[question.id, question.dtype], answer)
        results.append(result)
        failed += is_open(result, settings.accepted, settings.known)
        progress(len(results), len(asked), failed)
        if settings.max_fail is not None and failed >= settings.max_fail:
            return results, len(results) == len(asked)
    return results, True


def _groups(asked: list[Ask]) -> list[Iterator[Question]]:
    """Group the questions by signature, because a framework compiles once for each; the largest group comes first."""
    groups: dict[Hashable, list[Ask]] = {}
    for ask in asked:
        groups.setdefault(ask.case.signature, []).append(ask)
    return [(ask.question() for ask in group) for group in sorted(groups.values(), key=len, reverse=True)]


def _alignment(pool: Pool, suite: Suite, selection: Selection, judge: Judge) -> tuple[str | None, tuple[str, ...]]:
    """Find the causal alignment of a target without an offset: its name, or a note if no alignment fits."""
    by_id = {ask.case.id: (name, ask) for name, ask in probes(suite.cases, pool.claims, selection).items()}
    outcomes: dict[str, str] = {}
    for question, answer in pool.answers([ask.question() for _, ask in by_id.values()]):
        name, ask = by_id[question.id]
        outcomes[name] = judge.result(ask, answer).outcome
    tried = [name for name, _ in by_id.values() if outcomes[name] != "unsupported"]
    fitting = next((name for name in tried if outcomes[name] == "pass"), None)
    if fitting is not None or not tried:
        return fitting, ()
    return None, (f"the causal alignment of the target is none of {', '.join(tried)}",)
