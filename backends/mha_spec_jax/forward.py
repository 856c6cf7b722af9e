"""The forward pass: the softmax of each block of queries over its whole stretch of keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from .block import contract, kept, logits, over_blocks, visible_in
from .plan import are_known, coarse
from .problem import anchor_of, finite

if TYPE_CHECKING:
    from jax import Array

    from .block import Block
    from .problem import Given, Operands, Problem

__all__ = ["attend", "softmax"]


FEW = 2**16
"""With so few scores values are always cleaned: a second program for when they must be takes long to compile."""


def attend(problem: Problem, x: Operands, given: Given) -> tuple[Array, Array]:
    """Output (batch, kv_heads, group, q_len, v_dim) and lse (batch, kv_heads, group, q_len).

    A value that is not finite and meets a weight of 0 shows in the output's sum; only then is the output worked again
    from clean values (MHA-POISON-1, MHA-POISON-2).
    """
    if not problem.excludes:
        return _attend(problem, x, given, clean=False)
    scores = math.prod(x.query.shape[:4]) * x.key.shape[2]
    if are_known(scores) and scores <= FEW:
        return _attend(problem, x, given, clean=True)
    output, lse = _attend(problem, x, given, clean=False)
    return lax.cond(jnp.isfinite(jnp.sum(output)), lambda: output, lambda: _again(problem, x, given)), lse


def _again(problem: Problem, x: Operands, given: Given) -> Array:
    """The output from clean values; drawn dropout has to see the very blocks in which it was drawn."""
    if given.dropout_key is None:
        problem = replace(problem, plan=coarse(problem.plan, x.key.shape[2]))
        given = given._replace(stretches=(None,) * len(problem.plan.groups))
    return _attend(problem, x, given, clean=True)[0]


def softmax(problem: Problem, x: Operands, given: Given, block: Block) -> tuple[Array, Array, Array]:
    """exp(logits - anchor) of a block, their sum with the sink's, and lse.

    A row that sees nothing has sum 1 and lse -inf (MHA-EMPTY-1, MHA-EMPTY-2).
    """
    values, _, _ = logits(problem, x, given, block)
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


def _attend(problem: Problem, x: Operands, given: Given, *, clean: bool) -> tuple[Array, Array]:
    def body(_: None, block: Block) -> tuple[None, tuple[Array, Array]]:
        exponentials, total, lse = softmax(problem, x, given, block)
        keep = kept(problem, x, given, block)
        dropped = exponentials if keep is None else exponentials * keep
        output = contract("bkqm,bkmd->bkqd", dropped, block.of_keys(value)) / total[..., None]
        return None, (_marked(problem, x, given, block, output) if clean else output, lse)

    value = finite(x.value) if clean else x.value
    return over_blocks(problem, x, given, body)[1]


def _marked(problem: Problem, x: Operands, given: Given, block: Block, output: Array) -> Array:
    """NaN where a visible pair has a value that is not finite (MHA-NAN-2)."""
    visible = visible_in(problem, x, given, block)
    if visible is None:
        return output
    visible = jnp.broadcast_to(visible, (*output.shape[:3], block.keys)).astype(output.dtype)
    broken = (~jnp.isfinite(block.of_keys(x.value))).astype(output.dtype)
    return jnp.where(contract("bkqm,bkmd->bkqd", visible, broken) > 0, math.nan, output)
