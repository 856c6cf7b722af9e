"""The forward pass: one tile of queries after another, block by block of their keys, with an online softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mha_spec import steps
from mha_spec.arrays import device_of

from .operations import anchor_of, exp, normalised, product, row_sum
from .tiling import SCORES, part

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .operations import Room
    from .problem import Block, Problem
    from .tiling import Assembly, Tile

__all__ = ["attend"]


class Softmax(NamedTuple):
    """What the blocks so far have come to: the maximum of each row, and against it the sums; no output by a sink."""

    maximum: Array
    total: Array
    output: Array | None


def attend(problem: Problem, output: Assembly, lse: Assembly | None, room: Room, tile: Tile) -> None:
    """Put a tile's output and lse into place; lse costs nothing where it is not asked for."""
    value = problem.value[tile.batch, tile.kv_head, ...]
    softmax, scaled = _of_sink(problem, tile), problem.scaled(tile)
    with_block = _with_block
    if problem.small(scaled, tile):
        nothing = problem.xp.zeros_like(softmax.maximum)
        softmax, with_block = Softmax(nothing, nothing, None), _with_small
    for keys in problem.visibility.key_blocks(tile, max(1, SCORES // tile.rows)):
        room.clear()
        block = problem.block(scaled, tile, keys, room=room)
        softmax = with_block(problem, tile, softmax, block, value[part(keys), :])
    weighted = softmax.output
    if weighted is None:
        weighted = problem.xp.zeros((tile.rows, value.shape[1]), dtype=value.dtype, device=device_of(value))
    output.put(tile, normalised(weighted, softmax.total))
    if lse is not None:
        lse.put(tile, steps.log_sum_exp(softmax.total, anchor_of(softmax.maximum)))


def _of_sink(problem: Problem, tile: Tile) -> Softmax:
    """The sink comes first, as a block without a value: it weighs 1 against itself, and 0 where it is none."""
    sink = problem.sink_of(tile)
    return Softmax(sink, problem.xp.exp(sink - anchor_of(sink)), None)


def _with_block(problem: Problem, tile: Tile, before: Softmax, block: Block, value: Array) -> Softmax:
    """One block more, and what came before it against the new maximum."""
    xp = problem.xp
    maximum = xp.maximum(before.maximum, xp.max(block.logits, axis=-1, keepdims=True))
    anchor = anchor_of(maximum)
    weights = block.logits
    weights -= anchor
    weights = exp(weights)
    output = _weighted(problem, tile, block, weights, value)
    decay = xp.exp(before.maximum - anchor)
    if before.output is not None:
        output += before.output * decay
    return Softmax(maximum, before.total * decay + row_sum(weights), output)


def _with_small(problem: Problem, tile: Tile, before: Softmax, block: Block, value: Array) -> Softmax:
    """One block more of logits that need no maximum: against 0, nothing that came before changes."""
    weights = exp(block.logits)
    output = _weighted(problem, tile, block, weights, value)
    if before.output is not None:
        output += before.output
    return Softmax(before.maximum, before.total + row_sum(weights), output)


def _weighted(problem: Problem, tile: Tile, block: Block, weights: Array, value: Array) -> Array:
    """The sum of a block's values, each times its weight after dropout."""
    dropped = steps.drop(weights, problem.keep(tile, block.keys), problem.a.dropout_rate)
    return product(dropped, value, block.visible)
