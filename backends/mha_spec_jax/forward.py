"""The forward pass: a softmax of each block of queries over its whole stretch of keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from .block import contract, dropout_factor, logits, over_blocks, visibility
from .plan import are_known, coarse
from .problem import anchor_of, finite

if TYPE_CHECKING:
    from jax import Array

    from .block import Block
    from .problem import Constraints, Operands, Problem

__all__ = ["attend", "softmax"]


FEW = 2**16
"""Up to this number of scores values are always cleaned, because a second, conditional program compiles slowly."""


def attend(problem: Problem, x: Operands, constraints: Constraints) -> tuple[Array, Array]:
    """Compute output (batch, kv_heads, group, q_len, v_dim) and lse (batch, kv_heads, group, q_len).

    A non-finite value makes the sum of the output non-finite, even at a weight of 0; only then is the output computed
    again from clean values (MHA-POISON-1, MHA-POISON-2).
    """
    if not problem.excludes:
        return _attend(problem, x, constraints, clean=False)
    scores = math.prod(x.query.shape[:4]) * x.key.shape[2]
    if are_known(scores) and scores <= FEW:
        return _attend(problem, x, constraints, clean=True)
    output, lse = _attend(problem, x, constraints, clean=False)
    return lax.cond(jnp.isfinite(jnp.sum(output)), lambda: output, lambda: _recompute(problem, x, constraints)), lse


def _recompute(problem: Problem, x: Operands, constraints: Constraints) -> Array:
    """Compute the output from clean values; random dropout needs the same blocks again, which its masks depend on."""
    if constraints.dropout_key is None:
        problem = replace(problem, plan=coarse(problem.plan, x.key.shape[2]))
        constraints = constraints._replace(stretches=(None,) * len(problem.plan.groups))
    return _attend(problem, x, constraints, clean=True)[0]


def softmax(problem: Problem, x: Operands, constraints: Constraints, block: Block) -> tuple[Array, Array, Array]:
    """Compute exp(logits - anchor) of a block, its sum including the sink, and lse.

    An empty row has sum 1 and lse -inf (MHA-EMPTY-1, MHA-EMPTY-2).
    """
    values, _, _ = logits(problem, x, constraints, block)
    sinks = None if x.sinks is None else block.of_rows(jnp.broadcast_to(x.sinks, x.query.shape[:4]))
    maximum = jnp.max(lax.stop_gradient(values), axis=-1, initial=-math.inf)
    if sinks is not None:
        maximum = jnp.maximum(maximum, lax.stop_gradient(sinks))
    anchor = anchor_of(maximum)
    exponentials = jnp.exp(values - anchor[..., None])
    total = jnp.sum(exponentials, axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - anchor)
    return exponentials, jnp.where(total == 0, 1.0, total), anchor + jnp.log(total)


def _attend(problem: Problem, x: Operands, constraints: Constraints, *, clean: bool) -> tuple[Array, Array]:
    def body(_: None, block: Block) -> tuple[None, tuple[Array, Array]]:
        exponentials, total, lse = softmax(problem, x, constraints, block)
        keep = dropout_factor(problem, x, constraints, block)
        dropped = exponentials if keep is None else exponentials * keep
        output = contract("bkqm,bkmd->bkqd", dropped, block.of_keys(value)) / total[..., None]
        return None, (_marked(problem, x, constraints, block, output) if clean else output, lse)

    value = finite(x.value) if clean else x.value
    return over_blocks(problem, x, constraints, body)[1]


def _marked(problem: Problem, x: Operands, constraints: Constraints, block: Block, output: Array) -> Array:
    """Set NaN where a visible pair has a non-finite value (MHA-NAN-2)."""
    visible = visibility(problem, x, constraints, block)
    if visible is None:
        return output
    visible = jnp.broadcast_to(visible, (*output.shape[:3], block.keys)).astype(output.dtype)
    broken = (~jnp.isfinite(block.of_keys(x.value))).astype(output.dtype)
    return jnp.where(contract("bkqm,bkmd->bkqd", visible, broken) > 0, math.nan, output)
