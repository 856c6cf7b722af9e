# /// script
# dependencies = ["jax==0.10.2", "keras==3.15.1"]
# ///
"""Keras with JAX: `layers.MultiHeadAttention(value_dim=...)` fails if `value_dim` is not `key_dim`."""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np

tokens = np.ones((1, 3, 8), "float32")
print("value_dim 4", keras.layers.MultiHeadAttention(2, key_dim=4, value_dim=4)(tokens, tokens).shape)
try:
    keras.layers.MultiHeadAttention(2, key_dim=4, value_dim=6)(tokens, tokens)
    error = None
except Exception as raised:
    error = raised
print("value_dim 6", type(error).__name__, str(error)[:160])
query, value = np.ones((0, 3, 2, 4), "float32"), np.ones((0, 3, 2, 6), "float32")
shape = keras.ops.dot_product_attention(query, query, value).shape
print("ops.dot_product_attention without a batch", shape)  # (0, 3, 2, 4); the value has the size 6
sys.exit(not (isinstance(error, TypeError) and "cannot reshape" in str(error) and shape == (0, 3, 2, 4)))
