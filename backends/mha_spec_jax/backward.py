"""The gradients in closed form, from output and lse of the forward pass, in blocks with memory of O(length)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from .block import contract, dropout_factor, hide, logits, over_blocks
from .problem import Operands, anchor_of, finite

if TYPE_CHECKING:
    from jax import Array

    from .block import Block
    from .problem import Constraints, Problem

__all__ = ["dot_of_rows", "gradients", "sink_gradient"]


def gradients(
    problem: Problem,
    x: Operands,
    constraints: Constraints,
    output: Array,
    lse: Array,
    grad_output: Array,
    grad_lse: Array,
) -> Operands:
    """Return the gradients of the operands, in their shapes and the softmax's type (MHA-VJP-1 to MHA-VJP-6).

    With output and lse over further keys, they are the part that the keys of this call add (MHA-SHARD-4).
    """
    row_dot = dot_of_rows(output, grad_output, grad_lse)
    lse = anchor_of(lse)
    work = _Backward(problem, x, constraints, lse, row_dot, grad_output)
    zeros = _transposed(jnp.zeros_like(x.key)), _transposed(jnp.zeros_like(x.value))
    sums = _Sums(*zeros, None if x.bias is None else jnp.zeros_like(x.bias))
    sums, query = over_blocks(problem, x, constraints, work.block, sums)
    sinks = None if x.sinks is None else sink_gradient(x.sinks, lse, row_dot)
    return Operands(query, _transposed(sums.key), _transposed(sums.value), sums.bias, sinks)


class _Sums(NamedTuple):
    """Gradients to which every block adds; key and value are (size, keys), for which products on a CPU are fastest."""

    key: Array
    value: Array
    bias: Array | None


class _Backward:
    """The inputs of every block, with zeros for non-finite numbers, which a weight of 0 would not stop."""

    def __init__(
        self, problem: Problem, x: Operands, constraints: Constraints, lse: Array, row_dot: Array, grad_output: Array
    ) -> None:
        self.problem, self.x, self.constraints = problem, x, constraints
        self.lse, self.row_dot, self.grad_output = lse, row_dot, grad_output
        self.clean_query, self.clean_key, self.clean_grad = x.query, x.key, grad_output
        if problem.excludes:
            self.clean_query, self.clean_key, self.clean_grad = finite(x.query), finite(x.key), finite(grad_output)

    def block(self, sums: _Sums, block: Block) -> tuple[_Sums, Array]:
        """Add the gradients of a block to the sums, and return the gradient of its queries."""
        dropped, grad_logits, grad_scores = self._block_gradients(block)
        of_key = contract("bkqd,bkqm->bkdm", block.of_rows(self.clean_query), grad_scores)
        of_value = contract("bkqd,bkqm->bkdm", block.of_rows(self.clean_grad), dropped)
        sums = _Sums(
            block.added_to_keys(sums.key, of_key),
            block.added_to_keys(sums.value, of_value),
            None if sums.bias is None else block.added_to_pairs(sums.bias, grad_logits),
        )
        return sums, contract("bkqm,bkmd->bkqd", grad_scores, block.of_keys(self.clean_key))

    def _block_gradients(self, block: Block) -> tuple[Array, Array, Array]:
        """Return the dropped weights, dS = P (dP - D), and dS times scale and slope of the cap (MHA-VJP-1, -2)."""
        problem, x, constraints = self.problem, self.x, self.constraints
        values, visible, slope = logits(problem, x, constraints, block, slope=True)
        weights = hide(jnp.exp(values - block.of_rows(self.lse)[..., None]), visible)
        grad_weights = contract("bkqd,bkmd->bkqm", block.of_rows(self.grad_output), block.of_keys(x.value))
        dropped, keep = weights, dropout_factor(problem, x, constraints, block)
        if keep is not None:
            dropped, grad_weights = weights * keep, grad_weights * keep
        grad_logits = hide(weights * (grad_weights - block.of_rows(self.row_dot)[..., None]), visible)
        grad_scores = problem.scale * grad_logits
        return dropped, grad_logits, grad_scores if slope is None else hide(grad_scores * slope, visible)


def _transposed(array: Array) -> Array:
    return jnp.swapaxes(array, 2, 3)


def dot_of_rows(output: Array, grad_output: Array, grad_lse: Array) -> Array:
    """Return D of each row less its grad_lse (MHA-VJP-1, MHA-LSE-3).

    An empty row has output 0, so that nothing of its grad_output reaches D (MHA-EMPTY-3, MHA-POISON-1).
    """
    relevant = jnp.where(jnp.isfinite(grad_output) | (output != 0), grad_output, 0.0)
    return jnp.sum(relevant * output, axis=-1) - grad_lse


def sink_gradient(sinks: Array, lse: Array, row_dot: Array) -> Array:
    """Return -sum over batch and rows of P_sink D (MHA-VJP-6)."""
    weights = jnp.exp(sinks - lse)
    return -jnp.sum(jnp.where(weights == 0, 0.0, weights * row_dot), axis=(0, 3), keepdims=True)
