"""Attention as a function that JAX compiles and differentiates."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from .backward import gradients
from .block import Block, hide, visibility
from .forward import attend, softmax
from .mesh import alike, axes_of, varying
from .problem import Constraints, Operands, Problem, folded, softmax_dtype, unfold
from .reverse import reverse_only

if TYPE_CHECKING:
    from jax import Array

__all__ = ["attention", "program", "vjp", "weights"]


_attention = jax.custom_vjp(attend, nondiff_argnums=(0,))
_in_reverse = reverse_only("attention", "A Hessian is jax.jacrev(jax.jacrev(...)).")


def _forward(problem: Problem, x: Operands, constraints: Constraints) -> tuple[tuple[Array, Array], tuple]:
    """Call `_attention`, not `attend`, so that gradients can be taken of the residuals again."""
    output, lse = _attention(problem, x, constraints)
    return (output, lse), (x, constraints, output, lse)


def _backward(problem: Problem, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    x, constraints, output, lse = residuals
    return gradients(problem, x, constraints, output, lse, *cotangents), None


_attention.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0)
def program(problem: Problem, x: Operands, constraints: Constraints) -> tuple[Array, Array]:
    """Compute output and lse of operands in the softmax's type."""
    if not problem.plan.groups:
        rows = x.query.shape[:3]
        return jnp.zeros((*rows, x.value.shape[3]), x.query.dtype), jnp.zeros(rows, x.query.dtype)
    output, lse = _attention(problem, *folded(*alike((jax.tree.map(_in_reverse, x), constraints))))
    return unfold(output), unfold(lse)


@partial(jax.jit, static_argnums=0)
def _pullback(
    problem: Problem, x: Operands, constraints: Constraints, grad_output: Array, grad_lse: Array | None
) -> Operands:
    (_, lse), pull = jax.vjp(lambda x: program(problem, x, constraints), x)
    cotangents = grad_output, jnp.zeros_like(lse) if grad_lse is None else grad_lse
    return pull(varying(axes_of(lse), cotangents))[0]


@partial(jax.jit, static_argnums=0)
def _weights(problem: Problem, x: Operands, constraints: Constraints) -> Array:
    x, constraints = folded(x, constraints)
    block = Block(0, x.query.shape[3], 0, x.key.shape[2], x.query.shape[2])
    exponentials, total, _ = softmax(problem, _without_unused(problem, x, constraints, block), constraints, block)
    return unfold(block.apart(exponentials / total[..., None]))


def _without_unused(problem: Problem, x: Operands, constraints: Constraints, block: Block) -> Operands:
    """Set queries and keys without a visible pair to 0, since the gradient of a product is NaN there (MHA-POISON-1)."""
    visible = visibility(problem, x, constraints, block)
    if visible is None:
        return x
    visible = jnp.broadcast_to(visible, (*x.key.shape[:2], block.rows, block.keys))
    rows, keys = block.apart(jnp.any(visible, 3)), jnp.any(visible, 2)
    return x._replace(query=hide(x.query, rows[..., None]), key=hide(x.key, keys[..., None]))


def attention(problem: Problem, operands: Operands, constraints: Constraints) -> tuple[Array, Array]:
    """Compute output in the query's dtype and lse in the softmax's (MHA-DTYPE-1, MHA-LSE-2).

    Programs are compiled for the softmax's type, so that three of the four dtypes share a program.
    """
    output, lse = program(problem, _in_softmax_dtype(operands), constraints)
    return _in_dtype_of(output, operands.query), lse


def vjp(
    problem: Problem, operands: Operands, constraints: Constraints, grad_output: Array, grad_lse: Array | None
) -> Operands:
    """Compute the gradients of `attention`, each in the dtype of its operand (MHA-DTYPE-2)."""
    dtype = softmax_dtype(operands.query)
    grad_lse = None if grad_lse is None else grad_lse.astype(dtype)
    gradients = _pullback(problem, _in_softmax_dtype(operands), constraints, grad_output.astype(dtype), grad_lse)
    return jax.tree.map(_in_dtype_of, gradients, operands)


def weights(problem: Problem, operands: Operands, constraints: Constraints) -> Array:
    """Compute the normalised weights over all keys, before dropout (MHA-WEIGHTS-1)."""
    return _in_dtype_of(_weights(problem, _in_softmax_dtype(operands), constraints), operands.query)


def _in_softmax_dtype(operands: Operands) -> Operands:
    dtype = softmax_dtype(operands.query)
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), operands)


def _in_dtype_of(array: Array, like: Array) -> Array:
    """Convert to the dtype of another array; `astype` to the same dtype would take as long as a small call."""
    return array if array.dtype == like.dtype else array.astype(like.dtype)
