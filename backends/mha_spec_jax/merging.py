"""Two halves of one softmax, and the gradients of their merging, which jax takes in either mode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from mha_spec.arrays import softmax_dtype_name

from .problem import anchor_of

if TYPE_CHECKING:
    from jax import Array

__all__ = ["Halves", "merge", "merge_vjp"]


class Halves(NamedTuple):
    """The operands of a merging, or the gradients of these."""

    output_a: Array
    lse_a: Array
    output_b: Array
    lse_b: Array


@jax.jit
def merge(halves: Halves) -> tuple[Array, Array]:
    """The merged output and lse in the dtypes of those of the halves (MHA-MERGE-1 to MHA-MERGE-6)."""
    output, lse = _merged(*_widened(halves))
    return output.astype(halves.output_a.dtype), lse.astype(halves.lse_a.dtype)


@jax.jit
def merge_vjp(halves: Halves, grad_output: Array, grad_lse: Array | None) -> Halves:
    """The gradients of the halves in their dtypes (MHA-MERGE-7)."""
    (output, lse), pull = jax.vjp(_merged, *_widened(halves))
    grad_lse = jnp.zeros_like(lse) if grad_lse is None else grad_lse.astype(lse.dtype)
    gradients = pull((grad_output.astype(output.dtype), grad_lse))
    return Halves(*(gradient.astype(half.dtype) for gradient, half in zip(gradients, halves, strict=True)))


def _widened(halves: Halves) -> Halves:
    """The halves in the widest of their softmax's types."""
    wide = jnp.result_type(*(softmax_dtype_name(half.dtype.name) for half in halves))
    return Halves(*(half.astype(wide) for half in halves))


@jax.custom_jvp
def _merged(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """An empty half adds nothing, and of anything that is not finite where it has no share of 0 (MHA-MERGE-6)."""
    lse = _merged_lse(lse_a, lse_b)
    part_a, part_b = (
        jnp.where((half == -math.inf)[..., None], 0.0, _share(half, lse)[..., None] * output)
        for half, output in ((lse_a, output_a), (lse_b, output_b))
    )
    return jnp.where(jnp.isnan(lse)[..., None], math.nan, part_a + part_b), lse


@_merged.defjvp
def _differential(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[tuple, tuple]:
    """Linear in the tangents, so that its transpose is MHA-MERGE-7 as it is written there.

    `where` is the last step of each term: its transpose hides a cotangent that is not finite from an empty half.
    """
    (output_a, lse_a, output_b, lse_b), (of_output_a, of_lse_a, of_output_b, of_lse_b) = primals, tangents
    output, lse = _merged(*primals)
    share_a, share_b = _share(lse_a, lse), _share(lse_b, lse)
    full_a, full_b = lse_a != -math.inf, lse_b != -math.inf
    both = (full_a & full_b)[..., None]
    slope = jnp.where(both, (share_a * share_b)[..., None] * (output_a - output_b), 0.0)
    of_output = (
        jnp.where(full_a[..., None], share_a[..., None] * of_output_a, 0.0)
        + jnp.where(full_b[..., None], share_b[..., None] * of_output_b, 0.0)
        + jnp.where(both, slope * (of_lse_a - of_lse_b)[..., None], 0.0)
    )
    of_lse = jnp.where(full_a, share_a * of_lse_a, 0.0) + jnp.where(full_b, share_b * of_lse_b, 0.0)
    return (output, lse), (of_output, of_lse)


def _merged_lse(lse_a: Array, lse_b: Array) -> Array:
    """lse = ln(exp lse_a + exp lse_b), NaN where one is +inf and the other half is not empty (MHA-MERGE-5)."""
    maximum = jnp.maximum(lse_a, lse_b)
    anchor = jnp.where(maximum == math.inf, math.nan, anchor_of(maximum))
    both = anchor + jnp.log(jnp.exp(lse_a - anchor) + jnp.exp(lse_b - anchor))
    return jnp.where(lse_a == -math.inf, lse_b, jnp.where(lse_b == -math.inf, lse_a, both))


def _share(half: Array, lse: Array) -> Array:
    """exp(half - lse), 1 beside an empty half (MHA-MERGE-2)."""
    return jnp.exp(jnp.where(half == lse, 0.0, half - lse))
