"""The operands of a call in the softmax's type, and the logits of any of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, namespace_of

from .operations import dense, hide, is_finite, outer
from .pages import Pages
from .tiling import cut_pairs, fold, part, rows_of, unfold

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .dropout import Dropout
    from .operations import Scratch
    from .plan import Plan
    from .tiling import Tile
    from .visibility import VisiblePairs

__all__ = ["Block", "Problem"]


class Block(NamedTuple):
    """The logits of a tile against some keys, (entries, kv_heads, rows, keys); -inf where a pair is not visible."""

    tile: Tile
    keys: range
    logits: Array
    visible: VisiblePairs | None
    """None where all pairs are visible."""
    cap_slope: Array | float

    def product(self, weights: Array, values: Array, place: Array | None = None) -> Array:
        """Compute sum_j weights_ij values_jc over visible pairs, into `place` if possible; invisible weights are 0."""
        if isinstance(values, Pages):
            return self._product_of_pages(weights, values, place)
        # In a plain product, the weight 0 of an invisible pair times an infinite value would be NaN (MHA-POISON-1).
        if self.visible is None or is_finite(values):
            return weights @ values if place is None else numpy.matmul(weights, values, out=place)
        return steps.sum_over_visible(weights, values, self.visible_pairs())

    def _product_of_pages(self, weights: numpy.ndarray, values: Pages, place: numpy.ndarray | None) -> numpy.ndarray:
        sums = numpy.empty((*weights.shape[:-1], values.shape[-1]), weights.dtype) if place is None else place
        sums[...] = 0.0
        visible = None if self.visible is None else self.visible_pairs()
        for entry, keys, part_of_values in values.parts():
            some, pairs = weights[entry, ..., keys], None if visible is None else visible[entry, ..., keys]
            if pairs is None or pairs.all() or is_finite(part_of_values):
                sums[entry] += some @ part_of_values
            else:
                sums[entry] += steps.sum_over_visible(some, part_of_values, pairs)
        return sums

    def transposed_product(self, weights: Array, rows: Array) -> Array:
        """Compute sum_i weights_ij rows_ic over visible pairs; invisible weights are 0."""
        xp: Any = namespace_of(weights)
        weights = xp.matrix_transpose(weights)
        if self.visible is None or is_finite(rows):
            return weights @ rows
        return steps.sum_over_visible(weights, rows, xp.matrix_transpose(self.visible_pairs()))

    def visible_pairs(self) -> Array:
        """Tell which pairs are visible, (entries, kv_heads, rows, keys)."""
        xp: Any = namespace_of(self.logits)
        pairs = None if self.visible is None else self.visible.pairs
        return fold(xp.broadcast_to(pairs, (*self.tile.unfolded, len(self.keys))), self.tile)


@dataclass(slots=True)
class Problem:
    """The operands of a call in the softmax's type (MHA-SOFTMAX-2)."""

    plan: Plan
    a: Arguments
    xp: Any
    query: Array
    key: Array
    value: Array
    sinks: Array | None
    dropout: Dropout | None = None
    slopes: Array | None = None
    """The slopes of a linear bias, (heads,), in the softmax's type (MHA-VARLEN-8)."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        query: Array,
        key: Array,
        value: Array | None,
        dropout: Dropout | None = None,
        slopes: Array | None = None,
    ) -> Problem:
        """Convert the operands of a call; an operand of the right type and layout is not copied."""
        a, dtype = plan.a, plan.dtype
        query, key = dense(query, dtype), dense(key, dtype)
        value = None if value is None else dense(value, dtype)
        sinks = None if a.sinks is None else dense(a.sinks, dtype)
        return cls(plan, a, plan.xp, query, key, value, sinks, dropout, slopes)

    def scaled(self, tile: Tile) -> Array:
        """Return the queries of a tile, (entries, kv_heads, rows, qk_dim), times the scale."""
        return rows_of(self.query, tile) * self.plan.scale

    def block(self, scaled: Array, tile: Tile, keys: range, scratch: Scratch, *, slope: bool = False) -> Block:
        """Compute the logits of a tile and a block of keys, and with `slope` the slope of the soft cap (MHA-VJP-2)."""
        scores = outer(scaled, self.key[(*tile.matrices, part(keys), ...)], scratch)
        a, logits, cap_slope, bias = self.a, scores, 1.0, None
        if a.softcap is not None:
            logits = steps.soft_cap(scores, a.softcap)
            cap_slope = steps.cap_slope(scores, a.softcap) if slope else 1.0
        if a.bias is not None:
            bias = self.xp.astype(cut_pairs(a.bias, tile, keys), logits.dtype)
            logits = fold(steps.add_bias(unfold(logits, tile), bias), tile)
        if self.slopes is not None:
            logits = fold(steps.add_bias(unfold(logits, tile), self.linear_bias(tile, keys)), tile)
        visible = self.plan.visibility.visible(tile, keys, bias)
        return Block(tile, keys, hide(logits, visible, tile), visible, cap_slope)

    def linear_bias(self, tile: Tile, keys: range) -> Array:
        """Compute -slope[h] |p - j| for a block, (1 or entries, heads, queries, keys) (MHA-VARLEN-8)."""
        xp, slopes = self.xp, self.slopes
        assert slopes is not None
        device = device_of(slopes)
        queries = xp.reshape(xp.arange(tile.queries.start, tile.queries.stop, device=device), (1, 1, -1, 1))
        positions = queries + self.plan.visibility.offset.get(tile.entries, self.query)
        distances = xp.abs(xp.arange(keys.start, keys.stop, device=device) - positions)
        return -slopes[part(tile.heads)][:, None, None] * xp.astype(distances, slopes.dtype)

    def values(self, block: Block) -> Array:
        """Return the values of a block, (entries, kv_heads, keys, v_dim)."""
        return self.value[(*block.tile.matrices, part(block.keys), ...)]

    def sink_of(self, tile: Tile) -> Array | None:
        """Return the sink of each row, (entries, kv_heads, rows, 1); None without sinks (MHA-SINK-1)."""
        if self.sinks is None:
            return None
        xp = self.xp
        sinks = xp.reshape(self.sinks[part(tile.heads)], (1, -1, 1, 1))
        return fold(xp.broadcast_to(sinks, (*tile.unfolded, 1)), tile)

    def full(self, tile: Tile, columns: int, number: float) -> Array:
        """Return matrices filled with `number` for the rows of a tile."""
        shape = (*tile.folded, columns)
        return self.xp.full(shape, number, dtype=self.query.dtype, device=device_of(self.query))

    def drop(self, tile: Tile, keys: range, weights: Array) -> Array:
        """Apply dropout, if there is any, to a matrix over pairs (MHA-DROP-1, MHA-DROP-2)."""
        if self.a.dropout_mask is not None:
            kept = cut_pairs(self.a.dropout_mask, tile, keys)
        elif self.dropout is not None:
            kept = self.dropout.block(tile, keys, self.xp, device_of(self.query))
        else:
            return weights
        return fold(steps.drop(unfold(weights, tile), kept, self.a.dropout_rate), tile)
