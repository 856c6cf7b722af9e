# /// script
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0"]
# ///
"""Keras with TensorFlow: `ops.dot_product_attention` fails with a single head of keys and values."""

import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np

query = np.ones((1, 3, 4, 8), "float32")
print("2 heads of keys", keras.ops.dot_product_attention(query, query[:, :, :2], query[:, :, :2]).shape)
try:
    keras.ops.dot_product_attention(query, query[:, :, :1], query[:, :, :1])
    error = None
except Exception as raised:
    error = raised
print("1 head of keys", type(error).__name__, str(error)[:160])
sys.exit(type(error).__name__ != "InvalidArgumentError")
