"""`mha-spec check`: read the options, judge the target, print the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking.selection import Selection, matches
from mha_spec_conformance.reporting.report import write_json
from mha_spec_conformance.reporting.terminal import Bar, console, print_run
from mha_spec_conformance.running.known import read_known
from mha_spec_conformance.running.runner import NothingToJudge, Settings, run
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.suite.conventions import parse_convention

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mha_spec_conformance.suite.cases import Suite

__all__ = ["UsageError", "check"]


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
) -> int:
    """Judge a target, print the verdict, write the report, and give the exit status."""
    suite = load(cases)
    settings = Settings(
        selection=_selection(suite, only, dtypes),
        required=_among("--require", required, (*_features(suite), *FLOATING)),
        accepted=frozenset(parse_convention(text) for text in accepted),
        known=read_known(known) if known else (),
        max_fail=max_fail,
        jobs=jobs,
        limit=limit,
    )
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise UsageError(f"--json {json}: this is a folder, or there is no folder {json.parent}")
    if json is not None:
        _remove_old(json)
    screen = console()
    with Bar(screen, target) as bar:
        result = run(target, suite, settings, bar)
    if not result.deciding:
        raise NothingToJudge(f"target {target}: {result.verdict}")
    if json is not None:
        write_json(result, json)
    print_run(screen, result)
    return result.status


def _remove_old(report: Path) -> None:
    """Remove the report of an earlier run, so that it is not mistaken for the new report; keep devices and links."""
    if report.is_file() and not report.is_symlink():
        report.unlink()


def _selection(suite: Suite, only: tuple[str, ...], dtypes: tuple[str, ...]) -> Selection:
    selection = Selection(only, _among("--dtypes", dtypes, FLOATING))
    for pattern in only:
        if not any(matches(case, pattern) for case in suite.cases):
            raise UsageError(f"--only {pattern} matches none of {len(suite.cases)} cases; `mha-spec cases` lists them")
    return selection


def _features(suite: Suite) -> tuple[str, ...]:
    return tuple(dict.fromkeys(feature for case in suite.cases for feature in case.features))


def _among(option: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in allowed:
            raise UsageError(f"{option} must be one of {', '.join(allowed)}, received {name!r}")
    return names
