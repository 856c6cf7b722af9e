"""The field on one page: for each clause and each implementation, whether the answers follow the clause.

A failure counts against the clauses of its cause alone, because a case cites all clauses that it touches. Where no
case of a clause passes, all failures of its cases count.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING

from mha_spec_conformance.judging.result import INTERNAL
from mha_spec_conformance.suite.spec import Clause, clauses

from .report import is_whole, label_of
from .stored import require_same_suite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .stored import StoredReport, StoredResult

__all__ = ["STATES", "Cell", "Column", "Matrix", "Row", "matrix"]

STATES = ("conforms", "convention", "wrong", "error", "unsupported", "not asked")
"""The states of a cell; "convention" means that the results are those of another convention, which has a name."""

STATE_OF = {
    "fail": "wrong",
    "error": "error",
    "crash": "error",
    "timeout": "error",
    INTERNAL: "error",
    "deviation": "convention",
}
"""The states that outcomes give, the first of them that occurs."""


@dataclass(frozen=True)
class Cell:
    """The results of an implementation in the cases of a clause."""

    state: str
    outcomes: Counter[str]
    elsewhere: int
    """The number of failures that other clauses explain."""
    conventions: tuple[str, ...]

    @property
    def text(self) -> str:
        """The state with numbers, as in "wrong in 3 of 20" or "conforms in 20 of 20"."""
        total = self.outcomes.total()
        if self.state == "not asked":
            return self.state
        if self.state == "conforms":
            return f"conforms in {self.outcomes['pass']} of {total}"
        if self.state == "unsupported":
            return f"unsupported, {total} refused"
        number = sum(count for outcome, count in self.outcomes.items() if STATE_OF.get(outcome) == self.state)
        name = " ".join(self.conventions) if self.state == "convention" else self.state
        return f"{name} in {number} of {total}"

    @property
    def partial(self) -> bool:
        """True if the clause holds where it could be judged, but the implementation refused some of the cases."""
        return self.state == "conforms" and self.outcomes["unsupported"] > 0


@dataclass(frozen=True)
class Column:
    """An implementation."""

    report: StoredReport
    name: str
    """The name of the target without its folder, with a number if it is not the first of that name."""
    slug: str
    """The name in links to cells."""

    @property
    def label(self) -> str:
        """The verdict in a few words."""
        return label_of(self.report.data)

    @property
    def description(self) -> str:
        """The verdict in a few words, or the reason why the implementation was not judged."""
        data = self.report.data
        return data["verdict"] if data["status"] == 2 and not data["cases"] else self.label

    @property
    def whole(self) -> bool:
        """True if the run asked everything that the target claims."""
        return is_whole(self.report.data)

    @property
    def conformant(self) -> bool:
        """True if a complete run had no failure, except for accepted conventions."""
        return self.label.startswith("conformant")

    @cached_property
    def by_clause(self) -> dict[str, list[StoredResult]]:
        """The results by each clause that the case cites."""
        by_clause: dict[str, list[StoredResult]] = defaultdict(list)
        for result in self.report.results.values():
            for clause in dict.fromkeys(result.clauses):
                by_clause[clause].append(result)
        return dict(by_clause)

    def blamed(self, result: StoredResult) -> tuple[str, ...]:
        """Return the clauses against which a failure counts: those of its cause, or the first that the case cites."""
        cause = self.report.causes.get(result.key)
        cited = cause.clauses if cause is not None else ()
        return cited or tuple(result.clauses[:1])

    def cell(self, clause: Clause) -> Cell:
        """Judge the implementation by a clause; SHOULD cases count for SHOULD clauses alone."""
        results = [r for r in self.by_clause.get(clause.id, ()) if r.must or clause.level == "SHOULD"]
        counted = [r for r in results if not r.failing or clause.id in self.blamed(r)]
        if not any(result.outcome == "pass" or result.failing for result in counted):
            counted = results
        outcomes = Counter(result.outcome for result in counted)
        conventions = dict.fromkeys(str(c) for r in counted if r.outcome == "deviation" for c in r.conventions)
        return Cell(_state(outcomes), outcomes, len(results) - len(counted), tuple(conventions))


def _state(outcomes: Counter[str]) -> str:
    """Return the state of a cell with these outcomes."""
    for outcome, state in STATE_OF.items():
        if outcomes[outcome]:
            return state
    return "conforms" if outcomes["pass"] else "unsupported" if outcomes["unsupported"] else "not asked"


@dataclass(frozen=True)
class Row:
    """A clause with a cell for each implementation."""

    clause: Clause
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Matrix:
    """Reports of the same suite side by side."""

    columns: tuple[Column, ...]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The clauses that a case cites, in the order of the specification."""
        asked = {name for column in self.columns for name in column.by_clause}
        listed = [clause for name, clause in clauses().items() if name in asked]
        unknown = sorted(asked - clauses().keys())
        listed += [Clause(name, "MUST", "", "", "Clauses of another version") for name in unknown]
        return tuple(Row(clause, tuple(column.cell(clause) for column in self.columns)) for clause in listed)

    @property
    def themes(self) -> dict[str, list[Row]]:
        """The rows by theme."""
        themes: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            themes[row.clause.theme].append(row)
        return dict(themes)

    def tally(self, column: int) -> dict[str, int]:
        """Count the clauses of each state of a column."""
        count = Counter(row.cells[column].state for row in self.rows)
        return {state: count[state] for state in STATES}


def matrix(reports: Sequence[StoredReport]) -> Matrix:
    """Put reports side by side.

    Raises:
        ReportError: The reports are of different suites.
    """
    require_same_suite(reports)
    names = [PurePath(report.name).name or report.name for report in reports]
    slugs = _distinct([re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "target" for name in names], "{}-{}")
    columns = map(Column, reports, _distinct(names, "{} ({})"), slugs)
    return Matrix(tuple(columns))


def _distinct(names: Sequence[str], form: str) -> list[str]:
    """Return names of which those that occurred before have a number, in this form."""
    distinct: dict[str, None] = {}
    for name in names:
        number, candidate = 1, name
        while candidate in distinct:
            number += 1
            candidate = form.format(name, number)
        distinct[candidate] = None
    return list(distinct)
