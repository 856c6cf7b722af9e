"""Attention in blocks, and the layer around it, for NumPy and every other library of the Python array API.

Results are those of `mha_spec.reference`, also where invisible pairs hold NaN. No array of q_len x kv_len is made, and
blocks that no query sees are skipped. Dropout is drawn from an integer seed.
"""

from mha_spec.cache import KVCache, PagedKVCache, WindowKVCache
from mha_spec.reference import merge_attention, merge_attention_vjp

from .core import attention, attention_vjp, attention_weights
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
from .module import MultiHeadAttention
from .varlen import varlen_attention, varlen_attention_vjp

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
