# /// script
# dependencies = ["jax==0.10.2"]
# ///
"""JAX's Pallas kernel for TPUs, `flash_attention`, unchanged, in interpret mode, which needs no TPU.

Its blocks have 128 queries and 128 keys, and its causal diagonal begins at the upper left. Its bias has all axes. The
kernel multiplies the bias by the scale, so that it is divided here.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

arrays = "jax"
dtypes = ("float32", "bfloat16")
groups = False
conventions = {"causal_alignment": "upper_left"}

BLOCK = 128


def supports(question):
    """Refuse the sizes that the kernel does not have."""
    shapes = question.shapes
    query, key = shapes["query"], shapes["key"]
    if query != (*key[:2], query[2], key[3]) or shapes["value"] != key:
        return "queries, keys and values have the same heads and sizes"
    return not (query[2] % BLOCK or key[2] % BLOCK or 0 in query) or f"lengths are multiples of {BLOCK}"


@partial(jax.jit, static_argnames=("causal", "scale"))
def attention(query, key, value, *, bias=None, causal=False, q_segment_ids=None, kv_segment_ids=None, scale=None):
    """Call the kernel."""
    lengths = query.shape[2], key.shape[2]
    ids = None if q_segment_ids is None else SegmentIds(q_segment_ids.astype("int32"), kv_segment_ids.astype("int32"))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    bias = None if bias is None else jnp.broadcast_to(bias / scale, (*query.shape[:2], *lengths))
    with pltpu.force_tpu_interpret_mode():
        return flash_attention(query, key, value, bias, ids, causal=causal, sm_scale=scale)


@partial(jax.jit, static_argnames=("causal", "scale"))
def attention_vjp(grad_output, query, key, value, *, causal=False, q_segment_ids=None, kv_segment_ids=None, scale=None):
    """Return the gradients of the kernel's backward pass."""
    options = {"causal": causal, "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids, "scale": scale}
    with pltpu.force_tpu_interpret_mode():
        return jax.vjp(lambda *operands: attention(*operands, **options), query, key, value)[1](grad_output)
