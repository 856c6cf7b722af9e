"""Every case of the suite, without its expected values; see `descriptions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import (
    broadcast,
    core,
    errors,
    extremes,
    gradients,
    merges,
    pairs,
    poison,
    rounding,
    singles,
    smoke,
    tiles,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

THEMES = (
    smoke,
    core,
    singles,
    broadcast,
    pairs,
    tiles,
    extremes,
    poison,
    rounding,
    gradients,
    weights,
    merges,
    errors,
)


def descriptions() -> Iterator[Description]:
    """Every case, the smoke cases first, in an order that never changes."""
    for theme in THEMES:
        yield from theme.descriptions()
