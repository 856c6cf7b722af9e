"""Render pages that need no other file: texts are made safe, and the style and the script are parts of the page."""

from __future__ import annotations

import base64
import hashlib
import math
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from mha_spec_conformance.suite.text import one_line

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["MOST_CHARACTERS", "digest", "rendered", "source_of"]

MOST_CHARACTERS = 1000
"""The length of a text of the target; a verdict that lists every feature is half as long."""


def rendered(template: str, **context: object) -> str:
    """Return a page in ASCII alone, so that no encoding can change it."""
    text = _environment().get_template(template).render(**context)
    return text.encode("ascii", "xmlcharrefreplace").decode()


@cache
def _environment() -> Environment:
    """Return the templates; every text that they insert is made printable, cut and escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def safe(value: object) -> object:
        return one_line(value, MOST_CHARACTERS) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("mha_spec_conformance", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "times": _times, "count": _count}
    return environment


def source_of(*names: str) -> Markup:
    """Return files of this folder, one after the other, as a part of a page that is not escaped."""
    from markupsafe import Markup

    folder = files("mha_spec_conformance") / "reporting"
    return Markup("".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names))


def digest(text: str) -> str:
    """Return the sha256 by which the policy of a page allows a style or a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _number(value: float | str) -> str:
    """Write a number with few digits; the report writes NaN and infinities as texts."""
    number = float(value)
    if math.isfinite(number):
        return f"{number:.6g}"
    return "NaN" if math.isnan(number) else "∞" if number > 0 else "-∞"


def _times(value: float | str) -> str:
    """Write a multiple of the allowance with two or three digits."""
    number = float(value)
    if not 1000 <= number < 1e9:
        return f"{number:.3g}" if math.isfinite(number) else "∞"
    return f"{float(f'{number:.2g}'):,.0f}"


def _count(number: int, name: str) -> str:
    """Write a number with the name of what is counted, as in "1 failure" or "2,013 failures"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"
