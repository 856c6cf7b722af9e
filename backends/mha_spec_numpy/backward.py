"""The gradients: strip by strip of queries, each strip against every key that it can see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mha_spec import steps
from mha_spec.arrays import device_of, dtype_name

from .operations import Room, added, dense, outer, product, shown
from .parallel import each
from .strip import exponentials, strips
from .tiling import Assembly, fold, heads, part, stacked, unfold

if TYPE_CHECKING:
    from mha_spec.arrays import Array
    from mha_spec.reference import Gradients

    from .problem import Block, Problem
    from .tiling import Tile

__all__ = ["gradients"]


@dataclass(slots=True)
class HeadGradients:
    """What the strips of one batch entry and key/value head have given so far, in the softmax's type."""

    key: Array
    """(kv_len, qk_dim)."""
    value: Array
    """(kv_len, v_dim)."""
    bias: Array | None
    """(1, group, q_len, kv_len), 1 for each axis along which the bias is broadcast."""
    sinks: Array
    """(group,)."""


def gradients(problem: Problem, grad_output: Array, grad_lse: Array | None) -> Gradients:
    """The gradients of query, key, value, bias and sinks, each of its operand's dtype and shape (MHA-DTYPE-2)."""
    a, like = problem.a, problem.query
    grad_output = dense(grad_output, dtype_name(like))
    grad_lse = None if grad_lse is None else dense(grad_lse, dtype_name(like))[..., None]
    grad_query = Assembly(a, (a.query.shape[3],), like)
    parts = each(partial(_head_gradients, problem, grad_output, grad_lse, grad_query, Room()), heads(a), a)

    grad_key = stacked([head.key for head in parts], tuple(a.key.shape), like)
    grad_value = stacked([head.value for head in parts], tuple(a.value.shape), like)
    grad_sinks = problem.xp.sum(stacked([head.sinks for head in parts], (a.batch, a.heads), like), axis=0)
    of_query, of_key, of_value = (
        steps.round_output(gradient, dtype_name(a.query)) for gradient in (grad_query.whole(), grad_key, grad_value)
    )
    of_bias = None if a.bias is None else steps.round_output(_grad_bias(problem, parts, a.bias), dtype_name(a.bias))
    of_sinks = None if a.sinks is None else steps.round_output(grad_sinks, dtype_name(a.sinks))
    return of_query, of_key, of_value, of_bias, of_sinks


def _head_gradients(
    problem: Problem,
    grad_output: Array,
    grad_lse: Array | None,
    grad_query: Assembly,
    room: Room,
    head: tuple[int, int],
) -> HeadGradients:
    a, xp, like = problem.a, problem.xp, problem.query
    key, value = problem.key[(*head, ...)], problem.value[(*head, ...)]
    group = a.heads // a.kv_heads
    bias = None
    if a.bias is not None:
        bias = xp.zeros((1, min(group, a.bias.shape[1]), *a.bias.shape[2:]), dtype=like.dtype, device=device_of(like))
    sinks = xp.zeros((group,), dtype=like.dtype, device=device_of(like))
    gradients = HeadGradients(xp.zeros_like(key), xp.zeros_like(value), bias, sinks)
    for tile in strips(a, [head]):
        room.clear()
        blocks, of_sink, total = exponentials(problem, tile, slope=True, room=room)
        share = steps.normalise(xp.ones_like(total), total)
        weighed, row_dot = _through_values(problem, tile, blocks, fold(grad_output, tile) * share, gradients, room)
        if grad_lse is not None:
            row_dot = row_dot - fold(grad_lse, tile)
        grad_query.put(tile, _through_scores(problem, tile, weighed, row_dot * share, gradients))
        of_sinks = steps.grad_sinks(unfold(of_sink * share, tile)[None, ...], unfold(row_dot, tile)[None, ...])
        gradients.sinks = gradients.sinks + of_sinks
    return gradients


def _through_values(
    problem: Problem, tile: Tile, blocks: list[Block], shared: Array, gradients: HeadGradients, room: Room
) -> tuple[list[tuple[Block, Array]], Array]:
    """Add dV; give each block with its dP, and D, the sum of P dP over the keys (MHA-VJP-1, MHA-VJP-3).

    Blocks hold exponentials: what divides them, the sum of their row, `shared` = dO / sum has taken, and so has dP.
    """
    xp, rate, value = problem.xp, problem.a.dropout_rate, problem.value[tile.batch, tile.kv_head, ...]
    row_dot = xp.zeros((tile.rows, 1), dtype=value.dtype, device=device_of(value))
    weighed: list[tuple[Block, Array]] = []
    for block in blocks:
        keys, weights, visible, _ = block
        keep = problem.keep(tile, keys)
        grad_weights = shown(steps.drop(outer(shared, value[part(keys), :], room), keep, rate), visible)
        row_dot += xp.vecdot(weights, grad_weights)[:, None]
        dropped = xp.matrix_transpose(steps.drop(weights, keep, rate))
        of_value = product(dropped, shared, _transposed(problem, visible))
        gradients.value = added(gradients.value, (part(keys), slice(None)), of_value)
        weighed.append((block, grad_weights))
    return weighed, row_dot


def _through_scores(
    problem: Problem, tile: Tile, weighed: list[tuple[Block, Array]], row_dot: Array, gradients: HeadGradients
) -> Array:
    """Add dK and dbias of dS = P (dP - D), and give dQ (MHA-VJP-1, MHA-VJP-2, MHA-VJP-5).

    The sum by which P is divided is in dP and `row_dot`. The last blocks come first: they are still in the cache.
    """
    xp = problem.xp
    query, key = problem.scaled(tile), problem.key[tile.batch, tile.kv_head, ...]
    grad_query = xp.zeros_like(query)
    for (keys, weights, visible, cap_slope), grad_weights in reversed(weighed):
        grad_logits = grad_weights
        grad_logits -= row_dot
        grad_logits *= weights
        grad_logits = shown(grad_logits, visible)
        if gradients.bias is not None:
            gradients.bias = _with_block(gradients.bias, tile, keys, grad_logits)
        grad_scores = grad_logits if problem.a.softcap is None else shown(grad_logits * cap_slope, visible)
        grad_query += product(grad_scores, key[part(keys), :], visible)
        of_key = product(xp.matrix_transpose(grad_scores), query, _transposed(problem, visible))
        gradients.key = added(gradients.key, (part(keys), slice(None)), of_key)
    return problem.scale * grad_query


def _transposed(problem: Problem, visible: Array | None) -> Array | None:
    return None if visible is None else problem.xp.matrix_transpose(visible)


def _with_block(grad_bias: Array, tile: Tile, keys: range, grad_logits: Array) -> Array:
    """Add to a bias gradient what a block gives, summed over the axes along which the bias is broadcast (MHA-VJP-5)."""
    of_block = steps.grad_bias(unfold(grad_logits, tile)[None, ...], grad_bias.shape)
    places = (range(tile.group), tile.queries, keys)
    where = (
        slice(None),
        *(slice(None) if size == 1 else part(place) for place, size in zip(places, grad_bias.shape[1:], strict=True)),
    )
    return added(grad_bias, where, of_block)


def _grad_bias(problem: Problem, parts: list[HeadGradients], bias: Array) -> Array:
    """Sum what the heads give to the gradient of the bias, in their order."""
    a, like = problem.a, problem.query
    whole = problem.xp.zeros(tuple(bias.shape), dtype=like.dtype, device=device_of(like))
    group = a.heads // a.kv_heads
    for (batch, kv_head), head in zip(heads(a), parts, strict=True):
        entry = slice(batch, batch + 1) if bias.shape[0] > 1 else slice(None)
        of_head = slice(kv_head * group, (kv_head + 1) * group) if bias.shape[1] > 1 else slice(None)
        whole = added(whole, (entry, of_head, slice(None), slice(None)), head.bias)
    return whole
