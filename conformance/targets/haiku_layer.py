# /// script
# dependencies = ["dm-haiku==0.0.17", "jax==0.10.2", "jmp==0.0.4", "tabulate==0.10.0"]
# ///
"""Haiku's `MultiHeadAttention`, unchanged, under `jax.jit`.

All projections have biases, or none, and keys have as many heads as queries. In 16 bits it keeps scores and weights in
16 bits.
"""

from __future__ import annotations

import haiku
import jax

arrays = "jax"
dtypes = ("float64", "float32")
groups = False

PARTS = {"q": "query", "k": "key", "v": "value", "o": "linear"}


def supports(question):
    """Refuse the layers that MultiHeadAttention cannot be."""
    if question.function != "multi_head_attention":
        return "only the layer is asked"
    biases = [f"b_{name}" in question.shapes for name in PARTS]
    return all(biases) or not any(biases) or "all projections have biases, or none"


@jax.jit
def multi_head_attention(query, key, value, params, *, mask=None):
    """Apply a layer that has these parameters."""
    _, heads, size = params["w_q"].shape

    def attend(*operands):
        return haiku.MultiHeadAttention(
            heads,
            size,
            w_init=haiku.initializers.Constant(0),
            with_bias="b_q" in params,
            value_size=params["w_v"].shape[2],
            model_size=params["w_o"].shape[2],
            name="layer",
        )(*operands)

    layer = haiku.without_apply_rng(haiku.transform(attend))
    return layer.apply({f"layer/{part}": dense(params, name) for name, part in PARTS.items()}, query, key, value, mask)


def dense(params, name):
    """Return the parameters of a projection as a matrix and a vector."""
    weight = params[f"w_{name}"]
    weight = weight.reshape(-1, weight.shape[2]) if name == "o" else weight.reshape(weight.shape[0], -1)
    return {"w": weight} | ({"b": params[f"b_{name}"].ravel()} if f"b_{name}" in params else {})
