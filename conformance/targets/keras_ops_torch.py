# /// script
# dependencies = ["keras==3.15.1", "torch==2.13.0"]
# ///
"""Keras' `ops.dot_product_attention` with PyTorch, unchanged, as keras_ops.py calls it.

It computes float64 in float32, and refuses a mask together with a bias.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

from keras_ops import arrays, attention, conventions, layout

__all__ = ["arrays", "attention", "conventions", "dtypes", "layout", "supports"]

dtypes = ("float32",)


def supports(question):
    """Refuse the calls that the backend refuses."""
    return not {"mask", "bias"} <= question.shapes.keys() or "a mask or a bias is passed, not both"
