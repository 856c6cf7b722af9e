# /// script
# dependencies = ["equinox==0.13.8", "jax==0.10.2"]
# ///
"""Equinox's `nn.MultiheadAttention`, unchanged, under `jax.vmap`, since it takes a single batch entry.

Its masks are (q_len, kv_len) or (heads, q_len, kv_len), and keys have as many heads as queries. In 16 bits it keeps
scores and weights in 16 bits.
"""

from __future__ import annotations

import equinox
import jax
import jax.numpy as jnp

arrays = "jax"
dtypes = ("float64", "float32")
groups = False

PARTS = {"q": "query_proj", "k": "key_proj", "v": "value_proj", "o": "output_proj"}


def supports(question):
    """Refuse all but the layer."""
    return question.function == "multi_head_attention" or "only the layer is asked"


@jax.jit
def multi_head_attention(query, key, value, params, *, mask=None):
    """Call a layer that has these parameters for each batch entry."""
    (embed, heads, size), (*_, value_size) = params["w_q"].shape, params["w_v"].shape
    layer = equinox.nn.MultiheadAttention(
        heads,
        embed,
        params["w_k"].shape[0],
        params["w_v"].shape[0],
        params["w_o"].shape[2],
        size,
        value_size,
        use_query_bias="b_q" in params,
        use_key_bias="b_k" in params,
        use_value_bias="b_v" in params,
        use_output_bias="b_o" in params,
        dtype=query.dtype,
        key=jax.random.key(0),
    )
    for name, part in PARTS.items():
        weight = params[f"w_{name}"]
        weight = weight.reshape(-1, weight.shape[2]).T if name == "o" else weight.reshape(weight.shape[0], -1).T
        layer = equinox.tree_at(lambda tree, part=part: getattr(tree, part).weight, layer, weight)
        if f"b_{name}" in params:
            bias = params[f"b_{name}"].ravel()
            layer = equinox.tree_at(lambda tree, part=part: getattr(tree, part).bias, layer, bias)
    if mask is None:
        return jax.vmap(layer)(query, key, value)
    mask = jnp.broadcast_to(mask, (query.shape[0], mask.shape[1], query.shape[1], key.shape[1]))
    heads = heads if mask.shape[1] > 1 else None
    return jax.vmap(layer)(query, key, value, mask if heads else mask[:, 0])
