"""The claims of a target: plain data that the process of the target sends to the runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mha_spec_conformance.suite.functions import FUNCTIONS, OF_ATTENTION

from .layouts import PACKED

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PROFILES", "Claims", "Shards"]

PROFILES = ("standard", "strict", "fused")
"""Profiles of precision: weights and their gradients have the type of the inputs, or that of the accumulator, or that
of the inputs in kernels that multiply whole tiles and approximate tanh."""

DENSE_OPTIONS = frozenset(
    {"mask", "bias", "dropout_mask", "dropout_rate", "q_segment_ids", "kv_segment_ids", "kv_starts", "prefix_lengths"}
)
"""The options that have no place in a packed layout."""


class Shards(NamedTuple):
    """The number of ranks that share the keys of a call, and the layout in which they hold them (MHA-SHARD-1)."""

    ranks: int
    layout: str


@dataclass(frozen=True, slots=True)
class Claims:
    """The functions, keywords, dtypes and conventions that a target declares."""

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
    further: tuple[str, ...] = ()
    """The further calls that the program of the target can make."""
    layout: str = "bhsd"
    lse_layout: str = "tokens_first"
    block_size: int = 16
    groups: bool = True
    """False if the suite repeats keys and values, because the target has as many of their heads as of the queries'."""
    stacked: str | None = None
    """The operands that the target takes as a single array, "qkv" or "kv"."""
    ranks: int = 1
    """The number of ranks that share the keys of a call, and merge their partial results (MHA-SHARD-3)."""
    rank_layout: str = "contiguous"
    """The layout in which the ranks hold the keys."""
    unclaimed: tuple[str, ...] = ()
    """The functions that take any keyword, and for which the target declares no features."""

    @property
    def shards(self) -> Shards | None:
        """The shards of the keys; None if a single rank holds all of them."""
        return Shards(self.ranks, self.rank_layout) if self.ranks > 1 else None

    @property
    def packs_queries(self) -> bool:
        """True if the target takes the queries of all sequences concatenated."""
        of_pages = self.layout == "paged" and any("cu_seqlens_q" in words for words in self.keywords.values())
        return self.layout == "thd" or of_pages

    def words(self, function: str) -> frozenset[str]:
        """Return the options of the specification that the target accepts in a function, whatever its layout is."""
        words = frozenset(self.keywords.get(function, ()))
        if self.layout not in PACKED or function not in OF_ATTENTION:
            return words
        return (words - DENSE_OPTIONS) | {"kv_lengths"} | ({"q_lengths"} if self.packs_queries else set())

    def accepts(self, function: str, keywords: frozenset[str]) -> bool:
        """Tell whether the target has the function and the function accepts every keyword."""
        return function in self.keywords and keywords <= self.words(function)

    @property
    def features(self) -> tuple[str, ...]:
        """The features that the target claims by having a function or by accepting its keywords."""
        features: dict[str, None] = {}
        for name in self.keywords:
            function = FUNCTIONS[name]
            accepted = [f for f, words in function.keyword_features.items() if self.words(name).issuperset(words)]
            features |= dict.fromkeys([*function.features, *accepted])
        return tuple(features)
