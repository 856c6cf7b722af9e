"""The pictures of SPEC.md: which pairs of query and key are visible, drawn from the reference."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy

from mha_spec import reference
from mha_spec.arguments import Arguments

__all__ = ["Picture", "Text", "draw", "figure", "mask", "parts", "raw", "see", "split_pictures"]

ROW = re.compile(r"(?:b=(?P<b>\d+) )?i=(?P<i>\d+)(?: p=(?P<p>-?\d+))? +(?P<cells>[x.](?: [x.])*)")
CAPTION = re.compile(r"\w+=")
KEYS = re.compile(r" *j  (\d+ )*\d+")
CELL = 24
DTYPES = {"mask": bool, "bias": float, "q_segment_ids": int, "kv_segment_ids": int}


@dataclass(frozen=True)
class Picture:
    """A picture of a clause: the arguments of a call, and a row for each query."""

    caption: str
    rows: tuple[re.Match[str], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, q_len, kv_len)."""
        batch = 1 + int(self.rows[-1]["b"] or 0)
        return batch, len(self.rows) // batch, len(self.rows[0]["cells"].split())

    @property
    def as_written(self) -> numpy.ndarray:
        """The visible pairs as the text of SPEC.md shows them."""
        cells = [[cell == "x" for cell in row["cells"].split()] for row in self.rows]
        return numpy.array(cells).reshape(self.shape)


@dataclass(frozen=True)
class Text:
    """Lines of a block that are no picture: a formula or a table."""

    lines: tuple[str, ...]


def _blocks(text: str) -> list[list[str]]:
    """Return the indented blocks of a text, without their indentation and empty lines."""
    indented = re.findall(r"(?:^ {4}.*\n(?:\n(?= {4}))*)+", text + "\n", flags=re.MULTILINE)
    return [[line[4:] for line in block.splitlines() if line.strip()] for block in indented]


def parts(block: list[str]) -> list[Picture | Text]:
    """Split a block into pictures and the lines between them; empty lines of the block are kept in the latter."""
    result: list[Picture | Text] = []
    waiting: list[str] = []
    i = 0
    while i < len(block):
        rows = _rows_below(block, i)
        if rows:
            result += [Text(tuple(waiting))] if any(line.strip() for line in waiting) else []
            result.append(Picture(block[i].strip(), tuple(match for match in rows if match)))
            waiting, i = [], i + 1 + len(rows)
        else:
            waiting.append(block[i])
            i += 1
    return result + ([Text(tuple(waiting))] if any(line.strip() for line in waiting) else [])


def _rows_below(block: list[str], i: int) -> list[re.Match[str] | None]:
    """Return a match for each line of the picture whose caption is line i, None for lines without a query."""
    if not CAPTION.match(block[i]):
        return []
    lines: list[re.Match[str] | None] = []
    for line in block[i + 1 :]:
        row = ROW.match(line)
        if row is None and line.strip() and not KEYS.fullmatch(line):
            break
        lines.append(row)
    while lines and lines[-1] is None:
        lines.pop()
    return lines


def split_pictures(text: str) -> list[Picture]:
    """Return the pictures of a text."""
    return [part for block in _blocks(text) for part in parts(block) if isinstance(part, Picture)]


def see(caption: str, shape: tuple[int, int, int]) -> numpy.ndarray:
    """Return the pairs that are visible with the arguments of a caption, (batch, q_len, kv_len)."""
    call = ast.parse(f"call({caption})".replace("-inf", "-1e999"), mode="eval").body
    assert isinstance(call, ast.Call)
    options: dict[str, Any] = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    options = {name: numpy.array(x, DTYPES[name]) if name in DTYPES else x for name, x in options.items()}
    batch, q_len, kv_len = shape
    query, key = numpy.zeros((batch, 1, q_len, 2)), numpy.zeros((batch, 1, kv_len, 2))
    arguments = Arguments(query, key, key, **options)
    plain = reference.Reference()
    plain.steps.check(arguments)
    return numpy.broadcast_to(plain.visible(arguments), (batch, 1, q_len, kv_len))[:, 0]


def draw(picture: Picture) -> str:
    """Draw a picture with the labels that SPEC.md gives to its rows."""
    return _figure_of(picture.caption, see(picture.caption, picture.shape), [row["p"] for row in picture.rows])


def mask(arguments: str, shape: tuple[int, int, int]) -> str:
    """Draw the pairs that are visible in a call of the shape (batch, q_len, kv_len)."""
    return _figure_of(arguments, see(arguments, shape), [None] * (shape[0] * shape[1]))


def figure(caption: str, drawing: str) -> str:
    """Put the arguments of a call above its drawing."""
    return f'<figure class="mask"><figcaption><code>{escape(caption)}</code></figcaption>{drawing}</figure>'


def raw(html: str) -> str:
    """Return HTML as a block of Markdown."""
    return f"```{{raw}} html\n{html}\n```"


def _figure_of(arguments: str, visible: numpy.ndarray, positions: list[str | None]) -> str:
    """Draw a grid for each batch entry, its cells as the reference computes them."""
    batch, q_len, kv_len = visible.shape
    left = 76 if any(positions) else 40
    width, height = left + kv_len * CELL + 4, q_len * CELL + 26
    entries = "".join(
        f'<g transform="translate({b * (width + 20)} 0)">{_grid(visible, b, positions, left)}</g>' for b in range(batch)
    )
    total = batch * width + (batch - 1) * 20
    label = escape(f"Visible pairs of query and key with {arguments}: {_in_words(visible)}")
    return (
        f'<svg class="mask" role="img" aria-label="{label}" viewBox="0 0 {total} {height}" width="{total}" '
        f'height="{height}" xmlns="http://www.w3.org/2000/svg">{entries}</svg>'
    )


def _grid(visible: numpy.ndarray, b: int, positions: list[str | None], left: int) -> str:
    batch, q_len, kv_len = visible.shape
    texts: list[tuple[float, float, str, str]] = [(left - 10, 14, "end", f"b={b}")] if batch > 1 else []
    texts += [(left + (j + 0.5) * CELL, 14, "middle", f"{j}" if j else "j=0") for j in range(kv_len)]
    for i in range(q_len):
        position = positions[b * q_len + i]
        name = f"i={i}" + (f" p={position}" if position else "")
        texts.append((left - 8, 22 + (i + 0.5) * CELL + 4, "end", name))
    cells = [
        f'<rect class="{"seen" if visible[b, i, j] else "hidden"}" x="{left + j * CELL + 1}" '
        f'y="{22 + i * CELL + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="3"/>'
        for i in range(q_len)
        for j in range(kv_len)
    ]
    labels = [f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts]
    return "".join(cells + labels)


def _in_words(visible: numpy.ndarray) -> str:
    """Name the visible keys of each query, for readers who cannot see the picture."""
    sentences = [
        f"query {i}{f' of entry {b}' if len(visible) > 1 else ''} sees "
        + (", ".join(map(str, numpy.flatnonzero(row))) or "no key")
        for b, entry in enumerate(visible)
        for i, row in enumerate(entry)
    ]
    return "; ".join(sentences)
