# /// script
# dependencies = ["jax==0.10.2", "keras==3.15.1"]
# ///
"""Keras: `return_attention_scores=True` changes the output of `layers.MultiHeadAttention` where a query sees no key."""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np

tokens = np.random.default_rng(0).normal(size=(1, 3, 8)).astype("float32")
nothing = np.zeros((1, 3, 3), bool)
layer = keras.layers.MultiHeadAttention(2, 4, use_bias=False)
plain = np.asarray(layer(tokens, tokens, attention_mask=nothing))
output, weights = map(np.asarray, layer(tokens, tokens, attention_mask=nothing, return_attention_scores=True))
print("without weights", abs(plain).max())  # not 0: the heads are the mean of the values
print("with weights", abs(output).max(), abs(weights).max())  # 0.0 0.0
sys.exit(not (abs(plain).max() > 0.01 and abs(output).max() == 0))
