"""Expected gradients of merge_attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
from flint import arb
from oracle_balls import rounded
from oracle_kinds import ANY, EXACT, FINITE_VALUE, Marked
from storage import NARROW_FIRST, holds

if TYPE_CHECKING:
    from description import Description

__all__ = ["merge_attention_vjp"]

SOFTMAX = numpy.float32
"""The narrowest type of lse in the cases."""


def merge_attention_vjp(description: Description) -> dict[str, Marked]:
    """Compute the gradients of both outputs and both lse, in the shapes of the halves."""
    arrays = {name: numpy.asarray(item.values, dtype=numpy.float64) for name, item in description.inputs.items()}
    arrays.setdefault("grad_lse", numpy.zeros(arrays["lse_a"].shape))
    results = {f"grad_{name}": _zeros(arrays[name].shape) for name in ("output_a", "lse_a", "output_b", "lse_b")}
    rows = [Row(arrays, place) for place in numpy.ndindex(*arrays["lse_a"].shape)]
    for row in rows:
        row.mark(results)
    finite = {name: marked.kinds == FINITE_VALUE for name, marked in results.items()}
    evaluated = [row for row in rows if row.is_specified and row.live]
    values = rounded(description.id, lambda: _evaluate(evaluated, results), finite)
    for name, marked in results.items():
        marked.values[finite[name]] = values[name][finite[name]]
    return results


def _zeros(shape: tuple[int, ...]) -> Marked:
    """Return a result that is exactly 0 until rows are marked."""
    return Marked(numpy.zeros(shape), numpy.full(shape, EXACT, dtype=numpy.uint8))


@dataclass(frozen=True)
class Row:
    """A row of both halves with its cotangents."""

    arrays: dict[str, numpy.ndarray]
    place: tuple[int, ...]

    def of(self, name: str) -> numpy.ndarray:
        """Return the row of an array: a vector of an output, a number of an lse."""
        return self.arrays[name][self.place]

    @property
    def lses(self) -> dict[str, float]:
        """The lse of each half."""
        return {half: float(self.of(f"lse_{half}")) for half in "ab"}

    @property
    def live(self) -> list[str]:
        """The halves that are not empty."""
        return [half for half, lse in self.lses.items() if lse != -math.inf]

    @property
    def is_specified(self) -> bool:
        """Return True if the gradients are specified: both lse are numbers or -inf, and the cotangents are finite."""
        cotangents = numpy.isfinite(self.of("grad_output")).all() and numpy.isfinite(self.of("grad_lse"))
        return bool(cotangents) and all(lse < math.inf for lse in self.lses.values())

    def mark(self, results: dict[str, Marked]) -> None:
        """Mark the kinds, and set the values without arithmetic: if a half is empty, the other gets the cotangents."""
        outputs_are_finite = all(numpy.isfinite(self.of(f"output_{half}")).all() for half in "ab")
        for half in "ab" if not self.is_specified else self.live:
            grad_output, grad_lse = results[f"grad_output_{half}"], results[f"grad_lse_{half}"]
            if not self.is_specified:
                grad_output.put(self.place, math.nan, ANY)
                grad_lse.put(self.place, math.nan, ANY)
            elif len(self.live) == 2:
                grad_output.put(self.place, math.nan, FINITE_VALUE)
                grad_lse.put(self.place, math.nan, FINITE_VALUE if outputs_are_finite else ANY)
            else:
                _pass_on(grad_output, self.place, self.of("grad_output"), NARROW_FIRST[:2])
                _pass_on(grad_lse, self.place, self.of("grad_lse"), (SOFTMAX,))

    def balls(self) -> dict[str, numpy.ndarray | arb]:
        """Compute d output_x = x dO, d lse_a = a g + t, d lse_b = b g - t, with t = a b sum_c dO (o_a - o_b).

        Divisions come last. An empty half has the power 0. A component that is not finite counts as 0: it belongs to an
        empty half, or the gradients that depend on it are not specified.
        """
        largest = max(self.lses.values())
        power = {half: (arb(lse) - arb(largest)).exp() for half, lse in self.lses.items()}
        total = power["a"] + power["b"]
        cotangents = [arb(float(x)) for x in self.of("grad_output")]
        outputs = {half: [_ball(float(x)) for x in self.of(f"output_{half}")] for half in "ab"}
        terms = zip(cotangents, outputs["a"], outputs["b"], strict=True)
        moved = power["a"] * power["b"] * sum((g * (a - b) for g, a, b in terms), arb(0))
        result: dict[str, numpy.ndarray | arb] = {}
        for half, sign in (("a", 1), ("b", -1)):
            direct = power[half] * total * arb(float(self.of("grad_lse")))
            result[f"grad_lse_{half}"] = (direct + sign * moved) / (total * total)
            result[f"grad_output_{half}"] = numpy.array([power[half] * g / total for g in cotangents], dtype=object)
        return result


def _ball(x: float) -> arb:
    return arb(x) if math.isfinite(x) else arb(0)


def _pass_on(marked: Marked, place: tuple[int, ...], values: numpy.ndarray, narrow: tuple[type, ...]) -> None:
    """Set a gradient to its cotangent, which is exact if the narrow types of the operand hold it."""
    held = [all(holds(dtype, numpy.asarray(x)) for dtype in narrow) for x in numpy.ravel(values)]
    marked.put(place, values + 0.0, numpy.where(numpy.reshape(held, values.shape), EXACT, FINITE_VALUE))


def _evaluate(rows: list[Row], results: dict[str, Marked]) -> dict[str, numpy.ndarray]:
    """Evaluate every gradient of these rows in balls."""
    balls = {name: numpy.full(marked.values.shape, arb(0), dtype=object) for name, marked in results.items()}
    for row in rows:
        for name, ball in row.balls().items():
            balls[name][row.place] = ball
    return balls
