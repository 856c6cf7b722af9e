"""The documentation site: the links of its pages, and the pages that are generated from the specification."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
from website.api import PAGES
from website.build import DOCS, NAVIGATION, assemble, file_of
from website.drawings import DRAWINGS, with_drawings
from website.markdown import LinkError, Site, clause_page
from website.pictures import draw, see, split_pictures

from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.spec import clauses

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return assemble(tmp_path_factory.mktemp("site") / "source")


def text_of(site: Site, page: str) -> str:
    return (site.folder / page).read_text(encoding="utf-8")


def test_every_page_of_docs_is_in_the_sidebar(site: Site) -> None:
    listed = {file_of(page) for pages in NAVIGATION.values() for page in pages}
    assert {path.name for path in DOCS.glob("*.md")} - listed == {"index.md"}
    toctrees = re.findall(r"^```\{toctree\}.*?^```$", text_of(site, "index.md"), flags=re.DOTALL | re.MULTILINE)
    entries = {line for tree in toctrees for line in tree.splitlines()[4:-1] if line}
    assert all((site.folder / file_of(entry)).is_file() for entry in entries)


def test_a_page_for_each_clause_has_its_text_cases_and_mistakes(site: Site) -> None:
    for clause in clauses().values():
        text = text_of(site, clause_page(clause.id))
        assert f"# {clause.id}: {clause.title}\n" in text
        assert clause.sentence.split()[0] in text
        assert "**Why.**" in text
        assert "## Cases" in text
        assert len(re.findall('<svg class="mask"', text)) == len(split_pictures(clause.text))
        known = [mistake.variant for mistake in MISTAKES if clause.id in mistake.clauses]
        assert all(f"| `{name}` |" in text for name in known)


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
    classes = re.findall(r'<rect class="(seen|hidden)"', draw(picture))
    assert classes == [("hidden", "seen")[int(cell)] for cell in visible.ravel()]
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
        ("```\n[a](none.md) MHA-POS-1\n```", "```\n[a](none.md) MHA-POS-1\n```"),
        ("a\n\n    MHA-POS-1 a/b#7\n", "a\n\n    MHA-POS-1 a/b#7\n"),
    ],
)
def test_links(text: str, expected: str, tmp_path: Path) -> None:
    site = Site(ROOT, tmp_path, {"docs/targets.md": "targets.md", "mha_spec/SPEC.md": "spec/index.md"})
    assert site.converted(text, "x.md", "docs/x.md") == expected


def test_a_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"docs/x\.md links to 'none\.md'"):
        Site(ROOT, tmp_path).converted("[a](none.md)", "x.md", "docs/x.md")


def test_the_api_describes_every_public_name(site: Site) -> None:
    import mha_spec
    from mha_spec import weights
    from mha_spec_conformance import testing

    documented = {f"{page.module}.{name}" for pages in PAGES.values() for page in pages for name in page.names}
    for module in (mha_spec, weights, testing):
        public = {f"{module.__name__}.{name}" for name in module.__all__ if name != "SPEC_VERSION"}
        assert public <= documented
    text = text_of(site, "api/attention.md")
    assert "`return_lse`\n: True also returns the log-sum-exp of each row." in text
    assert "```text\nS = softcap * tanh(scale * Q K^T / softcap) + bias" in text
    assert "**Errors**\n\n`ArgumentValueError`\n: A shape" in text
