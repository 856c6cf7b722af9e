"""Logits, visibility and dropout of a block of queries over its stretch of keys.

The query heads that share a key/value head are stacked along the rows of a block, because XLA fuses products and
softmax best for arrays of four axes, (batch, kv_heads, rows, keys).
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
    from .problem import Constraints, Operands, Problem

__all__ = ["Block", "Logits", "contract", "dropout_factor", "hide", "logits", "over_blocks", "visibility"]


class Block(NamedTuple):
    """Consecutive queries and keys of some or all key/value heads; their first indices may be traced."""

    query: Array | int
    queries: int
    key: Array | int
    keys: int
    group: int
    head: tuple[Array, Array] | None = None
    """A batch entry and the first key/value head of the block; None for all entries and heads."""
    heads: int = 1
    """The number of key/value heads, where `head` is not None."""

    @property
    def rows(self) -> int:
        """The number of rows, over all query heads of a group."""
        return self.group * self.queries

    def of_head(self, array: Array) -> Array:
        """Cut the heads of this block from (batch, kv_heads, ...); an axis of size 1 broadcasts."""
        return array if self.head is None else _cut(_cut(array, self.head[0], 1, 0), self.head[1], self.heads, 1)

    def of_rows(self, array: Array) -> Array:
        """Cut the queries of this block from (batch, kv_heads, group, q_len, ...), and stack them to rows."""
        return _stacked(_cut(self.of_head(array), self.query, self.queries, 3))

    def of_keys(self, array: Array) -> Array:
        """Cut the keys of this block from (batch, kv_heads, kv_len, size)."""
        return _cut(self.of_head(array), self.key, self.keys, 2)

    def of_pairs(self, array: Array) -> Array:
        """Cut the pairs of this block from a folded mask or bias; an axis of size 1 broadcasts (MHA-MASK-2)."""
        array = _cut(_cut(self.of_head(array), self.query, self.queries, 3), self.key, self.keys, 4)
        batch, kv_heads, group, queries, keys = array.shape
        if (group, queries) != (1, 1):
            array = jnp.broadcast_to(array, (batch, kv_heads, self.group, self.queries, keys))
        return _stacked(array)

    def apart(self, array: Array) -> Array:
        """Reshape (batch, kv_heads, rows, ...) to (batch, kv_heads, group, queries, ...)."""
        return array.reshape(*array.shape[:2], self.group, self.queries, *array.shape[3:])

    def added_to_keys(self, total: Array, part: Array) -> Array:
        """Add the part of this block's keys to `total`, (batch, kv_heads, size, kv_len)."""
        return _added(total, part, (*(self.head or (0, 0)), 0, self.key))

    def added_to_pairs(self, total: Array, part: Array) -> Array:
        """Add the part of this block's pairs to a folded `total`, summed over its axes of size 1 (MHA-VJP-5)."""
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
    """The logits of a block, -inf at hidden pairs."""

    values: Array
    visible: Array | None
    """Broadcasts to the logits; None where all pairs are visible."""
    slope: Array | None
    """The derivative of the soft cap (MHA-VJP-2)."""


def contract(axes: str, a: Array, b: Array) -> Array:
    """Compute einsum in the full precision of the operands, which accelerators reduce by default."""
    return jnp.einsum(axes, a, b, precision=lax.Precision.HIGHEST)


def logits(problem: Problem, x: Operands, constraints: Constraints, block: Block, *, slope: bool = False) -> Logits:
    """Cap the scores, add the bias, hide pairs (MHA-SCORE-1, MHA-CAP-1, MHA-CAP-2, MHA-BIAS-1, MHA-POISON-2)."""
    values = problem.scale * contract("bkqd,bkmd->bkqm", block.of_rows(x.query), block.of_keys(x.key))
    cap_slope = None
    if problem.softcap is not None:
        tanh = jnp.tanh(values / problem.softcap)
        cap_slope = 1 - tanh**2 if slope else None
        values = problem.softcap * tanh
    visible = visibility(problem, x, constraints, block)
    if x.bias is not None:
        values = values + block.of_pairs(x.bias)
    return Logits(hide(values, visible, -math.inf), visible, cap_slope)


def hide(values: Array, visible: Array | None, fill: float = 0.0) -> Array:
    """Replace the values at hidden pairs."""
    return values if visible is None else jnp.where(visible, values, fill)


def dropout_factor(problem: Problem, x: Operands, constraints: Constraints, block: Block) -> Array | None:
    """Return the factor of the weights of a block, None without dropout (MHA-DROP-1, MHA-DROP-2).

    A random mask depends on the key and on the position of the block alone, so that the backward pass draws it again.
    """
    if constraints.dropout_mask is not None:
        keep = block.of_pairs(constraints.dropout_mask)
    elif constraints.dropout_key is not None:
        key = constraints.dropout_key
        for place in (block.query, *(block.head or ())):
            key = jax.random.fold_in(key, place)
        heads = x.query.shape[:2] if block.head is None else (1, block.heads)
        keep = jax.random.bernoulli(key, 1 - problem.dropout_rate, (*heads, block.rows, block.keys))
    else:
        return None
    return keep.astype(x.query.dtype) / (1 - problem.dropout_rate)


def visibility(problem: Problem, x: Operands, constraints: Constraints, block: Block) -> Array | None:
    """Mark the visible pairs of a block, broadcastable to its logits; None without a constraint (MHA-MASK-3)."""
    conditions = list(_conditions(problem, x, constraints, block))
    return reduce(jnp.logical_and, conditions) if conditions else None


def _conditions(problem: Problem, x: Operands, constraints: Constraints, block: Block) -> Iterator[Array]:
    rows = jnp.tile(block.query + lax.iota(jnp.int32, block.queries), block.group)[:, None]
    keys = block.key + lax.iota(jnp.int32, block.keys)
    q_stride, kv_stride = problem.strides
    positions = q_stride * rows
    if constraints.q_offset is not None:
        positions = positions + _for_each_entry(constraints.q_offset, block)
    # A bound of 2^30 added to a position could pass the range of int32 (MHA-WINDOW-2).
    distance = kv_stride * keys - positions
    if problem.left is not None:
        yield distance >= -problem.left
    if problem.right is not None:
        shows = distance <= problem.right
        prefix = constraints.prefix_lengths
        yield shows if prefix is None else shows | (keys < _for_each_entry(prefix, block))
    if problem.unlifted_right is not None:
        yield distance <= problem.unlifted_right
    if problem.chunk is not None:
        starts = 0 if constraints.kv_starts is None else _for_each_entry(constraints.kv_starts, block)
        yield (positions - starts) // problem.chunk == (keys - starts) // problem.chunk
    if constraints.kv_starts is not None:
        yield keys >= _for_each_entry(constraints.kv_starts, block)
    if constraints.q_lengths is not None:
        yield rows < _for_each_entry(constraints.q_lengths, block)
    if constraints.kv_lengths is not None:
        yield keys < _for_each_entry(constraints.kv_lengths, block)
    for q_ids, kv_ids in zip(constraints.q_segment_ids, constraints.kv_segment_ids, strict=True):
        yield block.of_pairs(q_ids) == block.of_pairs(kv_ids)
    if constraints.mask is not None:
        yield block.of_pairs(constraints.mask)
    if x.bias is not None:
        yield block.of_pairs(x.bias) != -math.inf


def _for_each_entry(numbers: Array, block: Block) -> Array:
    """Reshape a number, or a number for each batch entry, to broadcast to the logits."""
    return block.of_head(jnp.asarray(numbers).astype(jnp.int32).reshape(-1, 1, 1, 1))


def over_blocks(problem: Problem, x: Operands, constraints: Constraints, body: Callable, carry: object = None) -> tuple:
    """Run `body(carry, block)`, which gives a new carry and arrays (batch, kv_heads, rows, ...), on every block.

    Returns:
        The last carry, and the arrays of all blocks joined to (batch, kv_heads, group, q_len, ...).
    """
    heads = problem.plan.heads
    if heads is None:
        return _over_queries(problem, x, constraints, body, carry, None)
    batch, kv_heads = x.query.shape[:2]

    def step(carry: object, head: tuple[Array, Array]) -> tuple:
        return _over_queries(problem, x, constraints, body, carry, head)

    entries, firsts = jnp.indices((batch, kv_heads // heads), jnp.int32)
    carry, arrays = lax.scan(step, carry, (entries.reshape(-1), heads * firsts.reshape(-1)))
    return carry, jax.tree.map(lambda array: array.reshape(batch, kv_heads, *array.shape[3:]), arrays)


def _over_queries(
    problem: Problem,
    x: Operands,
    constraints: Constraints,
    body: Callable,
    carry: object,
    head: tuple[Array, Array] | None,
) -> tuple:
    joined = []
    for group, starts in zip(problem.plan.groups, constraints.stretches, strict=True):

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
    """Join (blocks, batch, kv_heads, group, queries, ...) to (batch, kv_heads, group, blocks * queries, ...)."""
    moved = jnp.moveaxis(stacked, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])
