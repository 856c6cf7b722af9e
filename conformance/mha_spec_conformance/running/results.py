"""Write results to a file as they come, and read them again, so that a run that was killed can go on.

The file has one JSON object on each line: the first describes the run, every other is a result. A later line replaces
an earlier line about the same case and dtype, and an incomplete last line is ignored.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.judging.compare import Worst
from mha_spec_conformance.judging.result import INTERNAL, OUTCOMES, Result
from mha_spec_conformance.suite.conventions import Convention

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

    Key = tuple[str, str]

__all__ = ["FORMAT", "ResultsError", "ResultsFile", "read_results"]

FORMAT = "mha-spec-results/1"

FIELDS = (
    "outcome",
    "reason",
    "allowance_used",
    "diagnosis",
    "deterministic",
    "clauses",
    "seconds",
    "note",
    "malformed",
)
"""The fields of a result that JSON can hold as they are; NaN and infinities are written as Python does."""


class ResultsError(MhaSpecError):
    """A file of results cannot be written, or belongs to another run."""


class ResultsFile:
    """A file to which results are appended; use it as a context manager."""

    def __init__(self, path: Path | None) -> None:
        """Write to a file; None writes nowhere."""
        self._path = path
        self._file = None

    def begin(self, suite: Suite, claims: Claims, *, resume: bool) -> None:
        """Open the file, after the results that it has, or empty it and describe the run.

        Raises:
            ResultsError: The file cannot be opened.
        """
        if self._path is None:
            return
        goes_on = resume and self._path.exists() and self._path.stat().st_size > 0
        try:
            self._file = self._path.open("ab" if goes_on else "wb", buffering=0)
            if goes_on and not self._path.read_bytes().endswith(b"\n"):
                self._file.write(b"\n")
        except OSError as error:
            raise ResultsError(f"--results {self._path}: {error.strerror}") from error
        if not goes_on:
            self._append(_header(suite, claims))

    def add(self, result: Result) -> None:
        """Append a result."""
        if self._file is not None:
            self._append(_data(result))

    def _append(self, data: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(data).encode() + b"\n")
        except OSError as error:
            raise ResultsError(f"--results {self._path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _header(suite: Suite, claims: Claims) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "spec_version": suite.spec_version,
        "goldens_sha256": suite.goldens_sha256,
        "target": claims.name,
        "versions": dict(claims.versions),
    }


def _data(result: Result) -> dict[str, Any]:
    return {
        "id": result.ask.case.id,
        "dtype": result.ask.dtype,
        **{name: getattr(result, name) for name in FIELDS},
        "conventions": [list(convention) for convention in result.conventions],
        "refused": list(result.refused),
        "worst": result.worst and asdict(result.worst),
    }


def read_results(path: Path, suite: Suite, claims: Claims, asked: Iterable[Ask]) -> dict[Key, Result]:
    """Read the results of the cases that are asked; those that the suite could not judge are left out.

    Raises:
        ResultsError: The file cannot be read, or describes a run of another suite, target or version.
    """
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise ResultsError(f"--results {path}: {error.strerror}") from error
    data = [_parsed(line) for line in lines]
    if not data:
        return {}
    header, expected = data[0], _header(suite, claims)
    differing = [name for name, value in expected.items() if not isinstance(header, dict) or header.get(name) != value]
    if differing:
        raise ResultsError(f"--resume: {path} has the results of another run; it differs in {', '.join(differing)}")
    by_key = {ask.key: ask for ask in asked}
    results: dict[Key, Result] = {}
    for entry in data[1:]:
        ask = None if entry is None else by_key.get((str(entry.get("id")), str(entry.get("dtype"))))
        result = None if ask is None else _result(ask, entry)
        if result is not None:
            results[result.ask.key] = result
    return results


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Read a line; None is a line that is incomplete, because the run was killed while it was written."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _result(ask: Ask, entry: dict[str, Any]) -> Result | None:
    """Give the result of an entry; None if it is damaged or has to be judged again."""
    if entry.get("outcome") not in OUTCOMES or entry["outcome"] == INTERNAL:
        return None
    try:
        fields = {name: entry[name] for name in FIELDS}
        fields |= {name: tuple(entry[name]) for name in ("diagnosis", "clauses", "refused")}
        worst = entry["worst"] and Worst(**{**entry["worst"], "index": tuple(entry["worst"]["index"])})
        conventions = tuple(Convention(*pair) for pair in entry["conventions"])
        return Result(ask, **fields, worst=worst, conventions=conventions)
    except (KeyError, TypeError):
        return None
