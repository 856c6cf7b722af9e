"""Honest ways to join two halves of one softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FORMS", "MergeProblem", "draw_merge"]

SHAPE = (2, 3, 17, 19)


@dataclass(frozen=True)
class MergeProblem:
    """Two halves, as stored in the dtype of the run."""

    dtype: str
    arrays: Mapping[str, numpy.ndarray]
    generic: bool = True

    @property
    def id(self) -> str:
        """Its name in a message."""
        return f"{self.dtype}, merge"

    @property
    def work(self) -> type[numpy.floating]:
        """The type of lse and of the sums."""
        return numpy.float64 if self.dtype == "float64" else numpy.float32

    def half(self, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Output and lse of one half; an empty half has the output 0, whatever it holds."""
        lse = self.arrays[f"lse_{name}"][..., None]
        return numpy.where(lse == -numpy.inf, 0, self.arrays[f"output_{name}"].astype(self.work)), lse

    def results(self, output: numpy.ndarray, lse: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """Give the results their dtypes; where a half is empty the other is passed on unchanged."""
        (output_a, lse_a), (output_b, lse_b) = self.half("a"), self.half("b")
        for kept, empty in (((output_a, lse_a), lse_b), ((output_b, lse_b), lse_a)):
            output = numpy.where(empty == -numpy.inf, kept[0], output)
            lse = numpy.where(empty == -numpy.inf, kept[1], lse)
        return {"output": output.astype(self.arrays["output_a"].dtype), "lse": lse[..., 0]}


def draw_merge(rng: numpy.random.Generator, dtype: str) -> MergeProblem:
    """Draw two halves whose weights differ a little or a lot, now and then one of them empty."""
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    wide = "float64" if dtype == "float64" else "float32"
    lse_a = rng.standard_normal(SHAPE[:3]) * rng.choice([1, 10, 1000])
    lse_b = lse_a + rng.standard_normal(SHAPE[:3]) * rng.choice([0.01, 1, 10])
    for lse in (lse_a, lse_b):
        lse[rng.random(lse.shape) < 0.1] = -numpy.inf
    size = rng.choice([0.01, 1, 100])
    arrays = {
        "output_a": (size * rng.standard_normal(SHAPE)).astype(stored),
        "lse_a": lse_a.astype(wide),
        "output_b": rng.standard_normal(SHAPE).astype(stored),
        "lse_b": lse_b.astype(wide),
    }
    return MergeProblem(dtype, arrays)


@numpy.errstate(all="ignore")
def by_exponentials(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """lse by logaddexp, each half times exp(lse_half - lse)."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    lse = numpy.logaddexp(lse_a, lse_b)
    return problem.results(numpy.exp(lse_a - lse) * output_a + numpy.exp(lse_b - lse) * output_b, lse)


@numpy.errstate(all="ignore")
def by_maximum(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Exponentials under the larger lse, divided by their sum at the end."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    maximum = numpy.maximum(lse_a, lse_b)
    share_a, share_b = numpy.exp(lse_a - maximum), numpy.exp(lse_b - maximum)
    total = share_a + share_b
    return problem.results((share_a * output_a + share_b * output_b) / total, maximum + numpy.log(total))


@numpy.errstate(all="ignore")
def by_interpolation(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """output_a - sigmoid(lse_b - lse_a) * (output_a - output_b), as ring attention does it."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    share = 1 / (1 + numpy.exp(lse_a - lse_b))
    lse = lse_a + numpy.log1p(numpy.exp(-abs(lse_a - lse_b))) + numpy.maximum(lse_b - lse_a, 0)
    return problem.results(output_a - share * (output_a - output_b), lse)


FORMS: dict[str, Callable[[MergeProblem], dict[str, numpy.ndarray]]] = {
    "exponentials": by_exponentials,
    "maximum": by_maximum,
    "interpolation": by_interpolation,
}
