"""Run the suite: load the target, try the smoke cases, ask all that it claims, and judge each answer on arrival."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.selection import Selection, asks, tried_in_every_layout
from mha_spec_conformance.judging.judge import Judge

from .again import SecondTime
from .alignment import find_alignment
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

    Key = tuple[str, str]

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
        asked = _asked(target, suite, pool.claims, settings.selection)
        judge = Judge(pool.claims, settings.accepted)
        notes = try_smoke_cases(suite, pool, judge)
        alignment = find_alignment(pool, suite, settings.selection, judge)
        results, finished = _results(pool, asked, settings, judge, progress)
        return Run(
            suite=suite,
            claims=pool.claims,
            selection=settings.selection,
            results=(*alignment.failures, *(results[ask.key] for ask in asked if ask.key in results)),
            finished=finished,
            alignment=alignment.name,
            notes=(*notes, *([alignment.note] if alignment.note else [])),
            required=settings.required,
            accepted=settings.accepted,
            known=settings.known,
        )


def _asked(target: str, suite: Suite, claims: Claims, selection: Selection) -> list[Ask]:
    """Give all asks of a run, or raise with the reason why the target cannot be asked what was selected."""
    asked = tried_in_every_layout(asks(suite.cases, claims, selection))
    if not asked:
        raise NothingToJudge(f"target {target} has nothing to judge: {_why_nothing(suite, claims, selection)}")
    lacking = [dtype for dtype in selection.dtypes if dtype not in claims.dtypes]
    if lacking:
        raise NothingToJudge(
            f"target {target} cannot be judged in {', '.join(lacking)}: it claims {', '.join(claims.dtypes)}; "
            f"--dtypes asks {', '.join(selection.dtypes)}"
        )
    return asked


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
) -> tuple[dict[Key, Result], bool]:
    """Give the results by case and dtype, and whether all questions were asked before too many failed."""
    by_key = {ask.key: ask for ask in asked}
    second_time = SecondTime(asked)
    results: dict[Key, Result] = {}
    count, failed = len(asked) + second_time.count, 0
    progress(0, count, failed)
    for question, answer in pool.answers(*_groups(asked)):
        ask = by_key[question.id, question.dtype]
        results[ask.key] = result = judge.result(ask, answer)
        second_time.remember(result, answer)
        failed += is_open(result, settings.accepted, settings.known)
        progress(len(results), count, failed)
        if settings.max_fail is not None and failed >= settings.max_fail:
            return results, False
    for done, result in enumerate(second_time.amended(pool, judge, results), len(results)):
        results[result.ask.key] = result
        progress(min(done, count), count, failed)
    return results, True


def _groups(asked: list[Ask]) -> list[Iterator[Question]]:
    """Group the questions by signature, because a framework compiles once for each; the largest group comes first."""
    groups: dict[Hashable, list[Ask]] = {}
    for ask in asked:
        groups.setdefault(ask.case.signature, []).append(ask)
    return [(ask.question() for ask in group) for group in sorted(groups.values(), key=len, reverse=True)]
