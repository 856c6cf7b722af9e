"""Read SPEC.md into its clauses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from mha_spec.errors import MhaSpecError

__all__ = ["Clause", "SpecificationError", "clauses", "parse", "specification"]

_HEADING = re.compile(r"### (?P<id>MHA-[A-Z]+-[1-9]\d*) \((?P<level>MUST|SHOULD)\): (?P<title>\S.*)")
_SENTENCE = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)


class SpecificationError(MhaSpecError, ValueError):
    """A clause of SPEC.md is malformed, or repeats the id of another clause."""


@dataclass(frozen=True)
class Clause:
    """One clause of the specification."""

    id: str
    level: str
    """MUST or SHOULD."""
    title: str
    text: str
    """The text below the heading, in Markdown."""
    theme: str = ""
    """The heading of the section that has the clause."""

    @property
    def sentence(self) -> str:
        """The normative sentence on a single line."""
        normative = _SENTENCE.match(self.text)
        if normative is None:
            raise SpecificationError(
                f"clause {self.id} must begin with its normative sentence in bold, received {self.text[:60]!r}"
            )
        return " ".join(normative[1].split())


def specification() -> str:
    """Return the text of the SPEC.md that is installed with `mha_spec`."""
    return files("mha_spec").joinpath("SPEC.md").read_text(encoding="utf-8")


@cache
def clauses() -> dict[str, Clause]:
    """Return every clause of the specification by its id, in the order of SPEC.md."""
    return parse(specification())


def parse(text: str) -> dict[str, Clause]:
    """Read the clauses of a text in the form of SPEC.md: a heading `### MHA-TOPIC-n (MUST): Title`, then its text.

    Raises:
        SpecificationError: A heading is malformed, or an id occurs twice; the message names it.
    """
    by_id: dict[str, Clause] = {}
    theme = ""
    _, *sections = re.split(r"^(#.*)$", text, flags=re.MULTILINE)
    for heading, body in zip(sections[::2], sections[1::2], strict=True):
        if not heading.startswith("###") and "MHA-" not in heading:
            theme = heading.lstrip("# ")
            continue
        parts = _HEADING.fullmatch(heading)
        if parts is None:
            raise SpecificationError(
                f"a clause must be headed `### MHA-TOPIC-n (MUST|SHOULD): Title`, received {heading!r}"
            )
        if parts["id"] in by_id:
            raise SpecificationError(f"a clause id must occur once, received {parts['id']} twice: {heading!r}")
        by_id[parts["id"]] = Clause(parts["id"], parts["level"], parts["title"], body.strip("\n"), theme)
    return by_id
