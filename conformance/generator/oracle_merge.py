"""Expected results of merge_attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy
from flint import arb
from oracle_balls import rounded
from oracle_kinds import EXACT, FINITE_VALUE, NAN_VALUE, NON_FINITE, Marked

if TYPE_CHECKING:
    from description import Description

__all__ = ["merge_attention"]


def merge_attention(description: Description) -> dict[str, Marked]:
    """Compute output and lse of two halves of a softmax, in the shapes of the halves."""
    arrays = {name: numpy.asarray(item.values, dtype=numpy.float64) for name, item in description.inputs.items()}
    output = Marked(numpy.zeros(arrays["output_a"].shape), numpy.zeros(arrays["output_a"].shape, dtype=numpy.uint8))
    lse = Marked(numpy.zeros(arrays["lse_a"].shape), numpy.zeros(arrays["lse_a"].shape, dtype=numpy.uint8))
    for place in numpy.ndindex(*lse.values.shape):
        halves = [(float(arrays[f"lse_{half}"][place]), arrays[f"output_{half}"][place]) for half in "ab"]
        _mark_row(lse, output, place, halves)
    finite = {"output": output.kinds == FINITE_VALUE, "lse": lse.kinds == FINITE_VALUE}
    values = rounded(description.id, lambda: _evaluate(arrays, finite["lse"]), finite)
    for name, marked in (("output", output), ("lse", lse)):
        marked.values[finite[name]] = values[name][finite[name]]
    return {"output": output, "lse": lse}


def _mark_row(lse: Marked, output: Marked, place: tuple[int, ...], halves: list[tuple[float, numpy.ndarray]]) -> None:
    """Mark the kinds of a row, and set the values that need no arithmetic: those of empty or infinite halves."""
    live = [(half, values) for half, values in halves if half != -math.inf]
    if any(math.isnan(half) or (half == math.inf and len(live) == 2) for half, _ in live):
        lse.put(place, math.nan, NAN_VALUE)
        output.put(place, math.nan, NAN_VALUE)
    elif len(live) < 2:
        half, values = live[0] if live else (-math.inf, numpy.zeros(output.values.shape[-1]))
        lse.put(place, half, EXACT if _is_float32(half) else FINITE_VALUE)
        output.put(place, values + 0.0, numpy.where(numpy.isnan(values), NAN_VALUE, EXACT))
    else:
        finite = numpy.isfinite(halves[0][1]) & numpy.isfinite(halves[1][1])
        output.put(place, math.nan, numpy.where(finite, FINITE_VALUE, NON_FINITE))


def _is_float32(x: float) -> bool:
    with numpy.errstate(over="ignore"):
        return float(numpy.float32(x)) == x


def _evaluate(arrays: dict[str, numpy.ndarray], finite: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """Compute lse = m + ln(e_a + e_b) and output = (e_a o_a + e_b o_b) / (e_a + e_b), with e = exp(lse - m)."""
    lse = numpy.full(finite.shape, arb(0), dtype=object)
    output = numpy.full(arrays["output_a"].shape, arb(0), dtype=object)
    for place in zip(*numpy.nonzero(finite), strict=True):
        halves = [float(arrays[f"lse_{half}"][place]) for half in "ab"]
        largest = max(halves)
        powers = [(arb(half) - arb(largest)).exp() for half in halves]
        total = powers[0] + powers[1]
        lse[place] = arb(largest) + total.log()
        for c in range(arrays["output_a"].shape[-1]):
            parts = [arb(float(arrays[f"output_{half}"][(*place, c)])) for half in "ab"]
            output[(*place, c)] = (powers[0] * parts[0] + powers[1] * parts[1]) / total
    return {"output": output, "lse": lse}
