"""The claims of a target: plain data that the process of the target sends to the runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mha_spec_conformance.suite.functions import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PROFILES", "Claims"]

PROFILES = ("standard", "strict")
"""Profiles of precision: weights and their gradients have the type of the inputs, or that of the accumulator."""


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

    def accepts(self, function: str, keywords: frozenset[str]) -> bool:
        """Tell whether the target has the function and the function accepts every keyword."""
        return function in self.keywords and keywords <= set(self.keywords[function])

    @property
    def features(self) -> tuple[str, ...]:
        """The features that the target claims by having a function or by accepting its keywords."""
        features: dict[str, None] = {}
        for name, keywords in self.keywords.items():
            function = FUNCTIONS[name]
            accepted = [f for f, words in function.keyword_features.items() if set(words) <= set(keywords)]
            features |= dict.fromkeys([*function.features, *accepted])
        return tuple(features)
