# /// script
# dependencies = ["keras==3.15.1", "tensorflow-cpu==2.21.0"]
# ///
"""Keras' `GroupQueryAttention` with TensorFlow, unchanged.

It has the masks, lengths, alignment and biases of keras_layer.py. Values have the size of keys, and the output has that
of the query: parameters of smaller sizes are passed with zeros at their end.
"""

from __future__ import annotations

from keras_layer import arrays, call_layer, has_bias, keras, takes_mask

__all__ = ["arrays"]

dtypes = ("float64", "float32", "float16", "bfloat16")
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse sizes and masks that the layer does not have."""
    if not question.function.startswith("multi_head_attention"):
        return "only the layer is asked"
    shapes = question.shapes
    if shapes["w_q"][2] < shapes["w_v"][2] or shapes["w_q"][0] < shapes["w_o"][2]:
        return "values are no larger than keys, and the output is no larger than the query"
    return takes_mask(question)


def multi_head_attention(query, key, value, params, *, mask=None, causal=False, kv_lengths=None):
    """Compute the output."""
    return call(query, key, value, params, mask, causal, kv_lengths)


def multi_head_attention_and_weights(query, key, value, params, *, mask=None, causal=False, kv_lengths=None):
    """Compute the output and the weights of every head."""
    return call(query, key, value, params, mask, causal, kv_lengths, return_attention_scores=True)


def call(query, key, value, params, mask, causal, kv_lengths, **options):
    """Call a layer that has these parameters."""
    (embed, heads, size), kv_heads = params["w_q"].shape, params["w_k"].shape[1]
    layer = keras.layers.GroupQueryAttention(
        size, heads, kv_heads, use_bias=has_bias(params), dtype=keras.backend.standardize_dtype(query.dtype)
    )
    results = call_layer(layer, query, key, value, padded(params, size, embed), mask, causal, kv_lengths, **options)
    output, *weights = results if isinstance(results, tuple) else (results,)
    output = output[..., : params["w_o"].shape[2]]
    return (output, *weights) if weights else output


def padded(params, size, embed):
    """Append zeros to the values of each head up to `size`, and to the output up to `embed`."""
    ends = {"w_v": {2: size}, "b_v": {1: size}, "w_o": {1: size, 2: embed}, "b_o": {0: embed}}

    def pad(array, sizes):
        return keras.ops.pad(array, [(0, sizes.get(axis, length) - length) for axis, length in enumerate(array.shape)])

    return {**params, **{name: pad(params[name], sizes) for name, sizes in ends.items() if name in params}}
