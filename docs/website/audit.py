"""Look at the pages of the built site in headless Chromium: rules of axe, complaints of the browser, narrow windows."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import Browser, Page

__all__ = ["CHROMIUM", "SAMPLE", "faults_of_page", "faults_of_site"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SAMPLE = ("index", "frameworks", "search", "spec/visibility", "spec/mha-pos-2", "api/layer")
"""Pages with each kind of content; `--audit all` looks at every page."""
WIDTHS = (1920, 1440, 1320, 1100, 1000, 700, 360)
"""Widths of windows in pixels, the narrowest last; no page scrolls sideways in any."""


def faults_of_site(folder: Path, *, every: bool) -> Iterator[str]:
    """Yield what is wrong with the pages, light and dark, each with the name of its page."""
    from playwright.sync_api import sync_playwright

    pages = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.html"))]
    chosen = [page for page in pages if not page.startswith("files/")] if every else SAMPLE
    with served(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for page in chosen:
            yield from (f"{page}: {fault}" for fault in faults_of_page(browser, address, page))
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Log nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; axe reads style sheets, which a browser forbids for files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def faults_of_page(browser: Browser, address: str, page: str) -> list[str]:
    """Return the broken rules of axe, the complaints of the browser, and requests that leave the folder."""
    faults: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    opened.on("console", lambda message: faults.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: faults.append(f"error: {error}"))
    opened.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else faults.append(sent.url))
    opened.goto(f"{address}/{page}.html")
    faults += broken_rules(opened, "light")
    opened.emulate_media(color_scheme="dark")
    faults += broken_rules(opened, "dark", ["color-contrast", "link-in-text-block"])
    for width in WIDTHS:
        opened.set_viewport_size({"width": width, "height": 700})
        shown = opened.evaluate("document.documentElement.scrollWidth")
        faults += [f"scrolls sideways at {width} pixels: {shown}"] if shown > width else []
    faults += broken_rules(opened, "narrow", ["scrollable-region-focusable"])
    opened.close()
    return faults


def broken_rules(opened: Page, state: str, rules: list[str] | None = None) -> list[str]:
    """Return the rules of axe that a page breaks in a state: these rules, or all."""
    options = {} if rules is None else {"runOnly": {"type": "rule", "values": rules}}
    broken = axe().run(opened, options=options).response["violations"]
    return [f"{state}, {rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in broken]


@cache
def axe() -> Axe:
    """Read the program of axe once."""
    from axe_playwright_python.sync_playwright import Axe

    return Axe()
