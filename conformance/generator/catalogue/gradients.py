"""Gradients: every option, every reduction, empty rows, poison; the cotangents are never uniform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Input

from .build import describe, inputs_of, vary
from .pairs import EVERYTHING
from .poison import poisoned
from .sizes import EQUAL, PRIME, ROOMY, Sizes, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

FUNCTION = "attention_vjp"
PLAIN = (("generic", 0), ("random", 1), ("coded", 0), ("steep", 2), ("levels", 3), ("low", 1), ("far", 0))
HIDDEN = (("generic", 0), ("random", 1), ("coded", 2), ("levels", 3), ("low", 2), ("random", 3), ("generic", 2))
ARITHMETIC = (("generic", 0), ("random", 1), ("steep", 2), ("far", 3), ("generic", 3), ("random", 2), ("steep", 1))

ALL = tuple((flavour, variant) for flavour in ("generic", "random", "steep", "far", "coded") for variant in (4, 5))
DTYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("coded", "far"), ("float64", "float32", "float16")),
    **dict.fromkeys(("steep", "levels", "low"), ("float64", "float32")),
}
"""Gradients with weights near 0 or 1, or with sums that cancel, are too inaccurate in 16 bits."""

COARSE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "mask/random-2",
            "bias/generic-4",
            "bias/float32-2",
            "bias+grad_lse/generic-1",
            "bias+grad_lse/generic-4",
            "kv-heads-equal-kv-len/generic-1",
            "kv-heads-equal-kv-len/random-2",
            "bias+sinks/random-2",
            "bias+sinks/generic-4",
            "window+offset/generic-1",
            "window+offset/generic-3",
            "segments+scale/generic-1",
            "segments+scale/random-2",
            "segments+scale/generic-3",
            "size-64/random-2",
            "size-128/generic-1",
            "size-128/random-2",
            "window+offset/random-4",
            "everything/random-5",
            "poison/window+offset/unused-3",
            "poison/window+offset/unused-4",
            "poison/segments+scale/unused-3",
            "poison/everything/unused-5",
        ),
        ("float64", "float32", "float16"),
    ),
    **dict.fromkeys(
        ("window+offset/coded-3", "segments+scale/coded-3", "kv-heads-equal-kv-len/coded-3"), ("float64", "float32")
    ),
    "bias+sinks/steep-3": ("float64",),
}
"""Single cases whose gradients are too inaccurate in 16 bits."""

SPECS: tuple[tuple[Sizes, dict[str, Any], Any], ...] = (
    (PRIME, {}, PLAIN),
    (PRIME, {"grad_lse": True}, PLAIN),
    (EQUAL, {"mask": "b1qk"}, HIDDEN),
    (EQUAL, {"bias": "1hqk"}, ARITHMETIC),
    (EQUAL, {"bias": "b11k", "grad_lse": True}, ARITHMETIC),
    (EQUAL, {"bias": "111k", "sinks": True}, ARITHMETIC),
    (PRIME, {"causal": True, "offset": True}, HIDDEN),
    (PRIME, {"window": (2, 1), "offset": True}, HIDDEN),
    (PRIME, {"q_lengths": True, "kv_lengths": True}, HIDDEN),
    (PRIME, {"segments": True, "scale": -0.375}, HIDDEN),
    (PRIME, {"softcap": 2.0}, ARITHMETIC),
    (PRIME, {"sinks": True, "grad_lse": True}, ARITHMETIC),
    (PRIME, {"dropout": (0.3, "bhqk")}, ARITHMETIC),
    (EQUAL, {"mask": "bh1k", "softcap": 3.0, "dropout": (0.0, "1hqk"), "grad_lse": True}, ARITHMETIC),
    (ROOMY, {**EVERYTHING, "grad_lse": True}, ALL),
)
OTHER_SIZES = {
    "size-64": head_size(64),
    "size-128": head_size(128),
    "kv-heads-equal-kv-len": Sizes(2, 6, 3, 5, 3, 11, 13),
    "no-keys": Sizes(2, 2, 1, 3, 0, 5, 7),
    "no-queries": Sizes(2, 2, 1, 0, 3, 5, 7),
}


def descriptions() -> Iterator[Description]:
    """Yield options, sizes, then rows and queries for which naive formulas fail."""
    for sizes, spec, variants in SPECS:
        yield from _varied(name_of(spec), sizes, spec, variants)
    for name, sizes in OTHER_SIZES.items():
        empty = 0 in (sizes.q_len, sizes.kv_len)
        variants = [("generic", 0)] if empty else [("generic", 0), ("random", 1), ("coded", 2), ("levels", 0)]
        clauses = ("MHA-SHAPE-2",) if empty else ("MHA-SHAPE-1",)
        yield from _varied(name, sizes, {}, variants, clauses)
    yield from _poison()
    yield from _flat_softcap()
    yield from _float32_bias()


def _varied(
    name: str, sizes: Sizes, spec: dict[str, Any], variants: Any, clauses: tuple[str, ...] = ()
) -> Iterator[Description]:
    """Yield one case per variant, in the dtypes in which its gradients exceed their allowances."""
    for flavour, variant in variants:
        tags = {"tags": ("structured", "cancellation")} if flavour == "low" else {}
        dtypes = dtypes_of(name, flavour, variant)
        yield from vary(
            name, sizes, spec, [(flavour, variant)], function=FUNCTION, clauses=clauses, dtypes=dtypes, **tags
        )


def dtypes_of(name: str, flavour: str, variant: int) -> tuple[str, ...]:
    """Return the dtypes in which the gradients of a case exceed their allowances."""
    return COARSE.get(f"{name}/{flavour}-{variant + 1}", DTYPES.get(flavour, ALL_DTYPES))


def name_of(spec: dict[str, Any]) -> str:
    """Return the name of a spec in ids."""
    return "everything" if len(spec) > 10 else "+".join(spec) or "plain"


def _poison() -> Iterator[Description]:
    for sizes, spec, variants in SPECS:
        for variant in {HIDDEN: (2, 3), ALL: (4, 5)}.get(variants, ()):
            name = name_of(spec)
            inputs, options = inputs_of(sizes, "random", spec, variant, FUNCTION)
            spoilt = poisoned(sizes, inputs, options)
            if all(spoilt[key] is item for key, item in inputs.items() if key != "bias"):
                continue
            title = "Garbage in rows that see nothing and keys that nobody sees reaches no gradient."
            yield describe(
                f"poison/{name}/unused-{variant + 1}",
                title,
                sizes,
                spoilt,
                options,
                function=FUNCTION,
                clauses=("MHA-POISON-1", "MHA-EMPTY-3"),
                features=("poison",),
                tags=("structured", "poison"),
                dtypes=COARSE.get(f"poison/{name}/unused-{variant + 1}", ALL_DTYPES),
            )


def _flat_softcap() -> Iterator[Description]:
    """Yield queries of zeros, where the cap has slope 1, but a tanh of the magnitude would have slope 0."""
    for variant in (0, 1):
        inputs, options = inputs_of(PRIME, "generic", {"softcap": 2.0}, variant, FUNCTION)
        query = inputs["query"].values.copy()
        query[:, variant::2] = 0
        title = "Queries of zeros under a softcap, whose slope is 1 there."
        yield describe(
            f"softcap/zero-query-{variant + 1}",
            title,
            PRIME,
            {**inputs, "query": Input(query)},
            options,
            function=FUNCTION,
            clauses=("MHA-CAP-1",),
        )


def _float32_bias() -> Iterator[Description]:
    for variant in (0, 1):
        inputs, options = inputs_of(EQUAL, "generic", {"bias": "1hqk"}, variant, FUNCTION)
        bias = numpy.float32(inputs["bias"].values + 1000.37).astype(float)
        title = "A float32 bias keeps its type: it is not rounded, and neither is its gradient."
        yield describe(
            f"bias/float32-{variant + 1}",
            title,
            EQUAL,
            {**inputs, "bias": Input(bias, "float32")},
            options,
            function=FUNCTION,
            clauses=("MHA-BIAS-2",),
            dtypes=COARSE.get(f"bias/float32-{variant + 1}", ALL_DTYPES),
        )
