"""The forward pass: one tile of queries after another, block by block of their keys, with an online softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mha_spec import steps
from mha_spec.arrays import device_of

from .operations import anchor_of, exp, finite, product, row_sum
from .tiling import SCORES, part, unfold

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .problem import Block, Problem
    from .tiling import Tile

__all__ = ["attend"]


class Softmax(NamedTuple):
    """What the blocks so far have come to: the maximum of each row, and against it the sums; no output by a sink."""

    maximum: Array
    total: Array
    output: Array | None


def attend(problem: Problem, needs_lse: bool, tile: Tile) -> tuple[Array, Array | None]:
    """Output (group, queries, v_dim) and lse (group, queries) of a tile, in the softmax's type.

    The sink comes first, as a block without a value. Small operations are left out where they change nothing, since
    threads hand over at each: lse unless it is asked for, rescaling before there is anything, and the look for what is
    not finite unless a block hides a pair.
    """
    xp = problem.xp
    value = problem.value[tile.batch, tile.kv_head, ...]
    blocks = problem.visibility.key_blocks(tile, max(1, SCORES // tile.rows))
    whole = value[blocks[0].start : blocks[-1].stop, :] if blocks else value
    softmax, scaled, clean = _before(problem, tile), problem.scaled(tile), None
    for keys in blocks:
        block = problem.block(scaled, tile, keys)
        if clean is None and block.visible is not None:
            clean = finite(whole)
        softmax = _with_block(problem, tile, softmax, block, value[part(keys), :], clean=bool(clean))
    if softmax is None or softmax.output is None:
        output = xp.zeros((tile.rows, value.shape[1]), dtype=value.dtype, device=device_of(value))
        softmax = Softmax(problem.sink_of(tile), output[:, :1], output) if softmax is None else softmax
        softmax = softmax._replace(output=output)
    output = unfold(steps.normalise(softmax.output, softmax.total), tile)
    if not needs_lse:
        return output, None
    return output, unfold(steps.log_sum_exp(softmax.total, anchor_of(softmax.maximum)), tile)[..., 0]


def _before(problem: Problem, tile: Tile) -> Softmax | None:
    """The sink alone: it weighs 1 against itself, and 0 where it is none."""
    if problem.sinks is None:
        return None
    sink = problem.sink_of(tile)
    return Softmax(sink, problem.xp.exp(sink - anchor_of(sink)), None)


def _with_block(
    problem: Problem, tile: Tile, before: Softmax | None, block: Block, value: Array, *, clean: bool
) -> Softmax:
    """One block more, and what came before it against the new maximum."""
    xp = problem.xp
    maximum = xp.max(block.logits, axis=-1, keepdims=True)
    maximum = maximum if before is None else xp.maximum(before.maximum, maximum)
    anchor = anchor_of(maximum)
    weights = block.logits
    weights -= anchor
    weights = exp(weights)
    total = row_sum(weights)
    dropped = steps.drop(weights, problem.keep(tile, block.keys), problem.a.dropout_rate)
    output = product(dropped, value, block.visible, clean=clean)
    if before is None:
        return Softmax(maximum, total, output)
    decay = xp.exp(before.maximum - anchor)
    if before.output is not None:
        output += before.output * decay
    return Softmax(maximum, before.total * decay + total, output)
