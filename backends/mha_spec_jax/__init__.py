"""Attention for JAX: the meaning of `mha_spec.reference`, block by block under `jit`, with gradients in closed form.

The table in `native` says which path a call takes. Arrays of jax are never read: numbers, sequences and NumPy arrays of
lengths, offsets and segment ids tell which keys need no work, and a program is compiled for each shape of what is left.
"""

from mha_spec.cache import KVCache

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

__all__ = [
    "KVCache",
    "MultiHeadAttention",
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
]
