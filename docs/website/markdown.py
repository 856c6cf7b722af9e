"""Markdown of the repository as Markdown of the site: links between files, clauses and issues."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mha_spec_conformance.suite.spec import clauses

__all__ = ["LinkError", "Site", "clause_page"]

TOKEN = re.compile(
    r"^(?P<fence>```|~~~).*?^(?P=fence)\s*?$"
    r"|(?:(?<=\n\n)|\A)(?:[ ]{4}[^\n]*\n?)+"
    r"|(?P<ticks>`+)[^`].*?(?<!`)(?P=ticks)(?!`)"
    r"|^\#[^\n]*$"
    r"|(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)"
    r"|(?<![\w/\#-])(?P<clause>MHA-[A-Z]+-[1-9]\d*)(?![\w-])"
    r"|(?<![\w/.\#-])(?P<repository>[\w.-]+/[\w.-]+)(?P<pull>[ ]PR)?\#(?P<number>\d+)\b",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
"""Fenced code, indented code, code in a line, headings, links, clauses, issues; the first four are left alone."""


class LinkError(ValueError):
    """A page links to a file that does not exist."""


def clause_page(clause: str) -> str:
    """Return the page of a clause, from the root of the site."""
    return f"spec/{clause.lower()}.md"


@dataclass
class Site:
    """The files that are assembled for Sphinx, and the pages that the files of the repository became."""

    root: Path
    """The repository."""
    folder: Path
    """The folder of the assembled files."""
    pages: dict[str, str] = field(default_factory=dict)
    """A file of the repository -> its page, both from their roots."""

    def write(self, page: str, text: str, *, source: str | None = None) -> None:
        """Write a page; its links are relative to `source`, a file of the repository, if it is a copy of one."""
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.converted(text, page, source), encoding="utf-8")

    def converted(self, text: str, page: str, source: str | None) -> str:
        """Rewrite the links of a text, and link the clauses and issues that it cites; code and headings stay."""

        def replaced(match: re.Match[str]) -> str:
            if match["target"] is not None:
                return self._link(match, source)
            if match["clause"] is not None:
                known = match[0] in clauses() and page != clause_page(match[0])
                return f"[{match[0]}](/{clause_page(match[0])})" if known else match[0]
            if match["repository"] is not None:
                kind = "pull" if match["pull"] else "issues"
                return f"[{match[0]}](https://github.com/{match['repository']}/{kind}/{match['number']})"
            return match[0]

        return TOKEN.sub(replaced, text)

    def _title(self, file: str) -> str:
        """Return the title of a page in italics, for a link whose text is the name of its file."""
        with (self.root / file).open(encoding="utf-8") as lines:
            return f"*{next(line for line in lines if line.startswith('# '))[2:].strip()}*"

    def _link(self, link: re.Match[str], source: str | None) -> str:
        target, _, anchor = link["target"].partition("#")
        if source is None or not target or ":" in target:
            return link[0]
        file = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / target)).as_posix()
        if file in self.pages:
            destination = f"/{self.pages[file]}" + (f"#{anchor}" if anchor else "")
            is_name = link["text"] in (file, PurePosixPath(file).name)
            return f"{link['image']}[{self._title(file) if is_name else link['text']}]({destination})"
        path = self.root / file
        if path.is_dir():
            return f"`{file}/`" if link["text"] == file else f"{link['text']} (`{file}/`)"
        if not path.is_file():
            raise LinkError(f"{source} links to {target!r}, which does not exist")
        copy = self.folder / "files" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        return f"{link['image']}[{link['text']}](/files/{file})"
