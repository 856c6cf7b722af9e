"""The forward pass: tile by tile of queries, an online softmax over blocks of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mha_spec import steps

from .anchors import anchor_of, finite_anchor
from .operations import exp, normalised, row_sum
from .tiling import part

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .operations import Scratch
    from .problem import Block, Problem
    from .tiling import Assembly, Tile

__all__ = ["attend"]

SCORES = 2**18
"""The largest number of scores in a block: 1 MiB in float32, which stays in a core's cache."""


class Softmax(NamedTuple):
    """The state after some blocks: the sums of exponentials, and the anchor that was subtracted before exp."""

    anchor: Array | None
    """None if it is 0 in every row."""
    total: Array
    sums: Array | None
    """Sums of values, each times its exponential after dropout; None if only a sink has been added."""


def attend(problem: Problem, output: Assembly, lse: Assembly | None, tile: Tile, scratch: Scratch) -> None:
    """Write a tile's output, and its lse if it is asked for."""
    value, scaled = problem.value[(*tile.matrices, ...)], problem.scaled(tile)
    softmax, place = _of_sink(problem, tile), output.place(tile)
    for keys in problem.visibility.key_blocks(tile, max(1, SCORES // tile.rows)):
        scratch.clear()
        block = problem.block(scaled, tile, keys, scratch)
        softmax = _with_block(problem, softmax, block, value[..., part(keys), :], place)
    anchor, total, sums = softmax or Softmax(None, problem.full(tile, 1, 0.0), None)
    attended = problem.full(tile, value.shape[3], 0.0) if sums is None else normalised(sums, total)
    if sums is None or sums is not place:
        output.put(tile.box, attended)
    if lse is not None:
        lse.put(tile.box, steps.log_sum_exp(total, 0.0 if anchor is None else anchor))


def _of_sink(problem: Problem, tile: Tile) -> Softmax | None:
    """Give the state after the sink, a block without a value; the exponential of a sink of -inf is 0 (MHA-SINK-2)."""
    sink = problem.sink_of(tile)
    if sink is None:
        return None
    anchor = finite_anchor(sink)
    return Softmax(anchor, problem.xp.exp(sink - anchor), None)


def _with_block(problem: Problem, before: Softmax | None, block: Block, value: Array, place: Array | None) -> Softmax:
    """Give the state after a further block; the first block writes its sums into `place` unless it is None."""
    weights, anchor = block.logits, _anchor(problem, before, block, value)
    if anchor is not None:
        weights -= anchor
    weights = exp(weights)
    total, dropped = row_sum(weights), problem.drop(block.tile, block.keys, weights)
    if before is None:
        return Softmax(anchor, total, block.product(dropped, value, place))
    decay = 1.0 if anchor is None else problem.xp.exp((0.0 if before.anchor is None else before.anchor) - anchor)
    total = total + before.total * decay
    if before.sums is None:
        return Softmax(anchor, total, block.product(dropped, value, place))
    sums = before.sums
    if anchor is not None:
        sums *= decay
    sums += block.product(dropped, value)
    return Softmax(anchor, total, sums)


def _anchor(problem: Problem, before: Softmax | None, block: Block, value: Array) -> Array | None:
    """Give the anchor after a further block; it is at least the anchor before the block."""
    anchor = anchor_of(block, value)
    if before is None or anchor is before.anchor is None:
        return anchor
    if before.anchor is None or anchor is None:
        return problem.xp.maximum(before.anchor if anchor is None else anchor, 0.0)
    return problem.xp.maximum(before.anchor, anchor)
