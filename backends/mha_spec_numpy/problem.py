"""One call, prepared: operands in the softmax's type, and the logits of any block of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, dtype_name, namespace_of, softmax_dtype_name

from .operations import dense, hide, outer
from .tiling import block_of, fold, part
from .visibility import Visibility

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .dropout import Dropout
    from .operations import Room
    from .tiling import Tile

__all__ = ["Block", "Problem"]

SMALL = 16.0
"""Against no maximum, exponentials of logits up to this are between 2^-24 and 2^24: they overflow no sum of products
with values up to `LARGEST`, and what underflows in one is at most the smallest normal number of float32."""
LARGEST = 2.0**60
FEWEST_ROWS = 64
"""Below so many queries for each key, lengths cost more than maxima."""


class Block(NamedTuple):
    """The logits of a tile against some keys, (rows, keys); -inf where a pair is not visible."""

    keys: range
    logits: Array
    visible: Array | None
    """(rows, keys), or None where all pairs are visible."""
    cap_slope: Array | float


@dataclass(frozen=True, slots=True)
class Problem:
    """The operands of one call in the softmax's type (MHA-SOFTMAX-2)."""

    a: Arguments
    query: Array
    key: Array
    value: Array
    sinks: Array | None
    scale: float
    visibility: Visibility
    dropout: Dropout | None
    longest: Callable[[int, int], float] | None
    """The length of the longest key of a head, where a softmax may do without maxima: every row sees every key, so that
    nothing invisible has a say in that."""

    @classmethod
    def of(cls, a: Arguments, dropout: Dropout | None = None) -> Problem:
        """Convert the operands of a call; what is already as needed is not copied."""
        dtype = softmax_dtype_name(dtype_name(a.query))
        scale = steps.scale_of(a.scale, a.query.shape[3])
        key, value, sinks = (
            None if operand is None else dense(operand, dtype) for operand in (a.key, a.value, a.sinks)
        )
        visibility = Visibility.of(a)
        longest = None
        rows = a.heads // a.kv_heads * a.q_len
        shown = visibility.whole and a.bias is None and sinks is None
        if shown and isinstance(key, numpy.ndarray) and rows >= FEWEST_ROWS:
            longest = lru_cache(maxsize=None)(partial(longest_key, key, value))
        return cls(a, dense(a.query, dtype), key, value, sinks, scale, visibility, dropout, longest)

    @property
    def xp(self) -> Any:
        """The array namespace of the call."""
        return namespace_of(self.a.query)

    def scaled(self, tile: Tile) -> Array:
        """The queries of a tile, (rows, qk_dim), times the scale."""
        return fold(self.query, tile) * self.scale

    def small(self, scaled: Array, tile: Tile) -> bool:
        """Whether the logits of a tile are known to be so small that no maximum need be subtracted from them.

        A product is at most that of the lengths, and a soft cap only makes it smaller.
        """
        return self.longest is not None and length_of(scaled) * self.longest(tile.batch, tile.kv_head) <= SMALL

    def block(self, scaled: Array, tile: Tile, keys: range, *, slope: bool = False, room: Room | None = None) -> Block:
        """The logits of a tile against a block of keys, and with `slope` that of the soft cap (MHA-VJP-2)."""
        xp = self.xp
        scores = outer(scaled, self.key[tile.batch, tile.kv_head, part(keys), :], room)
        logits = steps.soft_cap(scores, self.a.softcap)
        cap_slope = steps.cap_slope(scores, self.a.softcap) if slope else 1.0
        bias = None if self.a.bias is None else block_of(self.a.bias, tile, keys)
        visible = self.visibility.visible(tile, keys, bias)
        if bias is None and visible is None:
            return Block(keys, logits, None, cap_slope)

        shape = (tile.group, len(tile.queries), len(keys))
        bias = None if bias is None else xp.astype(bias, logits.dtype)
        logits = steps.add_bias(xp.reshape(logits, shape), bias)
        if visible is not None:
            visible = xp.broadcast_to(visible, shape)
            logits, visible = hide(logits, visible), xp.reshape(visible, scores.shape)
        return Block(keys, xp.reshape(logits, scores.shape), visible, cap_slope)

    def sink_of(self, tile: Tile) -> Array:
        """The sink of each row, (rows, 1); -inf is none (MHA-SINK-1, MHA-SINK-2)."""
        xp = self.xp
        if self.sinks is None:
            return xp.full((tile.rows, 1), -math.inf, dtype=self.query.dtype, device=device_of(self.query))
        sinks = xp.reshape(self.sinks[part(tile.heads)], (tile.group, 1))
        return xp.reshape(xp.broadcast_to(sinks, (tile.group, len(tile.queries))), (tile.rows, 1))

    def keep(self, tile: Tile, keys: range) -> Array | None:
        """Which weights of a block dropout keeps, (rows, keys); None without dropout (MHA-DROP-1, MHA-DROP-2)."""
        xp = self.xp
        if self.a.dropout_mask is not None:
            kept = block_of(self.a.dropout_mask, tile, keys)
        elif self.dropout is not None:
            kept = self.dropout.block(tile, keys, xp, device_of(self.query))
        else:
            return None
        return xp.reshape(xp.broadcast_to(kept, (tile.group, len(tile.queries), len(keys))), (tile.rows, len(keys)))


def longest_key(key: numpy.ndarray, value: numpy.ndarray | None, batch: int, head: int) -> float:
    """The length of the longest key of a head, infinite beside a value that is too long."""
    if value is not None and not length_of(value[batch, head]) <= LARGEST:
        return math.inf
    return length_of(key[batch, head])


def length_of(vectors: numpy.ndarray) -> float:
    """The length of the longest of some vectors; NaN counts as 0, since what it meets is NaN in any case."""
    longest = numpy.vecdot(vectors, vectors).max(initial=0.0)
    if math.isnan(longest):
        numbers = numpy.where(numpy.isnan(vectors), 0.0, vectors)
        longest = numpy.vecdot(numbers, numbers).max(initial=0.0)
    return math.sqrt(longest)
