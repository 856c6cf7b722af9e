"""Read known failures, each with its reason. An entry that does not fail is an error, so that no entry becomes stale.

The file is TOML, a table for each reason, with the ids of the cases, in every dtype or only in `dtype`. An entry is
about a wrong result or an error; to excuse a crash or a timeout, it must name that as its `outcome`:

    [[known]]
    reason = "MHA-SOFTMAX-2: scores are kept in float16, issue 12"
    dtype = "float16"
    id = ["attention/causal/offset-1", "attention/causal/offset-2"]
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mha_spec.arrays import FLOATING
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.judging.result import FAILING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mha_spec_conformance.suite.conventions import Convention

__all__ = ["Known", "KnownError", "excuse", "is_open", "read_known", "stale_entries"]


EXPECTED = ("fail", "deviation", "error")
"""The outcomes that an entry excuses if it names none."""


class KnownError(MhaSpecError):
    """A file of known failures cannot be read."""


class Judged(Protocol):
    """A result, of this run or of a report that was read."""

    @property
    def key(self) -> tuple[str, str]: ...
    @property
    def outcome(self) -> str: ...
    @property
    def must(self) -> bool: ...
    @property
    def conventions(self) -> tuple[Convention, ...]: ...


@dataclass(frozen=True)
class Known:
    """One known failure."""

    id: str
    reason: str
    dtype: str | None = None
    outcome: str | None = None

    def covers(self, result: Judged) -> bool:
        """Tell whether the entry is about this case and dtype."""
        identity, dtype = result.key
        return identity == self.id and self.dtype in (None, dtype)

    def expects(self, result: Judged) -> bool:
        """Tell whether the entry is about a failure of this kind."""
        return result.outcome in (EXPECTED if self.outcome is None else (self.outcome,))


def excuse(result: Judged, accepted: frozenset[Convention], known: Iterable[Known]) -> str | None:
    """Return the reason why a failing result does not count: "accepted" or "known"."""
    if result.conventions and accepted.issuperset(result.conventions):
        return "accepted"
    return "known" if any(entry.covers(result) and entry.expects(result) for entry in known) else None


def is_open(result: Judged, accepted: frozenset[Convention], known: Iterable[Known]) -> bool:
    """Tell whether a result makes the target fail: it is of a MUST case and neither accepted nor known."""
    return result.must and result.outcome in FAILING and excuse(result, accepted, known) is None


def read_known(path: Path) -> tuple[Known, ...]:
    """Read a file of known failures.

    Raises:
        KnownError: The file does not exist or is not TOML, or an entry has no id or reason.
    """
    try:
        tables_by_name = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KnownError(f"known failures {path}: {error}") from error
    tables = tables_by_name.pop("known", None)
    if tables_by_name:
        raise KnownError(
            f"known failures {path}: the file may have only [[known]] tables, received {', '.join(tables_by_name)}"
        )
    if not isinstance(tables, list):
        raise KnownError(f"known failures {path}: the file must have a [[known]] table with id and reason")
    return tuple(entry for number, table in enumerate(tables, 1) for entry in _entries(path, number, table))


def _entries(path: Path, number: int, table: object) -> list[Known]:
    """Return an entry for each id of a table; `id` is a string or a list."""
    fields = dict(table) if isinstance(table, dict) else {}
    ids = fields.pop("id", None)
    ids = ids if isinstance(ids, list) else [ids]
    strings = all(isinstance(value, str) and value.strip() for value in (*ids, *fields.values()))
    if not ids or not strings or not {"reason"} <= fields.keys() <= {"reason", "dtype", "outcome"}:
        raise KnownError(
            f"known failures {path}: entry {number} must have a reason and an id or a list, and may have a dtype "
            f"and an outcome, received {table!r}"
        )
    for field, allowed in (("dtype", FLOATING), ("outcome", tuple(sorted(FAILING)))):
        if fields.get(field, allowed[0]) not in allowed:
            raise KnownError(
                f"known failures {path}: the {field} of entry {number} must be one of {', '.join(allowed)}, "
                f"received {fields[field]!r}"
            )
    return [Known(id=name, **fields) for name in ids]


def stale_entries(known: Iterable[Known], results: Iterable[Judged], suite: Iterable[str], whole: bool) -> list[str]:
    """Describe the entries that did not fail or that match no result; `whole` is True after a complete run."""
    asked, ids = list(results), set(suite)
    lines: list[str] = []
    for entry in known:
        covered = [result for result in asked if entry.covers(result)]
        where = entry.id + (f" in {entry.dtype}" if entry.dtype else "")
        if entry.id not in ids:
            lines.append(f"known failure {where} is not a case of the suite: remove it from the file")
        elif covered and not any(result.outcome in FAILING for result in covered):
            lines.append(f"known failure {where} did not fail ({covered[0].outcome}): remove it from the file")
        elif not covered and whole:
            lines.append(f"known failure {where} was not asked: remove it from the file")
    return lines
