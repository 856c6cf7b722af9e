"""What needs normalised weights: a strip of queries is held against every key that it can see.

So each exponential and each product is computed once. A strip is lower the more keys there are.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from mha_spec import steps

from .anchors import anchor_of, finite_anchor
from .operations import added, exp, row_sum, shown
from .tiling import part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .operations import Room
    from .problem import Block, Problem
    from .tiling import Assembly, Tile

__all__ = ["exponentials", "strip_rows", "weigh"]

SCORES = 5 * 2**16
"""How many scores a block has at most: 640 in each of 512 rows, since rows of 512 meet in the same lines of a cache."""
STRIP = 2**21
"""How many scores a strip has, 8 MiB in float32, as long as its rows keep within the bounds."""
LOWEST, HIGHEST = 64, 512
"""Bounds of a strip's rows; below the lowest, matrix products lose their speed."""


def strip_rows(a: Arguments) -> int:
    """How many rows of a matrix make a strip whose weights over all keys may be held."""
    return min(HIGHEST, max(LOWEST, STRIP // max(1, a.kv_len)))


def exponentials(
    problem: Problem, tile: Tile, cotangent: Array | None = None, *, room: Room | None = None
) -> tuple[list[Block], Array | None, Array]:
    """The blocks of a strip with exponentials for logits, those of the sinks, and the sums.

    With a cotangent of its rows the blocks have the slope of the soft cap, too. Where no anchor is needed, exponentials
    are taken as soon as the logits are there, in the core's cache.
    """
    scaled, sink = problem.scaled(tile), problem.sink_of(tile)
    total = problem.full(tile, 1, 0.0)
    blocks: list[tuple[Block, Array | None]] = []
    for keys in problem.visibility.key_blocks(tile, max(1, SCORES // tile.rows)):
        block = problem.block(scaled, tile, keys, slope=cotangent is not None, room=room)
        factors = () if cotangent is None else (cotangent, problem.value[(*tile.matrices, part(keys), ...)])
        anchor = anchor_of(block, *factors)
        if anchor is None:
            total = total + row_sum(exp(block.logits))
        blocks.append((block, anchor))

    anchors = [anchor for _, anchor in blocks] + ([] if sink is None else [finite_anchor(sink)])
    highest = _highest(problem, anchors)
    if highest is None:
        return [block for block, _ in blocks], None, total
    of_sink = None if sink is None else problem.xp.exp(sink - highest)
    decay = problem.xp.exp(-problem.xp.where(highest < 0.0, 0.0, highest))
    total = total * decay if of_sink is None else total * decay + of_sink
    weighed: list[Block] = []
    for block, anchor in blocks:
        weights = block.logits
        if anchor is None:
            weights *= decay
        else:
            weights -= highest
            weights = exp(weights)
            total = total + row_sum(weights)
        weighed.append(block._replace(logits=shown(weights, block.visible, tile)))
    return weighed, of_sink, total


def _highest(problem: Problem, anchors: Sequence[Array | None]) -> Array | None:
    """The anchor that serves all blocks, no less than any of theirs; None where that is 0 in every row."""
    numbers = [anchor for anchor in anchors if anchor is not None]
    if not numbers:
        return None
    if len(numbers) < len(anchors):
        numbers.append(problem.xp.zeros_like(numbers[0]))
    return reduce(problem.xp.maximum, numbers)


def weigh(problem: Problem, whole: Assembly, tile: Tile) -> None:
    """Put a tile's weights over all keys into place; 0 at invisible pairs, NaN in a row of NaN."""
    xp = problem.xp
    blocks, _, total = exponentials(problem, tile)
    unseen = xp.where(xp.isnan(total), total, 0.0)
    weights = problem.full(tile, problem.a.kv_len, 0.0) + unseen
    for block in blocks:
        weights = added(weights, (..., part(block.keys)), steps.normalise(block.logits, total))
    whole.put(tile.box, weights)
