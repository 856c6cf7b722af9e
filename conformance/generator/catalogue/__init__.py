"""Every case of the suite, without its expected values; see `descriptions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import (
    across_tiles,
    boundaries,
    broadcast,
    caches,
    cancelling,
    core,
    decoding,
    edges,
    errors,
    extremes,
    far_positions,
    far_sinks,
    flushed,
    frequencies,
    gradients,
    head_shapes,
    id_types,
    last_tiles,
    layer_edges,
    layer_errors,
    layer_kinds,
    layers,
    many_rows,
    merge_gradients,
    merges,
    nan_weights,
    other_caches,
    outputs_and_weights,
    packed,
    pairs,
    poison,
    positions,
    readings,
    rotations,
    rounding,
    single_keys,
    singles,
    smoke,
    structured_masks,
    tiles,
    weights,
    wide_bias,
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
    single_keys,
    last_tiles,
    far_sinks,
    flushed,
    cancelling,
    wide_bias,
    id_types,
    boundaries,
    readings,
    nan_weights,
    merge_gradients,
    layer_edges,
    outputs_and_weights,
    across_tiles,
    layer_kinds,
    decoding,
    head_shapes,
    far_positions,
    many_rows,
    frequencies,
    positions,
    packed,
    structured_masks,
    other_caches,
)


def descriptions() -> Iterator[Description]:
    """Yield every case, smoke cases first, in a fixed order."""
    for theme in THEMES:
        yield from theme.descriptions()
