"""Write a run as a self-contained HTML page: it needs no network, no script and no other file.

The page consists of the report, as `as_json` returns it, and of a drawing of a failure of each cause. Any text may come
from the target, so all texts are escaped in a single place, and the page forbids the browser to load or run anything.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mha_spec.arrays import FLOATING
from mha_spec_conformance.suite.spec import clauses
from mha_spec_conformance.suite.text import one_line

from .drawing import ERRORS, PAIRS, drawing_of
from .files import write_text
from .report import as_json, label_of
from .strips import HEIGHT, LIMIT, TICKS, WIDTH, strips
from .templates import MOST_CHARACTERS, digest, rendered, source_of
from .terminal import call_of, example_of, remarks, title_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mha_spec_conformance.judging.causes import Cause
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.running.run import Run

    from .drawing import Drawing

__all__ = ["FORMAT", "page", "write_html"]

FORMAT = "mha-spec-page/1"
"""The attribute `data-format` of the page, which distinguishes a page from other files."""

MOST_CAUSES = 30
"""The number of causes that are described; the JSON report has all of them."""

MOST_DRAWN = 12
"""The number of causes, the largest first, of which a failure is drawn."""

MOST_PATHS = 300_000
"""The number of characters of all drawings together; a drawing that does not fit is left out."""

MOST_LISTED = 40
"""The number of entries of any other list."""

LEAST_DRAWN = 1000
"""A failure with fewer numbers among its inputs is drawn only if the cause has no larger failure."""


@dataclass(frozen=True)
class Section:
    """A cause as the page shows it."""

    title: str
    report: Mapping[str, Any]
    """The cause as in the JSON report."""
    excused: Mapping[str, int]
    """The numbers of its failures that are accepted or known."""
    clauses: Mapping[str, str]
    """The clauses with their normative sentences."""
    cases: Mapping[str, str]
    """The dtypes of each case that fails."""
    example: Result
    call: str
    drawing: Drawing | None


def page(run: Run) -> str:
    """Return the report of a run as HTML, in ASCII alone, so that no encoding can change it."""
    report: dict[str, Any] = as_json(run)
    dtypes = [name for name in FLOATING if any(case["dtype"] == name for case in report["cases"])]
    style = source_of("page.css")
    return rendered(
        "page.html.jinja",
        format=FORMAT,
        style=style,
        style_digest=digest(style),
        name=one_line(run.claims.name, MOST_CHARACTERS),
        label=label_of(report).capitalize(),
        report=report,
        remarks=remarks(run),
        internal=run.internal,
        sections=_sections(run, report["causes"]),
        dtypes=dtypes,
        strips=strips(report["cases"], run.asked_features, dtypes),
        axis={"width": WIDTH, "height": HEIGHT, "limit": LIMIT, "ticks": TICKS},
        shades={"errors": ERRORS, "pairs": PAIRS},
        most={"listed": MOST_LISTED, "causes": MOST_CAUSES},
    )


def _sections(run: Run, reports: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Describe the largest causes, each with its part of the report, and with a drawing as long as there is space."""
    sections: list[Section] = []
    space = MOST_PATHS
    for cause, report in zip(run.findings.causes[:MOST_CAUSES], reports, strict=False):
        example = example_of(cause, LEAST_DRAWN)
        drawing = drawing_of(example, run.claims.profile) if len(sections) < MOST_DRAWN else None
        drawing = drawing if drawing is not None and drawing.size <= space else None
        space -= drawing.size if drawing is not None else 0
        sections.append(_section(run, cause, report, example, drawing))
    return sections


def _section(run: Run, cause: Cause, report: Mapping[str, Any], example: Result, drawing: Drawing | None) -> Section:
    broken = cause.clauses if example.compared else ()  # A call that returned nothing breaks no particular clause.
    dtypes: dict[str, list[str]] = {}
    for result in cause.results:
        dtypes.setdefault(result.ask.case.id, []).append(result.ask.dtype)
    return Section(
        title=_title(cause),
        report=report,
        excused=Counter(excuse for result in cause.results if (excuse := run.excuse(result)) is not None),
        clauses={name: clauses()[name].sentence for name in broken if name in clauses()},
        cases={name: ", ".join(of_case) for name, of_case in dtypes.items()},
        example=example,
        call=call_of(example),
        drawing=drawing,
    )


def _title(cause: Cause) -> str:
    """Name a cause; a cause without a name is described by the properties that its failures share."""
    if cause.kind == "unknown" and cause.story.share is not None:
        return f"No known mistake; what they share: {' and '.join(cause.story.share.properties)}"
    return title_of(cause)


def write_html(run: Run, path: Path) -> None:
    """Write the page of a run to a file, which is never seen half written.

    Raises:
        OSError: The file cannot be written.
    """
    write_text(path, page(run))
