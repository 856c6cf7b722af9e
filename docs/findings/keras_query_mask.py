# /// script
# dependencies = ["jax==0.10.2", "keras==3.15.1"]
# ///
"""Keras: `layers.MultiHeadAttention` ignores its argument `query_mask`."""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np

tokens = np.random.default_rng(0).normal(size=(1, 3, 8)).astype("float32")
visible = np.array([[True, False, False]])
layer = keras.layers.MultiHeadAttention(2, 4)
plain = np.asarray(layer(tokens, tokens))
masked = np.asarray(layer(tokens, tokens, query_mask=visible))
equivalent = np.asarray(layer(tokens, tokens, attention_mask=np.repeat(visible[:, :, None], 3, axis=2)))
print("query_mask changes the output by", abs(masked - plain).max())  # 0.0
print("the same constraint as attention_mask, by", abs(equivalent - plain).max())  # more than 0.1
sys.exit(not (np.array_equal(masked, plain) and abs(equivalent - plain).max() > 0.1))
