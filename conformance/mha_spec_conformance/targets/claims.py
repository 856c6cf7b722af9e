"""What a target claims: plain data that its process sends to the runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mha_spec_conformance.suite.functions import FEATURES_OF_FUNCTIONS, KEYWORDS, LAYER_KEYWORDS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PROFILES", "Claims"]

PROFILES = ("standard", "strict")
"""standard: weights and their gradients may be stored in the type of the inputs; strict: in the accumulator's."""


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
