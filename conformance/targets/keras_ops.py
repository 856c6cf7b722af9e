# /// script
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0"]
# ///
"""Keras' `ops.dot_product_attention` with TensorFlow, unchanged.

Its axes are (batch, length, heads, size), and its causal diagonal begins at the upper left. In 16 bits it keeps scores
and weights in 16 bits. keras_ops_jax.py and keras_ops_torch.py ask other backends.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras

arrays = os.environ["KERAS_BACKEND"]
dtypes = ("float64", "float32")
layout = "bshd"
conventions = {"causal_alignment": "upper_left"}


def attention(query, key, value, *, mask=None, bias=None, causal=False, scale=None):
    """Call the function, which chooses its implementation."""
    return keras.ops.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale, is_causal=causal)
