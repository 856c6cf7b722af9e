# /// script
# dependencies = ["dm-haiku==0.0.17", "jax==0.10.2", "jmp==0.0.4", "tabulate==0.10.0"]
# ///
"""Haiku: a query of `MultiHeadAttention` that sees no key gives NaN in float16, and the mean elsewhere."""

import sys

import haiku
import jax
import jax.numpy as jnp


def attention(tokens, mask):
    """Apply the layer to tokens that are queries, keys and values."""
    return haiku.MultiHeadAttention(2, 4, w_init=haiku.initializers.Constant(0.125))(tokens, tokens, tokens, mask)


layer = haiku.without_apply_rng(haiku.transform(attention))
results = {}
for dtype in (jnp.bfloat16, jnp.float16):
    tokens, mask = jnp.ones((1, 3, 8), dtype), jnp.zeros((1, 1, 3, 3), bool)
    params = jax.tree.map(lambda array, dtype=dtype: array.astype(dtype), layer.init(jax.random.key(0), tokens, mask))
    results[dtype] = layer.apply(params, tokens, mask)[0, 0, 0]
    print(jnp.dtype(dtype).name, results[dtype])  # 1 in bfloat16, NaN in float16
sys.exit(not (jnp.isfinite(results[jnp.bfloat16]) and jnp.isnan(results[jnp.float16])))
