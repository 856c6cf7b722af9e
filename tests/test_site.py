"""The documentation site: the links of its pages, and the pages that are generated from the specification."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pytest
from website.api import PAGES
from website.build import DOCS, NAVIGATION, appended, assemble, file_of
from website.drawings import DRAWINGS, with_drawings
from website.markdown import LinkError, Site, clause_page
from website.markup import mend
from website.pictures import draw, see, split_pictures
from website.specification import DETECTIONS, MOST_CASES, in_cell

from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Suite

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    (folder / "field.html").write_text("the page of the field", encoding="utf-8")
    return assemble(folder / "source", folder / "field.html")


def text_of(site: Site, page: str) -> str:
    return (site.folder / page).read_text(encoding="utf-8")


def test_every_page_of_docs_is_in_the_sidebar(site: Site) -> None:
    listed = [file_of(page) for pages in NAVIGATION.values() for page in pages]
    assert {path.name for path in DOCS.glob("*.md")} - set(listed) == {"index.md"}
    toctrees = re.findall(r"^```\{toctree\}.*?^```$", text_of(site, "index.md"), flags=re.DOTALL | re.MULTILINE)
    assert [file_of(entry) for tree in toctrees for entry in tree.splitlines()[4:-1]] == listed
    assert all((site.folder / page).is_file() for page in listed)


def test_the_page_of_the_field_is_published_and_linked(site: Site) -> None:
    assert text_of(site, "extra/matrix.html") == "the page of the field"
    assert '<a href="matrix.html">' in text_of(site, "field.md")
    assert not appended("field.md", None)


def test_a_page_for_each_clause_has_its_text_cases_and_mistakes(site: Site, suite: Suite) -> None:
    for clause in clauses().values():
        page = clause_page(clause.id)
        text, _, cases = text_of(site, page).partition("## Cases")
        cases, _, mistakes = cases.partition("## Known mistakes")
        assert f"# {clause.id}: {clause.title}\n" in text
        assert site.converted(f"**{clause.sentence}**", page, None) in " ".join(text.split())
        assert "**Why.**" in text
        citing = {case.id for case in suite.cases if clause.id in case.clauses}
        assert set(names_in(cases)) <= citing
        assert len(names_in(cases)) == min(len(citing), MOST_CASES)
        assert names_in(mistakes) == [mistake.variant for mistake in MISTAKES if clause.id in mistake.clauses]


def test_every_mistake_that_is_drawn_has_its_figures_from_the_fuzzer(site: Site) -> None:
    """`python benchmarks/fuzzing.py NAME --csv docs/fuzzing.csv` adds those of a new mistake."""
    refusals = runpy.run_path(str(ROOT / "benchmarks" / "fuzzing.py"))["REFUSALS"]
    drawn = [mistake for mistake in MISTAKES if not any(word in mistake.name for word in refusals)]
    with DETECTIONS.open(newline="", encoding="utf-8") as file:
        measured = {row["mistake"]: row["calls"] for row in csv.DictReader(file)}
    assert list(measured) == [mistake.name for mistake in drawn]
    rows = text_of(site, "spec/mistakes.md").splitlines()
    for mistake in drawn:
        calls = measured[mistake.name]
        shown = f"| after {calls} calls, " if calls else "| not within a minute |"
        assert any(row.startswith(f"| `{mistake.variant}` |") and shown in row for row in rows), mistake.name


def names_in(table: str) -> list[str]:
    """Return the first cells of the rows of a table."""
    return re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)


def test_the_pictures_of_a_page_have_the_cells_of_the_specification(site: Site) -> None:
    pages = {clause_page(clause.id): split_pictures(clause.text) for clause in clauses().values()}
    pages["spec/pictures.md"] = [picture for pictures in pages.values() for picture in pictures]
    for page, pictures in pages.items():
        cells = [cell for picture in pictures for cell in picture.as_written.ravel()]
        assert cells_in(text_of(site, page)) == cells, page


def cells_in(drawing: str) -> list[bool]:
    """Return the cells of masks, True where they are visible."""
    return [name == "seen" for name in re.findall(r'<rect class="(seen|hidden)"', drawing)]


def test_every_mistake_is_in_the_page_of_mistakes(site: Site) -> None:
    broken = [mistake.variant for clause in clauses() for mistake in MISTAKES if clause in mistake.clauses]
    assert names_in(text_of(site, "spec/mistakes.md")) == broken
    assert set(broken) == {mistake.variant for mistake in MISTAKES}


def test_no_formula_is_lost(site: Site) -> None:
    """Each indented line of a clause is in a fence of its page, unless it belongs to a picture."""
    for clause in clauses().values():
        text = text_of(site, clause_page(clause.id))
        drawn = {line for picture in split_pictures(clause.text) for line in lines_of(picture)}
        for line in re.findall(r"^ {4}(.*\S)$", clause.text, flags=re.MULTILINE):
            if line.strip() not in drawn and not re.fullmatch(r" *j  [\d ]+", line):
                assert f"\n{line}\n" in text, (clause.id, line)


def lines_of(picture) -> list[str]:
    return [picture.caption, *(row[0].strip() for row in picture.rows)]


def test_a_drawing_has_the_cells_of_the_reference() -> None:
    (picture,) = split_pictures(clauses()["MHA-LEN-4"].text)
    visible = see(picture.caption, picture.shape)
    assert visible.shape == (2, 3, 4)
    assert cells_in(draw(picture)) == visible.ravel().tolist()
    assert "query 2 of entry 0 sees 2" in draw(picture)
    assert numpy.array_equal(visible, picture.as_written)


def test_comments_become_drawings() -> None:
    text = with_drawings("a\n\n<!-- mask: causal=True, q_offset=1; 2, 5 -->\n<!-- drawing: heads -->\n\nb\n")
    assert text.count("<div") == 1
    assert text.count("<svg") == 2
    assert text.startswith("a\n\n```{raw} html\n")
    assert text.endswith("```\n\nb\n")
    with pytest.raises(KeyError):
        with_drawings("<!-- drawing: nothing -->\n")
    assert all("aria-label=" in drawing() for drawing in DRAWINGS.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](targets.md#x)", "[a](/targets.md#x)"),
        ("[two\nlines](../mha_spec/SPEC.md)", "[two\nlines](/spec/index.md)"),
        ("[a](../conformance/targets)", "a (`conformance/targets/`)"),
        ("[a](protocol.schema.json)", "[a](/files/docs/protocol.schema.json)"),
        ("[targets.md](targets.md#y)", "[*Other attentions, judged*](/targets.md#y)"),
        ("[a](#x) [b](https://c.d)", "[a](#x) [b](https://c.d)"),
        ("see MHA-POS-1, -2.", "see [MHA-POS-1](/spec/mha-pos-1.md), -2."),
        ("MHA-NONE-1", "MHA-NONE-1"),
        ("# MHA-POS-1", "# MHA-POS-1"),
        ("`MHA-POS-1` a/b#7", "`MHA-POS-1` [a/b#7](https://github.com/a/b/issues/7)"),
        ("a/b PR#7", "[a/b PR#7](https://github.com/a/b/pull/7)"),
        ("```\n[a](none.md) MHA-POS-1\n```", "```\n[a](none.md) MHA-POS-1\n```"),
        ("a\n\n    MHA-POS-1 a/b#7\n", "a\n\n    MHA-POS-1 a/b#7\n"),
    ],
)
def test_links(text: str, expected: str, tmp_path: Path) -> None:
    site = Site(ROOT, tmp_path, {"docs/targets.md": "targets.md", "mha_spec/SPEC.md": "spec/index.md"})
    assert site.converted(text, "x.md", "docs/x.md") == expected


def mended(folder: Path, content: str) -> str:
    page = folder / "page.html"
    sidebar = '<aside class="sidebar-drawer" aria-label="Pages">'
    page.write_text(sidebar + content)
    mend(folder)
    return page.read_text().removeprefix(sidebar)


def test_long_names_in_cells_and_headings_break_after_a_sign(tmp_path: Path) -> None:
    code = '<code><span class="pre">linen.dot_product_attention</span></code>'
    broken = code.replace("linen.", "linen.<wbr>").replace("product_", "product_<wbr>")
    page = f"<h2>a.b_c torch.nn.attention</h2><p>{code}</p><td>{code} MHA-WINDOW-1 &amp;lt; b</td>"
    text = f"<h2>a.b_c torch.<wbr>nn.attention</h2><p>{code}</p><td>{broken} MHA-WINDOW-1 &amp;lt; b</td>"
    assert mended(tmp_path, page) == text


def test_cells_with_much_text_are_marked(tmp_path: Path) -> None:
    text = mended(tmp_path, f"<td>{60 * 'a'}</td><td><p>{61 * 'a'}</p></td>")
    assert text == f'<td>{60 * "a"}</td><td class="long"><p>{61 * "a"}</p></td>'


def test_a_page_that_sphinx_does_not_write_is_not_mended(tmp_path: Path) -> None:
    page, text = tmp_path / "matrix.html", "<script>`<td>${result.outcome}</td>`</script><pre>"
    page.write_text(text)
    mend(tmp_path)
    assert page.read_text() == text


def test_the_code_of_a_cell_stays_code() -> None:
    assert in_cell("names `q_offset`, a_b|c and a ` alone") == "names `q_offset`, a\\_b\\|c and a \\` alone"


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"docs/x\.md links to 'none\.md'"):
        Site(ROOT, tmp_path).converted("[a](none.md)", "x.md", "docs/x.md")


def test_the_api_describes_every_public_name(site: Site) -> None:
    import mha_spec
    from mha_spec import weights
    from mha_spec_conformance import testing

    documented = set()
    for name, pages in PAGES.items():
        text = text_of(site, f"api/{name}.md")
        objects = re.findall(r"^:+\{py:(?:function|class|exception)\} ([\w.]+)", text, flags=re.MULTILINE)
        assert objects == [f"{page.module}.{member}" for page in pages for member in page.names]
        documented |= set(objects)
    for module in (mha_spec, weights, testing):
        public = {f"{module.__name__}.{name}" for name in module.__all__ if name != "SPEC_VERSION"}
        assert public <= documented
    text = text_of(site, "api/attention.md")
    assert "`return_lse`\n: True also returns the log-sum-exp of each row." in text
    assert "```text\nS = softcap * tanh(scale * Q K^T / softcap) + bias" in text
    assert "**Errors**\n\n`ArgumentValueError`\n: A shape" in text
