# /// script
# dependencies = [
#     "einshape==1.0",
#     "immutabledict==4.3.1",
#     "jax==0.10.2",
#     "qwix==0.1.8",
#     "tensorboardx==2.6.5",
#     "tokamax==0.0.12",
#     "typeguard==2.13.3",
# ]
# ///
"""tokamax's `dot_product_attention` under `jax.jit`, unchanged, which takes its implementation `xla` on the CPU.

The causal diagonal begins at the upper left. The soft cap comes after the bias, as its documentation says, and on the
CPU the function refuses float16.
"""

from __future__ import annotations

from functools import partial

import jax
import tokamax

arrays = "jax"
layout = "bshd"
dtypes = ("float64", "float32", "bfloat16")
features = ("mask", "bias", "causal", "window", "q_lengths", "kv_lengths", "scale", "softcap")
conventions = {"causal_alignment": "upper_left"}

STATIC = ("causal", "window", "scale", "softcap")


def supports(question):
    """Refuse windows with a single bound."""
    window = question.options.get("window")
    return window is None or None not in window or "local_window_size must bound both sides"


@partial(jax.jit, static_argnames=(*STATIC, "implementation"))
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
    implementation=None,
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
        implementation=implementation,
    )


@partial(jax.jit, static_argnames=(*STATIC, "implementation"))
def attention_vjp(grad_output, query, key, value, *, bias=None, **options):
    """Return the gradients of jax.vjp."""

    def forward(query, key, value, *bias):
        return attention(query, key, value, bias=bias[0] if bias else None, **options)

    operands = (query, key, value) if bias is None else (query, key, value, bias)
    gradients = jax.vjp(forward, *operands)[1](grad_output)
    return (*gradients, *[None] * (5 - len(gradients)))
