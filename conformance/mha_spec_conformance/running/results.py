"""Write results to a file as they come, and read them again, so that a run that was killed can go on.

The file has a JSON object on each line: the first describes the run, every other is a result. A later line replaces
an earlier line about the same case and dtype, and an incomplete last line is ignored.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.judging.compare import Worst
from mha_spec_conformance.judging.result import OUTCOMES, Result
from mha_spec_conformance.suite.conventions import check_convention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

    Key = tuple[str, str]

__all__ = ["FORMAT", "ResultsError", "ResultsFile", "read_results"]

T = TypeVar("T")

FORMAT = "mha-spec-results/1"


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
        **{name: getattr(result, name) for name in READERS},
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
    for entry in filter(None, data[1:]):
        ask = by_key.get((str(entry.get("id")), str(entry.get("dtype"))))
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
    """Return the result of an entry; None if it is damaged or has to be judged again."""
    try:
        return Result(ask, **{name: read(entry[name]) for name, read in READERS.items()})
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _is_a(kind: type[T]) -> Callable[[Any], T]:
    """Return a function that returns values of this type, and raises if it receives another value."""

    def read(value: Any) -> T:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, received {value!r}")
        return value

    return read


def _number(value: Any) -> float:
    return _is_a(float)(float(value) if type(value) is int else value)


def _optional(read: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else read(value)


def _each(read: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    return lambda values: tuple(map(read, _is_a(list)(values)))


def _outcome(value: Any) -> str:
    """Read an outcome; a case that the suite could not judge is judged again."""
    if value not in OUTCOMES:
        raise ValueError(f"expected one of {', '.join(OUTCOMES)}, received {value!r}")
    return value


def _worst(data: Any) -> Worst:
    numbers = {name: _number(data[name]) for name in ("expected", "got", "allowance")}
    return Worst(_is_a(str)(data["output"]), _each(_is_a(int))(data["index"]), **numbers)


READERS: dict[str, Callable[[Any], Any]] = {
    "outcome": _outcome,
    "reason": _optional(_is_a(str)),
    "allowance_used": _optional(_number),
    "worst": _optional(_worst),
    "diagnosis": _each(_is_a(str)),
    "conventions": _each(lambda pair: check_convention(*_each(_is_a(str))(pair))),
    "deterministic": _optional(_is_a(bool)),
    "clauses": _each(_is_a(str)),
    "seconds": _number,
    "note": _optional(_is_a(str)),
    "malformed": _is_a(bool),
    "refused": _each(_is_a(str)),
}
"""The fields of a result in the file, with the functions that read them; NaN is written as Python does."""
