"""Weights of rows that see a NaN: all are NaN, those of hidden pairs too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import Input

from .build import describe, inputs_of
from .sizes import PRIME, SQUARE, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .sizes import Sizes

    Spec = dict[str, Any]

SPECS: dict[str, tuple[Sizes, Spec]] = {
    "causal": (SQUARE, {"causal": True}),
    "mask": (PRIME, {"mask": "b1qk"}),
    "bias": (PRIME, {"bias": "bhqk"}),
    "kv_lengths": (PRIME, {"kv_lengths": True}),
    "segments": (PRIME, {"segments": True}),
    "window": (SQUARE, {"window": (1, 1)}),
    "sinks": (PRIME, {"sinks": True, "mask": "b1qk"}),
    "size-64": (head_size(64), {"mask": "b1qk"}),
    "size-128": (head_size(128), {"mask": "b1qk"}),
}


def descriptions() -> Iterator[Description]:
    """Yield a NaN in one query of each batch entry, under each constraint; then in a key, and in a bias."""
    for name, (sizes, spec) in SPECS.items():
        yield _case(f"query-nan/{name}", sizes, spec, "query", (slice(None), 1, 2, 1), "in a query")
    for name in ("causal", "mask"):
        yield _case(f"key-nan/{name}", *SPECS[name], "key", (1, 0, 2, 3), "in a key that some rows see", "SHOULD")
    yield _case("bias-nan/bias", *SPECS["bias"], "bias", (0, 1, 1, 2), "in the bias of a visible pair")


def _case(name: str, sizes: Sizes, spec: Spec, spoilt: str, place: Any, where: str, level: str = "MUST") -> Description:
    inputs, options = inputs_of(sizes, "generic", spec, 1 if "bias" in spec else 0, "attention_weights")
    values = inputs[spoilt].values.copy()
    values[place] = numpy.nan
    inputs[spoilt] = Input(values, inputs[spoilt].dtype)
    return describe(
        f"nonfinite/{name}",
        f"NaN {where}: the weights of the rows that see it are NaN, at hidden pairs too.",
        sizes,
        inputs,
        options,
        function="attention_weights",
        clauses=("MHA-NAN-1", *(["MHA-POISON-2"] if level == "SHOULD" else [])),
        features=("nonfinite",),
        level=level,
    )
