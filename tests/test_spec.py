"""SPEC.md: its form, its pictures, and the citations of clauses in the code."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import numpy
import pytest
from website.pictures import see, split_pictures

import mha_spec
from mha_spec import reference
from mha_spec.arguments import OPTIONS
from mha_spec_conformance.judging.bounds import precision
from mha_spec_conformance.suite.spec import Clause, SpecificationError, clauses, parse, specification

ROOT = Path(__file__).parents[1]
CITED = re.compile(r"(?P<topic>MHA-[A-Z]+)-(?P<first>\d+)(?P<more>(?:(?:,| to| and) (?:MHA-[A-Z]+)?-\d+)*)")
ISSUE_OR_VERSION = re.compile(r"[\w.-]+/[\w.-]+#\d+|(?:PyTorch|jax|ONNX Runtime) \d+\.\d+")
TOPICS_OF_VISIBILITY = {"MASK", "POS", "CAUSAL", "WINDOW", "LEN", "SEG"}
IN_THE_SUITE = {*(f"MHA-ACC-{n}" for n in (1, 2, 3)), *(f"MHA-LAYOUT-{n}" for n in (1, 2, 3, 4, 5))}

by_clause = pytest.mark.parametrize("clause", clauses().values(), ids=clauses())


def citations(text: str) -> set[str]:
    """Return every clause that a text cites; ranges and lists such as `MHA-ARG-1 to -4` are expanded."""
    cited = set()
    for match in CITED.finditer(text):
        topic, numbers = match["topic"], [int(match["first"])]
        for joint, next_topic, number in re.findall(r"(,| to| and) (MHA-[A-Z]+)?-(\d+)", match["more"]):
            if joint == " to":
                numbers += range(numbers[-1], int(number))
            if next_topic and next_topic != topic:
                cited |= {f"{topic}-{n}" for n in numbers}
                topic, numbers = next_topic, []
            numbers.append(int(number))
        cited |= {f"{topic}-{n}" for n in numbers}
    return cited


def test_the_version_is_that_of_the_package():
    assert f"\nVersion {mha_spec.SPEC_VERSION}.\n" in specification()


def test_lines_fit_a_terminal():
    assert max(len(line) for line in specification().splitlines()) <= 98


@by_clause
def test_a_single_normative_sentence_has_the_word_of_its_level(clause):
    assert clause.level in clause.sentence
    assert clause.sentence.endswith(".")
    assert not re.search(r"[.!?] +[A-Z]", clause.sentence)
    _, _, rest = clause.text.partition("**\n")
    assert not re.search(r"\b(MUST|SHOULD)\b", rest)


@by_clause
def test_a_formula_follows_the_sentence(clause):
    paragraphs = clause.text.split("\n\n")
    assert paragraphs[1].startswith("    ")


@by_clause
def test_every_clause_has_a_reason(clause):
    assert clause.text.count("**Why.** ") == 1


@by_clause
def test_elsewhere_cites_a_version_or_an_issue_and_targets_that_exist(clause):
    _, heading, elsewhere = clause.text.partition("**Elsewhere.** ")
    assert bool(heading) == bool(ISSUE_OR_VERSION.search(elsewhere))
    for path in re.findall(r"`(conformance/targets/[^`]+)`", elsewhere):
        assert (ROOT / path).is_file(), path


def test_only_few_clauses_are_without_elsewhere():
    without = {name for name, clause in clauses().items() if "**Elsewhere.**" not in clause.text}
    of_attention = {"MHA-HEAD-2", "MHA-LEN-5", "MHA-SEG-2", "MHA-VJP-7", "MHA-ARG-4", "MHA-MERGE-6"}
    assert without == of_attention | {"MHA-PROJ-4", "MHA-ALIBI-3", "MHA-CACHE-7", "MHA-LAYER-1"}


@by_clause
def test_pictures_show_what_the_reference_sees(clause):
    topic = clause.id.split("-")[1]
    pictures = split_pictures(clause.text)
    assert pictures or topic not in TOPICS_OF_VISIBILITY or clause.id in {"MHA-MASK-2", "MHA-LEN-3", "MHA-LEN-5"}
    for picture in pictures:
        drawn = picture.as_written
        assert [(int(row["b"] or 0), int(row["i"])) for row in picture.rows] == list(numpy.ndindex(drawn.shape[:2]))
        assert drawn.shape[1] != drawn.shape[2], "equal lengths hide the alignment"
        assert drawn.any()
        assert not drawn.all()
        numpy.testing.assert_array_equal(drawn, see(picture.caption, drawn.shape), err_msg=picture.caption)


@by_clause
def test_pictures_have_the_position_of_each_query(clause):
    for picture in split_pictures(clause.text):
        offset = re.search(r"q_offset=(\[[^]]*\]|-?\d+)", picture.caption)
        offsets = ast.literal_eval(offset[1]) if offset else None
        for row in picture.rows:
            if row["p"] is not None or offsets is not None:
                start = offsets[int(row["b"] or 0)] if isinstance(offsets, list) else offsets
                assert int(row["p"]) == start + int(row["i"]), picture.caption


def test_a_wrong_picture_fails():
    right = "### MHA-X-1 (MUST): X\n\n    causal=True, q_offset=1\n\n             j  0 1 2\n    i=0 p=1     x x .\n"
    (picture,) = split_pictures(parse(right)["MHA-X-1"].text)
    assert [row["cells"] for row in picture.rows] == ["x x ."]
    assert see(picture.caption, (1, 1, 3)).tolist() == [[[True, True, False]]]
    assert see(picture.caption, (1, 1, 3)).tolist() != see("causal=True, q_offset=0", (1, 1, 3)).tolist()


def test_every_citation_is_of_a_clause():
    assert citations(specification()) <= clauses().keys()
    folders = (ROOT / "mha_spec", ROOT / "backends", ROOT / "conformance")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        assert citations(path.read_text(encoding="utf-8")) <= clauses().keys(), path


def test_every_clause_is_cited_by_the_reference():
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "mha_spec").glob("*.py")))
    assert clauses().keys() - IN_THE_SUITE - citations(code) == set()


def test_the_clauses_that_no_call_implements_are_cited_by_the_suite():
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "conformance").rglob("*.py")))
    assert IN_THE_SUITE - citations(code) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MHA-MASK-1", {"MHA-MASK-1"}),
        ("MHA-ARG-1 to -3, MHA-HEAD-2", {"MHA-ARG-1", "MHA-ARG-2", "MHA-ARG-3", "MHA-HEAD-2"}),
        ("MHA-VJP-5 to MHA-VJP-7", {"MHA-VJP-5", "MHA-VJP-6", "MHA-VJP-7"}),
        ("MHA-EMPTY-1, -2", {"MHA-EMPTY-1", "MHA-EMPTY-2"}),
    ],
)
def test_lists_and_ranges_of_citations(text, expected):
    assert citations(text) == expected


def test_the_call_is_that_of_the_reference():
    call = re.search(r"attention\(query, key, value, \*,(.*?)\)", specification(), flags=re.DOTALL)
    written = {name: ast.literal_eval(default) for name, default in re.findall(r"(\w+)=([\w.]+)", call[1])}
    parameters = inspect.signature(reference.attention).parameters.values()
    assert list(written.items()) == [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]


@pytest.mark.parametrize(
    "name",
    ["multi_head_attention", "multi_head_attention_weights", "rotary_embedding", "alibi_slopes", "alibi_bias"],
)
def test_the_calls_of_the_layer_are_those_of_the_reference(name):
    call = re.search(rf"^    {name}\((.*?)\)$", specification(), flags=re.DOTALL | re.MULTILINE)[1]
    parameters = inspect.signature(getattr(reference, name)).parameters.values()
    listed = [p for p in parameters if "<" not in call or p.name not in OPTIONS]
    positional = [p.name for p in listed if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert re.findall(r"\w+", call.split("*")[0]) == positional
    if "rotary=" in call or "<" not in call:
        written = {key: ast.literal_eval(default) for key, default in re.findall(r'(\w+)=([\w."-]+)', call)}
        assert written == {p.name: p.default for p in listed if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_roundoffs_are_those_of_the_suite(dtype):
    (row,) = [line.split() for line in specification().splitlines() if re.match(rf" +{dtype} +2\^", line)]
    results, accumulator, standard, strict, functions, underflow = (2.0 ** int(x.removeprefix("2^")) for x in row[1:])
    p, s = precision(dtype), precision(dtype, "strict")
    assert (results, accumulator, accumulator) == (p.u_o, p.u_a, p.u_l)
    assert (standard, standard, strict, strict) == (p.u_p, p.u_dp, s.u_p, s.u_dp)
    assert (functions, functions, underflow) == (p.e_x, p.e_t, p.w)


@pytest.mark.parametrize(
    "heading",
    [
        "### MHA-MASK (MUST): No number",
        "### MHA-MASK-1 (MAY): Another level",
        "### MHA-MASK-1 MUST: No brackets",
        "### MHA-MASK-1 (MUST)",
        "## MHA-MASK-1 (MUST): Another depth",
        "###MHA-MASK-1 (MUST): No space",
        "### Something else",
    ],
)
def test_an_error_names_a_malformed_heading(heading):
    with pytest.raises(SpecificationError, match=re.escape(heading)):
        parse(f"# Title\n\n{heading}\n\n**It MUST be.**\n")


def test_an_error_names_an_id_that_occurs_twice():
    clause = "### MHA-MASK-1 (MUST): A\n\n**It MUST be.**\n\n"
    with pytest.raises(SpecificationError, match="MHA-MASK-1 twice"):
        parse(clause + clause)


def test_an_error_names_a_clause_without_its_sentence():
    clause = parse("### MHA-MASK-1 (MUST): A\n\nIt MUST be.\n")["MHA-MASK-1"]
    with pytest.raises(SpecificationError, match="MHA-MASK-1"):
        assert clause.sentence


def test_a_clause_ends_at_the_next_heading():
    parsed = parse("### MHA-A-1 (MUST): A\n\n**It MUST be.**\n\n## Limits\n\nNot this.\n")
    assert parsed["MHA-A-1"] == Clause("MHA-A-1", "MUST", "A", "**It MUST be.**")
