# /// script
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0"]
# ///
"""Keras' `MultiHeadAttention` with TensorFlow, unchanged.

keras_grouped.py asks `GroupQueryAttention`, and keras_layer_jax.py and keras_layer_torch.py ask other backends.

Its masks are (batch, q_len, kv_len), or have an axis of heads if nothing else hides keys; lengths are passed as
`key_mask`, and its causal diagonal begins at the upper left. All biases exist or none, and keys have as many heads as
queries.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras

arrays = os.environ["KERAS_BACKEND"]
dtypes = ("float64", "float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse calls that the layer does not have."""
    return takes_mask(question) if question.function.startswith("multi_head_attention") else "only the layer is asked"


def takes_mask(question):
    """Refuse masks of heads together with other constraints, which the layer computes without an axis of heads."""
    of_heads = question.shapes.get("mask", (1, 1))[1] > 1
    together = question.options.get("causal") or "kv_lengths" in question.arrays
    return "a mask of heads is the only constraint" if of_heads and together else True


def multi_head_attention(query, key, value, params, *, mask=None, causal=False, kv_lengths=None):
    """Compute the output."""
    return call(query, key, value, params, mask, causal, kv_lengths)


def multi_head_attention_and_weights(query, key, value, params, *, mask=None, causal=False, kv_lengths=None):
    """Compute the output and the weights of every head."""
    return call(query, key, value, params, mask, causal, kv_lengths, return_attention_scores=True)


def call(query, key, value, params, mask, causal, kv_lengths, **options):
    """Call a layer that has these parameters."""
    _, heads, size = params["w_q"].shape
    layer = keras.layers.MultiHeadAttention(
        heads,
        size,
        value_dim=params["w_v"].shape[2],
        use_bias=has_bias(params),
        output_shape=params["w_o"].shape[2],
        dtype=keras.backend.standardize_dtype(query.dtype),
    )
    return call_layer(layer, query, key, value, params, mask, causal, kv_lengths, **options)


def has_bias(params):
    """Tell whether the layer has biases: all of them, or none."""
    return any(name.startswith("b_") for name in params)


def call_layer(layer, query, key, value, params, mask, causal, kv_lengths, **options):
    """Give a layer its parameters, with 0 for missing biases, and call it."""
    layer.build(query.shape, value.shape, key.shape)
    parts = {"q": layer._query_dense, "k": layer._key_dense, "v": layer._value_dense, "o": layer._output_dense}
    for name, dense in parts.items():
        dense.kernel.assign(params[f"w_{name}"])
        if f"b_{name}" in params:
            dense.bias.assign(params[f"b_{name}"])
    return layer(
        query,
        value,
        key,
        attention_mask=mask if mask is None or mask.shape[1] > 1 else mask[:, 0],
        key_mask=None if kv_lengths is None else within(kv_lengths, key.shape[1]),
        use_causal_mask=causal,
        **options,
    )


def within(lengths, length):
    """Return which keys are before the end of each batch entry, (batch, length)."""
    return keras.ops.less(keras.ops.arange(length), keras.ops.expand_dims(keras.ops.convert_to_tensor(lengths), 1))
