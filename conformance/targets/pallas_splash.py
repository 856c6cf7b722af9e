# /// script
# dependencies = ["jax==0.10.2"]
# ///
"""JAX's Pallas kernel for TPUs, splash attention, unchanged, in interpret mode, which needs no TPU.

Its masks are those of causal attention and of windows, known when it is traced, for lengths that are multiples of 128.
It has no scale: the query is multiplied here.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import and_

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    CausalMask,
    FullMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

arrays = "jax"
dtypes = ("float32",)
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


@partial(jax.jit, static_argnames=("causal", "window", "scale", "softcap"))
def attention(
    query,
    key,
    value,
    *,
    causal=False,
    window=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    scale=None,
    softcap=None,
    sinks=None,
):
    """Call the kernel for every batch entry."""
    shape = query.shape[2], key.shape[2]
    constraints = [CausalMask(shape)] if causal else []
    constraints += [] if window is None else [LocalMask(shape, window, 0)]
    mask = reduce(and_, constraints) if constraints else FullMask(shape)
    masks = MultiHeadMask([mask] * query.shape[1])
    kernel = make_splash_mha(masks, head_shards=1, q_seq_shards=1, interpret=True, attn_logits_soft_cap=softcap)
    scaled = query * (query.shape[3] ** -0.5 if scale is None else scale)
    if q_segment_ids is None:
        return jax.vmap(lambda *operands: kernel(*operands, sinks=sinks))(scaled, key, value)
    ids = SegmentIds(q_segment_ids.astype("int32"), kv_segment_ids.astype("int32"))
    return jax.vmap(lambda *operands: kernel(*operands, sinks=sinks))(scaled, key, value, ids)


def attention_vjp(grad_output, query, key, value, **options):
    """Return the gradients of the kernel's backward pass."""
    return jax.vjp(lambda *operands: attention(*operands, **options), query, key, value)[1](grad_output)


features = ("causal", "window", "segments", "scale", "softcap")
