# /// script
# dependencies = ["jax==0.10.2"]
# ///
"""JAX's `jax.nn.dot_product_attention` under `jax.jit`, unchanged.

Its axes are (batch, length, heads, size), and its causal diagonal begins at the upper left. For float64 it computes the
softmax in float32, and on the CPU it refuses float16.
"""

from __future__ import annotations

from functools import partial

import jax

arrays = "jax"
dtypes = ("float32", "bfloat16")
features = ("mask", "bias", "causal", "window", "q_lengths", "kv_lengths", "scale")
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse the log-sum-exp in bfloat16, because every case of it would fail for the same reason."""
    asks_lse = "lse" in question.outputs or "grad_lse" in question.arrays
    return "the log-sum-exp has the type of the query" if asks_lse and question.dtype == "bfloat16" else True


@partial(jax.jit, static_argnames=("causal", "window", "scale", "return_lse"))
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
    return_lse=False,
):
    """Call jax.nn, which chooses its implementation."""
    if query.shape[3] != value.shape[3]:
        raise NotImplementedError("query, key and value must have the same head size")
    if window is not None and None in window:
        raise NotImplementedError("local_window_size must bound both sides")
    result = jax.nn.dot_product_attention(
        query.swapaxes(1, 2),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
        local_window_size=window,
        return_residual=return_lse,
    )
    if isinstance(result, tuple):
        return tuple(x.swapaxes(1, 2) for x in result)
    return result.swapaxes(1, 2)


@partial(jax.jit, static_argnames=("causal", "window", "scale"))
def attention_vjp(grad_output, query, key, value, *, bias=None, grad_lse=None, **options):
    """Return the gradients of jax.vjp, also through lse if its cotangent is passed."""

    def forward(query, key, value, *bias):
        return attention(query, key, value, bias=bias[0] if bias else None, return_lse=grad_lse is not None, **options)

    operands = (query, key, value) if bias is None else (query, key, value, bias)
    gradients = jax.vjp(forward, *operands)[1](grad_output if grad_lse is None else (grad_output, grad_lse))
    return (*gradients, *[None] * (5 - len(gradients)))
