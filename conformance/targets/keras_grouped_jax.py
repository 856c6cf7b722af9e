# /// script
# dependencies = ["jax==0.10.2", "keras==3.15.1"]
# ///
"""Keras' `GroupQueryAttention` with JAX, unchanged, as keras_grouped.py calls it."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from keras_grouped import arrays, conventions, dtypes, multi_head_attention, multi_head_attention_and_weights, supports

__all__ = ["arrays", "conventions", "dtypes", "multi_head_attention", "multi_head_attention_and_weights", "supports"]
