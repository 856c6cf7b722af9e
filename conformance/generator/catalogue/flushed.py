"""Subnormal numbers, in inputs and in products, which a large scale makes ordinary again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy
from description import Input

from .build import describe, inputs_of
from .sizes import PRIME
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

MAIN = 6
"""Number of components that make the score; the others are so small that they may be flushed to 0."""


class Units(NamedTuple):
    """The units of the components of query and key and of the scale, as exponents of two."""

    scale: int
    query: int
    key: int
    small_query: int
    small_key: int


QUESTIONS: dict[str, tuple[str, Units, tuple[str, ...]]] = {
    "products": (
        "Products of which some are subnormal, before a scale of 2^112.",
        Units(112, -60, -60, -65, -65),
        ("float64", "float32", "bfloat16"),
    ),
    "queries": (
        "Queries of which some components are subnormal, before a scale of 2^108.",
        Units(108, -60, -56, -133, 2),
        ("float64", "float32", "bfloat16"),
    ),
    "keys": (
        "Keys of which some components are subnormal, before a scale of 2^108.",
        Units(108, -56, -60, 2, -133),
        ("float64", "float32", "bfloat16"),
    ),
    "wide-products": (
        "Products of which some are subnormal in float64, before a scale of 2^1008.",
        Units(1008, -508, -508, -513, -513),
        ("float64",),
    ),
}


def descriptions() -> Iterator[Description]:
    """Yield outputs, weights and gradients; the scores have ordinary sizes."""
    for name, (title, units, dtypes) in QUESTIONS.items():
        yield _case(name, title, units, dtypes, "attention")
        yield _case(name, title, units, dtypes[:2], "attention_vjp")
    yield _case("products", *QUESTIONS["products"], "attention_weights")


def _case(name: str, title: str, units: Units, dtypes: tuple[str, ...], function: str) -> Description:
    inputs, _ = inputs_of(PRIME, "generic", {"grad_lse": True} if function == "attention_vjp" else {}, 0, function)
    small = numpy.arange(PRIME.qk_dim) >= MAIN
    for operand, shape, large_unit, small_unit in (
        ("query", PRIME.query, units.query, units.small_query),
        ("key", PRIME.key, units.key, units.small_key),
    ):
        integers = bell(shape, 1.0, "flushed", operand) + (8.0 if function == "attention_vjp" else 0.0)
        inputs[operand] = Input(integers * 2.0 ** numpy.where(small, small_unit, large_unit))
    return describe(
        f"flushed/{name}",
        title,
        PRIME,
        inputs,
        {"scale": 2.0**units.scale},
        function=function,
        clauses=("MHA-ACC-3",),
        dtypes=dtypes,
        lse=True,
    )
