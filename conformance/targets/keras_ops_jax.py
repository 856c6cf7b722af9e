# /// script
# dependencies = ["jax==0.10.2", "keras==3.15.1"]
# ///
"""Keras' `ops.dot_product_attention` with JAX, unchanged, as keras_ops.py calls it.

It computes float64 in float32.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

from keras_ops import arrays, attention, conventions, layout

__all__ = ["arrays", "attention", "conventions", "dtypes", "layout"]

dtypes = ("float32",)
