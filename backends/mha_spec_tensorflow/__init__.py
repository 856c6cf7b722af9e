"""Attention for TensorFlow as `mha_spec.reference` defines it, in blocks of queries, with gradients in closed form.

The table in `function` shows which path a call takes. `tf.function(jit_compile=True)` drops assertions: shapes that are
unknown when a call is traced are then not compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.cache import KVCache, PagedKVCache, WindowKVCache

from .core import attention, attention_vjp, attention_weights, merge_attention, merge_attention_vjp
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
from .varlen import varlen_attention, varlen_attention_vjp

if TYPE_CHECKING:
    from .module import MultiHeadAttention

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
    "WindowKVCache",
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


def __getattr__(name: str) -> object:
    """Import the layer's class on first use, since it imports Keras."""
    if name == "MultiHeadAttention":
        from .module import MultiHeadAttention

        return MultiHeadAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
