"""`mha-spec matrix`: the states of cells, the badges, the Markdown and the command."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from support.matrix_reports import basic, field_reports, named, read, windows
from support.pages import Structure
from support.stored_reports import cause, written
from typer.testing import CliRunner

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.commands.cli import app
from mha_spec_conformance.commands.matrix import markdown_lines, show_matrix, text_lines
from mha_spec_conformance.reporting.badge import badge_of
from mha_spec_conformance.reporting.matrix_page import FORMAT, matrix_page
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from pathlib import Path

    from mha_spec_conformance.reporting.matrix import Matrix


def states_of(field: Matrix, clause: str) -> list[str]:
    (row,) = (row for row in field.rows if row.clause.id == clause)
    return [cell.state for cell in row.cells]


def test_each_state_occurs_where_it_should(field: Matrix) -> None:
    assert states_of(field, "MHA-WINDOW-1") == ["conforms", "wrong", "convention", "unsupported", "error", "conforms"]
    assert states_of(field, "MHA-SCORE-2") == ["conforms"] * 5 + ["not asked"]
    assert states_of(field, "MHA-MASK-1") == ["conforms"] + ["not asked"] * 5
    texts = [cell.text for row in field.rows if row.clause.id == "MHA-WINDOW-1" for cell in row.cells]
    assert texts == [
        "conforms in 6 of 6",
        "wrong in 3 of 6",
        "window_left=exclusive in 3 of 3",
        "unsupported, 3 refused",
        "error in 3 of 3",
        "conforms in 1 of 1",
    ]


def test_a_failure_counts_against_the_clauses_of_its_cause(field: Matrix) -> None:
    assert states_of(field, "MHA-HEAD-1") == ["conforms"] * 6
    (row,) = (row for row in field.rows if row.clause.id == "MHA-HEAD-1")
    assert [cell.elsewhere for cell in row.cells] == [0, 3, 3, 0, 3, 0]
    assert [cell.partial for cell in row.cells] == [False, False, False, True, False, False]


def test_a_clause_of_which_no_case_passes_does_not_conform(tmp_path: Path) -> None:
    wrong = windows("fail")
    content = named("x", *wrong, causes=[{**cause("window-ignored", *wrong), "clauses": ["MHA-WINDOW-1"]}])
    assert states_of(read(tmp_path, content), "MHA-HEAD-1") == ["wrong"]
    content["cases"] += windows("unsupported", dtype="float32")
    assert states_of(read(tmp_path, content), "MHA-HEAD-1") == ["wrong"]
    content["causes"] = []
    assert states_of(read(tmp_path, content), "MHA-WINDOW-1") == ["wrong"]


@pytest.mark.parametrize(
    "outcomes", [("fail", "crash"), ("error", "deviation"), ("deviation", "pass"), ("internal", "pass")]
)
def test_the_worst_result_decides_a_cell(outcomes: tuple[str, str], tmp_path: Path) -> None:
    dtypes = ("float32", "float16")
    cases = [basic(outcome, dtype=dtype) for outcome, dtype in zip(outcomes, dtypes, strict=True)]
    expected = {"fail": "wrong", "error": "error", "deviation": "convention", "internal": "error"}[outcomes[0]]
    assert states_of(read(tmp_path, named("x", *cases)), "MHA-SCORE-2") == [expected]
    assert states_of(read(tmp_path, named("x", *reversed(cases))), "MHA-SCORE-2") == [expected]


def test_should_cases_count_for_should_clauses_alone(tmp_path: Path) -> None:
    should = next(clause.id for clause in clauses().values() if clause.level == "SHOULD")
    failure = basic("fail", level="SHOULD", clauses=[should, "MHA-SCORE-2"])
    field = read(tmp_path, named("x", failure))
    assert states_of(field, should) == ["wrong"]
    assert states_of(field, "MHA-SCORE-2") == ["not asked"]


def test_rows_are_grouped_by_theme_in_the_order_of_the_specification(field: Matrix) -> None:
    assert list(field.themes) == ["Heads", "Scores", "Visibility"]
    names = list(clauses())
    assert [names.index(row.clause.id) for row in field.rows] == sorted(
        names.index(row.clause.id) for row in field.rows
    )
    assert all(clause.theme for clause in clauses().values())


def test_clauses_that_are_not_installed_are_shown(tmp_path: Path) -> None:
    field = read(tmp_path, named("x", basic(clauses=["MHA-FUTURE-1"])))
    assert list(field.themes) == ["Clauses of another version"]
    assert "MHA-FUTURE-1" in matrix_page(field)


def test_names_are_distinct(tmp_path: Path) -> None:
    field = read(tmp_path, *[named(name, basic()) for name in ("a/x.py", "b/x.py", "x_py", "/", "\u2603")])
    assert [column.name for column in field.columns] == ["x.py", "x.py (2)", "x_py", "/", "\u2603"]
    assert [column.slug for column in field.columns] == ["x-py", "x-py-2", "x-py-3", "target", "target-2"]


# --- The badge and the verdicts ---

CONFORMANT = {"complete": True, "status": 0, "verdict": "conformant on core (1 of 1 passed)"}
SELECTIONS = [{"only": ["x"]}, {"dtypes": ["float32"]}, {"exclude": ["x"]}, {"shard": [1, 2]}]


def test_a_badge_says_conformant_of_a_complete_run(tmp_path: Path) -> None:
    uncounted = basic("unsupported", dtype="float16"), basic("fail", dtype="float64", level="SHOULD")
    badge = badge_of(read(tmp_path, named("x", basic(), *uncounted, **CONFORMANT)))
    assert (badge.label, badge.message, badge.colour) == ("mha-spec 1.1", "conformant, 1 of 1 cases", "brightgreen")
    accepted = named("x", basic(), **CONFORMANT, accepted=["lse_base=2"])
    assert "conformant, with accepted conventions" in badge_of(read(tmp_path, accepted)).message
    several = badge_of(read(tmp_path, *[named(name, basic(), **CONFORMANT) for name in "xyz"]))
    assert (several.message, several.colour) == ("3 of 3 conformant", "brightgreen")


@pytest.mark.parametrize("change", [
    {"complete": False},
    {"complete": False, "verdict": "conformant"},
    {"status": 1},
    {"status": 2},
    {"verdict": "not conformant on core (0 of 1 passed, 1 known)"},
    {"verdict": "partial run: 1 of 1 passed"},
    *[{"selection": {"only": [], "dtypes": [], "exclude": [], "shard": None, **part}} for part in SELECTIONS],
])  # fmt: skip
def test_a_badge_never_says_conformant_of_another_run(change: dict[str, Any], tmp_path: Path) -> None:
    content = named("x", basic(), **{**CONFORMANT, **change})
    field = read(tmp_path, content)
    badge = badge_of(field)
    assert not re.search(r"(?<!not )conformant", badge.message)
    assert badge.colour == ("red" if field.columns[0].report.data["status"] else "yellow")
    both = badge_of(read(tmp_path, content, named("y", basic(), **CONFORMANT)))
    assert (both.message, both.colour) == ("1 of 2 conformant", "yellow")
    words = "\n".join([*text_lines(field), *markdown_lines(field), Structure(matrix_page(field)).text])
    assert not re.search(r"(?<!not )conformant[^_]", words)


def test_badges_are_valid_files(tmp_path: Path) -> None:
    paths = written(tmp_path, named("x", basic(), **CONFORMANT, spec_version="<1.1> & \"'"))
    badges = [tmp_path / "badge.svg", tmp_path / "badge.json"]
    show_matrix(paths, badges=badges)
    root = ElementTree.parse(badges[0]).getroot()
    assert root.get("aria-label") == "mha-spec <1.1> & \"': conformant, 1 of 1 cases"
    endpoint = json.loads(badges[1].read_text())
    assert endpoint == {
        "schemaVersion": 1,
        "label": "mha-spec <1.1> & \"'",
        "message": "conformant, 1 of 1 cases",
        "color": "brightgreen",
    }
    show_matrix(paths, badges=badges)


# --- The command ---


def test_the_command_writes_its_files_and_prints_a_line_for_each_target(tmp_path: Path) -> None:
    paths = [str(path) for path in written(tmp_path, *field_reports())]
    page, summary = tmp_path / "matrix.html", tmp_path / "summary.md"
    summary.write_text("before\n")
    arguments = ["matrix", *paths, "--html", str(page), "--markdown", str(summary)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    result = CliRunner().invoke(app, arguments)  # It replaces a page of its form, and appends Markdown.
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == len(paths)
    assert lines[1].startswith("wrong.py (library 1.0): not conformant; clauses: 2 conforms, 1 wrong, 1 not asked")
    assert FORMAT in page.read_text()[:200]
    text = summary.read_text()
    assert text.startswith("before\n## Attention by clause")
    assert text.count("## Attention by clause") == 2
    (row, _) = (line for line in text.splitlines() if line.startswith("| MHA-WINDOW-1 "))
    signs = ["✅", "❌", "🔀 window\\_left=exclusive", "⛔", "💥", "✅"]
    assert row.endswith(f" | {' | '.join(signs)} |")
    (row, _) = (line for line in text.splitlines() if line.startswith("| wrong.py "))
    assert row == "| wrong.py | library 1.0 | not conformant | 2 |  | 1 |  |  | 1 |"


def test_markdown_of_many_targets_has_no_clauses(tmp_path: Path) -> None:
    text = "\n".join(markdown_lines(read(tmp_path, *[named(f"{i}.py", basic()) for i in range(13)])))
    assert "| 12.py |" in text
    assert "MHA-" not in text


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    right, other = named("x", basic()), named("y", basic(), spec_version="9.9")
    paths = written(tmp_path, right, other)
    (tmp_path / "page.html").write_text("something else")
    with pytest.raises(MhaSpecError, match="different suites"):
        show_matrix(paths)
    with pytest.raises(MhaSpecError, match=r"must end in \.svg or \.json"):
        show_matrix(paths[:1], badges=[tmp_path / "badge.png"])
    with pytest.raises(MhaSpecError, match="does not hold mha-spec-matrix"):
        show_matrix(paths[:1], html=tmp_path / "page.html")
    with pytest.raises(MhaSpecError, match="there is no folder"):
        show_matrix(paths[:1], html=tmp_path / "no" / "page.html")
