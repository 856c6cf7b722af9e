"""Badges of a run or of several: an SVG, and JSON as the endpoint of shields.io reads it.

A badge says "conformant" only of complete runs without a failure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .matrix import Matrix

__all__ = ["BADGE", "Badge", "badge_of"]

BADGE = 'data-format="mha-spec-badge/1"'
"""The attribute of the SVG, which distinguishes a badge from other files."""

COLOURS = {"brightgreen": "#187a4b", "yellow": "#855600", "red": "#b4232f"}
"""The colours by their names at shields.io; white text on each has a contrast above 5."""

LETTER, MARGIN = 6.6, 10.0
"""The average width of a letter of 11 pixels, and the space around a text."""


@dataclass(frozen=True)
class Badge:
    """The text of a badge, and its colour by the name at shields.io."""

    label: str
    message: str
    colour: str

    @property
    def endpoint(self) -> str:
        """The badge as JSON for shields.io."""
        data = {"schemaVersion": 1, "label": self.label, "message": self.message, "color": self.colour}
        return json.dumps(data) + "\n"

    @property
    def svg(self) -> str:
        """The badge as a picture that needs no other file."""
        left, right = (round(len(text) * LETTER + 2 * MARGIN) for text in (self.label, self.message))
        title, label, message = (escape(text) for text in (f"{self.label}: {self.message}", self.label, self.message))
        width = left + right
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {BADGE} width="{width}" height="20" role="img" '
            f'aria-label="{title}"><title>{title}</title>'
            f'<clipPath id="r"><rect width="{width}" height="20" rx="4"/></clipPath><g clip-path="url(#r)">'
            f'<rect width="{left}" height="20" fill="#3b444d"/>'
            f'<rect x="{left}" width="{right}" height="20" fill="{COLOURS[self.colour]}"/></g>'
            '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
            f'<text x="{left / 2}" y="14" textLength="{left - 2 * MARGIN:.0f}">{label}</text>'
            f'<text x="{left + right / 2}" y="14" textLength="{right - 2 * MARGIN:.0f}">{message}</text></g></svg>\n'
        )


def badge_of(field: Matrix) -> Badge:
    """Return the badge of reports: the verdict of a single one, or the number of conformant implementations."""
    first, *others = field.columns
    label = f"mha-spec {first.report.data['spec_version']}"
    if others:
        number, conformant = len(field.columns), sum(column.conformant for column in field.columns)
        return Badge(label, f"{conformant} of {number} conformant", "brightgreen" if conformant == number else "yellow")
    results = [result for result in first.report.results.values() if result.must and result.outcome != "unsupported"]
    passed = sum(result.outcome == "pass" for result in results)
    colour = "brightgreen" if first.conformant else "red" if first.report.data["status"] != 0 else "yellow"
    return Badge(label, f"{first.label}, {passed} of {len(results)} cases", colour)
