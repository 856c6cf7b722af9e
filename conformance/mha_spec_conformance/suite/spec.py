"""The specification as data: SPEC.md read into its clauses."""

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
    """A clause of SPEC.md is malformed, or has the id of another one."""


@dataclass(frozen=True)
class Clause:
    """One clause of the specification."""

    id: str
    level: str
    """MUST or SHOULD."""
    title: str
    text: str
    """The text below the heading, in Markdown."""

    @property
    def sentence(self) -> str:
        """The normative sentence, on one line."""
        normative = _SENTENCE.match(self.text)
        if normative is None:
            raise SpecificationError(
                f"clause {self.id} must begin with its normative sentence in bold, received {self.text[:60]!r}"
            )
        return " ".join(normative[1].split())


def specification() -> str:
    """The text of SPEC.md, as the installed `mha_spec` has it."""
    return files("mha_spec").joinpath("SPEC.md").read_text(encoding="utf-8")


@cache
def clauses() -> dict[str, Clause]:
    """Every clause of the specification by its id, in the order of SPEC.md."""
    return parse(specification())


def parse(text: str) -> dict[str, Clause]:
    """Read the clauses of a text in the form of SPEC.md: a heading `### MHA-TOPIC-n (MUST): Title`, then its text.

    Raises:
        SpecificationError: A heading is malformed, or an id stands twice; the message names it.
    """
    found: dict[str, Clause] = {}
    _, *sections = re.split(r"^(#.*)$", text, flags=re.MULTILINE)
    for heading, body in zip(sections[::2], sections[1::2], strict=True):
        if not heading.startswith("###") and "MHA-" not in heading:
            continue
        parts = _HEADING.fullmatch(heading)
        if parts is None:
            raise SpecificationError(
                f"a clause must be headed `### MHA-TOPIC-n (MUST|SHOULD): Title`, received {heading!r}"
            )
        if parts["id"] in found:
            raise SpecificationError(f"a clause id must stand once, received {parts['id']} twice: {heading!r}")
        found[parts["id"]] = Clause(parts["id"], parts["level"], parts["title"], body.strip("\n"))
    return found
