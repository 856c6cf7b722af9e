"""attention_weights: the weights before dropout, 0 for hidden pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .build import vary
from .sizes import PRIME, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .sizes import Sizes

PLAIN = (("generic", 0), ("random", 0), ("steep", 0), ("levels", 0), ("low", 0), ("far", 0))
HIDDEN = (("generic", 0), ("random", 1), ("steep", 2), ("levels", 3))
SPECS: tuple[tuple[str, Sizes, dict[str, Any], Any], ...] = (
    ("plain", PRIME, {}, PLAIN),
    ("plain/size-64", head_size(64), {}, PLAIN[:3]),
    ("plain/size-128", head_size(128), {}, (*PLAIN[:2], ("far", 0))),
    ("mask+bias+softcap", PRIME, {"mask": "b1qk", "bias": "1hqk", "softcap": 2.0}, HIDDEN),
    ("causal+window+offset", PRIME, {"causal": True, "window": (3, None), "offset": True}, HIDDEN),
    ("q_lengths+kv_lengths+segments", PRIME, {"q_lengths": True, "kv_lengths": True, "segments": True}, HIDDEN),
    (
        "scale+sinks",
        PRIME,
        {"scale": 0.375, "sinks": True},
        (("generic", 0), ("random", 1), ("far", 0), ("generic", 3)),
    ),
)


def descriptions() -> Iterator[Description]:
    """Yield plain weights at every head size, then with every option except dropout."""
    for name, sizes, spec, variants in SPECS:
        yield from vary(name, sizes, spec, variants, function="attention_weights", clauses=("MHA-WEIGHTS-1",))
