"""The reference: every function of the specification, as SPEC.md writes it, on any library of the Python array API.

It is written to be read next to SPEC.md and is slow: it holds every score. `Reference` composes the steps of attention
(`mha_spec.steps`), and `mha_spec.layer.Layer` those of the layer (`mha_spec.layer_steps`).
"""

from __future__ import annotations

from .attention_reference import (
    Gradients,
    MergeGradients,
    Reference,
    Trace,
    attention,
    attention_vjp,
    attention_weights,
    merge_attention,
    merge_attention_vjp,
)
from .layer import (
    alibi_bias,
    alibi_slopes,
    append_cache,
    empty_cache,
    multi_head_attention,
    multi_head_attention_and_weights,
    multi_head_attention_weights,
    rotary_embedding,
)
from .varlen_reference import varlen_attention, varlen_attention_vjp

__all__ = [
    "Gradients",
    "MergeGradients",
    "Reference",
    "Trace",
    "alibi_bias",
    "alibi_slopes",
    "append_cache",
    "attention",
    "attention_vjp",
    "attention_weights",
    "empty_cache",
    "merge_attention",
    "merge_attention_vjp",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "multi_head_attention_weights",
    "rotary_embedding",
    "varlen_attention",
    "varlen_attention_vjp",
]
