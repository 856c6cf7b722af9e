"""The gradients, computed strip by strip of queries, each strip with every key that it sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mha_spec import steps
from mha_spec.arrays import device_of, dtype_name

from .operations import Scratch, added, dense, outer, without_hidden
from .parallel import each
from .strip import exponentials, strip_rows
from .tiling import Assembly, cut, part, rows_of, stacks, unfold

if TYPE_CHECKING:
    from mha_spec.arrays import Array
    from mha_spec.reference import Gradients

    from .problem import Block, Problem
    from .tiling import Tile

__all__ = ["gradients"]


@dataclass(slots=True)
class StackGradients:
    """The sums of the gradients of a stack over its strips, in the softmax's type."""

    key: Array
    """(entries, kv_heads, kv_len, qk_dim)."""
    value: Array
    """(entries, kv_heads, kv_len, v_dim)."""
    bias: Array | None
    """(entries, heads, q_len, kv_len), with size 1 along the axes on which the bias is broadcast."""
    sinks: Array | None
    """(heads,)."""


def gradients(problem: Problem, grad_output: Array, grad_lse: Array | None) -> Gradients:
    """Return the gradients of query, key, value, bias and sinks in their dtypes and shapes (MHA-DTYPE-2)."""
    a, like = problem.a, problem.query
    grad_output = dense(grad_output, dtype_name(like))
    grad_lse = None if grad_lse is None else dense(grad_lse, dtype_name(like))[..., None]
    assemblies = [Assembly(tuple(operand.shape), like) for operand in (a.query, a.key, a.value)]
    compute = partial(_gradients_of_stack, problem, grad_output, grad_lse, assemblies)
    sums = each(compute, stacks(a), a, tiny=problem.plan.is_tiny)
    grad_query, grad_key, grad_value = (
        steps.round_output(assembly.whole(), dtype_name(a.query)) for assembly in assemblies
    )
    grad_bias = None if a.bias is None else steps.round_output(_grad_bias(problem, sums), dtype_name(a.bias))
    grad_sinks = None if a.sinks is None else steps.round_output(_grad_sinks(problem, sums), dtype_name(a.sinks))
    return grad_query, grad_key, grad_value, grad_bias, grad_sinks


def _gradients_of_stack(
    problem: Problem,
    grad_output: Array,
    grad_lse: Array | None,
    assemblies: list[Assembly],
    stack: Tile,
    scratch: Scratch,
) -> StackGradients:
    """Write the gradients of query, key and value of a stack, and return those of bias and sinks."""
    grad_query, grad_key, grad_value = assemblies
    gradients = _zeros(problem, stack)
    for tile in cut(stack, strip_rows(problem.a)):
        scratch.clear()
        cotangent = rows_of(grad_output, tile)
        blocks, sink_exponentials, total = exponentials(problem, tile, scratch, cotangent)
        share = steps.normalise(problem.xp.ones_like(total), total)
        grad_weights, row_dot = _through_values(problem, tile, blocks, cotangent * share, gradients, scratch)
        if grad_lse is not None:
            row_dot = row_dot - rows_of(grad_lse, tile)
        grad_query.put(tile.box, _through_scores(problem, tile, grad_weights, row_dot * share, gradients))
        if sink_exponentials is not None:
            gradients.sinks += steps.grad_sinks(unfold(sink_exponentials * share, tile), unfold(row_dot, tile))
    grad_key.put(stack.matrices, gradients.key)
    grad_value.put(stack.matrices, gradients.value)
    return gradients


def _zeros(problem: Problem, stack: Tile) -> StackGradients:
    """Return zeros in the shapes of a stack's gradients."""
    a, xp, like = problem.a, problem.xp, problem.query
    key, value = (xp.zeros_like(operand[(*stack.matrices, ...)]) for operand in (problem.key, problem.value))
    bias = sinks = None
    if a.bias is not None:
        shape = (1 if size == 1 else full for full, size in zip(stack.unfolded, a.bias.shape[:3], strict=True))
        bias = xp.zeros((*shape, a.bias.shape[3]), dtype=like.dtype, device=device_of(like))
    if a.sinks is not None:
        sinks = xp.zeros((len(stack.heads),), dtype=like.dtype, device=device_of(like))
    return StackGradients(key, value, bias, sinks)


def _through_values(
    problem: Problem, tile: Tile, blocks: list[Block], shared: Array, gradients: StackGradients, scratch: Scratch
) -> tuple[list[tuple[Block, Array]], Array]:
    """Add dV; return each block with its dP, and D, the sum of P dP over the keys (MHA-VJP-1, MHA-VJP-3).

    The blocks hold exponentials, which are not divided by the sums of their rows: `shared`, dO / sum, is divided
    instead, because it is smaller.
    """
    xp, value = problem.xp, problem.value[(*tile.matrices, ...)]
    row_dot = problem.full(tile, 1, 0.0)
    blocks_and_gradients: list[tuple[Block, Array]] = []
    for block in blocks:
        keys, weights = part(block.keys), block.logits
        grad_weights = outer(shared, value[..., keys, :], scratch)
        grad_weights = without_hidden(problem.drop(tile, block.keys, grad_weights), block.visible, tile)
        row_dot += xp.vecdot(weights, grad_weights)[..., None]
        grad_value = block.transposed_product(problem.drop(tile, block.keys, weights), shared)
        gradients.value = added(gradients.value, (..., keys, slice(None)), grad_value)
        blocks_and_gradients.append((block, grad_weights))
    return blocks_and_gradients, row_dot


def _through_scores(
    problem: Problem,
    tile: Tile,
    blocks_and_gradients: list[tuple[Block, Array]],
    row_dot: Array,
    gradients: StackGradients,
) -> Array:
    """Add dK and dbias from dS = P (dP - D), and return dQ (MHA-VJP-1, MHA-VJP-2, MHA-VJP-5).

    dP and `row_dot` are divided by the sums of the rows, so that the exponentials stand for P.
    """
    query, key = problem.scaled(tile), problem.key[(*tile.matrices, ...)]
    grad_query = problem.xp.zeros_like(query)
    # The last blocks come first, because they are still in the core's cache.
    for block, grad_weights in reversed(blocks_and_gradients):
        keys, grad_logits = part(block.keys), grad_weights
        grad_logits -= row_dot
        grad_logits *= block.logits
        grad_logits = without_hidden(grad_logits, block.visible, block.tile)
        if gradients.bias is not None:
            gradients.bias = _with_block(gradients.bias, block, grad_logits)
        grad_scores = grad_logits
        if problem.a.softcap is not None:
            grad_scores = without_hidden(grad_logits * block.cap_slope, block.visible, block.tile)
        grad_query += block.product(grad_scores, key[..., keys, :])
        grad_key = block.transposed_product(grad_scores, query)
        gradients.key = added(gradients.key, (..., keys, slice(None)), grad_key)
    return problem.plan.scale * grad_query


def _with_block(grad_bias: Array, block: Block, grad_logits: Array) -> Array:
    """Add a block's dS to the gradient of the bias, summed over the axes on which the bias is broadcast (MHA-VJP-5)."""
    block_gradient = steps.grad_bias(unfold(grad_logits, block.tile), grad_bias.shape)
    queries, keys = (
        slice(None) if size == 1 else part(indices)
        for indices, size in zip((block.tile.queries, block.keys), grad_bias.shape[2:], strict=True)
    )
    return added(grad_bias, (slice(None), slice(None), queries, keys), block_gradient)


def _grad_bias(problem: Problem, sums: list[StackGradients]) -> Array:
    """Add up the bias gradients of the stacks."""
    bias: Array = problem.a.bias
    like = problem.query
    whole = problem.xp.zeros(tuple(bias.shape), dtype=like.dtype, device=device_of(like))
    for stack, gradients in zip(stacks(problem.a), sums, strict=True):
        entries = part(stack.entries) if bias.shape[0] > 1 else slice(None)
        heads = part(stack.heads) if bias.shape[1] > 1 else slice(None)
        whole = added(whole, (entries, heads, slice(None), slice(None)), gradients.bias)
    return whole


def _grad_sinks(problem: Problem, sums: list[StackGradients]) -> Array:
    """Add up the sink gradients of the stacks."""
    whole = problem.xp.zeros_like(problem.sinks)
    for stack, gradients in zip(stacks(problem.a), sums, strict=True):
        whole = added(whole, (part(stack.heads),), gradients.sinks)
    return whole
