"""Build the site: `python docs/website/build.py` writes docs/_build/html; a warning or a broken link is an error.

The pages are Markdown that reads well in the repository. They are copied to docs/_build/source, with links that fit the
site, next to the pages that are generated; Sphinx reads that folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

from website.api import write_api  # noqa: E402
from website.drawings import with_drawings  # noqa: E402
from website.markdown import Site  # noqa: E402
from website.markup import mend  # noqa: E402
from website.specification import write_specification  # noqa: E402

COPIES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "conformance/generator/ERRATA.md": "errata.md",
}
"""Files of the repository outside docs/ that are pages of the site."""
NAVIGATION = {
    "Start": ("validate", "testing", "continuous-integration", "reports", "README <readme>"),
    "Backends": ("backends", "numpy", "pytorch", "jax", "tensorflow"),
    "How to": (
        "caching",
        "packed",
        "scaling",
        "masks",
        "poison",
        "gradients",
        "other-languages",
        "kernels",
        "weights",
        "fuzzing",
    ),
    "Meaning": ("spec/index", "accuracy", "frameworks", "judges"),
    "The field": ("field", "findings", "targets", "layouts"),
    "Reference": ("api/index", "cases", "goldens", "protocol", "errata"),
    "Project": ("benchmarks", "examples", "contributing", "security", "changelog"),
}
"""The pages in the order of the sidebar; every page of docs/ is in it."""


def file_of(entry: str) -> str:
    """Return the file of an entry of the sidebar, `page` or `title <page>`."""
    return f"{entry.rsplit('<', maxsplit=1)[-1].strip('>')}.md"


def navigation() -> str:
    """Write the tables of contents."""
    return "\n\n".join(
        "\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```"])
        for caption, pages in NAVIGATION.items()
    )


def appended(page: str, matrix: Path | None) -> str:
    """Return what the site adds to a page: the tables of contents, and a link to the page of the field."""
    if page == "index.md":
        return f"\n{navigation()}\n"
    if page == "field.md" and matrix is not None:
        return '\n## The matrix\n\n<a href="matrix.html">Every clause and every implementation on one page</a>.\n'
    return ""


def assemble(folder: Path, matrix: Path | None = None) -> Site:
    """Write the sources of the site: the pages of docs/, and those that are generated."""
    shutil.rmtree(folder, ignore_errors=True)
    site = Site(ROOT, folder)
    site.pages = {f"docs/{path.name}": path.name for path in sorted(DOCS.glob("*.md"))}
    site.pages |= COPIES | {"mha_spec/SPEC.md": "spec/index.md"}
    shutil.copytree(DOCS / "website" / "static", folder / "static")
    for file, page in site.pages.items():
        if file != "mha_spec/SPEC.md":
            text = with_drawings((ROOT / file).read_text(encoding="utf-8"))
            site.write(page, text + appended(page, matrix), source=file)
    write_specification(site)
    write_api(site)
    if matrix is not None:
        (folder / "extra").mkdir()
        shutil.copy(matrix, folder / "extra" / "matrix.html")
    return site


def build(output: Path, matrix: Path | None = None) -> int:
    """Assemble the sources next to the output, and run Sphinx on them; return its exit status."""
    from sphinx.cmd.build import build_main

    sources = output.parent / "source"
    assemble(sources, matrix)
    extra = ["-D", f"html_extra_path={sources / 'extra'}"] if matrix else []
    strict = ["-W", "--keep-going", "-n", "-q", "-E"]
    settings = ["-c", str(DOCS / "website"), "-d", str(output.parent / "doctrees")]
    status = build_main([*strict, *extra, *settings, str(sources), str(output)])
    mend(output)
    return status


def main() -> int:
    """Build as the command line says."""
    parser = argparse.ArgumentParser(description="Build the site; a warning or a broken link is an error.")
    parser.add_argument("--output", type=Path, default=DOCS / "_build" / "html")
    parser.add_argument("--matrix", type=Path, help="the page of `mha-spec matrix --html`, to publish with the site")
    parser.add_argument(
        "--audit", choices=("none", "sample", "all"), default="none", help="look at pages in headless Chromium"
    )
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    status = build(output, arguments.matrix)
    return status or (0 if arguments.audit == "none" else audit(output, every=arguments.audit == "all"))


def audit(output: Path, *, every: bool) -> int:
    """Print what is wrong with the pages in a browser; return 1 if anything is."""
    from website.audit import CHROMIUM, faults_of_site

    if CHROMIUM is None:
        print("No Chromium is installed, so no page was looked at (Debian: apt-get install chromium).")
        return 0
    status = 0
    for fault in faults_of_site(output, every=every):
        print(fault, flush=True)
        status = 1
    if status == 0:
        print("Every page that was looked at is right.")
    return status


if __name__ == "__main__":
    sys.exit(main())
