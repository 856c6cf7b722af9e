"""The kinds of real attentions, and the cases that each kind can be asked; kinds.toml has a row for each kind."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mha_spec_conformance.suite.functions import OPTION_FEATURES

from .alignments import alignments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mha_spec_conformance.suite.cases import Case

__all__ = ["AttentionKind", "Count", "LayerKind", "counted", "kinds", "together"]

TABLE = Path(__file__).with_suffix(".toml")

OPTIONS = tuple(name for name in OPTION_FEATURES if name not in ("lse", "chunk", "prefix_lengths", "kv_starts"))
"""The features of options that families of attentions have; the others have few cases, or are features of outputs."""

ALWAYS = frozenset({"core", "groups", "value_size", "empty", "lse", "vjp", "poison", "nonfinite"})
"""The features that are not options; the sizes of a kind decide whether it has groups and values of another size."""

LAYER_OPTIONS = ("mask", "bias", "causal", "kv_lengths")
"""The options of a layer that every framework has."""

FUNCTION_OF = {"forward": "attention", "backward": "attention_vjp"}
BIASES = ("b_q", "b_k", "b_v", "b_o")


@dataclass(frozen=True)
class AttentionKind:
    """The options and sizes that a family of attentions takes; kinds.toml describes the members."""

    name: str
    like: str
    groups: int | bool = True
    equal_lengths: bool = False
    equal_sizes: bool = False
    head_sizes: tuple[int, ...] = ()
    multiple_of: int = 1
    block: int = 1
    queries: tuple[int, int] = (0, 2**30)
    fewer_queries: bool = False
    alignments: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ()
    backward: bool = True
    options: tuple[str, ...] = OPTIONS

    @property
    def functions(self) -> dict[str, str]:
        """The functions of the kind, by the column of the table."""
        return {"forward": FUNCTION_OF["forward"]} | ({"backward": FUNCTION_OF["backward"]} if self.backward else {})

    def takes(self, case: Case) -> bool:
        """Tell whether an attention of the kind can be asked the case."""
        return self._takes_options(case) and self._takes_sizes(case)

    def _takes_options(self, case: Case) -> bool:
        features = {*case.features} - ALWAYS
        if "offset" in features and "offset" not in self.options and self._knows_offset(case):
            features.discard("offset")
        return features <= {*self.options} and (not self.dtypes or not {*self.dtypes}.isdisjoint(case.dtypes))

    def _knows_offset(self, case: Case) -> bool:
        return self.alignments is None or not {*self.alignments}.isdisjoint(alignments(case))

    def _takes_sizes(self, case: Case) -> bool:
        (_, heads, q_len, qk_dim), (_, kv_heads, kv_len, v_dim) = case.shape_of("query"), case.shape_of("value")
        sizes = (qk_dim, v_dim)
        return (
            (heads == kv_heads if self.groups is False else heads >= self.groups * kv_heads)
            and (not self.equal_lengths or q_len == kv_len)
            and (not self.equal_sizes or qk_dim == v_dim)
            and (not self.head_sizes or {*sizes} <= {*self.head_sizes})
            and all(size % self.multiple_of == 0 for size in sizes)
            and all(length % self.block == 0 for length in (q_len, kv_len))
            and self.queries[0] <= q_len <= self.queries[1]
            and (not self.fewer_queries or q_len < kv_len)
        )


@dataclass(frozen=True)
class LayerKind:
    """The options of a family of layers: tokens, heads and outputs have the same width, heads * qk_dim."""

    name: str
    like: str
    attends: str
    """Either "self", where query, key and value are the same tokens, or "cross"."""
    biases: bool
    options: tuple[str, ...] = LAYER_OPTIONS

    @property
    def functions(self) -> dict[str, str]:
        """The functions of the kind, by the column of the table."""
        return {"forward": "multi_head_attention"}

    def takes(self, case: Case) -> bool:
        """Tell whether a layer of the kind can be asked the case."""
        features = {*case.features} - {"projection", *(["offset"] if case.options.get("q_offset") == 0 else [])}
        names = {*case.input_names}
        biased = [name in names for name in BIASES]
        return (
            features <= {*self.options}
            and (all(biased) if self.biases else not any(biased))
            and {"query", "key", "value"} <= names
            and self._has_one_width(case)
            and case.has_one_input("query", "key", "value") == (self.attends == "self")
        )

    @staticmethod
    def _has_one_width(case: Case) -> bool:
        width, heads, size = case.shape_of("w_q")
        return (
            width == heads * size
            and all(case.shape_of(f"w_{name}") == (width, heads, size) for name in "kv")
            and case.shape_of("w_o") == (heads, size, width)
        )


@dataclass(frozen=True)
class Count:
    """The number of cases of a kind that have an option, for a function."""

    kind: str
    direction: str
    option: str
    cases: int


@lru_cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def kinds() -> tuple[AttentionKind | LayerKind, ...]:
    """Return every row of the table."""
    table = _table()
    return (
        *(AttentionKind(**_members(row)) for row in table["attention"]),
        *(LayerKind(**_members(row)) for row in table["layer"]),
    )


def _members(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def together() -> dict[str, frozenset[str]]:
    """Return the combinations of options that models use, by name."""
    return {name: frozenset(options) for name, options in _table()["together"].items()}


def counted(cases: Iterable[Case]) -> list[Count]:
    """Count the MUST cases with values for each kind, function and option, for "all" and for options together."""
    asked = [
        case for case in cases if case.expect == "values" and case.level == "MUST" and "empty" not in case.features
    ]
    counts: list[Count] = []
    for kind in kinds():
        for direction, function in kind.functions.items():
            features = [{*case.features} for case in asked if case.function == function and kind.takes(case)]
            rows = {"all": frozenset(), **{name: frozenset({name}) for name in kind.options if name != "offset"}}
            if isinstance(kind, AttentionKind):
                rows |= {name: options for name, options in together().items() if options <= {*kind.options}}
            counts += [
                Count(kind.name, direction, name, sum(options <= has for has in features))
                for name, options in rows.items()
            ]
    return counts
