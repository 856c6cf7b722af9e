"""Mend the markup of Sphinx and furo where axe finds faults: headings, names of landmarks, access by keyboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["REPLACEMENTS", "mend"]

REPLACEMENTS = (
    ('<p class="caption" role="heading">', '<p class="caption">'),
    ('<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="Pages">'),
    ('<aside class="toc-drawer">', '<aside class="toc-drawer" aria-label="On this page">'),
    ('<div id="search-results"></div>', '<h1>Search</h1><div id="search-results"></div>'),
    ("<pre>", '<pre tabindex="0">'),  # long lines scroll, also by keyboard
)


def mend(folder: Path) -> None:
    """Replace the faulty markup in every page."""
    for path in folder.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        mended = text
        for faulty, right in REPLACEMENTS:
            mended = mended.replace(faulty, right)
        if mended != text:
            path.write_text(mended, encoding="utf-8")
