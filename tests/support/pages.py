"""Pages that the suite writes: their structure, and how headless Chromium shows them."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium); the structure is tested"
)


class Structure(HTMLParser):
    """Collects what the tests of the structure compare."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unclosed: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("input", "meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unclosed.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def visit(browser: Browser, path: Path) -> Iterator[tuple[Page, list[str]]]:
    """Open a page, and collect what the browser complains about or tries to load."""
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda sent: complaints.append(sent.url) if sent.url != path.as_uri() else None)
    opened.goto(path.as_uri())
    yield opened, complaints
    opened.close()


def violations(opened: Page) -> list[tuple[str, str]]:
    """Return the rules of axe that the page breaks, each with an element that breaks it."""
    from axe_playwright_python.sync_playwright import Axe

    return [(broken["id"], broken["nodes"][0]["html"]) for broken in Axe().run(opened).response["violations"]]


def ground_of(opened: Page) -> list[int]:
    """Return the red, green and blue of the background."""
    colour = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(number) for number in re.findall(r"\d+", colour)[:3]]


def assert_fits_a_phone_and_paper(opened: Page, *, shown: str, hidden: list[str]) -> None:
    """Assert that a narrow page does not scroll sideways, and that a printed page is white and shows what it should."""
    opened.set_viewport_size({"width": 320, "height": 600})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 320
    opened.set_viewport_size({"width": 1200, "height": 900})
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.locator(shown).is_visible()
    assert not any(opened.locator(name).is_visible() for name in hidden)
    assert ground_of(opened) == [255, 255, 255]
    assert opened.pdf().startswith(b"%PDF")
    opened.emulate_media(media="screen")
