# /// script
# dependencies = ["flax==0.12.7", "jax==0.10.2"]
# ///
"""Flax's `linen.dot_product_attention`, its weights and `linen.MultiHeadDotProductAttention`, under `jax.jit`.

Its axes are (batch, length, heads, size), and keys have as many heads as queries. In 16 bits it keeps scores and
weights in 16 bits.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

arrays = "jax"
dtypes = ("float64", "float32")
layout = "bshd"
groups = False


def supports(question):
    """Refuse the layers that MultiHeadDotProductAttention cannot be."""
    if not question.function.startswith("multi_head_attention"):
        return True
    shapes = question.shapes
    if shapes["w_q"][2] != shapes["w_v"][2]:
        return "values have the size of keys"
    biases = [f"b_{name}" in shapes for name in "qkvo"]
    return all(biases) or not any(biases) or "all projections have biases, or none"


@jax.jit
def attention(query, key, value, *, mask=None, bias=None):
    """Call the function."""
    return nn.dot_product_attention(query, key, value, bias, mask)


@jax.jit
def attention_weights(query, key, *, mask=None, bias=None):
    """Call the function of the weights."""
    return nn.dot_product_attention_weights(query, key, bias, mask)


@jax.jit
def attention_vjp(grad_output, query, key, value, *, mask=None, bias=None):
    """Return the gradients of jax.vjp."""

    def forward(query, key, value, *bias):
        return attention(query, key, value, mask=mask, bias=bias[0] if bias else None)

    operands = (query, key, value) if bias is None else (query, key, value, bias)
    return jax.vjp(forward, *operands)[1](grad_output)


def multi_head_attention(query, key, value, params, *, mask=None):
    """Call the layer."""
    return call(query, key, value, params, mask)


def multi_head_attention_and_weights(query, key, value, params, *, mask=None):
    """Call the layer, which stores its weights among its intermediates."""
    output, state = call(query, key, value, params, mask, sow_weights=True, mutable=["intermediates"])
    return output, state["intermediates"]["attention_weights"][0]


def call(query, key, value, params, mask, **options):
    """Apply a layer that has these parameters."""
    _, heads, size = params["w_q"].shape
    layer = nn.MultiHeadDotProductAttention(
        heads,
        qkv_features=heads * size,
        out_features=params["w_o"].shape[2],
        use_bias="b_q" in params,
    )
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    kinds = {"kernel": "w", "bias": "b"}
    variables = {
        part: {
            kind: jnp.asarray(params[f"{letter}_{name}"])
            for kind, letter in kinds.items()
            if f"{letter}_{name}" in params
        }
        for part, name in names.items()
    }
    return layer.apply({"params": variables}, query, key, value, mask=mask, **options)
