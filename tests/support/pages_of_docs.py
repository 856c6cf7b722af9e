"""The code of the pages in docs/: its blocks, and a comparison of outputs that leaves out what a page leaves out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCS", "Block", "assert_printed", "blocks_of", "commands_of"]

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    """The line of the page on which the text begins."""


def blocks_of(page: str, *languages: str) -> list[Block]:
    """Return the blocks of a page in these languages, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = [
        Block(match["language"], match["text"], text.count("\n", 0, match.start("text")) + 1)
        for match in FENCE.finditer(text)
    ]
    return [block for block in blocks if block.language in languages]


def commands_of(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a block, each behind `$`, and the outputs that the page shows."""
    _, *parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    return list(zip(parts[::2], parts[1::2], strict=True))


def assert_printed(shown: str, printed: str) -> None:
    """Assert that the output is what the page shows; `...` there stands for any text, and a line may be wrapped."""
    pieces = [" ".join(piece.split()) for piece in shown.split("...")]
    text = " ".join(printed.split())
    assert text.startswith(pieces[0]), f"expected {pieces[0]!r} at the beginning of {printed}"
    position = len(pieces[0])
    for piece in pieces[1:]:
        place = text.find(piece, position)
        assert place >= 0, f"expected {piece!r} behind {text[:position][-60:]!r} in {printed}"
        position = place + len(piece)
    assert shown.rstrip().endswith("...") or text.endswith(pieces[-1]), (
        f"expected {pieces[-1]!r} at the end of {printed}"
    )
