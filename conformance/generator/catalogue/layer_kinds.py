"""Layers as frameworks have them: tokens, heads and output of one width, no groups, all four biases or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layer_build import vary_layer
from .layer_sizes import BIASES, LayerSizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from description import Description

SELF = LayerSizes(2, 5, 5, 12, 12, 12, 3, 3, 4, 4, 12)
CROSS = SELF._replace(q_len=5, kv_len=7)
SPECS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "mask": {"mask": "11qk"},
    "mask-of-heads": {"mask": "bhqk"},
    "bias": {"bias": "11qk"},
    "bias-of-heads": {"bias": "bhqk"},
    "causal": {"causal": True},
    "causal+mask": {"causal": True, "mask": "11qk"},
    "kv_lengths": {"kv_lengths": True},
    "kv_lengths+mask": {"kv_lengths": True, "mask": "11qk"},
    "kv_lengths+bias": {"kv_lengths": True, "bias": "1hqk"},
    "causal+kv_lengths": {"causal": True, "kv_lengths": True, "offset": 0},
    "causal+bias": {"causal": True, "bias": "1hqk"},
}
DTYPES = ("float32",)


def descriptions() -> Iterator[Description]:
    """Yield self- and cross-attention with and without biases, under the options that layers of frameworks have."""
    for label, sizes in (("self", SELF), ("cross", CROSS)):
        for biases in ((), BIASES):
            for name, spec in SPECS.items():
                offset = {"offset": 0} if "causal" in spec and label == "cross" else {}
                yield from vary_layer(
                    f"one-width/{label}{'+biases' if biases else ''}/{name}",
                    f"{label.capitalize()}-attention of one width, {'with' if biases else 'without'} biases: {name}.",
                    sizes,
                    biases,
                    {**spec, **offset},
                    variants=(0, 1, 2) if name == "causal+mask" else (0, 1, 2, 3),
                    dtypes=DTYPES,
                )
