# /// script
# dependencies = ["keras==3.15.1", "torch==2.13.0"]
# ///
"""Keras with PyTorch: `layers.MultiHeadAttention(dtype="float64")` computes the attention in float32."""

import os
import sys

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

rng = np.random.default_rng(0)
tokens = rng.normal(size=(1, 5, 8))
layer = keras.layers.MultiHeadAttention(2, 4, use_bias=False, dtype="float64")
output = layer(tokens, tokens)
parts = (layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense)
w_q, w_k, w_v, w_o = (part.kernel.numpy().astype("float64") for part in parts)
query, key, value = (np.einsum("bte,ehd->bhtd", tokens, weight) for weight in (w_q, w_k, w_v))
weights = np.exp(query @ key.swapaxes(2, 3) / 2)
heads = weights / weights.sum(-1, keepdims=True) @ value
error = abs(output.detach().numpy() - np.einsum("bhtd,hde->bte", heads, w_o)).max()
print(output.dtype, "with an error of", error)  # torch.float64, 1e-8 to 1e-7; NumPy has 1e-16
sys.exit(not (str(output.dtype) == "torch.float64" and error > 1e-9))
