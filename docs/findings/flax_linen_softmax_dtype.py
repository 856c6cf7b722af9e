# /// script
# dependencies = ["flax==0.12.7", "jax==0.10.2"]
# ///
"""Flax: with `force_fp32_for_softmax`, `linen.dot_product_attention` returns float32 for bfloat16."""

import sys

import flax.linen as nn
import jax.numpy as jnp

tokens = jnp.ones((1, 3, 2, 8), jnp.bfloat16)
plain = nn.dot_product_attention(tokens, tokens, tokens, dtype=jnp.bfloat16)
forced = nn.dot_product_attention(tokens, tokens, tokens, dtype=jnp.bfloat16, force_fp32_for_softmax=True)
print(plain.dtype, forced.dtype)  # bfloat16 float32
sys.exit(not (plain.dtype == jnp.bfloat16 and forced.dtype == jnp.float32))
