"""Attention for PyTorch, and the layer around it, with the meaning of `mha_spec.reference`.

On the CPU, attention runs by torch's flash kernel where that has the same meaning; the table in `paths` says which path
a call takes. Lengths, offsets and segment ids that can be read (numbers, sequences, NumPy arrays, tensors on the CPU)
become ranges of keys, and pairs outside of them are not computed.
"""

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
from .module import MultiHeadAttention
from .sharded import all_to_all_attention, ring_attention, sharded_kv_attention
from .varlen import varlen_attention, varlen_attention_vjp

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
    "WindowKVCache",
    "alibi_bias",
    "alibi_slopes",
    "all_to_all_attention",
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
    "ring_attention",
    "rotary_embedding",
    "sharded_kv_attention",
    "varlen_attention",
    "varlen_attention_vjp",
]
