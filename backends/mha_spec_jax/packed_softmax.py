"""Attention of packed sequences: an online softmax over the tiles of each block, and its gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .block import contract
from .mesh import alike, axes_of, cotangents_of, partitioned, varying
from .packed import Tile, cut, put, sequences_of, with_room
from .problem import anchor_of, finite
from .reverse import differentiable_once, reverse_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

    from .packed import Block, Lengths, Packing

__all__ = ["Packed", "attention", "vjp"]


class Packed(NamedTuple):
    """The arrays with a gradient: query (tokens, heads, size), keys and values in tokens or in pages."""

    query: Array
    key: Array
    value: Array
    sinks: Array | None


class _Rows(NamedTuple):
    """The numbers of each row of a block, (kv_heads, rows, ...)."""

    query: Array
    grad_output: Array
    lse: Array
    row_dot: Array


class _Work:
    """The blocks and tiles of a call, and what each of them reads."""

    def __init__(self, packing: Packing, x: Packed, lengths: Lengths) -> None:
        self.packing, self.tokens = packing, x.query.shape[0]
        self.heads, self.kv_heads = x.query.shape[1], x.key.shape[-2]
        self.group, self.dtype = self.heads // self.kv_heads, jnp.promote_types(x.query.dtype, jnp.float32)
        table: Any = lengths.block_table
        self.table: Any = None if table is None else with_room(with_room(table, 1).T, 1).T
        self.page: Any = None if table is None else x.key.shape[1]
        room = packing.keys if self.page is None else 1
        self.query, self.key, self.value = (
            with_room(array, size) for array, size in ((x.query, packing.rows), (x.key, room), (x.value, room))
        )
        kv_tokens = x.key.shape[0] if table is None else table.shape[1] * self.page
        self.sequences = sequences_of(packing, lengths, self.tokens, kv_tokens)
        self.slopes, self.sinks, self.axes = lengths.alibi_slopes, x.sinks, axes_of(x.query)

    def of_heads(self, numbers: Array, block: Block) -> Array:
        """Repeat a number for each head of a block along its rows, (kv_heads, rows)."""
        numbers = numbers.astype(self.dtype).reshape(self.kv_heads, self.group)
        numbers = lax.dynamic_slice_in_dim(numbers, block.head, self.packing.heads)
        return jnp.repeat(numbers, self.packing.rows, axis=1)

    def start(self, block: Block) -> Array:
        """Return the first of the tokens that are read for a block, which may begin before it."""
        return jnp.minimum(block.first, self.query.shape[0] - self.packing.rows)

    def queries(self, block: Block) -> Array:
        """Return the numbers of the queries that are read for a block, from 0 at its first."""
        return self.start(block) - block.first + lax.iota(jnp.int32, self.packing.rows)

    def inside(self, block: Block) -> Array:
        queries = self.queries(block)
        return (queries >= 0) & (queries < block.length)

    def rows(self, array: Array, block: Block) -> Array:
        """Return the rows of a block of (tokens, heads, ...), with 0 outside of it, as (kv_heads, rows, ...)."""
        part = cut(array, self._at(array, block), self._shape(array))
        inside = self.inside(block).reshape(-1, *(1,) * (part.ndim - 1))
        part = jnp.where(inside, part, jnp.zeros((), part.dtype)).astype(self.dtype)
        part = part.reshape(self.packing.rows, self.packing.heads, self.group, *part.shape[2:])
        return jnp.moveaxis(part, 0, 2).reshape(self.packing.heads, -1, *part.shape[3:])

    def _at(self, array: Array, block: Block) -> tuple[Array | int, ...]:
        return self.start(block), self.group * block.head, *(0,) * (array.ndim - 2)

    def _shape(self, array: Array) -> tuple[int, ...]:
        return self.packing.rows, self.group * self.packing.heads, *array.shape[2:]

    def put(self, array: Array, block: Block, rows: Array) -> Array:
        """Write the rows of a block to (tokens, heads, ...)."""
        at, shape = self._at(array, block), self._shape(array)
        rows = rows.reshape(self.packing.heads, self.group, self.packing.rows, *rows.shape[2:])
        rows = jnp.moveaxis(rows, 2, 0).reshape(shape)
        inside = self.inside(block).reshape(-1, *(1,) * (rows.ndim - 1))
        return put(array, jnp.where(inside, rows, cut(array, at, shape)), at)

    def tile(self, block: Block, first: Array, stop: Array) -> Tile:
        """Return the tile of a block from key `first` on, in which the keys from `stop` on are hidden."""
        steps, begin = lax.iota(jnp.int32, self.packing.keys), self.sequences.kv_first[block.sequence]
        if self.page is None:
            place = jnp.minimum(begin + first, self.key.shape[0] - self.packing.keys)
            keys = place - begin + steps
            return Tile(block.head, place, keys, (keys >= first) & (keys < stop))
        keys, table = first + steps, self.table[block.sequence]
        columns = first // self.page + lax.iota(jnp.int32, self.packing.keys // self.page)
        numbers = table.at[jnp.minimum(columns, table.shape[0] - 1)].get(mode="promise_in_bounds")
        # Entries of the table beyond the last key may hold any number.
        place = jnp.clip(numbers, 0, self.key.shape[0] - 1).astype(jnp.int32)
        return Tile(block.head, place, keys, keys < stop)

    def over_tiles(self, block: Block, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Run `body(carry, tile)` on the tiles that hold the keys that a block sees."""
        first, stop = block.keys(self.packing, self.sequences.kv_length[block.sequence])
        if self.page is not None:
            first = first // self.page * self.page
        count = jnp.maximum(0, -(-(stop - first) // self.packing.keys))

        def step(index: Array, carry: Any) -> Any:
            return body(carry, self.tile(block, first + index * self.packing.keys, stop))

        return lax.fori_loop(0, count, step, varying(self.axes, carry))

    def over_blocks(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Run `body(carry, block)` on all heads of all blocks."""
        parts = self.kv_heads // self.packing.heads

        def step(index: Array, carry: Any) -> Any:
            return body(carry, self.sequences.block(index // parts, index % parts * self.packing.heads))

        return lax.fori_loop(0, parts * self.sequences.total, step, varying(self.axes, carry))

    def keys(self, tile: Tile) -> Array:
        """Return the keys of a tile, (keys, kv_heads, qk_dim)."""
        return tile.read(self.key, self.packing.heads).astype(self.dtype)

    def values(self, tile: Tile) -> Array:
        """Return the values of a tile, (keys, kv_heads, v_dim)."""
        return tile.read(self.value, self.packing.heads).astype(self.dtype)

    def scores(self, query: Array, tile: Tile) -> Array:
        """Multiply queries by keys, (kv_heads, rows, keys); 0 for another head times NaN would be NaN."""
        if not self.packing.spread:
            return contract("kqd,ckd->kqc", query, self.keys(tile))
        key = self.keys(tile)
        columns = jnp.einsum("kqd,kh->hdkq", query, jnp.eye(self.kv_heads, dtype=self.dtype))
        product = contract("cx,xy->cy", key.reshape(key.shape[0], -1), columns.reshape(key[0].size, -1))
        # Without the barrier XLA transposes the keys, which takes longer, to compute the transposed product.
        product = lax.optimization_barrier(product).T.reshape(*query.shape[:2], -1)

        def again() -> Array:
            return contract("kqd,ckd->kqc", query, self.keys(tile))  # To read again is faster than to pass the keys.

        return lax.cond(jnp.isfinite(jnp.sum(product)), lambda: product, again)

    def product(self, weights: Array, value: Array) -> Array:
        """Multiply weights by values, (kv_heads, rows, v_dim)."""
        if not self.packing.spread:
            return contract("kqc,ckv->kqv", weights, value)
        product = contract("rc,cx->rx", weights.reshape(-1, weights.shape[2]), value.reshape(value.shape[0], -1))
        return jnp.einsum("kqkv->kqv", product.reshape(*weights.shape[:2], *value.shape[1:]))

    def distances(self, block: Block, tile: Tile) -> Array:
        """Return the distance of each key from the position of each query, (queries, keys)."""
        return tile.keys - (block.position + self.queries(block))[:, None]

    def visible(self, block: Block, tile: Tile) -> Array:
        """Mark the visible pairs, (rows, keys)."""
        packing, distances = self.packing, self.distances(block, tile)
        visible = tile.inside & self.inside(block)[:, None]
        if packing.left is not None:
            visible &= distances >= -packing.left
        if packing.right is not None:
            visible &= distances <= packing.right
        return jnp.tile(visible, (self.group, 1))

    def logits(self, block: Block, tile: Tile, query: Array) -> tuple[Array, Array | None]:
        """Return the logits (kv_heads, rows, keys), -inf where hidden, and the slope of the cap."""
        packing = self.packing
        values = packing.scale * self.scores(query, tile)
        slope = None
        if packing.softcap is not None:
            tanh = jnp.tanh(values / packing.softcap)
            values, slope = packing.softcap * tanh, 1 - tanh**2
        if self.slopes is not None:
            distances = jnp.tile(abs(self.distances(block, tile)), (self.group, 1)).astype(self.dtype)
            values = values - self.of_heads(self.slopes, block)[..., None] * distances
        return jnp.where(self.visible(block, tile), values, -math.inf), slope


def _attend(packing: Packing, x: Packed, lengths: Lengths) -> tuple[Array, Array]:
    """Compute output (tokens, heads, v_dim) and lse (tokens, heads) in the softmax's type."""
    work = _Work(packing, x, lengths)
    rows, v_dim = (packing.heads, work.group * packing.rows), x.value.shape[-1]

    def body(carry: tuple[Array, Array], block: Block) -> tuple[Array, Array]:
        query = work.rows(work.query, block)
        sinks = jnp.full(rows, -math.inf, work.dtype) if work.sinks is None else work.of_heads(work.sinks, block)

        def step(carry: tuple[Array, ...], tile: Tile) -> tuple[Array, ...]:
            maximum, total, output = carry
            logits, _ = work.logits(block, tile, query)
            higher = jnp.maximum(maximum, jnp.max(logits, axis=-1))
            anchor = anchor_of(higher)
            weights, shrink = jnp.exp(logits - anchor[..., None]), jnp.exp(maximum - anchor)
            part = _product(work, weights, block, tile)
            return higher, shrink * total + jnp.sum(weights, -1), shrink[..., None] * output + part

        start = sinks, (sinks > -math.inf).astype(work.dtype), jnp.zeros((*rows, v_dim), work.dtype)
        maximum, total, output = work.over_tiles(block, step, start)
        output = output / jnp.where(total == 0, 1.0, total)[..., None]
        return work.put(carry[0], block, output), work.put(carry[1], block, anchor_of(maximum) + jnp.log(total))

    tokens = work.query.shape[:2]
    empty = jnp.zeros((*tokens, v_dim), work.dtype), jnp.full(tokens, -math.inf, work.dtype)
    output, lse = work.over_blocks(body, empty)
    return output[: work.tokens], lse[: work.tokens]


def _product(work: _Work, weights: Array, block: Block, tile: Tile) -> Array:
    """Multiply weights by values; only where the sum is not finite, stop hidden values that are not finite.

    (MHA-POISON-1, MHA-POISON-2, MHA-NAN-2)
    """
    product = work.product(weights, work.values(tile))

    def again() -> Array:
        value = work.values(tile)  # To read again is faster than to pass the values.
        visible = work.visible(block, tile).astype(value.dtype)
        broken = contract("qc,ckv->kqv", visible, (~jnp.isfinite(value)).astype(value.dtype))
        return jnp.where(broken > 0, math.nan, contract("kqc,ckv->kqv", weights, finite(value)))

    return lax.cond(jnp.isfinite(jnp.sum(product)), lambda: product, again)


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))


def _forward(packing: Packing, x: Packed, lengths: Lengths) -> tuple[tuple[Array, Array], tuple]:
    output, lse = _attention(packing, x, lengths)
    return (output, lse), (x, lengths, output, lse)


_SECOND = (
    "varlen_attention of mha_spec_jax has no second derivatives, because its loops have no fixed number of steps. "
    "attention with q_segment_ids and kv_segment_ids has them."
)
_in_reverse, _once = reverse_only("varlen_attention", _SECOND), differentiable_once(_SECOND)


def _backward(packing: Packing, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple[Packed, None]:
    x, lengths, output, lse = residuals
    x, output, lse, cotangents = jax.tree.map(_once, (x, output, lse, cotangents))
    return _gradients(packing, x, lengths, output, lse, *cotangents), None


_attention.defvjp(_forward, _backward)


def _gradients(
    packing: Packing, x: Packed, lengths: Lengths, output: Array, lse: Array, grad_output: Array, grad_lse: Array
) -> Packed:
    """Compute the gradients in the dtypes of the operands (MHA-VJP-1 to MHA-VJP-6).

    An empty row has output 0, so that nothing of its grad_output reaches D (MHA-EMPTY-3, MHA-POISON-1).
    """
    work = _Work(packing, x, lengths)
    relevant = jnp.where(jnp.isfinite(grad_output) | (output != 0), grad_output, 0.0)
    row_dot = jnp.sum(relevant * output, axis=-1) - grad_lse
    of_rows = [work.query, *(with_room(array, packing.rows) for array in (grad_output, anchor_of(lse), row_dot))]

    def body(carry: tuple[Array, Array, Array], block: Block) -> tuple[Array, Array, Array]:
        rows = _Rows(*(work.rows(array, block) for array in of_rows))
        clean = finite(rows.query), finite(rows.grad_output)

        def step(carry: tuple[Array, Array, Array], tile: Tile) -> tuple[Array, Array, Array]:
            of_key, of_value, of_query = carry
            logits, slope = work.logits(block, tile, rows.query)
            visible = work.visible(block, tile)
            weights = jnp.where(visible, jnp.exp(logits - rows.lse[..., None]), 0.0)
            grad_weights = contract("kqv,ckv->kqc", rows.grad_output, work.values(tile))
            grad_logits = jnp.where(visible, weights * (grad_weights - rows.row_dot[..., None]), 0.0)
            grad_scores = packing.scale * grad_logits
            if slope is not None:
                grad_scores = jnp.where(visible, grad_scores * slope, 0.0)
            of_query += contract("kqc,ckd->kqd", grad_scores, finite(work.keys(tile)))
            of_key = tile.add(of_key, contract("kqc,kqd->ckd", grad_scores, clean[0]))
            return of_key, tile.add(of_value, contract("kqc,kqv->ckv", weights, clean[1])), of_query

        of_query, of_key, of_value = carry
        start = of_key, of_value, jnp.zeros_like(rows.query)
        of_key, of_value, rows_of_query = work.over_tiles(block, step, start)
        return work.put(of_query, block, rows_of_query), of_key, of_value

    zeros = (jnp.zeros(array.shape, work.dtype) for array in (work.query, work.key, work.value))
    of_query, of_key, of_value = work.over_blocks(body, tuple(zeros))
    sinks: Any = None if x.sinks is None else _sink_gradient(x.sinks.astype(work.dtype), lse, row_dot)
    return Packed(
        of_query[: work.tokens].astype(x.query.dtype),
        of_key[: x.key.shape[0]].astype(x.key.dtype),
        of_value[: x.value.shape[0]].astype(x.value.dtype),
        None if x.sinks is None else sinks.astype(x.sinks.dtype),
    )


def _sink_gradient(sinks: Array, lse: Array, row_dot: Array) -> Array:
    """Return -sum over the rows of P_sink D (MHA-VJP-6); a token of no sequence has lse -inf in spite of the sink."""
    weights = jnp.where(lse == -math.inf, 0.0, jnp.exp(sinks - anchor_of(lse)))
    return -jnp.sum(jnp.where(weights == 0, 0.0, weights * row_dot), axis=0)


def _attend_partitioned(packing: Packing, x: Packed, lengths: Lengths) -> tuple[Array, Array]:
    """Compute output and lse (tokens, heads) of arrays that may lie on a mesh."""
    call = partitioned(lambda *arrays: _attention(packing, *alike(arrays)), x.query, (0, 1), (0, 1))
    return call(x, lengths)


@partial(jax.jit, static_argnums=0)
def attention(packing: Packing, x: Packed, lengths: Lengths) -> tuple[Array, Array]:
    """Compute output in the query's dtype, and lse (heads, tokens) in the softmax's (MHA-DTYPE-1, MHA-VARLEN-9)."""
    output, lse = _attend_partitioned(packing, jax.tree.map(_in_reverse, x), lengths)
    return output.astype(x.query.dtype), lse.T


@partial(jax.jit, static_argnums=0)
def vjp(packing: Packing, x: Packed, lengths: Lengths, grad_output: Array, grad_lse: Array | None) -> Packed:
    """Compute the gradients of `attention`, each in the dtype of its operand (MHA-VARLEN-11)."""
    (output, lse), pull = jax.vjp(lambda x: _attend_partitioned(packing, x, lengths), x)
    grad_lse = jnp.zeros_like(lse) if grad_lse is None else grad_lse.T.astype(lse.dtype)
    return pull(cotangents_of((output, lse), (grad_output.astype(output.dtype), grad_lse)))[0]
