# /// script
# dependencies = ["jax==0.10.2", "keras==3.15.1"]
# ///
"""Keras' `MultiHeadAttention` with JAX, unchanged, as keras_layer.py calls it."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from keras_layer import (
    arrays,
    conventions,
    dtypes,
    groups,
    multi_head_attention,
    multi_head_attention_and_weights,
    supports,
)

__all__ = [
    "arrays",
    "conventions",
    "dtypes",
    "groups",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "supports",
]
