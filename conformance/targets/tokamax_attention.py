# /// script
# dependencies = [
#     "einshape==1.0",
#     "immutabledict==4.3.1",
#     "jax==0.10.2",
#     "qwix==0.1.8",
#     "tokamax==0.0.12",
#     "typeguard==2.13.3",
# ]
# ///
"""tokamax' `dot_product_attention` under `jax.jit`, unchanged: the implementation that it chooses on a CPU.

Its axes are (batch, length, heads, size), and its causal diagonal begins at the upper left. It caps the scores after it
has added the bias, as its documentation says.
"""

from __future__ import annotations

from functools import partial

import jax
import tokamax

arrays = "jax"
dtypes = ("float32",)
layout = "bshd"
features = ("mask", "bias", "causal", "window", "q_lengths", "kv_lengths", "scale", "softcap")
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse windows that are bounded on one side."""
    return None not in (question.options.get("window") or ()) or "local_window_size bounds both sides"


@partial(jax.jit, static_argnames=("causal", "window", "scale", "softcap"))
def attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    causal=False,
    window=None,
    q_lengths=None,
    kv_lengths=None,
    scale=None,
    softcap=None,
):
    """Call the function."""
    return tokamax.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
        local_window_size=window,
        logits_soft_cap=softcap,
    )


def attention_vjp(grad_output, query, key, value, *, bias=None, **options):
    """Return the gradients of jax.vjp."""

    def forward(query, key, value, *bias):
        return attention(query, key, value, bias=bias[0] if bias else None, **options)

    operands = (query, key, value) if bias is None else (query, key, value, bias)
    gradients = jax.vjp(forward, *operands)[1](grad_output)
    return (*gradients, *[None] * (5 - len(gradients)))
