"""Run the suite: load the target, try the smoke cases, ask all that it claims, and judge each answer on arrival."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.selection import Selection, asks, probes, tried_in_every_layout
from mha_spec_conformance.asking.sharding import shard
from mha_spec_conformance.judging.judge import Judge

from .again import SecondTime
from .alignment import find_alignment
from .diagnosing import diagnosed
from .keys import with_wrong_keys
from .known import is_open
from .laws import laws_of
from .results import ResultsFile, read_results
from .run import Run
from .smoke import NothingToJudge, try_smoke_cases

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
    from pathlib import Path

    from mha_spec_conformance.asking.question import Question, Source
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.suite.conventions import Convention
    from mha_spec_conformance.targets.claims import Claims

    from .known import Known

    Key = tuple[str, str]
    Progress = Callable[[int, int, int], None]

__all__ = ["NothingToJudge", "Settings", "asks_of", "check_selection", "judge_all", "run", "without_progress"]


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
    command: tuple[str, ...] | None = None
    """The program of a target that is not in Python, with its arguments."""
    memory: int | None = None
    """The most bytes of memory of a process; see `Pool`."""
    results: Path | None = None
    """The file to which results are appended as they come."""
    resume: bool = False
    """If True, the cases whose results the file has are not asked again."""


def without_progress(done: int, total: int, failed: int) -> None:
    """Show no progress."""


def run(target: str, suite: Suite, settings: Settings, progress: Progress = without_progress) -> Run:
    """Judge `target`; `progress` is called with the numbers of results, of questions and of failures.

    Raises:
        TargetError: The target cannot be loaded.
        NothingToJudge: The target claims nothing that is selected, or none of its answers can be compared.
    """
    # Judging makes small products. Threads of the BLAS would take processors from the target, whose process is another.
    with (
        threadpool_limits(1, user_api="blas"),
        Pool(target, settings.jobs, settings.limit, command=settings.command, memory=settings.memory) as pool,
    ):
        return judge_all(pool, Judge(pool.claims, settings.accepted), suite, settings, progress)


def judge_all(
    source: Source, judge: Judge, suite: Suite, settings: Settings, progress: Progress = without_progress
) -> Run:
    """Ask the source everything that its target claims, and judge the answers.

    Raises:
        NothingToJudge: The target claims nothing that is selected, or none of its answers can be compared.
    """
    claims = source.claims
    check_selection(suite, claims, settings.selection)
    notes = try_smoke_cases(suite, source, judge)
    alignment = find_alignment(source, suite, settings.selection, judge)
    asked = asks_of(suite, alignment.declared_by(claims), settings.selection)
    with ResultsFile(settings.results) as file:
        earlier = read_results(settings.results, suite, claims, asked) if settings.results and settings.resume else {}
        file.begin(suite, claims, resume=settings.resume)
        results, finished = _Asking(source, asked, settings, judge, progress, file).results(earlier)
        probed = {result.ask.key: result for result in alignment.failures if result.ask.key not in results}
        for result in diagnosed(source, judge, probed | results):
            if result.ask.key in probed:
                probed[result.ask.key] = result
                continue
            results[result.ask.key] = result
            file.add(result)
        whole = finished and settings.selection.everything
        laws = laws_of(source, results.values()) if whole else ()
    done = Run(
        suite=suite,
        claims=claims,
        selection=settings.selection,
        results=(*probed.values(), *(results[ask.key] for ask in asked if ask.key in results)),
        finished=finished,
        alignment=alignment.name,
        notes=(*notes, *_unclaimed(claims), *_merging(claims), *([alignment.note] if alignment.note else [])),
        required=settings.required,
        accepted=settings.accepted,
        known=settings.known,
        laws=laws,
    )
    return with_wrong_keys(source, done) if finished else done


def asks_of(suite: Suite, claims: Claims, selection: Selection) -> list[Ask]:
    """Return all asks of a run.

    Raises:
        NothingToJudge: The target claims nothing that is selected, or lacks a selected dtype.
    """
    asked = tried_in_every_layout(asks(suite.cases, claims, selection))
    if selection.shard is not None:
        asked = shard(asked, *selection.shard)
    if not asked:
        raise NothingToJudge(f"target {claims.name} has nothing to judge: {_why_nothing(suite, claims, selection)}")
    lacking = [dtype for dtype in selection.dtypes if dtype not in claims.dtypes]
    if lacking:
        raise NothingToJudge(
            f"target {claims.name} cannot be judged in {', '.join(lacking)}: it claims {', '.join(claims.dtypes)}; "
            f"--dtypes asks {', '.join(selection.dtypes)}"
        )
    return asked


def _unclaimed(claims: Claims) -> list[str]:
    """Note the functions that take any keyword, and are asked no option because none is declared."""
    return [
        f"{name} takes any keyword but claims no option, so it is asked only calls without options: name the features "
        f'that it has in the target file, as in features = ("mask", "causal")'
        for name in claims.unclaimed
    ]


def _merging(claims: Claims) -> list[str]:
    """Note that errors of merging are allowed to the ranks that a target declares."""
    if claims.shards is None:
        return []
    ranks, layout = claims.shards
    return [f"the allowance includes the merges of {ranks} ranks in the layout {layout} (MHA-SHARD-3)"]


def check_selection(suite: Suite, claims: Claims, selection: Selection) -> None:
    """Raise if a run has nothing to ask; what can be asked may depend on the alignment, which is read off first.

    Raises:
        NothingToJudge: The target claims nothing that is selected, or lacks a selected dtype.
    """
    if not probes(suite.cases, claims, selection):
        asks_of(suite, claims, selection)


def _why_nothing(suite: Suite, claims: Claims, selection: Selection) -> str:
    """Return the reason why the target cannot be asked any selected case."""
    if not any(selection.asks_in(dtype) for dtype in claims.dtypes):
        return f"it claims {', '.join(claims.dtypes)}; --dtypes asks {', '.join(selection.dtypes)}"
    functions = dict.fromkeys(case.function for case in suite.cases if selection.takes(case))
    if not functions.keys() & claims.keywords.keys():
        return f"it does not define {', '.join(functions)}"
    if selection.shard is not None:
        return "there are fewer kinds of calls than shards"
    return "every selected case needs a feature that it does not claim"


@dataclass
class _Asking:
    """Asks all questions of a run, and keeps, writes and counts the results as they come."""

    source: Source
    asked: list[Ask]
    settings: Settings
    judge: Judge
    progress: Progress
    file: ResultsFile
    failed: int = 0
    by_key: dict[Key, Result] = field(default_factory=dict)

    def results(self, earlier: Mapping[Key, Result]) -> tuple[dict[Key, Result], bool]:
        """Return the results by case and dtype, and whether all questions were asked before too many failed."""
        second_time = SecondTime(self.asked)
        for result in earlier.values():
            self._keep(result)
        self._show_progress()
        for result in chain(self._judged(second_time), second_time.amended(self.source, self.judge, self.by_key)):
            self._keep(result)
            self.file.add(result)
            self._show_progress()
            if self.settings.max_fail is not None and self.failed >= self.settings.max_fail:
                return self.by_key, False
        return self.by_key, True

    def _judged(self, second_time: SecondTime) -> Iterator[Result]:
        """Ask what has no result yet."""
        asks_by_key = {ask.key: ask for ask in self.asked if ask.key not in self.by_key}
        for question, answer in self.source.answers(*_groups(asks_by_key.values())):
            result = self.judge.result(asks_by_key[question.id, question.dtype], answer)
            second_time.remember(result, answer)
            yield result

    def _keep(self, result: Result) -> None:
        """Keep a result, which may replace that of the same case, and count the failures."""
        replaced = self.by_key.get(result.ask.key)
        self.failed += self._fails(result) - (replaced is not None and self._fails(replaced))
        self.by_key[result.ask.key] = result

    def _fails(self, result: Result) -> bool:
        return is_open(result, self.settings.accepted, self.settings.known)

    def _show_progress(self) -> None:
        self.progress(len(self.by_key), len(self.asked), self.failed)


def _groups(asked: Iterable[Ask]) -> list[Iterator[Question]]:
    """Group the questions by signature, because a framework compiles once for each; the largest group comes first."""
    groups: dict[Hashable, list[Ask]] = {}
    for ask in asked:
        groups.setdefault(ask.case.signature, []).append(ask)
    return [(ask.question() for ask in group) for group in sorted(groups.values(), key=len, reverse=True)]
