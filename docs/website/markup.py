"""Mend the markup of Sphinx and furo: headings, names of landmarks, access by keyboard, line breaks in long names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["REPLACEMENTS", "mend"]

SIDEBAR = 'class="sidebar-drawer"'
REPLACEMENTS = (
    ('<p class="caption" role="heading">', '<p class="caption">'),
    ('<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="Pages">'),
    ('<aside class="toc-drawer">', '<aside class="toc-drawer" aria-label="On this page">'),
    ('<div id="search-results"></div>', '<h1>Search</h1><div id="search-results"></div>'),
    ("<pre>", '<pre tabindex="0">'),  # long lines scroll, also by keyboard
    ('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),  # wide tables, too
)
NARROW = re.compile(r"<td>.*?</td>|<h[1-3]>.*?</h[1-3]>", re.DOTALL)
"""Cells and headings, which are narrower than some names."""
TEXT = re.compile(r"(?<=>)[^<>]+(?=<)")
MOST_OF_A_SHORT_CELL = 60
PIECE = re.compile(r"([^\s&;]{5,}?[._/=(:])(?=[\w(])")
"""Some characters of a name up to a sign after which a line may end."""


def mend(folder: Path) -> None:
    """Replace the faulty markup in every page of furo; the page of the field has its own markup and programs."""
    for path in folder.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        if SIDEBAR not in text:
            continue
        mended = text
        for faulty, right in REPLACEMENTS:
            mended = mended.replace(faulty, right)
        mended = NARROW.sub(_mended, mended)
        if mended != text:
            path.write_text(mended, encoding="utf-8")


def _mended(part: re.Match[str]) -> str:
    """Let long names break after a sign instead of anywhere, and mark the cells that need a wide column."""
    text = TEXT.sub(lambda text: PIECE.sub(r"\1<wbr>", text[0]), part[0])
    is_long = part[0].startswith("<td>") and sum(map(len, TEXT.findall(part[0]))) > MOST_OF_A_SHORT_CELL
    return text.replace("<td>", '<td class="long">', 1) if is_long else text
