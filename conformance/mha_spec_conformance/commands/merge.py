"""`mha-spec merge`: join the reports of shards into the report of the whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mha_spec.errors import MhaSpecError
from mha_spec.selection import backend_names
from mha_spec_conformance.asking.selection import Ask, Selection
from mha_spec_conformance.judging.compare import Worst
from mha_spec_conformance.judging.result import Result
from mha_spec_conformance.reporting.stored import read_report
from mha_spec_conformance.reporting.terminal import console
from mha_spec_conformance.running.known import Known
from mha_spec_conformance.running.run import Run
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.suite.conventions import Convention, parse_convention
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import REFERENCE

from .check import among
from .reports import conclude

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mha_spec_conformance.suite.cases import Case, Suite

    from .reports import Reports

    Report = Mapping[str, Any]

__all__ = ["MergeError", "merge"]

SAME = ("spec_version", "suite", "target", "accepted", "known")
"""The parts of the reports that must be equal; `deterministic` in the target may differ."""


class MergeError(MhaSpecError):
    """Reports are not the shards of the same run."""


def merge(paths: Sequence[Path], required: tuple[str, ...], reports: Reports) -> int:
    """Join the reports of shards, write and print the whole, and return the exit status.

    Raises:
        ReportError: A file is not a report.
        MergeError: The reports are of different runs, or a shard or a case is missing or occurs twice.
    """
    reports.prepare()
    suite = load()
    return conclude(console(), joined([_read(path) for path in paths], suite, required), reports)


def joined(parts: Sequence[Report], suite: Suite, required: tuple[str, ...] = ()) -> Run:
    """Return the run whose shards have these reports."""
    first = parts[0]
    _check_same(parts, suite)
    _check_shards([part["selection"]["shard"] for part in parts])
    among("--require", required, (*suite.features, *first["target"]["dtypes"]))
    selection = first["selection"]
    return Run(
        suite=suite,
        claims=_claims(first["target"], first["environment"]),
        selection=Selection(*(tuple(selection[name]) for name in ("only", "dtypes", "exclude"))),
        results=tuple(_results(parts, suite)),
        finished=True,
        alignment=_alignment(parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part["notes"])),
        required=required,
        accepted=frozenset(parse_convention(text) for text in first["accepted"]),
        known=tuple(Known(**entry) for entry in first["known"]),
    )


def _read(path: Path) -> Report:
    """Read a report of a shard."""
    report = read_report(path).data
    if report["selection"]["shard"] is None:
        raise MergeError(f"{path}: the report is not of a shard; `check --shard I/N --json FILE` writes such a report")
    return report


def _check_same(parts: Sequence[Report], suite: Suite) -> None:
    first = parts[0]
    for part in parts[1:]:
        for name in SAME:
            if _comparable(part[name]) != _comparable(first[name]):
                raise MergeError(f"the reports are of different runs: they differ in {name}")
        if {**part["selection"], "shard": None} != {**first["selection"], "shard": None}:
            raise MergeError("the reports are of different runs: they differ in the selected cases")
    if first["suite"]["goldens_sha256"] != suite.goldens_sha256:
        raise MergeError(
            f"the reports are of suite {first['suite']['version']}, whose goldens are not those of the installed suite "
            f"{suite.version}; merge them with the version of mha-spec that wrote them"
        )


def _comparable(value: Any) -> Any:
    return {**value, "deterministic": None} if isinstance(value, dict) else value


def _check_shards(shards: Sequence[Sequence[int]]) -> None:
    """Require every shard once."""
    counts = {count for _, count in shards}
    if len(counts) > 1:
        raise MergeError(f"the reports are of runs with {' and '.join(map(str, sorted(counts)))} shards")
    numbers = [number for number, _ in shards]
    for number in range(1, counts.pop() + 1):
        if number not in numbers:
            raise MergeError(f"the report of shard {number} is missing")
        if numbers.count(number) > 1:
            raise MergeError(f"there are {numbers.count(number)} reports of shard {number}")


def _claims(target: dict[str, Any], environment: dict[str, Any]) -> Claims:
    name = target["name"]
    return Claims(
        name=name,
        keywords={},
        dtypes=tuple(target["dtypes"]),
        profile=target["profile"],
        ranks=target.get("ranks", 1),
        rank_layout=target.get("rank_layout", "contiguous"),
        conventions=target["conventions"],
        registered=name in (*backend_names(), REFERENCE),
        versions=target["versions"],
        hardware=environment["device"],
    )


def _alignment(parts: Sequence[Report]) -> str | None:
    """Return the causal alignment that was read off the target; a declared alignment is not repeated."""
    if "causal_alignment" in parts[0]["target"]["conventions"]:
        return None
    return next(
        (part["conventions"]["causal_alignment"] for part in parts if "causal_alignment" in part["conventions"]), None
    )


def _results(parts: Sequence[Report], suite: Suite) -> list[Result]:
    """Return the results of all reports in the order of the suite."""
    cases = {case.id: case for case in suite.cases}
    results: dict[tuple[str, str], Result] = {}
    for part in parts:
        for entry in part["cases"]:
            if entry["id"] not in cases:
                raise MergeError(f"case {entry['id']} is not of the installed suite")
            key = entry["id"], entry["dtype"]
            if key in results:
                raise MergeError(f"case {key[0]} in {key[1]} occurs in two reports")
            results[key] = _result(cases[entry["id"]], entry)
    order = {name: index for index, name in enumerate(cases)}
    return sorted(results.values(), key=lambda result: order[result.ask.case.id])


def _result(case: Case, entry: dict[str, Any]) -> Result:
    outputs = tuple(
        name for name in case.expected if name != "lse" or "lse" in entry["features"] or "lse" not in case.features
    )
    worst = entry["worst"] and Worst(
        output=entry["worst"]["output"],
        index=tuple(entry["worst"]["index"]),
        **{name: float(entry["worst"][name]) for name in ("expected", "got", "allowance")},
    )
    used = entry["allowance_used"]
    deviating = entry["outcome"] == "deviation"
    return Result(
        Ask(case, entry["dtype"], outputs or ("output",)),
        entry["outcome"],
        entry["reason"],
        None if used is None else float(used),
        worst,
        tuple(entry["diagnosis"]),
        conventions=_conventions(entry) if deviating else (),
        clauses=tuple(entry["clauses"]),
        seconds=entry["seconds"],
    )


def _conventions(entry: dict[str, Any]) -> tuple[Convention, ...]:
    return tuple(parse_convention(text) for text in entry["conventions"])
