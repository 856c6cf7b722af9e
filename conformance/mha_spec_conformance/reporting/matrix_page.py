"""Write the matrix as a self-contained HTML page: the table, and the results for the script of the page.

The page has every text of the reports either through its template, which escapes it, or in a block of JSON, which the
script shows as text. The policy of the page allows the script and the style of the page, and nothing else.
"""

from __future__ import annotations

import json
import shlex
import string
from collections import Counter
from typing import TYPE_CHECKING, Any

from mha_spec.arrays import FLOATING
from mha_spec_conformance.judging.result import INTERNAL, OUTCOMES
from mha_spec_conformance.suite.spec import SpecificationError
from mha_spec_conformance.suite.text import one_line

from .matrix import STATES
from .templates import digest, rendered, source_of
from .terminal import title_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec_conformance.suite.spec import Clause

    from .matrix import Column, Matrix
    from .stored import Key, StoredResult

__all__ = ["FORMAT", "matrix_page"]

FORMAT = "mha-spec-matrix/1"
"""The attribute `data-format` of the page, which distinguishes it from other files."""

MEANINGS = {
    "conforms": "every case that was judged passes",
    "convention": "the results are those of another convention, which has a name",
    "wrong": "at least one case has a wrong result",
    "error": "at least one case raised, crashed or did not end",
    "unsupported": "the implementation refused every case",
    "not asked": "the implementation does not claim what the cases need, was not judged, or the run left them out",
}
"""The states as the page explains them."""

LEVELS = 50
"""The number of levels by which the script knows the share of the allowance that a pass uses."""

CODES = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""A character for each level of a pass, then one for each outcome without a level."""

NOT_ASKED = "."

WITHOUT_LEVEL = (*OUTCOMES, INTERNAL)

MOST_DESCRIBED = 2
"""The number of failures of a cause, in each dtype, whose reason is part of the page."""

MOST_CAUSES = 20
"""The number of causes of an implementation that the page names."""

ANOTHER = "another cause; the report has its name"

MOST_CHARACTERS = 160
"""The length of a reason or of the name of a cause."""


def matrix_page(field: Matrix) -> str:
    """Return the matrix as HTML, in ASCII alone."""
    from markupsafe import Markup

    style, script = source_of("page.css", "matrix.css"), source_of("matrix.js")
    data = _data(field)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return rendered(
        "matrix.html.jinja",
        format=FORMAT,
        style=style,
        style_digest=digest(style),
        script=script,
        script_digest=digest(script),
        data=Markup(text),
        field=field,
        tallies=[field.tally(number) for number in range(len(field.columns))],
        states=STATES,
        meanings=MEANINGS,
        features=data["features"],
        dtypes=[name for name in FLOATING if any(key[1] == name for c in field.columns for key in c.report.results)],
    )


def _features(field: Matrix) -> list[str]:
    """Return the features of all results, the most frequent first."""
    count = Counter(name for c in field.columns for r in c.report.results.values() for name in r.data["features"])
    return [name for name, _ in count.most_common()]


def _data(field: Matrix) -> dict[str, Any]:
    """Return what the script needs: the cases, the clauses, and a character for each case and dtype of each column."""
    cases: dict[str, StoredResult] = {}
    cited: dict[str, dict[str, None]] = {}
    features: dict[str, dict[str, None]] = {}
    for column in field.columns:
        for result in column.report.results.values():
            cases.setdefault(result.key[0], result)
            cited.setdefault(result.key[0], {}).update(dict.fromkeys(result.clauses))
            features.setdefault(result.key[0], {}).update(dict.fromkeys(result.data["features"]))
    names, clauses = _features(field), {row.clause.id: number for number, row in enumerate(field.rows)}
    order = {name: number for number, name in enumerate(names)}
    return {
        "levels": LEVELS,
        "codes": CODES[: LEVELS + len(WITHOUT_LEVEL)],
        "outcomes": WITHOUT_LEVEL,
        "states": STATES,
        "dtypes": FLOATING,
        "features": names,
        "clauses": [[row.clause.id, row.clause.level, _sentence(row.clause)] for row in field.rows],
        "cases": [
            [name, [clauses[c] for c in cited[name]], [order[f] for f in features[name]], int(result.must)]
            for name, result in cases.items()
        ],
        "columns": [_column(column, list(cases), clauses) for column in field.columns],
    }


def _sentence(clause: Clause) -> str:
    try:
        return clause.sentence
    except SpecificationError:
        return clause.title


def _column(column: Column, cases: list[str], clauses: Mapping[str, int]) -> dict[str, Any]:
    """Return an implementation for the script: its results, and the cause of each result that is not a pass."""
    results = column.report.results
    keys = [(name, dtype) for name in cases for dtype in FLOATING]
    titles: dict[str, None] = {}
    causes: dict[tuple[str, tuple[str, ...]], int] = {}
    described: Counter[tuple[str, str]] = Counter()
    numbers: list[int] = []
    reasons: dict[int, str] = {}
    for place, key in enumerate(keys):
        if key not in results or results[key].outcome == "pass":
            continue
        title = _title(column, key)
        if len(titles) < MOST_CAUSES:
            titles[title] = None
        title = title if title in titles else ANOTHER
        number = causes.setdefault((title, column.blamed(results[key])), len(causes))
        numbers.append(number)
        described[title, key[1]] += 1
        if title != ANOTHER and described[title, key[1]] <= MOST_DESCRIBED:
            reasons[place] = one_line(results[key].reason or "", MOST_CHARACTERS)
    return {
        "name": one_line(column.name, MOST_CHARACTERS),
        "target": shlex.quote(one_line(column.report.name, MOST_CHARACTERS)),
        "versions": one_line(column.report.versions, MOST_CHARACTERS),
        "description": column.description,
        "whole": column.whole,
        "slug": column.slug,
        "results": "".join(_code(results.get(key)) for key in keys),
        "causes": [
            [one_line(title, MOST_CHARACTERS), [clauses[c] for c in blamed if c in clauses]] for title, blamed in causes
        ],
        "numbers": numbers,
        "reasons": reasons,
    }


def _title(column: Column, key: Key) -> str:
    """Return the cause of a failure, or the reason of a result without a cause."""
    cause = column.report.causes.get(key)
    return title_of(cause) if cause is not None else column.report.results[key].reason or "no reason"


def _code(result: StoredResult | None) -> str:
    """Return the character of a result; that of a pass tells how much of the allowance it uses, rounded up."""
    if result is None:
        return NOT_ASKED
    if result.outcome == "pass" and result.share is not None and 0 <= result.share <= 1:
        return CODES[min(LEVELS - 1, -int(-result.share * (LEVELS - 1) // 1))]
    return CODES[LEVELS + WITHOUT_LEVEL.index(result.outcome)]
