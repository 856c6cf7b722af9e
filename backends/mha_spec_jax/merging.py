"""Merging of two halves of a softmax, differentiable in both modes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from mha_spec.arrays import softmax_dtype_name

from .mesh import cotangents_of
from .problem import anchor_of

if TYPE_CHECKING:
    from jax import Array

__all__ = ["Halves", "merge", "merge_vjp"]


class Halves(NamedTuple):
    """The operands of merge_attention, or their gradients."""

    output_a: Array
    lse_a: Array
    output_b: Array
    lse_b: Array


@jax.jit
def merge(halves: Halves) -> tuple[Array, Array]:
    """Compute the merged output and lse in the dtypes of the halves (MHA-MERGE-1 to MHA-MERGE-6)."""
    output, lse = _merged(*_widened(halves))
    return output.astype(halves.output_a.dtype), lse.astype(halves.lse_a.dtype)


@jax.jit
def merge_vjp(halves: Halves, grad_output: Array, grad_lse: Array | None) -> Halves:
    """Compute the gradients of the halves in their dtypes (MHA-MERGE-7)."""
    (output, lse), pull = jax.vjp(_merged, *_widened(halves))
    grad_lse = jnp.zeros_like(lse) if grad_lse is None else grad_lse.astype(lse.dtype)
    gradients = pull(cotangents_of((output, lse), (grad_output.astype(output.dtype), grad_lse)))
    return Halves(*(gradient.astype(half.dtype) for gradient, half in zip(gradients, halves, strict=True)))


def _widened(halves: Halves) -> Halves:
    """Convert the halves to the widest of their softmax's types."""
    wide = jnp.result_type(*(softmax_dtype_name(half.dtype.name) for half in halves))
    return Halves(*(half.astype(wide) for half in halves))


@jax.custom_jvp
def _merged(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Add the halves by their shares; an empty half adds nothing, even where it is not finite (MHA-MERGE-6)."""
    lse = _merged_lse(lse_a, lse_b)
    part_a, part_b = (
        jnp.where((half == -math.inf)[..., None], 0.0, _share(half, lse)[..., None] * output)
        for half, output in ((lse_a, output_a), (lse_b, output_b))
    )
    return jnp.where(jnp.isnan(lse)[..., None], math.nan, part_a + part_b), lse


@_merged.defjvp
def _differential(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[tuple, tuple]:
    """Return a differential that is linear in the tangents, whose transpose is the formula of MHA-MERGE-7.

    Each term ends with `where`, because its transpose stops a non-finite cotangent before an empty half.
    """
    (output_a, lse_a, output_b, lse_b), (d_output_a, d_lse_a, d_output_b, d_lse_b) = primals, tangents
    output, lse = _merged(*primals)
    share_a, share_b = _share(lse_a, lse), _share(lse_b, lse)
    full_a, full_b = lse_a != -math.inf, lse_b != -math.inf
    neither_empty = (full_a & full_b)[..., None]
    slope = jnp.where(neither_empty, (share_a * share_b)[..., None] * (output_a - output_b), 0.0)
    d_output = (
        jnp.where(full_a[..., None], share_a[..., None] * d_output_a, 0.0)
        + jnp.where(full_b[..., None], share_b[..., None] * d_output_b, 0.0)
        + jnp.where(neither_empty, slope * (d_lse_a - d_lse_b)[..., None], 0.0)
    )
    d_lse = jnp.where(full_a, share_a * d_lse_a, 0.0) + jnp.where(full_b, share_b * d_lse_b, 0.0)
    return (output, lse), (d_output, d_lse)


def _merged_lse(lse_a: Array, lse_b: Array) -> Array:
    """Return ln(exp lse_a + exp lse_b), NaN where an lse is +inf and the other half is not empty (MHA-MERGE-5)."""
    maximum = jnp.maximum(lse_a, lse_b)
    anchor = jnp.where(maximum == math.inf, math.nan, anchor_of(maximum))
    total = anchor + jnp.log(jnp.exp(lse_a - anchor) + jnp.exp(lse_b - anchor))
    return jnp.where(lse_a == -math.inf, lse_b, jnp.where(lse_b == -math.inf, lse_a, total))


def _share(half: Array, lse: Array) -> Array:
    """Return exp(half - lse), 1 where the other half is empty (MHA-MERGE-2)."""
    return jnp.exp(jnp.where(half == lse, 0.0, half - lse))
