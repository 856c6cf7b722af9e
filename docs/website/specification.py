"""The pages of the specification: one for each clause, for each theme, and for the known mistakes."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mha_spec_conformance.mistakes import MISTAKES, Mistake
from mha_spec_conformance.suite import cases
from mha_spec_conformance.suite.spec import Clause, clauses, specification

from .drawings import DRAWINGS
from .markdown import Site, clause_page
from .pictures import Picture, Text, draw, figure, parts, raw, split_pictures

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Case

__all__ = ["in_cell", "write_specification"]

MOST_CASES = 12
"""A page lists no more cases than these, those that cite the fewest clauses first."""
PREFACE = ("Words", "Notation", "The calls", "The order of the steps", "How results are compared")
INTRODUCTION_TO_PICTURES = """\
A row of a picture is a query, and a column is a key: filled cells are visible. `p` is the position of the query
(MHA-POS-1). The code above a picture has the arguments that make it. The reference computes each cell when this page is
built."""
INTRODUCTION_TO_MISTAKES = f"""\
The suite knows {len(MISTAKES)} mistakes: each is the reference with a replaced step, so that its wrong result can be
computed and recognised. Those with `=` in the name are conventions that others chose on purpose; `--accept` takes them.
A mistake is listed under each clause that it breaks. The last column says after how many calls
and how much processor time [the fuzzer](/fuzzing.md) gets the first wrong answer of the mistaken reference. It is empty
where the mistake is in refusing illegal calls, which the fuzzer does not draw."""
DETECTIONS = Path(__file__).resolve().parents[1] / "fuzzing.csv"
"""The calls and seconds after which the fuzzer finds each mistake, as `benchmarks/fuzzing.py` writes them."""
ENDINGS = {"ONNX": "onnx", "Limits": "limits", "Changes": "changes"}


def write_specification(site: Site) -> None:
    """Write the pages of SPEC.md, of its pictures and of the mistakes."""
    sections = _sections()
    by_theme: dict[str, list[Clause]] = defaultdict(list)
    for clause in clauses().values():
        by_theme[clause.theme].append(clause)
        site.write(clause_page(clause.id), _clause(clause))
    for theme, members in by_theme.items():
        site.write(f"spec/{_slug(theme)}.md", _theme(theme, sections[theme], members))
    for title, name in ENDINGS.items():
        site.write(f"spec/{name}.md", f"# {title}\n\n{_body(sections[title])}", source="mha_spec/SPEC.md")
    site.write("spec/pictures.md", _pictures())
    site.write("spec/mistakes.md", _mistakes())
    site.write("spec/index.md", _index(sections, by_theme))


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _sections() -> dict[str, str]:
    """Return the text of each section of SPEC.md before its first clause; that before all sections is called ""."""
    beginning, *rest = re.split(r"^## (.*)$", specification(), flags=re.MULTILINE)
    sections = {"": beginning.partition("\n")[2]}
    for title, text in zip(rest[::2], rest[1::2], strict=True):
        sections[title] = text.partition("\n### ")[0]
    return sections


def _body(text: str) -> str:
    """Return the text with its indented blocks as fenced ones, and its pictures drawn."""
    result: list[str] = []
    block: list[str] = []
    for line in [*text.strip("\n").split("\n"), "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line[4:])
            continue
        if block:
            result += _block(block)
            block = []
        result.append(line)
    return "\n".join(result[:-1]).strip("\n") + "\n"


def _block(lines: list[str]) -> list[str]:
    result: list[str] = []
    for part in parts(lines):
        if isinstance(part, Text):
            result += ["```text", *"\n".join(part.lines).strip("\n").split("\n"), "```", ""]
        else:
            result += [raw(_figure(part)), ""]
    return result


def _figure(picture: Picture) -> str:
    return figure(picture.caption, draw(picture))


def _clause(clause: Clause) -> str:
    theme = f"[{clause.theme}](/spec/{_slug(clause.theme)}.md)"
    ids = list(clauses())
    i = ids.index(clause.id)
    neighbours = [f"[{ids[k]}](/{clause_page(ids[k])})" for k in (i - 1, i + 1) if 0 <= k < len(ids)]
    lines = [
        "---\norphan: true\n---",  # in no table of contents: all clauses in every sidebar are four fifths of a build
        f"# {clause.id}: {clause.title}",
        f"{{.level}}\n**{clause.level}** · {theme} · next to {' and '.join(neighbours)} · `mha-spec spec {clause.id}`",
        _body(clause.text),
        raw(DRAWINGS["heads"]()) if clause.id == "MHA-HEAD-1" else "",
        _cases(clause),
        _mistakes_of(clause),
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


@cache
def _all_cases() -> tuple[Case, ...]:
    return tuple(cases.load().cases)


def _cases(clause: Clause) -> str:
    citing = [case for case in _all_cases() if clause.id in case.clauses]
    if not citing:
        return "## Cases\n\nNo stored case cites this clause: tests of the project or each run of the suite check it."
    citing.sort(key=lambda case: (len(case.clauses), len(case.features)))
    shown = citing[:MOST_CASES]
    listed = "lists all of them" if len(shown) < len(citing) else "lists them, and `mha-spec explain ID` shows one"
    number = "1 case cites" if len(citing) == 1 else f"{len(citing):,} cases cite"
    rows = [f"| `{case.id}` | {in_cell(case.title)} |" for case in shown]
    head = "Those that cite the fewest other clauses are:\n\n" if len(shown) < len(citing) else ""
    return f"## Cases\n\n{number} this clause; `mha-spec cases {clause.id}` {listed}. {head}" + "\n".join(
        ["", "", "| case | what it asks |", "| --- | --- |", *rows]
    )


def _mistakes_of(clause: Clause) -> str:
    known = [mistake for mistake in MISTAKES if clause.id in mistake.clauses]
    if not known:
        return ""
    return "## Known mistakes\n\nEach breaks this clause, and a report names it.\n\n" + _table(known)


def _table(mistakes: list[Mistake]) -> str:
    detections = _detections()
    rows = [
        f"| `{mistake.variant}` | {in_cell(mistake.title)} | {in_cell(', '.join(mistake.bugs))} "
        f"| {detections.get(mistake.name, '')} |"
        for mistake in mistakes
    ]
    head = ["| name | an implementation with it | published as | found by the fuzzer |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows])


@cache
def _detections() -> dict[str, str]:
    """Return for each mistake how soon the fuzzer finds it."""
    with DETECTIONS.open(newline="", encoding="utf-8") as file:
        return {
            row["mistake"]: f"after {row['calls']} calls, {row['seconds']} s" if row["calls"] else "not within a minute"
            for row in csv.DictReader(file)
        }


def in_cell(text: str) -> str:
    """Return a text that has no meaning as Markdown in a table, other than its code."""
    special, code = r"[*_|<>\[\]\\`]", "`[^`|]+`"
    return re.sub(f"({code})|({special})", lambda match: match[1] or f"\\{match[2]}", text)


def _theme(theme: str, introduction: str, members: list[Clause]) -> str:
    listed = "\n\n".join(f"{clause.id} · {clause.title}\n: {clause.sentence}" for clause in members)
    return f"# {theme}\n\n{_body(introduction)}\n{listed}\n"


def _index(sections: dict[str, str], by_theme: dict[str, list[Clause]]) -> str:
    themes = "\n".join(map(_slug, by_theme))
    listed = "\n".join(
        f"| [{theme}](/spec/{_slug(theme)}.md) | {' '.join(clause.id for clause in members)} |"
        for theme, members in by_theme.items()
    )
    drawing = raw(DRAWINGS["steps"]()) + "\n\n"
    parts = [
        "# The specification",
        _body(sections[""]),
        f"## The clauses\n\n{len(clauses())} clauses in {len(by_theme)} themes. "
        "[Pictures](/spec/pictures.md) has all masks on one page, and [the catalogue of mistakes](/spec/mistakes.md) "
        "what is known to go wrong.\n\n| theme | clauses |\n| --- | --- |\n" + listed,
        *(
            f"## {title}\n\n{drawing if title == 'The order of the steps' else ''}{_body(sections[title])}"
            for title in PREFACE
        ),
        f"```{{toctree}}\n:hidden:\n\npictures\n{themes}\nonnx\nlimits\nmistakes\nchanges\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _pictures() -> str:
    text = [
        "# Pictures of the masks",
        INTRODUCTION_TO_PICTURES,
    ]
    for clause in clauses().values():
        drawn = split_pictures(clause.text)
        if drawn:
            text += [f"## {clause.title} ({clause.id})", f"{clause.id}: {clause.sentence}"]
            text.append(raw(f'<div class="masks">{"".join(map(_figure, drawn))}</div>'))
    return "\n\n".join(text) + "\n"


def _mistakes() -> str:
    text = [
        "# Known mistakes",
        INTRODUCTION_TO_MISTAKES,
    ]
    for clause in clauses().values():
        known = [mistake for mistake in MISTAKES if clause.id in mistake.clauses]
        if known:
            text += [f"## {clause.id}", f"{clause.id}: {clause.title}.", _table(known)]
    return "\n\n".join(text) + "\n"
