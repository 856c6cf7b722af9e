"""Every case of the suite, without its expected values; see `descriptions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import (
    broadcast,
    caches,
    core,
    edges,
    errors,
    extremes,
    gradients,
    layer_errors,
    layers,
    merges,
    pairs,
    poison,
    rotations,
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
    edges,
    weights,
    merges,
    errors,
    layers,
    caches,
    rotations,
    layer_errors,
)


def descriptions() -> Iterator[Description]:
    """Every case, the smoke cases first, in an order that never changes."""
    for theme in THEMES:
        yield from theme.descriptions()
