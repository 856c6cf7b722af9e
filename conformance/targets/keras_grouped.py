"""Keras' `GroupQueryAttention` with TensorFlow, unchanged.

Its masks are (batch, q_len, kv_len), the same for all heads; lengths are passed as `key_mask`, and its causal diagonal
begins at the upper left. Values have the size of keys, the output has that of the query, and all biases exist or none.
"""

from __future__ import annotations

from keras_layer import call_layer, has_bias, keras

arrays = "tensorflow"
dtypes = ("float64", "float32", "float16", "bfloat16")
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse sizes and masks that the layer does not have."""
    if not question.function.startswith("multi_head_attention"):
        return "only the layer is asked"
    shapes = question.shapes
    if shapes["w_q"][2] != shapes["w_v"][2]:
        return "values have the size of keys"
    if shapes["w_q"][0] != shapes["w_o"][2]:
        return "the output has the size of the query"
    return True if shapes.get("mask", (1, 1))[1] == 1 else "attention_mask is the same for all heads"


def multi_head_attention(query, key, value, params, *, mask=None, causal=False, kv_lengths=None):
    """Compute the output."""
    return call(query, key, value, params, mask, causal, kv_lengths)


def multi_head_attention_and_weights(query, key, value, params, *, mask=None, causal=False, kv_lengths=None):
    """Compute the output and the weights of every head."""
    return call(query, key, value, params, mask, causal, kv_lengths, return_attention_scores=True)


def call(query, key, value, params, mask, causal, kv_lengths, **options):
    """Call a layer that has these parameters."""
    (_, heads, size), kv_heads = params["w_q"].shape, params["w_k"].shape[1]
    layer = keras.layers.GroupQueryAttention(size, heads, kv_heads, use_bias=has_bias(params), dtype=query.dtype.name)
    return call_layer(layer, query, key, value, params, mask, causal, kv_lengths, **options)
