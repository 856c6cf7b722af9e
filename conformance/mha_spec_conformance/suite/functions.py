"""The functions of the specification that a target can be asked, in a table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mha_spec.arguments import options_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["DECLARED_FEATURES", "FUNCTIONS", "OF_ATTENTION", "STACKED", "Function", "with_stacked"]

OPTION_FEATURES = {
    "mask": ("mask",),
    "bias": ("bias",),
    "causal": ("causal",),
    "offset": ("q_offset",),
    "window": ("window",),
    "chunk": ("chunk",),
    "prefix_lengths": ("prefix_lengths",),
    "q_lengths": ("q_lengths",),
    "kv_lengths": ("kv_lengths",),
    "kv_starts": ("kv_starts",),
    "segments": ("q_segment_ids", "kv_segment_ids"),
    "scale": ("scale",),
    "softcap": ("softcap",),
    "sinks": ("sinks",),
    "dropout": ("dropout_mask", "dropout_rate"),
    "lse": ("return_lse",),
}
"""The features of attention's options, each with its keywords."""

DECLARED_FEATURES = ("joint_norm", "paged_cache", "window_cache")
"""The features of contents of `params` and `cache`, which no signature shows: a target declares them by name."""

LAYER_FEATURES = {
    "rotary": ("rotary",),
    "positions": ("positions",),
    "norm": ("norm_epsilon",),
    "cache": ("cache",),
    **{name: (name,) for name in DECLARED_FEATURES},
}
"""The features of the keywords that only the layer has, and of the contents of its arguments."""

VARLEN_FEATURES = {
    "paged": ("block_table",),
    "kv_used": ("seqused_kv",),
    "slopes": ("alibi_slopes",),
    **{name: OPTION_FEATURES[name] for name in ("causal", "offset", "window", "scale", "softcap", "sinks", "lse")},
}
"""The features of the keywords of packed and paged calls."""

LAYER_KEYWORDS = tuple(word for words in LAYER_FEATURES.values() for word in words if word not in DECLARED_FEATURES)

OF_ATTENTION = ("attention", "attention_weights", "attention_vjp")
"""The functions of query and key that are not of the layer."""

STACKED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}
"""The operands that a target may take as a single array."""

GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_bias", "grad_sinks")


def with_stacked(names: tuple[str, ...], stacked: str) -> tuple[str, ...]:
    """Name a single array instead of the operands, or the gradients, that are stacked."""
    parts = STACKED[stacked]
    new = {**dict.fromkeys(parts, stacked), **{f"grad_{part}": f"grad_{stacked}" for part in parts}}
    return tuple(dict.fromkeys(new.get(name, name) for name in names))


@dataclass(frozen=True, slots=True)
class Function:
    """One function: its signature, its results, and the features that a target claims by having it."""

    name: str
    operands: tuple[str, ...]
    """The arguments that are passed by position."""
    outputs: tuple[str, ...]
    """The results in the order in which they are returned; `cache` is a tuple of three arrays."""
    keywords: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    """The features that a target claims by having the function."""
    keyword_features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The features that a target claims by accepting all of their keywords."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """The outputs that are returned only in a call with the keyword."""
    fewest: int | None = None
    """The number of outputs that must be returned; None is all of them."""
    of_layer: bool = False
    """True if the function takes `params`; such a function may take a cache."""

    def returned(self, keywords: Mapping[str, object]) -> tuple[str, ...]:
        """Name the outputs of a call with these keywords."""
        values = {name: keywords.get(keyword) for name, keyword in self.optional.items()}
        return tuple(name for name in self.outputs if values.get(name, True) not in (None, False))

    def stacked(self, name: str | None) -> Function:
        """Return the function whose operands "qkv" or "kv" are a single array, as are their gradients."""
        parts = STACKED.get(name or "", ())
        if name is None or not parts or not set(parts) <= set(self.operands):
            return self
        fewest = None if self.fewest is None else self.fewest - len(parts) + 1
        operands, outputs = with_stacked(self.operands, name), with_stacked(self.outputs, name)
        return replace(self, operands=operands, outputs=outputs, fewest=fewest)

    @property
    def claims(self) -> tuple[str, ...]:
        """What a target claims that has everything: the keywords, and the declared features of a layer."""
        return (*self.keywords, *(DECLARED_FEATURES if self.of_layer else ()))

    def keywords_of(self, features: Iterable[str]) -> tuple[str, ...]:
        """Name the keywords, or the declared features, by which a call asks for the features."""
        words = OPTION_FEATURES | LAYER_FEATURES | VARLEN_FEATURES
        return tuple(word for feature in features for word in words.get(feature, ()) if word in self.claims)


_FUNCTIONS = (
    Function(
        "attention",
        operands=("query", "key", "value"),
        outputs=("output", "lse"),
        keywords=(*options_of("attention"), "return_lse"),
        keyword_features=OPTION_FEATURES,
        optional={"lse": "return_lse"},
    ),
    Function(
        "attention_weights",
        operands=("query", "key"),
        outputs=("weights",),
        keywords=options_of("attention_weights"),
        features=("weights",),
    ),
    Function(
        "attention_vjp",
        operands=("grad_output", "query", "key", "value"),
        outputs=GRADIENTS,
        keywords=(*options_of("attention_vjp"), "grad_lse"),
        features=("vjp",),
        fewest=3,
    ),
    Function(
        "merge_attention",
        operands=("output_a", "lse_a", "output_b", "lse_b"),
        outputs=("output", "lse"),
        features=("merge",),
    ),
    Function(
        "merge_attention_vjp",
        operands=("grad_output", "output_a", "lse_a", "output_b", "lse_b"),
        outputs=("grad_output_a", "grad_lse_a", "grad_output_b", "grad_lse_b"),
        keywords=("grad_lse",),
        features=("merge", "vjp"),
    ),
    Function(
        "varlen_attention",
        operands=("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv"),
        outputs=("output", "lse"),
        keywords=(*options_of("varlen_attention"), "return_lse"),
        features=("varlen",),
        keyword_features=VARLEN_FEATURES,
        optional={"lse": "return_lse"},
    ),
    Function(
        "varlen_attention_vjp",
        operands=("grad_output", "query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv"),
        outputs=("grad_query", "grad_key", "grad_value", "grad_sinks"),
        keywords=(*options_of("varlen_attention_vjp"), "grad_lse"),
        features=("varlen", "vjp"),
        fewest=3,
    ),
    Function(
        "multi_head_attention",
        operands=("query", "key", "value", "params"),
        outputs=("output", "cache"),
        keywords=(*options_of("multi_head_attention"), *LAYER_KEYWORDS),
        features=("projection", "cross"),
        keyword_features=LAYER_FEATURES,
        optional={"cache": "cache"},
        of_layer=True,
    ),
    Function(
        "multi_head_attention_and_weights",
        operands=("query", "key", "value", "params"),
        outputs=("output", "weights", "cache"),
        keywords=(*options_of("multi_head_attention_and_weights"), *LAYER_KEYWORDS),
        features=("projection", "cross", "weights"),
        keyword_features=LAYER_FEATURES,
        optional={"cache": "cache"},
        of_layer=True,
    ),
    Function(
        "multi_head_attention_weights",
        operands=("query", "key", "params"),
        outputs=("weights",),
        keywords=(*options_of("multi_head_attention_weights"), *LAYER_KEYWORDS),
        of_layer=True,
    ),
    Function(
        "rotary_embedding",
        operands=("x", "positions"),
        outputs=("output",),
        keywords=("base", "interleaved", "rotary_dim", "frequencies", "attention_factor", "sections"),
        features=("rotary",),
    ),
    Function("alibi_slopes", operands=("heads",), outputs=("slopes",), keywords=("dtype",), features=("alibi",)),
    Function(
        "alibi_bias",
        operands=("slopes", "q_len", "kv_len"),
        outputs=("bias",),
        keywords=("q_offset",),
        features=("alibi",),
    ),
)

FUNCTIONS = {function.name: function for function in _FUNCTIONS}
"""The functions that can be asked, by name."""
