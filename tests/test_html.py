"""The page that `--html` writes: its structure, its drawings, its size, and how headless Chromium shows it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.pages import Structure, assert_fits_a_phone_and_paper, ground_of, in_a_browser, violations, visit

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.commands.cli import app
from mha_spec_conformance.commands.reports import Reports, UsageError
from mha_spec_conformance.judging.places import WrongElements
from mha_spec_conformance.reporting.drawing import Drawing, drawing_of
from mha_spec_conformance.reporting.html import FORMAT, page, write_html
from mha_spec_conformance.reporting.report import as_json
from mha_spec_conformance.reporting.strips import LIMIT, strips
from mha_spec_conformance.running.known import Known
from mha_spec_conformance.running.laws import Law
from mha_spec_conformance.running.runner import Settings, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from playwright.sync_api import Browser, Page

    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

WRONG = r"""
from mha_spec.reference import attention as right, attention_vjp as right_vjp

dtypes = ("float32", "float16")

def attention(query, key, value, *, mask=None, causal=False, q_offset=None, softcap=None, return_lse=False):
    if softcap is not None:
        raise RuntimeError("no <b>kernel</b> & 'quotes' \x1b[31m \u202e gnp.exe")
    if query.shape[2] == 1:
        raise NotImplementedError("a single query")
    mask = None if mask is None else ~mask
    output, lse = right(query, key, value, mask=mask, causal=causal, q_offset=q_offset, return_lse=True)
    output[:, 1:, 64:] *= 1.01
    return (output, lse) if return_lse else output

def attention_vjp(grad_output, query, key, value, *, bias=None):
    gradients = right_vjp(grad_output, query, key, value, bias=bias)
    gradients[1][..., -1] = float("nan")
    return gradients[:4] if bias is not None else gradients[:3]
"""

ONLY = (
    *("attention/mask/*size-64*", "attention/causal/size-64*", "attention/softcap/50*", "attention/smoke/*"),
    *("attention/tiles/128/causal/*", "attention_vjp/bias/far-4", "attention_vjp/bias/generic-1"),
)

HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e\u2066'\"&amp;\ud800{{ 7*7 }}\0"
)

LARGEST = 1_000_000


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory, suite: Suite) -> Run:
    path = tmp_path_factory.mktemp("target") / "wrong.py"
    path.write_text(WRONG)
    return run(str(path), suite, Settings(selection=Selection(only=ONLY)))


def conformant(failing: Run) -> Run:
    """Keep the results that passed, as of a complete run."""
    passed = tuple(result for result in failing.results if result.outcome == "pass")
    return replace(failing, results=passed, selection=Selection(), laws=LAWS)


def with_known_failures(failing: Run) -> Run:
    """Declare all failures of a run known, as of a complete run."""
    known = tuple(
        Known(result.ask.case.id, "issue 12", result.ask.dtype, result.outcome) for result in failing.failures
    )
    return replace(failing, selection=Selection(), known=known)


def hostile(failing: Run) -> Run:
    """Put hostile texts wherever a target, a user or a file of known failures has a text."""
    claims = replace(
        failing.claims,
        name=HOSTILE,
        versions={HOSTILE: HOSTILE},
        hardware=HOSTILE,
        conventions={"causal_alignment": HOSTILE},
    )
    return replace(
        failing,
        claims=claims,
        results=tuple(replace(result, reason=f"{HOSTILE} {HOSTILE * 40}") for result in failing.results),
        notes=(HOSTILE,),
        known=(Known(HOSTILE, HOSTILE), Known(failing.failures[0].ask.case.id, HOSTILE)),
    )


def many(failing: Run) -> Run:
    """Repeat the results until they are 6,000, with many causes and long texts."""
    failures = [result for result in failing.results if result.outcome == "error"]
    results = list(failing.results)
    for number in range(6000 - len(results)):
        example = failures[number % len(failures)]
        case = replace(example.ask.case, id=f"{example.ask.case.id}/{number}")
        reason = f"{chr(0x4E00 + number % 40) * 700} <&>"
        used = 10.0 ** (number % 90 / 10 - 4)
        results.append(replace(example, ask=replace(example.ask, case=case), reason=reason, allowance_used=used))
    return replace(failing, results=tuple(results), notes=(HOSTILE * 100,) * 500)


LAWS = (Law("another batch size", 3, 1), Law("decode = prefill", 0, 3, ("attention/smoke/plain",)))

KINDS: Mapping[str, Callable[[Run], Run]] = {
    "failing": lambda failing: replace(
        failing, laws=LAWS, notes=("a note",), known=(Known(failing.failures[0].ask.case.id, "is slow"),)
    ),
    "conformant": conformant,
    "hostile": hostile,
    "empty": lambda failing: replace(failing, results=()),
    "without arrays": lambda failing: replace(
        failing, results=tuple(replace(result, wrong=None) for result in failing.results)
    ),
    "many": many,
}


@pytest.fixture(scope="module", params=KINDS)
def shown(request: pytest.FixtureRequest, failing: Run) -> tuple[Run, str]:
    chosen = KINDS[request.param](failing)
    return chosen, page(chosen)


def test_the_page_is_well_formed_and_needs_nothing_else(shown: tuple[Run, str]) -> None:
    _, text = shown
    structure = Structure(text)
    assert structure.unclosed == []
    assert structure.open == []
    assert len(text) < LARGEST
    assert text.isascii()
    ids = [attributes["id"] for _, attributes in structure.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes["href"][1:] in ids for attributes in structure.all("a"))
    assert all(attributes["href"].startswith("#") for attributes in structure.all("a"))
    references = re.findall(r"url\(([^)]*)\)", text)
    assert {reference[1:] for reference in references} <= set(ids)
    assert not structure.all("script", "img", "link", "iframe", "object", "base", "form", "image", "use")
    names = {name for _, attributes in structure.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "style", "srcset", "xlink:href")}
    assert "default-src 'none'" in str(structure.all("meta")[1]["content"])


def test_headings_tables_and_pictures_have_names(shown: tuple[Run, str]) -> None:
    structure = Structure(shown[1])
    levels = [int(tag[1]) for tag, _ in structure.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(structure.all("caption")) == len(structure.all("table"))
    assert all("scope" in attributes for attributes in structure.all("th"))
    tags = [tag for tag, _ in structure.tags]
    for i, (tag, attributes) in enumerate(structure.tags):
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img"
            assert tags[i + 1] == "title"


def test_the_page_has_what_the_report_has(shown: tuple[Run, str]) -> None:
    chosen, text = shown
    words = " ".join(Structure(text).text.split())
    report: dict[str, Any] = as_json(chosen)
    for law in report["laws"]:
        assert law["law"] in words
    for feature in report["features"]:
        assert feature in words
    assert chosen.suite.spec_version in words
    assert f"{report['summary']['pass']:,} pass" in words
    for number, cause in enumerate(report["causes"][:30], 1):
        assert f"{number}." in words
        assert f"{cause['failures']:,} failure" in words
        if cause["share"]:
            assert " and ".join(cause["share"]["properties"]) in words
    further = len(report["causes"]) - 30
    assert (f"{further} further causes are not shown" in words) is (further > 0)


def test_the_verdict_is_the_first_that_is_said(failing: Run) -> None:
    failing = replace(failing, results=tuple(r for r in failing.results if "smoke" in r.ask.case.id))
    labels = {
        "Partial run, failed": failing,
        "Conformant": conformant(failing),
        "Not conformant": replace(failing, selection=Selection()),
        "Only known failures, not conformant": with_known_failures(failing),
        "Partial run, passed": replace(conformant(failing), selection=Selection(only=("x",))),
        "Requirements not met": replace(conformant(failing), required=("window",)),
        "Not judged": replace(failing, results=()),
    }
    for label, chosen in labels.items():
        words = " ".join(Structure(page(chosen)).text.split())
        assert re.search(rf"conformance report \S*wrong\.py . {label} {re.escape(chosen.verdict)}\.", words), label


def test_no_text_of_a_target_is_markup_or_hidden(failing: Run) -> None:
    text = page(hostile(failing))
    assert "<script" not in text
    assert "<img" not in text
    assert "49" not in Structure(text).all("title")[0].values()
    assert "{{ 7*7 }}" in Structure(text).text
    for character in "\x1b\0\u202e\u2066\ud800":
        assert character not in text
        assert f"&#{ord(character)};" not in text
    assert "\\u202e" in text


def by_output(drawing: Drawing) -> dict[str, Any]:
    return {picture.name: picture for picture in drawing.errors}


def cells(path: str) -> set[tuple[int, int]]:
    """Read the cells of a path again."""
    runs = [tuple(map(int, run)) for run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path)]
    return {(y, x + i) for x, y, width in runs for i in range(width)}


def test_every_element_of_a_small_answer_is_drawn(failing: Run) -> None:
    results = [r for r in failing.results if r.ask.case.function == "attention_vjp" and r.wrong is not None]
    result = min(results, key=lambda r: r.wrong.outputs["grad_key"].size)
    drawing = drawing_of(result)
    elements = WrongElements(result.wrong)
    assert by_output(drawing).keys() == {"grad_key"}
    (picture,) = drawing.errors
    marks = elements.marks["grad_key"]
    assert picture.block == (1, 1)
    assert picture.counts == (marks.sum(), marks.size)
    assert len(picture.grids) + picture.left_out == marks.shape[0] * marks.shape[1]
    for grid in picture.grids:
        entry, head = map(int, re.findall(r"\d+", grid.title))
        assert cells(grid.paths[5]) == {(int(i), int(c)) for i, c in numpy.argwhere(marks[entry, head])}
        assert cells(grid.paths[0]) == {(int(i), int(c)) for i, c in numpy.argwhere(~marks[entry, head])}
    first = drawing.elements[0]
    assert first.index == result.worst.index
    assert numpy.isnan(first.got)
    assert len({element.index for element in drawing.elements}) == len(drawing.elements) > 1


def test_pairs_and_errors_of_a_large_answer_share_cells(failing: Run) -> None:
    result = next(r for r in failing.results if r.ask.case.id.startswith("attention/tiles") and r.wrong is not None)
    drawing = drawing_of(result)
    size = result.wrong.outputs["output"].shape[2]
    assert drawing.pairs.sizes == (size, size)
    assert drawing.pairs.block == (size // 32, size // 32)
    (grid,) = drawing.pairs.grids
    lower = {(i, j) for i in range(32) for j in range(32)}
    assert cells(grid.paths[2]) == {(i, j) for i, j in lower if j < i}
    assert cells(grid.paths[1]) == {(i, i) for i in range(32)}
    assert cells(grid.paths[0]) == {(i, j) for i, j in lower if j > i}
    (picture,) = drawing.errors
    wrong = {
        grid.title: {y for shade in (1, 2, 3, 4, 5) for y, _ in cells(grid.paths.get(shade, ""))}
        for grid in picture.grids
    }
    assert not any(rows for title, rows in wrong.items() if title.endswith("head 0"))
    rows = set().union(*wrong.values())
    assert rows
    assert min(rows) >= 64 // (size // 32)
    marked = {int(y) for y in re.findall(r"M-1 (\d+)", grid.marked_rows)}
    assert marked
    assert min(marked) >= 64 // (size // 32)


def test_strips_have_passes_before_the_line_and_failures_after_it() -> None:
    shares = [
        ("pass", 0.0),
        ("pass", 1e-9),
        ("pass", 0.999),
        ("pass", 1.0),
        ("fail", 1.001),
        ("fail", "inf"),
        ("error", None),
    ]
    cases = [
        {"features": ["mask"], "dtype": "float32", "outcome": outcome, "allowance_used": share}
        for outcome, share in shares
    ]
    rows = strips(cases, ["mask", "bias"], ["float32", "float16"])
    assert list(rows) == ["all", "mask", "bias"]
    strip, other = rows["mask"]
    assert (strip.passed, strip.failed, strip.largest) == (4, 3, 1.0)
    assert (other.passed, other.failed, other.largest) == (0, 0, None)
    right = [float(x) for x in re.findall(r"M([\d.]+)", strip.right)]
    wrong = [float(x) + float(half) for x, half in re.findall(r"M([\d.]+) [\d.]+l([\d.]+)", strip.wrong)]
    assert len(right) == 3
    assert max(right) < LIMIT
    assert len(wrong) == 2
    assert min(wrong) > LIMIT
    (crowd,) = strips(cases[:1] + cases[2:3] * 150, [], ["float32"])["all"]
    low, high = (float(height) for height in re.findall(r"v([\d.]+)", crowd.right))
    assert low < high / 2


def test_a_page_replaces_only_a_page(failing: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(conformant(failing), path)
    assert FORMAT in path.read_text()[:200]
    Reports(html=path).prepare()
    assert not path.exists()
    path.write_text("<html>something else</html>")
    with pytest.raises(UsageError, match=r"--html .* does not hold mha-spec-page"):
        Reports(html=path).prepare()
    with pytest.raises(MhaSpecError, match="--html"):
        Reports(html=tmp_path / "no" / "folder.html").prepare()


@pytest.mark.parametrize("command", ["check", "verify", "merge"])
def test_the_option_reaches_the_reports(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    received: list[Reports] = []

    def stub(*arguments: Any, **options: Any) -> int:
        received.extend(x for x in (*arguments, *options.values()) if isinstance(x, Reports))
        return 0

    module = {"check": "check.check", "verify": "offline.verify", "merge": "merge.merge"}[command]
    monkeypatch.setattr(f"mha_spec_conformance.commands.{module}", stub)
    result = CliRunner().invoke(app, [command, str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert [reports.html for reports in received] == [tmp_path / "page.html"]


@pytest.fixture(scope="module", params=["failing", "hostile"])
def visited(
    request: pytest.FixtureRequest, browser: Browser, failing: Run, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Page, list[str]]]:
    """Open a page, and collect what the browser complains about or tries to load."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(KINDS[request.param](failing), path)
    yield from visit(browser, path)


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_and_the_console_are_silent(visited: tuple[Page, list[str]], scheme: Any) -> None:
    opened, complaints = visited
    opened.emulate_media(media="screen", color_scheme=scheme)
    assert violations(opened) == []
    assert complaints == []
    assert (max(ground_of(opened)) < 100) is (scheme == "dark")


@in_a_browser
def test_the_keyboard_reaches_every_link_and_summary(visited: tuple[Page, list[str]]) -> None:
    opened, _ = visited
    opened.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    number = opened.locator("a, summary, [tabindex='0']").evaluate_all(
        "all => all.filter(x => x.checkVisibility()).map((x, i) => x.dataset.stop = i).length"
    )
    stops, outlines = [], []
    for _ in range(number):
        opened.keyboard.press("Tab")
        stops.append(opened.evaluate("document.activeElement.dataset.stop"))
        outlines.append(opened.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
    assert stops == [str(i) for i in range(number)]
    assert set(outlines) == {"solid"}
    for summary in opened.locator("summary").all()[:2]:
        summary.press("Enter")
        assert summary.evaluate("summary => summary.parentElement.open")


@in_a_browser
def test_links_lead_to_what_they_name(visited: tuple[Page, list[str]]) -> None:
    opened, _ = visited
    for link in opened.locator("main a, nav a").all()[:8]:
        link.click()
        name = link.get_attribute("href")[1:]
        top = opened.evaluate("name => document.getElementById(name).getBoundingClientRect().top", name)
        assert 0 <= top < 900


@in_a_browser
def test_the_page_fits_a_phone_and_paper(visited: tuple[Page, list[str]]) -> None:
    opened, complaints = visited
    assert_fits_a_phone_and_paper(opened, shown="h1", hidden=["nav"])
    assert complaints == []
