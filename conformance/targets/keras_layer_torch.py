# /// script
# dependencies = ["keras==3.15.1", "torch==2.13.0"]
# ///
"""Keras' `MultiHeadAttention` with PyTorch, unchanged, as keras_layer.py calls it."""

import os

os.environ["KERAS_BACKEND"] = "torch"

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
