"""`mha-spec check`: read the options, judge the target, print the verdict."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec_conformance.asking.memory import parse_size
from mha_spec_conformance.asking.process import adopt_orphans
from mha_spec_conformance.asking.selection import Selection, matches
from mha_spec_conformance.reporting.terminal import Bar, console
from mha_spec_conformance.running.known import read_known
from mha_spec_conformance.running.results import FORMAT
from mha_spec_conformance.running.run import Run
from mha_spec_conformance.running.runner import NothingToJudge, Settings, run
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.suite.conventions import parse_convention
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.declarations import TargetError

from .reports import Reports, UsageError, check_output, conclude

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mha_spec_conformance.suite.cases import Suite

__all__ = ["among", "check", "selection_of", "settings_of"]

NO_REPORTS = Reports()


def check(
    *,
    target: str,
    only: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
    accepted: Iterable[str] = (),
    known: Path | None = None,
    reports: Reports = NO_REPORTS,
    max_fail: int | None = None,
    jobs: int = 1,
    dtypes: tuple[str, ...] = (),
    limit: float = 60.0,
    cases: Path | None = None,
    command: str | None = None,
    memory: str | None = None,
    results: Path | None = None,
    resume: bool = False,
    exclude: tuple[str, ...] = (),
    shard: str | None = None,
) -> int:
    """Judge a target, write the reports, print the verdict, and return the exit status."""
    suite = load(cases)
    settings = replace(
        settings_of(suite, required, accepted, known),
        selection=replace(selection_of(suite, only, dtypes, exclude), shard=_shard(shard)),
        max_fail=max_fail,
        jobs=jobs,
        limit=limit,
        command=_program(command),
        memory=_memory(memory),
        results=results,
        resume=resume,
    )
    if resume and results is None:
        raise UsageError("--resume needs --results FILE, the file of the run that is continued")
    check_output("--results", results, FORMAT.encode())
    reports.prepare()
    screen = console()
    adopt_orphans()
    try:
        with Bar(screen, target) as bar:
            result = run(target, suite, settings, bar)
    except (TargetError, NothingToJudge) as error:
        reports.record(_unjudged(target, suite, settings, str(error)))
        raise
    return conclude(screen, result, reports)


def _unjudged(target: str, suite: Suite, settings: Settings, fault: str) -> Run:
    """Return the run of a target that could not be asked."""
    claims = Claims(name=target, keywords={}, dtypes=())
    return Run(suite, claims, settings.selection, results=(), finished=False, fault=fault)


def settings_of(suite: Suite, required: tuple[str, ...], accepted: Iterable[str], known: Path | None) -> Settings:
    """Return the settings that decide which failures count."""
    return Settings(
        required=among("--require", required, (*suite.features, *FLOATING)),
        accepted=frozenset(parse_convention(text) for text in accepted),
        known=read_known(known) if known else (),
    )


def _program(command: str | None) -> tuple[str, ...] | None:
    """Split a command as a shell does."""
    if command is None:
        return None
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"--command {command!r}: {error}") from error
    if not words:
        raise UsageError("--command must name a program, received an empty string")
    return words


def _memory(size: str | None) -> int | None:
    """Read the limit of the memory."""
    try:
        return None if size is None else parse_size(size)
    except ValueError as error:
        raise UsageError(f"--memory {size}: {error}") from error


def _shard(text: str | None) -> tuple[int, int] | None:
    """Read I/N, the number of a shard and the number of shards."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard must be I/N with 1<=I<=N, as in 2/4, received {text!r}")
    return int(number), int(count)


def selection_of(
    suite: Suite, only: tuple[str, ...], dtypes: tuple[str, ...], exclude: tuple[str, ...] = ()
) -> Selection:
    """Return the selection, or raise if it contains a name that does not exist."""
    selection = Selection(only, among("--dtypes", dtypes, FLOATING), exclude)
    for option, patterns in (("--only", only), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(matches(case, pattern) for case in suite.cases):
                number = len(suite.cases)
                raise UsageError(f"{option} {pattern} matches none of {number} cases; `mha-spec cases` lists them")
    return selection


def among(option: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that an option received, or raise if any of them is not allowed."""
    for name in names:
        if name not in allowed:
            raise UsageError(f"{option} must be one of {', '.join(allowed)}, received {name!r}")
    return names
