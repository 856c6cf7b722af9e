# /// script
# dependencies = ["jax==0.10.2"]
# ///
"""JAX: the gradient through the log-sum-exp of `jax.nn.dot_product_attention` is 0, without an error."""

import sys

import jax
import jax.numpy as jnp

query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 3, 1, 8))


def lse_of_jax(query):
    """Return the sum of the log-sum-exp."""
    return jax.nn.dot_product_attention(query, key, value, return_residual=True)[1].sum()


def lse(query):
    """Compute the same sum by hand."""
    return jax.nn.logsumexp(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5, axis=-1).sum()


print("lse", lse_of_jax(query), lse(query))  # the same
gradient, expected = jax.grad(lse_of_jax)(query), jax.grad(lse)(query)
print("largest gradient", abs(gradient).max(), "instead of", abs(expected).max())
sys.exit(not (abs(gradient).max() == 0 and abs(expected).max() > 0.1))
