"""The forward pass: one tile of queries after another, block by block of their keys, with an online softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mha_spec import steps

from .anchors import anchor_of, finite_anchor
from .operations import exp, normalised, row_sum
from .tiling import part

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .operations import Room
    from .problem import Block, Problem
    from .tiling import Assembly, Tile

__all__ = ["attend"]

SCORES = 2**18
"""How many scores a block has at most: 1 MiB in float32, which stays in a core's cache."""


class Softmax(NamedTuple):
    """What the blocks so far have come to: the sums of exponentials, and the anchor that was subtracted before exp."""

    anchor: Array | None
    """None where it is 0 in every row."""
    total: Array
    sums: Array | None
    """Of values, each times its exponential after dropout; None where the total is that of a sink alone."""


def attend(problem: Problem, output: Assembly, lse: Assembly | None, room: Room, tile: Tile) -> None:
    """Put a tile's output and lse into place; lse costs nothing where it is not asked for."""
    value, scaled = problem.value[(*tile.matrices, ...)], problem.scaled(tile)
    softmax, place = _of_sink(problem, tile), output.place(tile)
    for keys in problem.visibility.key_blocks(tile, max(1, SCORES // tile.rows)):
        room.clear()
        block = problem.block(scaled, tile, keys, room=room)
        softmax = _with_block(problem, softmax, block, value[..., part(keys), :], place)
    anchor, total, sums = softmax or Softmax(None, problem.full(tile, 1, 0.0), None)
    attended = problem.full(tile, value.shape[3], 0.0) if sums is None else normalised(sums, total)
    if sums is None or sums is not place:
        output.put(tile.box, attended)
    if lse is not None:
        lse.put(tile.box, steps.log_sum_exp(total, 0.0 if anchor is None else anchor))


def _of_sink(problem: Problem, tile: Tile) -> Softmax | None:
    """The sink comes first, as a block without a value: it weighs 1 against itself, and 0 where it is none."""
    sink = problem.sink_of(tile)
    if sink is None:
        return None
    anchor = finite_anchor(sink)
    return Softmax(anchor, problem.xp.exp(sink - anchor), None)


def _with_block(problem: Problem, before: Softmax | None, block: Block, value: Array, place: Array | None) -> Softmax:
    """One block more, and what came before it against the new anchor; the first may put its sums into place."""
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
    """What a block's exponentials are taken against: no less than what those before were."""
    anchor = anchor_of(block, value)
    if before is None or anchor is before.anchor is None:
        return anchor
    if before.anchor is None or anchor is None:
        return problem.xp.maximum(before.anchor if anchor is None else anchor, 0.0)
    return problem.xp.maximum(before.anchor, anchor)
