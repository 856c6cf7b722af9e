# /// script
# dependencies = ["flax==0.12.7", "jax==0.10.2"]
# ///
"""Flax: `nnx.dot_product_attention` with `is_causal` and a padding mask fails as soon as dropout is asked."""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

tokens, mask = jnp.ones((2, 5, 2, 8)), jnp.ones((2, 1, 1, 5), bool)
print("without dropout", nnx.dot_product_attention(tokens, tokens, tokens, mask=mask, is_causal=True).shape)
options = {"mask": mask, "is_causal": True, "dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
try:
    nnx.dot_product_attention(tokens, tokens, tokens, **options)
    error = None
except Exception as raised:
    error = raised
print("with dropout", type(error).__name__, str(error)[:160])
sys.exit(not (isinstance(error, ValueError) and "broadcasting" in str(error)))
