"""Sinks far above and far below the scores of their rows: lse is the larger of both in every digit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import Input

from .build import describe, inputs_of
from .sizes import PRIME, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .sizes import Sizes

FILLS = (-1e3, -1e4, -1e9, -1e30)
"""Biases that other libraries use to hide a pair; here they are ordinary scores."""

LABELS = {"prime": PRIME, "size-64": head_size(64), "size-128": head_size(128)}


def descriptions() -> Iterator[Description]:
    """Yield rows with biases far below their sink, and scores far above some sinks and near others."""
    for label, sizes in LABELS.items():
        for fill in FILLS if label == "prime" else FILLS[2:3]:
            yield _below(f"sinks/above-bias/{fill:g}/{label}", sizes, fill, "attention")
    for fill in FILLS[1:]:
        yield _below(f"sinks/above-bias/{fill:g}", PRIME, fill, "attention_weights")
        yield _below(f"sinks/above-bias/{fill:g}", PRIME, fill, "attention_vjp")
    for flavour, near in (("high", 10432.0), ("low", -22016.0)):
        yield _at_a_distance(flavour, near)
    yield _above(80.0)


def _below(name: str, sizes: Sizes, fill: float, function: str) -> Description:
    """Give half of the rows only biases of `fill`, and every head another sink."""
    inputs, _ = inputs_of(sizes, "generic", {"bias": "1hqk", "grad_lse": True}, 0, function)
    if function != "attention_vjp":
        del inputs["grad_lse"]
    row = numpy.arange(sizes.q_len).reshape(1, 1, -1, 1)
    bias = numpy.where(row % 2 == 0, fill, inputs["bias"].values)
    inputs["bias"] = Input(numpy.float32(bias).astype(float), "float32")
    inputs["sinks"] = Input(numpy.resize([2.5, -1.25, 0.375], sizes.heads))
    return describe(
        name,
        f"Rows whose biases are {fill:g}, beside sinks of ordinary size.",
        sizes,
        inputs,
        function=function,
        clauses=("MHA-BIAS-3", "MHA-SINK-1"),
        lse=True,
    )


def _at_a_distance(flavour: str, near: float) -> Description:
    """Give every other head a sink near 0, and the others a sink near the scores."""
    inputs, _ = inputs_of(PRIME, flavour, {}, 0)
    inputs["sinks"] = Input(numpy.resize([2.5, near], PRIME.heads))
    return describe(
        f"sinks/far/{flavour}",
        f"Scores near {near:g} beside sinks near 0 and near the scores.",
        PRIME,
        inputs,
        clauses=("MHA-SINK-1", "MHA-SOFTMAX-1"),
        lse=True,
    )


def _above(sink: float) -> Description:
    """Put some sinks so high that a weight times grad_output is subnormal; times the value, too, it is not."""
    inputs, _ = inputs_of(PRIME, "generic", {}, 0, "attention_vjp")
    for name, exponent in (("grad_output", -13), ("value", 13)):
        inputs[name] = Input(inputs[name].values * 2.0**exponent, "case")
    inputs["sinks"] = Input(numpy.array([sink, 2.5, -1.25, 0.375, sink - 0.5, 1.5]))
    return describe(
        "sinks/far-above/small-grad_output",
        f"Some sinks near {sink:g}, a small grad_output and large values.",
        PRIME,
        inputs,
        function="attention_vjp",
        clauses=("MHA-SINK-1", "MHA-VJP-1", "MHA-ACC-1"),
        dtypes=("float64", "float32"),
    )
