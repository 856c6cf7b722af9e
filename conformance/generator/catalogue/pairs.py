"""Options together: every pair of options in at least one case, most in several, and everything at once.

Nine options without positions are combined in twelve triples, the lines of an affine plane of order three, so that each
pair of options is in exactly one triple; causal, window and offset are then combined with each option.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .build import vary
from .sizes import EQUAL, PRIME, ROOMY, SQUARE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .sizes import Sizes

TRIPLES: tuple[dict[str, Any], ...] = (
    {"mask": "1hqk", "bias": "b11k", "scale": 0.5},
    {"softcap": 3.0, "sinks": True, "dropout": (0.5, "1h1k")},
    {"q_lengths": True, "kv_lengths": True, "segments": True},
    {"mask": "b11k", "softcap": 1.5, "q_lengths": True},
    {"bias": "bh1k", "sinks": True, "kv_lengths": True},
    {"scale": -0.75, "dropout": (0.9, "11qk"), "segments": True},
    {"mask": "bh1k", "sinks": True, "segments": True},
    {"bias": "11qk", "dropout": (0.25, "bhqk"), "q_lengths": True},
    {"scale": 0.25, "softcap": 2.0, "kv_lengths": True},
    {"mask": "11qk", "dropout": (0.0, "bhqk"), "kv_lengths": True},
    {"bias": "1h1k", "softcap": 4.0, "segments": True},
    {"scale": 0.75, "sinks": True, "q_lengths": True},
)
PAIRS: tuple[dict[str, Any], ...] = (
    {"mask": "11qk", "softcap": 2.5},
    {"bias": "bhqk", "softcap": 2.5},
)
SQUARES: tuple[dict[str, Any], ...] = (
    {"causal": True, "mask": "b1qk"},
    {"causal": True, "bias": "1hqk"},
    {"causal": True, "scale": 0.5},
    {"causal": True, "softcap": 2.0},
    {"causal": True, "sinks": True},
    {"causal": True, "dropout": (0.3, "bhqk")},
    {"causal": True, "q_lengths": True},
    {"causal": True, "segments": True},
    {"causal": True, "window": (2, None)},
    {"window": (1, 2), "mask": "bh1k"},
    {"window": (2, 0), "bias": "b1qk"},
    {"window": (0, 1), "dropout": (0.2, "b11k")},
    {"causal": True, "window": (3, None), "softcap": 2.0, "sinks": True},
)
OFFSETS: tuple[dict[str, Any], ...] = (
    {"causal": True, "kv_lengths": True, "offset": True},
    {"window": (1, 1), "kv_lengths": True, "offset": True},
    {"causal": True, "mask": "b1qk", "bias": "bhqk", "offset": True},
    {"window": (2, 1), "scale": 0.5, "softcap": 3.0, "sinks": True, "offset": True},
    {"window": (2, None), "q_lengths": True, "segments": True, "offset": True},
    {"causal": True, "window": (3, None), "dropout": (0.4, "b1qk"), "offset": True},
    {"causal": True, "q_lengths": True, "kv_lengths": True, "offset": True},
)
EVERYTHING: dict[str, Any] = {
    "mask": "b1qk",
    "bias": "1hqk",
    "causal": True,
    "window": (7, None),
    "q_lengths": True,
    "kv_lengths": True,
    "segments": True,
    "scale": 0.4375,
    "softcap": 3.0,
    "sinks": True,
    "dropout": (0.125, "bhqk"),
    "offset": True,
}


def descriptions() -> Iterator[Description]:
    """Yield triples, pairs, positional options, and all options together."""
    groups: tuple[tuple[Sizes, tuple[dict[str, Any], ...]], ...] = (
        (EQUAL, TRIPLES),
        (EQUAL, PAIRS),
        (SQUARE, SQUARES),
        (PRIME, OFFSETS),
    )
    for sizes, specs in groups:
        for spec in specs:
            yield from vary("+".join(spec), sizes, spec, _variants(spec))
    flavours = ("generic", "random", "steep", "far")
    yield from vary(
        "everything", ROOMY, EVERYTHING, [(flavour, variant) for flavour in flavours for variant in (4, 5)], lse=True
    )


def _variants(spec: dict[str, Any]) -> list[tuple[str, int]]:
    arithmetic = {"scale", "softcap"} & spec.keys()
    return [
        ("generic", 0),
        ("random", 1),
        *([("steep", 2), ("far", 3)] if arithmetic else [("coded", 2), ("levels", 3)]),
        ("random", 0),
    ]
