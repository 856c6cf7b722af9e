"""One block of queries against its stretch of keys: logits, what is visible, and what dropout keeps.

The rows of a block are its queries of one head after those of another, for all heads that share a key/value head: as
matrices of four axes, (batch, kv_heads, rows, keys), products and softmax are what XLA fuses best.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jax import Array

    from .plan import Group
    from .problem import Given, Operands, Problem

__all__ = ["Block", "Logits", "contract", "kept", "logits", "over_blocks", "shown", "visible_in"]


class Block(NamedTuple):
    """Consecutive queries and keys, of some key/value heads or of all; where they begin may be traced."""

    query: Array | int
    queries: int
    key: Array | int
    keys: int
    group: int
    head: tuple[Array, Array] | None = None
    """A batch entry and its first key/value head; None for all of them."""
    heads: int = 1
    """How many key/value heads of the entry."""

    @property
    def rows(self) -> int:
        """Number of rows, those of all heads of a group counted."""
        return self.group * self.queries

    def of_head(self, array: Array) -> Array:
        """The part of this block's heads in (batch, kv_heads, ...), 1 where it broadcasts."""
        return array if self.head is None else _cut(_cut(array, self.head[0], 1, 0), self.head[1], self.heads, 1)

    def of_rows(self, array: Array) -> Array:
        """The rows of this block in (batch, kv_heads, group, q_len, ...), one below another."""
        return _stacked(_cut(self.of_head(array), self.query, self.queries, 3))

    def of_keys(self, array: Array) -> Array:
        """The keys of this block in (batch, kv_heads, kv_len, size)."""
        return _cut(self.of_head(array), self.key, self.keys, 2)

    def of_pairs(self, array: Array) -> Array:
        """The pairs of this block in a folded mask or bias, 1 where it broadcasts (MHA-MASK-2)."""
        array = _cut(_cut(self.of_head(array), self.query, self.queries, 3), self.key, self.keys, 4)
        batch, kv_heads, group, queries, keys = array.shape
        if (group, queries) != (1, 1):
            array = jnp.broadcast_to(array, (batch, kv_heads, self.group, self.queries, keys))
        return _stacked(array)

    def apart(self, array: Array) -> Array:
        """(batch, kv_heads, rows, ...) to (batch, kv_heads, group, queries, ...)."""
        return array.reshape(*array.shape[:2], self.group, self.queries, *array.shape[3:])

    def added_to_keys(self, total: Array, part: Array) -> Array:
        """Add to `total` (batch, kv_heads, size, kv_len) what the keys of this block give."""
        return _added(total, part, (*(self.head or (0, 0)), 0, self.key))

    def added_to_pairs(self, total: Array, part: Array) -> Array:
        """Add to a folded `total` what the pairs of this block give, summed where it has 1 (MHA-VJP-5)."""
        part = self.apart(part)
        axes = tuple(axis for axis in range(5) if total.shape[axis] == 1 and part.shape[axis] != 1)
        starts = (*(self.head or (0, 0)), 0, self.query, self.key)
        at = tuple(start if size != 1 else 0 for start, size in zip(starts, total.shape, strict=True))
        return _added(total, jnp.sum(part, axis=axes, keepdims=True), at)


def _cut(array: Array, start: Array | int, size: int, axis: int) -> Array:
    return array if array.shape[axis] in (1, size) else lax.dynamic_slice_in_dim(array, start, size, axis)


def _stacked(array: Array) -> Array:
    return array.reshape(*array.shape[:2], array.shape[2] * array.shape[3], *array.shape[4:])


def _added(total: Array, part: Array, at: tuple[Array | int, ...]) -> Array:
    if total.shape == part.shape:
        return total + part
    at = tuple(jnp.asarray(start, jnp.int32) for start in at)
    return lax.dynamic_update_slice(total, lax.dynamic_slice(total, at, part.shape) + part, at)


class Logits(NamedTuple):
    """The logits of a block, -inf where a pair is invisible."""

    values: Array
    visible: Array | None
    """Broadcastable to the logits; None where all pairs are visible."""
    slope: Array | None
    """The slope of the soft cap (MHA-VJP-2)."""


def contract(axes: str, a: Array, b: Array) -> Array:
    """einsum in the operands' full precision, which accelerators would cut."""
    return jnp.einsum(axes, a, b, precision=lax.Precision.HIGHEST)


def logits(problem: Problem, x: Operands, given: Given, block: Block, *, slope: bool = False) -> Logits:
    """The scores, capped, then biased, then hidden (MHA-SCORE-1, MHA-CAP-1, MHA-CAP-2, MHA-BIAS-1, MHA-POISON-2)."""
    values = problem.scale * contract("bkqd,bkmd->bkqm", block.of_rows(x.query), block.of_keys(x.key))
    of_cap = None
    if problem.softcap is not None:
        tanh = jnp.tanh(values / problem.softcap)
        of_cap = 1 - tanh**2 if slope else None
        values = problem.softcap * tanh
    visible = visible_in(problem, x, given, block)
    if x.bias is not None:
        values = values + block.of_pairs(x.bias)
    return Logits(shown(values, visible, -math.inf), visible, of_cap)


def shown(values: Array, visible: Array | None, otherwise: float = 0.0) -> Array:
    """The values at visible pairs, and something else where a pair is invisible."""
    return values if visible is None else jnp.where(visible, values, otherwise)


def kept(problem: Problem, x: Operands, given: Given, block: Block) -> Array | None:
    """By what dropout multiplies the weights of a block; None without dropout (MHA-DROP-1, MHA-DROP-2).

    A mask that is drawn depends on the key and on where the block lies, so that it can be drawn again.
    """
    if given.dropout_mask is not None:
        keep = block.of_pairs(given.dropout_mask)
    elif given.dropout_key is not None:
        key = given.dropout_key
        for place in (block.query, *(block.head or ())):
            key = jax.random.fold_in(key, place)
        heads = x.query.shape[:2] if block.head is None else (1, block.heads)
        keep = jax.random.bernoulli(key, 1 - problem.dropout_rate, (*heads, block.rows, block.keys))
    else:
        return None
    return keep.astype(x.query.dtype) / (1 - problem.dropout_rate)


def visible_in(problem: Problem, x: Operands, given: Given, block: Block) -> Array | None:
    """Which pairs of a block are visible, broadcastable to its logits; None without a constraint (MHA-MASK-3)."""
    constraints = list(_constraints(problem, x, given, block))
    return reduce(jnp.logical_and, constraints) if constraints else None


def _constraints(problem: Problem, x: Operands, given: Given, block: Block) -> Iterator[Array]:
    rows = jnp.tile(block.query + lax.iota(jnp.int32, block.queries), block.group)[:, None]
    keys = block.key + lax.iota(jnp.int32, block.keys)
    positions = rows if given.q_offset is None else rows + _per_entry(given.q_offset, block)
    distance = keys - positions  # A bound of 2^30 added to a position could pass the range of int32 (MHA-WINDOW-2).
    if problem.left is not None:
        yield distance >= -problem.left
    if problem.right is not None:
        yield distance <= problem.right
    if given.q_lengths is not None:
        yield rows < _per_entry(given.q_lengths, block)
    if given.kv_lengths is not None:
        yield keys < _per_entry(given.kv_lengths, block)
    for q_ids, kv_ids in zip(given.q_segment_ids, given.kv_segment_ids, strict=True):
        yield block.of_pairs(q_ids) == block.of_pairs(kv_ids)
    if given.mask is not None:
        yield block.of_pairs(given.mask)
    if x.bias is not None:
        yield block.of_pairs(x.bias) != -math.inf


def _per_entry(numbers: Array, block: Block) -> Array:
    """One number, or one for each batch entry, beside the logits."""
    return block.of_head(jnp.asarray(numbers).astype(jnp.int32).reshape(-1, 1, 1, 1))


def over_blocks(problem: Problem, x: Operands, given: Given, body: Callable, carry: object = None) -> tuple:
    """Work block after block: `body(carry, block)` gives the new carry, and arrays of (batch, kv_heads, rows, ...).

    Returns:
        The last carry, and the arrays of all blocks joined to (batch, kv_heads, group, q_len, ...).
    """
    at_once = problem.plan.heads
    if at_once is None:
        return _over_queries(problem, x, given, body, carry, None)
    batch, kv_heads = x.query.shape[:2]

    def step(carry: object, head: tuple[Array, Array]) -> tuple:
        return _over_queries(problem, x, given, body, carry, head)

    entries, firsts = jnp.indices((batch, kv_heads // at_once), jnp.int32)
    carry, arrays = lax.scan(step, carry, (entries.reshape(-1), at_once * firsts.reshape(-1)))
    return carry, jax.tree.map(lambda array: array.reshape(batch, kv_heads, *array.shape[3:]), arrays)


def _over_queries(
    problem: Problem, x: Operands, given: Given, body: Callable, carry: object, head: tuple[Array, Array] | None
) -> tuple:
    joined = []
    for group, starts in zip(problem.plan.groups, given.stretches, strict=True):

        def step(carry: object, at: tuple, group: Group = group) -> tuple:
            start = 0 if group.from_zero else at[1]
            block = Block(at[0], group.rows, start, group.keys, x.query.shape[2], head, problem.plan.heads or 1)
            carry, arrays = body(carry, block)
            return carry, jax.tree.map(block.apart, arrays)

        if group.count == 1:
            carry, arrays = step(carry, (group.first, None if starts is None else starts[0]))
        else:
            first = group.first + group.rows * jnp.arange(group.count, dtype=jnp.int32)
            carry, arrays = lax.scan(step, carry, (first, starts))
            arrays = jax.tree.map(_joined, arrays)
        joined.append(arrays)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *joined)


def _joined(stacked: Array) -> Array:
    """(blocks, batch, kv_heads, group, queries, ...) to (batch, kv_heads, group, blocks * queries, ...)."""
    moved = jnp.moveaxis(stacked, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])
