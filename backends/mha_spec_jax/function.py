"""Attention as one function that jax compiles and differentiates."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from .backward import gradients
from .block import Block, shown, visible_in
from .forward import attend, softmax
from .problem import Given, Operands, Problem, folded, softmax_dtype, unfold
from .reverse import reverse_only

if TYPE_CHECKING:
    from jax import Array

__all__ = ["attention", "program", "vjp", "weights"]


_attention = jax.custom_vjp(attend, nondiff_argnums=(0,))


def _forward(problem: Problem, x: Operands, given: Given) -> tuple[tuple[Array, Array], tuple]:
    """Calling the function itself, not `attend`, gives the residuals these same gradients: they can be taken twice."""
    output, lse = _attention(problem, x, given)
    return (output, lse), (x, given, output, lse)


def _backward(problem: Problem, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    x, given, output, lse = residuals
    return gradients(problem, x, given, output, lse, *cotangents), None


_attention.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0)
def program(problem: Problem, x: Operands, given: Given) -> tuple[Array, Array]:
    """Output and lse of operands in the softmax's type."""
    if not problem.plan.groups:
        rows = x.query.shape[:3]
        return jnp.zeros((*rows, x.value.shape[3]), x.query.dtype), jnp.zeros(rows, x.query.dtype)
    output, lse = _attention(problem, *folded(jax.tree.map(reverse_only, x), given))
    return unfold(output), unfold(lse)


@partial(jax.jit, static_argnums=0)
def _pullback(problem: Problem, x: Operands, given: Given, grad_output: Array, grad_lse: Array | None) -> Operands:
    (_, lse), pull = jax.vjp(lambda x: program(problem, x, given), x)
    return pull((grad_output, jnp.zeros_like(lse) if grad_lse is None else grad_lse))[0]


@partial(jax.jit, static_argnums=0)
def _weights(problem: Problem, x: Operands, given: Given) -> Array:
    x, given = folded(x, given)
    block = Block(0, x.query.shape[3], 0, x.key.shape[2], x.query.shape[2])
    exponentials, total, _ = softmax(problem, _used(problem, x, given, block), given, block)
    return unfold(block.apart(exponentials / total[..., None]))


def _used(problem: Problem, x: Operands, given: Given, block: Block) -> Operands:
    """0 in queries and keys of no visible pair: the gradient of a product carries NaN through a 0 (MHA-POISON-1)."""
    visible = visible_in(problem, x, given, block)
    if visible is None:
        return x
    visible = jnp.broadcast_to(visible, (*x.key.shape[:2], block.rows, block.keys))
    rows, keys = block.apart(jnp.any(visible, 3)), jnp.any(visible, 2)
    return x._replace(query=shown(x.query, rows[..., None]), key=shown(x.key, keys[..., None]))


def attention(problem: Problem, operands: Operands, given: Given) -> tuple[Array, Array]:
    """Output in the query's dtype, and lse in the softmax's (MHA-DTYPE-1, MHA-LSE-2).

    What is compiled knows the softmax's type alone, so that three of the four dtypes share a program.
    """
    output, lse = program(problem, _cast(operands), given)
    return _as(output, operands.query), lse


def vjp(problem: Problem, operands: Operands, given: Given, grad_output: Array, grad_lse: Array | None) -> Operands:
    """The gradients that jax takes of `attention`, each in its operand's dtype (MHA-DTYPE-2)."""
    dtype = softmax_dtype(operands.query)
    grad_lse = None if grad_lse is None else grad_lse.astype(dtype)
    gradients = _pullback(problem, _cast(operands), given, grad_output.astype(dtype), grad_lse)
    return jax.tree.map(_as, gradients, operands)


def weights(problem: Problem, operands: Operands, given: Given) -> Array:
    """The normalised weights over all keys, before dropout (MHA-WEIGHTS-1)."""
    return _as(_weights(problem, _cast(operands), given), operands.query)


def _cast(operands: Operands) -> Operands:
    dtype = softmax_dtype(operands.query)
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), operands)


def _as(array: Array, like: Array) -> Array:
    """The array in the dtype of another; asking jax for the dtype that it has takes as long as a small call."""
    return array if array.dtype == like.dtype else array.astype(like.dtype)
