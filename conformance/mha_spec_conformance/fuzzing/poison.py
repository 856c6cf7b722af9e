"""Put NaN and infinities into the operands of a drawn call, in visible and in hidden pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from .expected import Rows

if TYPE_CHECKING:
    from .call import Call
    from .drawing import Drawing

__all__ = ["poisoned"]

VALUES = ("nan", "inf", "-inf")
OPERANDS = ("query", "key", "value", "grad_output", "bias")


def poisoned(d: Drawing, call: Call) -> Call:
    """Put up to three non-finite numbers into the operands, either only where no pair uses them, or anywhere."""
    free = _unused(call) if d.often() else None
    names = [name for name in OPERANDS if name in call.recipes and call.arrays[name].size]
    if not (names if free is None else free):
        return call
    recipes = dict(call.recipes)
    for _ in range(d.one_of(1, 2, 3)):
        name, place = _anywhere(d, call, names) if free is None else free[d.below(len(free))]
        recipes[name] = replace(recipes[name], marks=(*recipes[name].marks, (place, d.one_of(*VALUES))))
    return replace(call, recipes=recipes)


def _anywhere(d: Drawing, call: Call, names: list[str]) -> tuple[str, tuple[int, ...]]:
    """Choose an element of an operand."""
    name = d.one_of(*names)
    return name, tuple(d.below(size) for size in call.arrays[name].shape)


def _unused(call: Call) -> list[tuple[str, tuple[int, ...]]]:
    """List the vectors that no visible pair uses (MHA-POISON-1)."""
    rows = Rows(call.arrays, call.options, call.dtype)
    used = rows.over_group(rows.visible)
    free = {"key": ~used, "value": ~used, "query": ~rows.seeing, "grad_output": ~rows.seeing}
    return [
        (name, tuple(int(index) for index in place))
        for name, places in free.items()
        if name in call.recipes
        for place in numpy.argwhere(places)
    ]
