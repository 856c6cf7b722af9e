"""Two halves of one softmax."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from .problem import anchor_of

__all__ = ["merge"]


@jax.jit
def merge(output_a: jax.Array, lse_a: jax.Array, output_b: jax.Array, lse_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merge, with gradients that an empty half leaves finite (MHA-MERGE-1 to MHA-MERGE-3)."""
    anchor = anchor_of(jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b)))
    parts = [jnp.exp(lse - anchor) for lse in (lse_a, lse_b)]
    total = parts[0] + parts[1]
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    merged = jnp.where(empty, -math.inf, anchor + jnp.log(total))
    outputs = [
        jnp.where((lse == -math.inf)[..., None], 0.0, (part / total)[..., None] * output.astype(merged.dtype))
        for lse, part, output in zip((lse_a, lse_b), parts, (output_a, output_b), strict=True)
    ]
    return (outputs[0] + outputs[1]).astype(output_a.dtype), merged
