"""Look at the pages of the built site in headless Chromium: rules of axe, complaints of the browser, narrow windows."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

__all__ = ["CHROMIUM", "SAMPLE", "faults_of_page", "faults_of_site"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SAMPLE = ("index", "frameworks", "search", "spec/visibility", "spec/mha-pos-2", "api/layer")
"""Pages with each kind of content; `--audit all` looks at every page."""
NARROW = 360


def faults_of_site(folder: Path, *, every: bool) -> list[str]:
    """Return what is wrong with the pages, light and dark, each with the name of its page."""
    from playwright.sync_api import sync_playwright

    pages = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.html"))]
    chosen = [page for page in pages if not page.startswith("files/")] if every else SAMPLE
    faults: list[str] = []
    with served(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for page in chosen:
            faults += [f"{page}: {fault}" for fault in faults_of_page(browser, address, page)]
        browser.close()
    return faults


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
    from axe_playwright_python.sync_playwright import Axe

    faults: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    opened.on("console", lambda message: faults.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: faults.append(f"error: {error}"))
    opened.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else faults.append(sent.url))
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        opened.goto(f"{address}/{page}.html")
        faults += [
            f"{scheme}, {broken['id']}: {broken['nodes'][0]['html'][:200]}"
            for broken in Axe().run(opened).response["violations"]
        ]
    opened.set_viewport_size({"width": NARROW, "height": 700})
    width = opened.evaluate("document.documentElement.scrollWidth")
    faults += [f"scrolls sideways at {NARROW} pixels: {width}"] if width > NARROW else []
    opened.close()
    return faults
