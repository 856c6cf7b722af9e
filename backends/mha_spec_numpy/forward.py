"""The forward pass: tile by tile of queries, an online softmax over blocks of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy

from mha_spec import steps

from .anchors import anchor_of, finite_anchor
from .operations import exp, is_finite, normalised, row_sum

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
    place, exact = output.place(tile), lse is not None
    anchor, total, sums = _softmax(problem, tile, scratch, place, exact=exact)
    if lse is not None:
        lse.put(tile.box, steps.log_sum_exp(total, 0.0 if anchor is None else anchor))
    if isinstance(sums, numpy.ndarray) and not is_finite(sums):
        # Without an anchor, exponentials up to 2^24 make the sums of very large values overflow.
        overflows = ~numpy.isfinite(sums).all(axis=-1, keepdims=True)
        _, total, sums = _softmax(problem, tile, scratch, place, overflows, exact=exact)
    attended = problem.full(tile, problem.value.shape[3], 0.0) if sums is None else normalised(sums, total)
    if sums is None or sums is not place:
        output.put(tile.box, attended)


def _softmax(
    problem: Problem,
    tile: Tile,
    scratch: Scratch,
    place: Array | None,
    anchored: Array | bool = False,
    *,
    exact: bool,
) -> Softmax:
    """Return the state of a tile after all blocks; the rows that are `anchored` have an anchor in any case.

    The lse of a row that sees a single key is `exact`, its logit, only with the logit as its anchor.
    """
    scaled, softmax = problem.scaled(tile), _of_sink(problem, tile)
    for keys in problem.plan.visibility.key_blocks(tile, max(1, SCORES // tile.rows)):
        scratch.clear()
        block = problem.block(scaled, tile, keys, scratch)
        lonely = exact and (block.visible is not None or problem.a.kv_len == 1)
        softmax = _with_block(problem, softmax, block, anchor_of(block, lonely or anchored), place)
    return softmax or Softmax(None, problem.full(tile, 1, 0.0), None)


def _of_sink(problem: Problem, tile: Tile) -> Softmax | None:
    """Return the state after the sink, a block without a value; the exponential of a sink of -inf is 0 (MHA-SINK-2)."""
    sink = problem.sink_of(tile)
    if sink is None:
        return None
    anchor = finite_anchor(sink)
    return Softmax(anchor, problem.xp.exp(sink - anchor), None)


def _with_block(
    problem: Problem, before: Softmax | None, block: Block, anchor: Array | None, place: Array | None
) -> Softmax:
    """Return the state after a further block; the first block writes its sums into `place` unless it is None."""
    if before is not None:
        anchor = _joint_anchor(problem, before.anchor, anchor)
    weights = block.logits
    if anchor is not None:
        weights -= anchor
    weights = exp(weights)
    total, dropped, values = row_sum(weights), problem.drop(block.tile, block.keys, weights), problem.values(block)
    if before is None:
        return Softmax(anchor, total, block.product(dropped, values, place))
    decay = 1.0 if anchor is None else problem.xp.exp((0.0 if before.anchor is None else before.anchor) - anchor)
    total = total + before.total * decay
    if before.sums is None:
        return Softmax(anchor, total, block.product(dropped, values, place))
    sums = before.sums
    if anchor is not None:
        sums *= decay
    sums += block.product(dropped, values)
    return Softmax(anchor, total, sums)


def _joint_anchor(problem: Problem, before: Array | None, anchor: Array | None) -> Array | None:
    """Return the greater anchor of each row, where None stands for 0."""
    if before is None and anchor is None:
        return None
    return problem.xp.maximum(0.0 if before is None else before, 0.0 if anchor is None else anchor)
