"""`mha-spec check`: read the options, judge the target, print the verdict."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking.memory import parse_size
from mha_spec_conformance.asking.selection import Selection, matches
from mha_spec_conformance.reporting.report import SCHEMA, write_json
from mha_spec_conformance.reporting.terminal import Bar, console, print_run
from mha_spec_conformance.running.known import read_known
from mha_spec_conformance.running.results import FORMAT
from mha_spec_conformance.running.runner import NothingToJudge, Settings, run
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.suite.conventions import parse_convention

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import Console

    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

__all__ = ["UsageError", "among", "check", "conclude", "prepare", "selection_of", "settings_of"]


class UsageError(MhaSpecError):
    """An option has an invalid value."""


def check(
    *,
    target: str,
    only: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
    accepted: Iterable[str] = (),
    known: Path | None = None,
    json: Path | None = None,
    max_fail: int | None = None,
    jobs: int = 1,
    dtypes: tuple[str, ...] = (),
    limit: float = 60.0,
    cases: Path | None = None,
    command: str | None = None,
    memory: str | None = None,
    results: Path | None = None,
    resume: bool = False,
) -> int:
    """Judge a target, write the report, print the verdict, and give the exit status."""
    suite = load(cases)
    settings = replace(
        settings_of(suite, required, accepted, known),
        selection=selection_of(suite, only, dtypes),
        max_fail=max_fail,
        jobs=jobs,
        limit=limit,
        command=_program(command),
        memory=_memory(memory),
        results=results,
        resume=resume,
    )
    if resume and results is None:
        raise UsageError("--resume needs --results FILE, the file of the run that goes on")
    _check_output("--results", results, FORMAT)
    prepare(json)
    screen = console()
    with Bar(screen, target) as bar:
        result = run(target, suite, settings, bar)
    return conclude(screen, result, json)


def settings_of(suite: Suite, required: tuple[str, ...], accepted: Iterable[str], known: Path | None) -> Settings:
    """Give the settings that decide which failures count."""
    return Settings(
        required=among("--require", required, (*_features_of(suite), *FLOATING)),
        accepted=frozenset(parse_convention(text) for text in accepted),
        known=read_known(known) if known else (),
    )


def prepare(report: Path | None) -> None:
    """Make sure that the report can be written, and remove that of an earlier run."""
    _check_output("--json", report, SCHEMA)
    if report is not None:
        _remove_old(report)


def conclude(screen: Console, result: Run, report: Path | None) -> int:
    """Write the report, print the verdict, and give the exit status."""
    if not result.deciding:
        raise NothingToJudge(f"target {result.claims.name}: {result.verdict}")
    fault = None if report is None else _written(result, report)
    print_run(screen, result)
    if fault is not None:
        raise fault
    return result.status


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


def _written(result: Run, report: Path) -> UsageError | None:
    """Write the report; an error is given after the verdict was printed."""
    try:
        write_json(result, report)
    except OSError as error:
        return UsageError(f"--json {report}: {error.strerror}")
    return None


def _check_output(option: str, path: Path | None, form: str) -> None:
    """Raise if the file cannot be written, or if it exists and an earlier run did not write it."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option} {path}: this is a folder, or there is no folder {path.parent}")
    if path.is_file() and not _has_form(path, form):
        raise UsageError(f"{option} {path}: the file exists and does not hold {form}; choose another name")


def _has_form(path: Path, form: str) -> bool:
    """Tell whether a file is empty or begins as the files of this form do."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return not start.strip() or (start.lstrip().startswith(b"{") and f'"{form}"'.encode() in start)


def _remove_old(report: Path) -> None:
    """Remove the report of an earlier run, so that it is not mistaken for the new report; keep devices and links."""
    if report.is_file() and not report.is_symlink():
        report.unlink()


def selection_of(suite: Suite, only: tuple[str, ...], dtypes: tuple[str, ...]) -> Selection:
    """Give the selection, or raise if it contains a name that does not exist."""
    selection = Selection(only, among("--dtypes", dtypes, FLOATING))
    for pattern in only:
        if not any(matches(case, pattern) for case in suite.cases):
            raise UsageError(f"--only {pattern} matches none of {len(suite.cases)} cases; `mha-spec cases` lists them")
    return selection


def _features_of(suite: Suite) -> tuple[str, ...]:
    """Name the features of all cases."""
    return tuple(dict.fromkeys(feature for case in suite.cases for feature in case.features))


def among(option: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Give the names that an option received, or raise if one of them is not allowed."""
    for name in names:
        if name not in allowed:
            raise UsageError(f"{option} must be one of {', '.join(allowed)}, received {name!r}")
    return names
