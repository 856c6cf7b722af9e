"""The functions that a target can be asked, and what their signatures claim."""

from __future__ import annotations

__all__ = ["FEATURES_OF_FUNCTIONS", "FUNCTIONS", "KEYWORDS", "LAYER_KEYWORDS", "OPERANDS"]

OPERANDS = {
    "attention": ("query", "key", "value"),
    "attention_weights": ("query", "key"),
    "attention_vjp": ("grad_output", "query", "key", "value"),
    "merge_attention": ("output_a", "lse_a", "output_b", "lse_b"),
    "multi_head_attention": ("query", "key", "value", "params"),
    "multi_head_attention_weights": ("query", "key", "params"),
    "rotary_embedding": ("x", "positions"),
    "alibi_slopes": ("heads",),
    "alibi_bias": ("slopes", "q_len", "kv_len"),
}
"""The functions that can be asked, each with what it takes by position; all else are keywords."""

FUNCTIONS = tuple(OPERANDS)

KEYWORDS = {
    "mask": ("mask",),
    "bias": ("bias",),
    "causal": ("causal",),
    "offset": ("q_offset",),
    "window": ("window",),
    "q_lengths": ("q_lengths",),
    "kv_lengths": ("kv_lengths",),
    "segments": ("q_segment_ids", "kv_segment_ids"),
    "scale": ("scale",),
    "softcap": ("softcap",),
    "sinks": ("sinks",),
    "dropout": ("dropout_mask", "dropout_rate"),
    "lse": ("return_lse",),
}
"""The keywords by whose acceptance a target claims a feature."""

LAYER_KEYWORDS = {"rotary": "rotary", "norm": "norm_epsilon", "cache": "cache"}
"""The same of multi_head_attention."""

FEATURES_OF_FUNCTIONS = {
    "attention_weights": ("weights",),
    "attention_vjp": ("vjp",),
    "merge_attention": ("merge",),
    "multi_head_attention": ("projection", "cross"),
    "rotary_embedding": ("rotary",),
    "alibi_slopes": ("alibi",),
    "alibi_bias": ("alibi",),
}
"""What a target claims by having a function."""
