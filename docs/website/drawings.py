"""Drawings for `<!-- drawing: NAME -->` in a page, and masks for `<!-- mask: ARGUMENTS; q_len, kv_len -->`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .pictures import figure, mask, raw

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DRAWINGS", "with_drawings"]

COMMENT = re.compile(r"^<!-- (?P<kind>drawing|mask): (?P<what>.*?) -->$", re.MULTILINE)
CONSECUTIVE = re.compile(r"(?:^<!-- (?:drawing|mask): .* -->\n)+", re.MULTILINE)
STEPS = (
    ("X", "scale · Q Kᵀ", "SCORE"),
    ("Y", "soft cap", "CAP"),
    ("S", "+ bias", "BIAS"),
    ("P", "softmax over visible keys", "SOFTMAX"),
    ("Pt", "dropout", "DROP"),
    ("O", "Pt V", "POISON"),
)


def with_drawings(text: str) -> str:
    """Put a drawing at each comment that asks for it; drawings of consecutive lines stand in a row."""

    def drawn(match: re.Match[str]) -> str:
        drawings = "".join(_drawn(line) for line in COMMENT.finditer(match[0]))
        return raw(f'<div class="masks">{drawings}</div>') + "\n"

    return CONSECUTIVE.sub(drawn, text)


def _drawn(comment: re.Match[str]) -> str:
    if comment["kind"] == "drawing":
        return DRAWINGS[comment["what"]]()
    caption, _, sizes = comment["what"].rpartition(";")
    q_len, kv_len = map(int, sizes.split(","))
    return figure(caption, mask(caption, (1, q_len, kv_len)))


def steps() -> str:
    """Draw the order of the steps of attention."""
    boxes = []
    for i, (name, what, topic) in enumerate(STEPS):
        x, y = i % 3 * 236 + 2, i // 3 * 92 + 2
        boxes.append(f'<rect class="box" x="{x}" y="{y}" width="208" height="62" rx="6"/>')
        boxes.append(f'<text class="name" x="{x + 12}" y="{y + 25}">{name} = {what}</text>')
        boxes.append(f'<text x="{x + 12}" y="{y + 47}">MHA-{topic}</text>')
        if i % 3 < 2:
            boxes.append(f'<path class="line" d="M{x + 208} {y + 31}h28m-7 -5l7 5l-7 5"/>')
    boxes.append('<path class="line" d="M578 64v14h-474v16m-5 -7l5 7l5 -7"/>')
    return _drawing(
        706, 160, "The order of the steps: scores, soft cap, bias, softmax over visible keys, dropout, output", boxes
    )


def heads() -> str:
    """Draw which key/value head each of six query heads reads: repeated, and tiled."""
    parts: list[str] = []
    for row, (title, reads) in enumerate(
        {"h // group: repeat, as specified": (0, 0, 0, 1, 1, 1), "h % kv_heads: tile": (0, 1, 0, 1, 0, 1)}.items()
    ):
        left = row * 340 + 2
        parts.append(f'<text class="name" x="{left}" y="16">{title}</text>')
        parts += [_box(left + kv * 150 + 40, 96, kv, f"kv {kv}", 76) for kv in (0, 1)]
        for head, kv in enumerate(reads):
            parts.append(_box(left + head * 50, 30, kv, f"h {head}", 42))
            parts.append(f'<path class="line" d="M{left + head * 50 + 21} 58L{left + kv * 150 + 78} 96"/>')
    return _drawing(660, 130, "Six query heads and two key/value heads: repeated heads are neighbours", parts)


def _box(x: int, y: int, group: int, text: str, width: int) -> str:
    return (
        f'<rect class="group{group}" x="{x}" y="{y}" width="{width}" height="28" rx="4"/>'
        f'<text class="on" x="{x + width / 2}" y="{y + 18}" text-anchor="middle">{text}</text>'
    )


def _drawing(width: int, height: int, label: str, parts: list[str]) -> str:
    return (
        f'<svg class="drawing" role="img" aria-label="{label}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


DRAWINGS: dict[str, Callable[[], str]] = {"steps": steps, "heads": heads}
