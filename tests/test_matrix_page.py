"""The page of `mha-spec matrix`: its structure, its size, and how headless Chromium shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.matrix_reports import basic, field_reports, named, read, windows
from support.pages import Structure, assert_fits_a_phone_and_paper, ground_of, in_a_browser, violations, visit
from support.stored_reports import cause, entry

from mha_spec.arrays import FLOATING
from mha_spec_conformance.reporting.matrix import STATES, Matrix, matrix
from mha_spec_conformance.reporting.matrix_page import matrix_page
from mha_spec_conformance.reporting.stored import StoredReport
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

LARGEST = 3_000_000

HOSTILE = (
    "</script></title><script>alert(1)</script><!--<img src=x onerror=alert(2)>\x1b[31m\u202e'\"&amp;\ud800{{ 7*7 }}\0"
)


def hostile_reports() -> list[dict[str, Any]]:
    """Put a hostile text wherever a report can have one."""
    failures = windows("fail", reason=HOSTILE * 20)
    content = named(
        HOSTILE,
        basic("error", reason=HOSTILE, features=[HOSTILE]),
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
    assert "fail: window-ignored" in text
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
    from playwright.sync_api import expect

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
    # Not `wait_for_function`, which fails if it waits: the policy of the page forbids `eval`.
    expect(opened.locator("#answer")).to_be_empty()
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
    opened.wait_for_url(f"{page}#MHA-WINDOW-1")
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
    assert_fits_a_phone_and_paper(opened, shown="#grid", hidden=["nav", "#choice"])
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
