"""Strips of queries with their weights over all keys, for the weights and the gradients.

A strip holds every exponential of its rows, so that each is computed once. The more keys there are, the fewer rows a
strip has.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from mha_spec import steps

from .anchors import anchor_of, finite_anchor, large_factors
from .operations import added, exp, row_sum, without_hidden
from .tiling import part

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .operations import Scratch
    from .problem import Block, Problem
    from .tiling import Assembly, Tile

__all__ = ["exponentials", "strip_rows", "weigh"]

SCORES = 5 * 2**16
"""The largest number of scores in a block: 640 in each of 512 rows, since 512 would make the rows share cache lines."""
STRIP = 2**21
"""The number of scores of a strip, 8 MiB in float32, unless the bounds of its rows demand another number."""
LOWEST, HIGHEST = 64, 512
"""Bounds of a strip's rows; matrix products with fewer rows than the lowest are slow."""


def strip_rows(a: Arguments) -> int:
    """Return the number of rows of a strip."""
    return min(HIGHEST, max(LOWEST, STRIP // max(1, a.kv_len)))


def exponentials(
    problem: Problem, tile: Tile, scratch: Scratch, cotangent: Array | None = None
) -> tuple[list[Block], Array | None, Array]:
    """Return the blocks of a strip with exponentials as logits, the exponentials of the sinks, and the sums of rows.

    With the cotangent of the strip's rows, the blocks also have the slope of the soft cap.
    """
    scaled, sink = problem.scaled(tile), problem.sink_of(tile)
    total = problem.full(tile, 1, 0.0)
    blocks: list[tuple[Block, Array | None]] = []
    for keys in problem.plan.visibility.key_blocks(tile, max(1, SCORES // tile.rows)):
        block = problem.block(scaled, tile, keys, scratch, slope=cotangent is not None)
        anchor = anchor_of(block, _needs_anchor(problem, block, cotangent))
        if anchor is None:
            # The logits are still in the core's cache, so that exp takes less time than after the last block.
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
        weighed.append(block._replace(logits=without_hidden(weights, block.visible, tile)))
    return weighed, of_sink, total


def _needs_anchor(problem: Problem, block: Block, cotangent: Array | None) -> numpy.ndarray | bool:
    """Mark the matrices of a block that need an anchor for the gradients.

    An invisible value must not decide (MHA-POISON-1), so that every block with invisible pairs has an anchor.
    """
    if cotangent is None:
        return False
    return block.visible is not None or large_factors(cotangent, problem.values(block))


def _highest(problem: Problem, anchors: Sequence[Array | None]) -> Array | None:
    """Return the highest anchor of all blocks, or None if it is 0 in every row."""
    numbers = [anchor for anchor in anchors if anchor is not None]
    if not numbers:
        return None
    if len(numbers) < len(anchors):
        numbers.append(problem.xp.zeros_like(numbers[0]))
    return reduce(problem.xp.maximum, numbers)


def weigh(problem: Problem, whole: Assembly, tile: Tile, scratch: Scratch) -> None:
    """Write a tile's weights over all keys: 0 at invisible pairs, but NaN in a row whose sum is NaN."""
    xp = problem.xp
    scratch.clear()
    blocks, _, total = exponentials(problem, tile, scratch)
    unseen = xp.where(xp.isnan(total), total, 0.0)
    weights = problem.full(tile, problem.a.kv_len, 0.0) + unseen
    for block in blocks:
        weights = added(weights, (..., part(block.keys)), steps.normalise(block.logits, total))
    whole.put(tile.box, weights)
