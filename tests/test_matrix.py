"""`mha-spec matrix`: the states of cells, the page in headless Chromium, its size, the Markdown and the badges."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from support.pages import Structure, ground_of, in_a_browser, violations, visit
from support.stored_reports import cause, entry, report, written
from typer.testing import CliRunner

from mha_spec.arrays import FLOATING
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.commands.cli import app
from mha_spec_conformance.commands.matrix import markdown_lines, show_matrix, text_lines
from mha_spec_conformance.reporting.badge import badge_of
from mha_spec_conformance.reporting.matrix import STATES, Matrix, matrix
from mha_spec_conformance.reporting.matrix_page import FORMAT, matrix_page
from mha_spec_conformance.reporting.stored import StoredReport, read_report
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

LARGEST = 3_000_000

HOSTILE = (
    "</script></title><script>alert(1)</script><!--<img src=x onerror=alert(2)>\x1b[31m\u202e'\"&amp;\ud800{{ 7*7 }}\0"
)

BASIC = "attention/core/generic-1"
BASIC_CLAUSES = {"clauses": ["MHA-SCORE-2", "MHA-HEAD-1"], "features": ["core", "groups"]}
WINDOW_CLAUSES = {"clauses": ["MHA-WINDOW-1", "MHA-HEAD-1"], "features": ["window", "groups"]}
WINDOWS = [f"attention/window/{number}" for number in range(3)]


def named(name: str, *entries: dict[str, Any], **members: Any) -> dict[str, Any]:
    """Return the report of a target with this name."""
    content = report(*entries, **members)
    content["target"] = {**content["target"], "name": name, "features": ["mask", "window"]}
    return content


def basic(outcome: str = "pass", **members: Any) -> dict[str, Any]:
    return entry(outcome, BASIC, **{**BASIC_CLAUSES, **members})


def windows(outcome: str = "pass", dtype: str = "bfloat16", **members: Any) -> list[dict[str, Any]]:
    return [entry(outcome, name, dtype, **{**WINDOW_CLAUSES, **members}) for name in WINDOWS]


def field_reports() -> list[dict[str, Any]]:
    """Return reports in which each state occurs."""
    wrong = windows("fail", allowance_used=123.0, reason="`output` at (0, 1) must be 1, received 2")
    exclusive = windows("deviation", conventions=["window_left=exclusive"], reason="window_left=exclusive")
    crashed = windows("crash")
    blamed = {"clauses": ["MHA-WINDOW-1"], "features": ["window"]}
    return [
        named("folder/right.py", basic(), *windows(), *windows(dtype="float32"), entry("pass")),
        named(
            "wrong.py",
            basic(),
            *wrong,
            *windows(dtype="float32"),
            status=1,
            causes=[{**cause("window-ignored", *wrong), **blamed}],
            verdict="not conformant",
        ),
        named(
            "another folder/exclusive.py",
            basic(),
            *exclusive,
            status=1,
            causes=[{**cause("window_left=exclusive", *exclusive), **blamed}],
            verdict="not conformant",
        ),
        named("refuses.py", basic(), *windows("unsupported", reason="no window")),
        named(
            "crashes.py", basic(), *crashed, status=1, causes=[{**cause("a crash", *crashed, kind="error"), **blamed}]
        ),
        named("partial.py", *windows()[:1], complete=False, verdict="partial run: 1 of 1 passed"),
    ]


def read(folder: Path, *reports: dict[str, Any]) -> Matrix:
    return matrix([read_report(path) for path in written(folder, *reports)])


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return read(tmp_path_factory.mktemp("reports"), *field_reports())


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
    badge = badge_of(read(tmp_path, named("x", basic(), basic("unsupported", dtype="float16"), **CONFORMANT)))
    assert (badge.label, badge.message, badge.colour) == ("mha-spec 1.1", "conformant, 1 of 1 cases", "brightgreen")
    accepted = named("x", basic(), **CONFORMANT, accepted=["lse_base=2"])
    assert "conformant, with accepted conventions" in badge_of(read(tmp_path, accepted)).message


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
    assert badge.colour != "brightgreen"
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
    assert endpoint.keys() == {"schemaVersion", "label", "message", "color"}
    assert endpoint["schemaVersion"] == 1
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
    assert "| MHA-WINDOW-1 " in text
    assert "❌" in text
    assert "window\\_left=exclusive" in text


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


# --- The page ---


def hostile_reports() -> list[dict[str, Any]]:
    """Put a hostile text wherever a report can have one."""
    failures = windows("fail", reason=HOSTILE * 20)
    content = named(
        HOSTILE,
        basic(HOSTILE and "error", reason=HOSTILE, features=[HOSTILE]),
        *failures,
        entry("pass", HOSTILE),
        verdict=HOSTILE,
        status=1,
        causes=[{**cause(HOSTILE, *failures, kind="error")}],
    )
    content["target"]["versions"] = {HOSTILE: HOSTILE}
    content["suite"] = {**content["suite"], "version": HOSTILE}
    return [content, {**content, "target": {**content["target"], "name": "__proto__"}}]


@pytest.mark.parametrize("hostile", [False, True])
def test_the_page_is_well_formed_and_needs_nothing_else(hostile: bool, tmp_path: Path) -> None:
    text = matrix_page(read(tmp_path, *(hostile_reports() if hostile else field_reports())))
    assert text.isascii()
    structure = Structure(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert structure.unclosed == []
    assert structure.open == []
    ids = [attributes["id"] for _, attributes in structure.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(
        attributes["href"].startswith("#") and attributes["href"][1:] in ids for attributes in structure.all("a")
    )
    assert not structure.all("img", "link", "iframe", "object", "base", "image", "use")
    assert text.count("<script") == 2
    names = {name for _, attributes in structure.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "style", "srcset")}
    policy = str(structure.all("meta")[1]["content"])
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert all("scope" in attributes for attributes in structure.all("th"))
    for character in "\x1b\0\u202e\ud800":
        assert f"&#{ord(character)};" not in text


def large(number: int) -> list[StoredReport]:
    """Return reports of 2,400 cases in four dtypes, half of which fail in as many ways as are shown."""
    from pathlib import Path

    cited = list(clauses())[:100]
    cases = [
        entry(
            "pass" if i % 2 else "fail",
            f"multi_head_attention/causal+window+offset/generic-{i}",
            dtype,
            clauses=[cited[(i + step) % 100] for step in range(6)],
            allowance_used=i / 2400 if i % 2 else 77.0,
            reason=None if i % 2 else f"{i} {'text ' * 60}",
        )
        for i in range(2400)
        for dtype in FLOATING
    ]
    groups = [[case for case in cases[part::80] if case["outcome"] == "fail"] for part in range(40)]
    causes = [cause(f"{number} {'the cause ' * 60}", *group, kind="unknown") for number, group in enumerate(groups)]
    return [StoredReport(Path(f"{i}.json"), named(f"{i}.py", *cases, causes=causes)) for i in range(number)]


def test_a_page_of_40_implementations_is_below_the_limit() -> None:
    smaller, larger = (len(matrix_page(matrix(large(number)))) for number in (1, 3))
    assert smaller + 39 * (larger - smaller) / 2 < LARGEST


@pytest.fixture(scope="module", params=["field", "hostile"])
def visited(
    request: pytest.FixtureRequest, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Page, list[str]]]:
    folder = tmp_path_factory.mktemp("matrix")
    path = folder / "matrix.html"
    reports = field_reports() if request.param == "field" else hostile_reports()
    path.write_text(matrix_page(read(folder, *reports)))
    yield from visit(browser, path)


@pytest.fixture
def opened(browser: Browser, field: Matrix, tmp_path: Path) -> Iterator[Page]:
    path = tmp_path / "matrix.html"
    path.write_text(matrix_page(field))
    for page, complaints in visit(browser, path):
        yield page
        assert complaints == []


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_the_console_are_silent(visited: tuple[Page, list[str]], scheme: Any) -> None:
    opened, complaints = visited
    opened.emulate_media(media="screen", color_scheme=scheme)
    assert violations(opened) == []
    choices = opened.locator("#choice input").all()
    for choice in choices:
        choice.check()
    assert opened.locator("#answer li").count() > 1
    opened.locator("#grid button:visible").first.click()
    assert opened.locator("dialog").is_visible()
    assert violations(opened) == []
    opened.keyboard.press("Escape")
    for choice in choices:
        choice.uncheck()
    assert complaints == []
    assert (max(ground_of(opened)) < 100) is (scheme == "dark")


@in_a_browser
def test_every_cell_shows_the_cases_that_it_counts(opened: Page, field: Matrix) -> None:
    for r, row in enumerate(field.rows):
        for c, cell in enumerate(row.cells):
            opened.locator("#grid tbody tr[id]").nth(r).locator("button").nth(c).click()
            text = opened.locator("dialog").inner_text()
            assert f"{row.clause.id}: {field.columns[c].name}" in text
            assert row.clause.sentence in text
            assert cell.text in text
            numbers = sum(int(number) for number in re.findall(r"\((\d+)\)$", text, re.MULTILINE))
            assert numbers == cell.outcomes.total() + cell.elsewhere
            assert ("mha-spec repro" in text) is (cell.elsewhere > 0 or cell.state in ("wrong", "convention", "error"))
            opened.locator("dialog .close").click()


@in_a_browser
def test_a_cell_shows_cause_reason_allowance_and_command(opened: Page) -> None:
    opened.locator("#MHA-WINDOW-1 button").nth(1).click()
    text = opened.locator("dialog").inner_text()
    assert "fail: window-ignored" in text or "fail: " in text
    assert "`output` at (0, 1) must be 1, received 2" in text
    assert "mha-spec repro wrong.py attention/window/0 --dtype bfloat16" in text
    assert "use at most 0.27 of their allowance" in text or "use at most 0.26 of their allowance" in text
    opened.keyboard.press("Escape")
    opened.locator("#MHA-HEAD-1 button").nth(2).click()
    assert "counts against MHA-WINDOW-1" in opened.locator("dialog").inner_text()
    assert "mha-spec repro 'another folder/exclusive.py'" in opened.locator("dialog").inner_text()


def answers(opened: Page) -> dict[str, str]:
    """Return the answers to the choice by target."""
    lines = opened.locator("#answer li").all_inner_texts()
    return {line.split(" (")[0].strip(): line.split("): ")[1] for line in lines}


@in_a_browser
def test_the_choice_tells_who_is_right(opened: Page) -> None:
    assert opened.locator("#answer").inner_text() == ""
    for name in ("groups", "window", "bfloat16"):
        opened.check(f"input[value={name}]")
    assert "1 of 6 are right about groups, window, bfloat16" in opened.locator("#answer").inner_text()
    assert answers(opened) == {
        "right.py": "right in all 3 cases that were asked",
        "refuses.py": "refused all 3 cases",
        "exclusive.py": "another convention in 3 of 3 cases",
        "wrong.py": "wrong in 3 of 3 cases",
        "crashes.py": "wrong in 3 of 3 cases",
        "partial.py": "right in the case that was asked, but the run is partial",
    }
    assert opened.locator("#shown").inner_text() == "3 of 4 clauses"
    opened.uncheck("input[value=bfloat16]")
    opened.check("input[value=float32]")
    assert answers(opened)["wrong.py"] == "right in all 4 cases that were asked"
    assert answers(opened)["exclusive.py"] == "right in 1 cases, but none with window"
    opened.check("input[value=mask]")
    assert answers(opened)["wrong.py"] == "right in 4 cases, but none with mask"
    opened.locator("#choice button").click()
    opened.wait_for_function("document.querySelector('#answer').textContent === ''")
    assert opened.locator("#shown").inner_text() == "4 of 4 clauses"


@in_a_browser
def test_search_and_rows_are_filtered(opened: Page) -> None:
    search, shown = opened.locator("input[type=search]"), opened.locator("#shown")
    for words, number in (
        ("window", 1),
        ("VISIBILITY", 2),
        ("true attends", 1),
        ("mha-head-1", 1),
        ("no such", 0),
        ("", 4),
    ):
        search.fill(words)
        assert shown.inner_text() == f"{number} of 4 clauses"
        assert opened.locator("#grid tbody tr[id]:visible").count() == number
        assert opened.locator("#grid .theme:visible").count() <= number
    for kind, number in (("wrong", 1), ("differ", 1), ("all", 4)):
        opened.locator("select").select_option(kind)
        assert shown.inner_text() == f"{number} of 4 clauses"


@in_a_browser
def test_links_lead_to_clauses_and_cells(opened: Page) -> None:
    opened.fill("input[type=search]", "scores")
    page = opened.url.split("#")[0]
    opened.evaluate("location.hash = '#MHA-WINDOW-1/wrong-py'")
    opened.wait_for_selector("dialog[open]")
    assert "MHA-WINDOW-1: wrong.py" in opened.locator("dialog").inner_text()
    opened.keyboard.press("Escape")
    # The browser tells the page after the key that its dialog was closed.
    opened.wait_for_function("location.hash === '#MHA-WINDOW-1'")
    opened.reload()
    assert not opened.locator("dialog").is_visible()
    opened.locator("#MHA-MASK-1 button").first.click()
    assert opened.url == f"{page}#MHA-MASK-1/right-py"
    opened.reload()
    assert "MHA-MASK-1: right.py" in opened.locator("dialog").inner_text()
    for wrong in ("#nothing/at-all", "#MHA-MASK-1/nobody", "#%3Cscript%3E"):
        opened.goto(page + wrong)
    opened.keyboard.press("Escape")
    for link in opened.locator("nav a").all():
        link.click()
        name = str(link.get_attribute("href"))[1:]
        assert 0 <= opened.evaluate("name => document.getElementById(name).getBoundingClientRect().top", name) < 900


@in_a_browser
def test_the_keyboard_moves_between_cells_and_opens_them(opened: Page) -> None:
    focused = "document.activeElement.closest('tr')?.id + ' ' + document.activeElement.textContent"
    assert opened.locator("#grid button[tabindex='0']").count() == 1
    opened.locator("#grid button[tabindex='0']").focus()
    for key, expected in (
        ("ArrowDown", "MHA-SCORE-2 conforms in 1 of 1"),
        ("End", "MHA-SCORE-2 not asked"),
        ("ArrowRight", "MHA-SCORE-2 not asked"),
        ("ArrowDown", "MHA-MASK-1 not asked"),
        ("ArrowDown", "MHA-WINDOW-1 conforms in 1 of 1"),
        ("ArrowDown", "MHA-WINDOW-1 conforms in 1 of 1"),
        ("Home", "MHA-WINDOW-1 conforms in 6 of 6"),
    ):
        opened.keyboard.press(key)
        assert opened.evaluate(focused) == expected
    assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.keyboard.press("Enter")
    assert opened.locator("dialog").is_visible()
    opened.keyboard.press("Escape")
    assert opened.evaluate(focused) == "MHA-WINDOW-1 conforms in 6 of 6"
    assert opened.locator("#grid button[tabindex='0']").count() == 1


@in_a_browser
def test_the_page_fits_a_phone_and_paper(visited: tuple[Page, list[str]]) -> None:
    opened, complaints = visited
    opened.set_viewport_size({"width": 320, "height": 600})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 320
    opened.set_viewport_size({"width": 1200, "height": 900})
    opened.emulate_media(media="print", color_scheme="dark")
    assert not opened.locator("nav").is_visible()
    assert not opened.locator("#choice").is_visible()
    assert opened.locator("#grid").is_visible()
    assert ground_of(opened) == [255, 255, 255]
    assert opened.pdf().startswith(b"%PDF")
    opened.emulate_media(media="screen")
    assert complaints == []


@in_a_browser
def test_the_table_is_complete_without_script(browser: Browser, field: Matrix, tmp_path: Path) -> None:
    path = tmp_path / "matrix.html"
    path.write_text(matrix_page(field))
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#grid button").count() == len(field.rows) * len(field.columns)
    assert page.locator("#grid button").nth(1).inner_text() == field.rows[0].cells[1].text
    assert not page.locator("#choice").is_visible()
    assert "Without its script" in page.locator("main").inner_text()
    context.close()


def test_the_states_are_explained(field: Matrix) -> None:
    text = " ".join(Structure(matrix_page(field)).text.split())
    for state in STATES:
        assert f"{state}: " in text
