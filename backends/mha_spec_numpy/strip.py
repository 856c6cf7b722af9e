"""What needs normalised weights: a strip of queries is held against every key that it can see.

So each exponential and each product is computed once. A strip is lower the more keys there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec import steps
from mha_spec.arrays import device_of

from .operations import added, anchor_of, exp, row_sum
from .tiling import SCORES, heads, part, tiles

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .problem import Block, Problem
    from .tiling import Assembly, Tile

__all__ = ["softmax", "strips", "weigh"]

STRIP = 2**20
"""How many scores a strip has, 4 MiB in float32, as long as its rows keep within the bounds."""
LOWEST, HIGHEST = 64, 256
"""Bounds of a strip's rows; below the lowest, matrix products lose their speed."""


def strips(a: Arguments, of: list[tuple[int, int]] | None = None) -> list[Tile]:
    """Cut the queries of every head, or of those named, into tiles whose weights over all keys may be held."""
    rows = min(HIGHEST, max(LOWEST, STRIP // max(1, a.kv_len)))
    return tiles(a, heads(a) if of is None else of, rows)


def softmax(problem: Problem, tile: Tile, *, slope: bool = False) -> tuple[list[Block], Array, Array]:
    """The blocks of a strip with weights for logits, the weights of the sinks, and the sum of exponentials."""
    xp = problem.xp
    length, scaled = max(1, SCORES // tile.rows), problem.scaled(tile)
    blocks = [problem.block(scaled, tile, keys, slope=slope) for keys in problem.visibility.key_blocks(tile, length)]
    maximum = sink = problem.sink_of(tile)
    for block in blocks:
        maximum = xp.maximum(maximum, xp.max(block.logits, axis=-1, keepdims=True))
    anchor = anchor_of(maximum)
    of_sink = total = xp.exp(sink - anchor)
    for index, block in enumerate(blocks):
        weights = block.logits
        weights -= anchor
        weights = exp(weights)
        total = total + row_sum(weights)
        blocks[index] = block._replace(logits=weights)
    return [_normalised(problem, block, total) for block in blocks], steps.normalise(of_sink, total), total


def weigh(problem: Problem, whole: Assembly, tile: Tile) -> None:
    """Put a tile's weights over all keys into place; 0 at invisible pairs, NaN in a row of NaN."""
    xp = problem.xp
    blocks, _, total = softmax(problem, tile)
    unseen = xp.where(xp.isnan(total), total, 0.0)
    weights = xp.zeros((tile.rows, problem.a.kv_len), dtype=total.dtype, device=device_of(total)) + unseen
    for block in blocks:
        weights = added(weights, (slice(None), part(block.keys)), block.logits)
    whole.put(tile, weights)


def _normalised(problem: Problem, block: Block, total: Array) -> Block:
    """In a row of NaN the invisible weights stay 0, so that they reach no other gradient (MHA-POISON-2)."""
    return block._replace(logits=problem.shown(steps.normalise(block.logits, total), block.visible))
