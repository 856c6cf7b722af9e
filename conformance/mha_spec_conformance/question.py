"""What passes between the runner and the process of the target: plain data, and nothing else.

A `Question` goes in, an `Answer` comes out, and `Claims` says beforehand what may be asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy

__all__ = [
    "FEATURES_OF_FUNCTIONS",
    "FUNCTIONS",
    "KEYWORDS",
    "LAYER_KEYWORDS",
    "LAYOUTS",
    "OPERANDS",
    "Answer",
    "Claims",
    "Question",
    "Raised",
]

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

LAYOUTS = ("strided", "reversed", "read_only")
"""How inputs may lie in memory, beside plainly (MHA-PURE-2)."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a target says of itself."""

    name: str
    keywords: Mapping[str, tuple[str, ...]]
    dtypes: tuple[str, ...]
    arrays: str = "numpy"
    device: str | None = None
    profile: str = "standard"
    conventions: Mapping[str, str] = field(default_factory=dict)
    registered: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = "cpu"

    def accepts(self, function: str, keywords: frozenset[str]) -> bool:
        """Whether the target has the function, and the function every keyword."""
        return function in self.keywords and keywords <= set(self.keywords[function])

    @property
    def features(self) -> tuple[str, ...]:
        """The features that are claimed by a keyword of attention or by having a function."""
        taken = set(self.keywords.get("attention", ()))
        by_keyword = [feature for feature, words in KEYWORDS.items() if taken.issuperset(words)]
        by_function = [feature for name in self.keywords for feature in FEATURES_OF_FUNCTIONS.get(name, ())]
        of_layer = set(self.keywords.get("multi_head_attention", ()))
        by_function += [feature for feature, word in LAYER_KEYWORDS.items() if word in of_layer]
        return tuple(dict.fromkeys([*by_keyword, *by_function]))


@dataclass(frozen=True, slots=True)
class Question:
    """One call: the function, its arrays as NumPy holds them and its options; the rest describes the case."""

    id: str
    function: str
    dtype: str
    arrays: Mapping[str, numpy.ndarray]
    options: Mapping[str, object]
    outputs: tuple[str, ...]
    features: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    repeat: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array by its name."""
        return {name: array.shape for name, array in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of the target: its classes from the most special on, its message and the target's own line."""

    classes: tuple[str, ...]
    message: str
    where: str | None = None

    def __str__(self) -> str:
        first = self.message.strip().splitlines()[:1]
        return ": ".join([self.classes[0], *first]) + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a question.

    `came` is "returned", "raised", "unsupported", "malformed" (no arrays that could be compared), "crash", "timeout" or
    "internal" (a fault of the suite); `reason` explains the last five. `written` names the inputs that were written to.
    `layouts` holds the outputs, or what was raised, for every other layout of the inputs that was tried; `foreign` is
    the library of the outputs where it is not that of the inputs.
    """

    came: str
    outputs: Mapping[str, numpy.ndarray] = field(default_factory=dict)
    reason: str | None = None
    raised: Raised | None = None
    written: tuple[str, ...] = ()
    layouts: Mapping[str, Mapping[str, numpy.ndarray] | str] = field(default_factory=dict)
    deterministic: bool | None = None
    foreign: str | None = None
    seconds: float = 0.0
