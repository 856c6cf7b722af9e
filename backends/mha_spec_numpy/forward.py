"""The forward pass: one tile of queries after another, block by block of their keys, with an online softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec import steps
from mha_spec.arrays import device_of

from .operations import anchor_of, exp, finite, product, row_sum
from .tiling import SCORES, part, unfold

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .problem import Problem
    from .tiling import Tile

__all__ = ["attend"]


def attend(problem: Problem, tile: Tile) -> tuple[Array, Array]:
    """Output (group, queries, v_dim) and lse (group, queries) of a tile, in the softmax's type.

    The sink comes first, as a block without a value; each block then rescales what came before it to the new maximum.
    """
    xp = problem.xp
    maximum = problem.sink_of(tile)
    anchor = anchor_of(maximum)
    total = xp.exp(maximum - anchor)
    value = problem.value[tile.batch, tile.kv_head, ...]
    output = None
    blocks = problem.visibility.key_blocks(tile, max(1, SCORES // tile.rows))
    clean = bool(blocks) and finite(value[blocks[0].start : blocks[-1].stop, :])
    for keys in blocks:
        block = problem.block(tile, keys)
        largest = xp.maximum(maximum, xp.max(block.logits, axis=-1, keepdims=True))
        anchor = anchor_of(largest)
        decay = xp.exp(maximum - anchor)
        weights = block.logits
        weights -= anchor
        weights = exp(weights)
        total = total * decay + row_sum(weights)
        dropped = steps.drop(weights, problem.keep(tile, keys), problem.a.dropout_rate)
        of_block = product(dropped, value[part(keys), :], block.visible, clean=clean)
        if output is not None:
            output *= decay
            of_block += output
        output, maximum = of_block, largest
    if output is None:
        output = xp.zeros((tile.rows, value.shape[1]), dtype=total.dtype, device=device_of(total))
    lse = steps.log_sum_exp(total, anchor)
    return unfold(steps.normalise(output, total), tile), unfold(lse, tile)[..., 0]
