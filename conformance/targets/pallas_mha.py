# /// script
# dependencies = ["jax==0.10.2"]
# ///
"""JAX's Pallas kernel for GPUs, `mha`, unchanged, in interpret mode, which needs no GPU.

Its axes are (batch, length, heads, size). Its causal diagonal begins at the upper left; queries and keys share their
segments. The residual is the log-sum-exp to base 2, which `attention` does not return.
"""

from __future__ import annotations

import jax
import numpy
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

arrays = "jax"
dtypes = ("float32",)
layout = "bshd"
groups = False
conventions = {"causal_alignment": "upper_left"}

LARGEST = 128
BLOCKS = BlockSizes.get_default()


def supports(question):
    """Refuse the sizes and segments that the kernel does not have."""
    (_, q_len, _, size), (_, kv_len, _, _) = query, key = question.shapes["query"], question.shapes["key"]
    if 0 in query or 0 in key or size != key[3] or size != question.shapes["value"][3]:
        return "queries, keys and values have the same size, and no axis is empty"
    if any(length > LARGEST and length % LARGEST for length in (q_len, kv_len)):
        return f"lengths above {LARGEST} are multiples of {LARGEST}"
    ids = [question.arrays.get(f"{side}_segment_ids") for side in ("q", "kv")]
    return ids[0] is None or numpy.array_equal(*ids) or "queries and keys have the same segments"


def attention(query, key, value, *, causal=False, q_segment_ids=None, kv_segment_ids=None, scale=None):
    """Call the kernel."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return mha(query, key, value, q_segment_ids, scale, causal, BLOCKS, interpret=True)


def attention_vjp(grad_output, query, key, value, *, causal=False, scale=None):
    """Return the gradients of the kernel's backward pass."""
    return jax.vjp(lambda *operands: attention(*operands, causal=causal, scale=scale), query, key, value)[1](
        grad_output
    )
