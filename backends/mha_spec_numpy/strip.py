"""What needs normalised weights: a strip of queries is held against every key that it can see.

So each exponential and each product is computed once. A strip is lower the more keys there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec import steps
from mha_spec.arrays import device_of

from .operations import added, anchor_of, exp, row_sum, shown
from .tiling import heads, part, tiles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .operations import Room
    from .problem import Block, Problem
    from .tiling import Assembly, Tile

__all__ = ["exponentials", "strips", "weigh"]

SCORES = 5 * 2**16
"""How many scores a block has at most: 640 in each of 512 rows, since rows of 512 meet in the same lines of a cache."""
STRIP = 2**21
"""How many scores a strip has, 8 MiB in float32, as long as its rows keep within the bounds."""
LOWEST, HIGHEST = 64, 512
"""Bounds of a strip's rows; below the lowest, matrix products lose their speed."""


def strips(a: Arguments, of: list[tuple[int, int]] | None = None) -> list[Tile]:
    """Cut the queries of every head, or of those named, into tiles whose weights over all keys may be held."""
    rows = min(HIGHEST, max(LOWEST, STRIP // max(1, a.kv_len)))
    return tiles(a, heads(a) if of is None else of, rows)


def exponentials(
    problem: Problem, tile: Tile, *, slope: bool = False, room: Room | None = None
) -> tuple[list[Block], Array, Array]:
    """The blocks of a strip with exponentials for logits, those of the sinks, and the sums.

    Where no maximum is waited for, they are taken as soon as the logits are there, in the core's cache.
    """
    length, scaled, sink = max(1, SCORES // tile.rows), problem.scaled(tile), problem.sink_of(tile)
    cut = problem.visibility.key_blocks(tile, length)
    blocks: Iterable[Block] = (problem.block(scaled, tile, keys, slope=slope, room=room) for keys in cut)
    anchor: Array | None = None
    if not problem.small(scaled, tile):
        blocks = list(blocks)
        anchor = _anchor(problem, blocks, sink)
    of_sink = total = problem.xp.exp(sink if anchor is None else sink - anchor)
    found: list[Block] = []
    for block in blocks:
        weights = block.logits
        if anchor is not None:
            weights -= anchor
        weights = exp(weights)
        total = total + row_sum(weights)
        found.append(block._replace(logits=shown(weights, block.visible)))
    return found, of_sink, total


def _anchor(problem: Problem, blocks: list[Block], sink: Array) -> Array:
    """What exponentials are taken against: the maximum of each row, its sink included."""
    maximum = sink
    for block in blocks:
        maximum = problem.xp.maximum(maximum, problem.xp.max(block.logits, axis=-1, keepdims=True))
    return anchor_of(maximum)


def weigh(problem: Problem, whole: Assembly, tile: Tile) -> None:
    """Put a tile's weights over all keys into place; 0 at invisible pairs, NaN in a row of NaN."""
    xp = problem.xp
    blocks, _, total = exponentials(problem, tile)
    unseen = xp.where(xp.isnan(total), total, 0.0)
    weights = xp.zeros((tile.rows, problem.a.kv_len), dtype=total.dtype, device=device_of(total)) + unseen
    for block in blocks:
        weights = added(weights, (slice(None), part(block.keys)), steps.normalise(block.logits, total))
    whole.put(tile, weights)
