"""Honest ways to merge two halves of one softmax, and to compute the gradients of merging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy
from problems import stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FORMS", "GRADIENTS", "MergeProblem", "draw_merge"]

SHAPE = (2, 3, 17, 19)


@dataclass(frozen=True)
class MergeProblem:
    """Two halves and the cotangents of their result, stored in the dtype of the run."""

    dtype: str
    arrays: Mapping[str, numpy.ndarray]
    cotangents: Mapping[str, numpy.ndarray] = field(default_factory=dict)
    generic: bool = True

    @property
    def id(self) -> str:
        """The name of the problem in messages."""
        return f"{self.dtype}, merge"

    @property
    def work(self) -> type[numpy.floating]:
        """The type of lse and of the sums."""
        return numpy.float64 if self.dtype == "float64" else numpy.float32

    def half(self, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return output and lse of one half; the output of an empty half is replaced by 0."""
        lse = self.arrays[f"lse_{name}"][..., None]
        return numpy.where(lse == -numpy.inf, 0, self.arrays[f"output_{name}"].astype(self.work)), lse

    @property
    def backward_arrays(self) -> dict[str, numpy.ndarray]:
        """The halves and the cotangents."""
        return {**self.arrays, **self.cotangents}

    @property
    def grad_output(self) -> numpy.ndarray:
        """The cotangent of the output, in the type of the sums."""
        return self.cotangents["grad_output"].astype(self.work)

    @property
    def grad_lse(self) -> numpy.ndarray:
        """The cotangent of lse, with a last axis of 1; 0 if there is none."""
        grad_lse = self.cotangents.get("grad_lse")
        return numpy.zeros((*SHAPE[:3], 1), self.work) if grad_lse is None else grad_lse.astype(self.work)[..., None]

    def gradients(self, **parts: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """Convert gradients to their dtypes; those of an empty half are 0, and the other half gets the cotangents."""
        empty = {name: self.arrays[f"lse_{name}"][..., None] == -numpy.inf for name in "ab"}
        gradients: dict[str, numpy.ndarray] = {}
        for name, other in (("a", "b"), ("b", "a")):
            for part, whole in (("output", self.grad_output), ("lse", self.grad_lse)):
                gradient = numpy.where(empty[other], whole, parts[f"{part}_{name}"])
                gradient = numpy.where(empty[name], 0, gradient).astype(self.arrays[f"{part}_{name}"].dtype)
                gradients[f"grad_{part}_{name}"] = gradient if part == "output" else gradient[..., 0]
        return gradients

    def results(self, output: numpy.ndarray, lse: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """Convert results to their dtypes; if a half is empty, the result is the other half."""
        (output_a, lse_a), (output_b, lse_b) = self.half("a"), self.half("b")
        for kept, empty in (((output_a, lse_a), lse_b), ((output_b, lse_b), lse_a)):
            output = numpy.where(empty == -numpy.inf, kept[0], output)
            lse = numpy.where(empty == -numpy.inf, kept[1], lse)
        return {"output": output.astype(self.arrays["output_a"].dtype), "lse": lse[..., 0]}


def draw_merge(rng: numpy.random.Generator, dtype: str) -> MergeProblem:
    """Draw two halves whose shares differ a little or a lot; some rows of each half are empty."""
    of_halves = stored(dtype)
    wide = "float64" if dtype == "float64" else "float32"
    lse_a = rng.standard_normal(SHAPE[:3]) * rng.choice([1, 10, 1000])
    lse_b = lse_a + rng.standard_normal(SHAPE[:3]) * rng.choice([0.01, 1, 10])
    for lse in (lse_a, lse_b):
        lse[rng.random(lse.shape) < 0.1] = -numpy.inf
    size = rng.choice([0.01, 1, 100])
    arrays = {
        "output_a": (size * rng.standard_normal(SHAPE)).astype(of_halves),
        "lse_a": lse_a.astype(wide),
        "output_b": rng.standard_normal(SHAPE).astype(of_halves),
        "lse_b": lse_b.astype(wide),
    }
    choices = [choice for choice in ("float64", "float32", of_halves) if choice != "float64" or rng.random() < 0.5]
    grad_output = rng.standard_normal(SHAPE).astype(choices[rng.integers(len(choices))])
    grad_lse = {"grad_lse": rng.standard_normal(SHAPE[:3]).astype(wide)} if rng.random() < 0.7 else {}
    return MergeProblem(dtype, arrays, {"grad_output": grad_output, **grad_lse})


@numpy.errstate(all="ignore")
def by_exponentials(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Merge with lse by logaddexp, each half multiplied by exp(lse_half - lse)."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    lse = numpy.logaddexp(lse_a, lse_b)
    return problem.results(numpy.exp(lse_a - lse) * output_a + numpy.exp(lse_b - lse) * output_b, lse)


@numpy.errstate(all="ignore")
def by_maximum(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Merge with exponentials relative to the larger lse, divided by their sum at the end."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    maximum = numpy.maximum(lse_a, lse_b)
    share_a, share_b = numpy.exp(lse_a - maximum), numpy.exp(lse_b - maximum)
    total = share_a + share_b
    return problem.results((share_a * output_a + share_b * output_b) / total, maximum + numpy.log(total))


@numpy.errstate(all="ignore")
def by_interpolation(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Merge as output_a - sigmoid(lse_b - lse_a) * (output_a - output_b), as ring attention does."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    share = 1 / (1 + numpy.exp(lse_a - lse_b))
    lse = lse_a + numpy.log1p(numpy.exp(-abs(lse_a - lse_b))) + numpy.maximum(lse_b - lse_a, 0)
    return problem.results(output_a - share * (output_a - output_b), lse)


FORMS: dict[str, Callable[[MergeProblem], dict[str, numpy.ndarray]]] = {
    "exponentials": by_exponentials,
    "maximum": by_maximum,
    "interpolation": by_interpolation,
}


def _sum(x: numpy.ndarray) -> numpy.ndarray:
    return numpy.sum(x, axis=-1, keepdims=True)


@numpy.errstate(all="ignore")
def in_closed_form(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Compute the formulas of MHA-MERGE-7, with each share from the joint lse."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    lse = numpy.logaddexp(lse_a, lse_b)
    return _from_shares(problem, numpy.exp(lse_a - lse), numpy.exp(lse_b - lse), output_a - output_b)


@numpy.errstate(all="ignore")
def by_two_sigmoids(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Compute the formulas of MHA-MERGE-7, with each share as a sigmoid of the difference."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    shares = 1 / (1 + numpy.exp(lse_b - lse_a)), 1 / (1 + numpy.exp(lse_a - lse_b))
    return _from_shares(problem, *shares, output_a - output_b)


@numpy.errstate(all="ignore")
def through_interpolation(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Differentiate `by_interpolation`: the share of half a is 1 minus that of half b."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    share = 1 / (1 + numpy.exp(lse_a - lse_b))
    return _from_shares(problem, 1 - share, share, output_a - output_b)


def _from_shares(
    problem: MergeProblem, a: numpy.ndarray, b: numpy.ndarray, difference: numpy.ndarray
) -> dict[str, numpy.ndarray]:
    grad_output, g = problem.grad_output, problem.grad_lse
    t = a * b * _sum(grad_output * difference)
    return problem.gradients(output_a=a * grad_output, lse_a=a * g + t, output_b=b * grad_output, lse_b=b * g - t)


@numpy.errstate(all="ignore")
def through_exponentials(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Differentiate `by_exponentials`: each share has a gradient, and both contribute to that of lse."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    lse, grad_output = numpy.logaddexp(lse_a, lse_b), problem.grad_output
    a, b = numpy.exp(lse_a - lse), numpy.exp(lse_b - lse)
    moved_a, moved_b = a * _sum(grad_output * output_a), b * _sum(grad_output * output_b)
    grad_lse = problem.grad_lse - moved_a - moved_b
    return problem.gradients(
        output_a=a * grad_output,
        lse_a=moved_a + a * grad_lse,
        output_b=b * grad_output,
        lse_b=moved_b + b * grad_lse,
    )


@numpy.errstate(all="ignore")
def through_maximum(problem: MergeProblem) -> dict[str, numpy.ndarray]:
    """Differentiate `by_maximum`, including the maximum, whose gradient cancels except for roundings."""
    (output_a, lse_a), (output_b, lse_b) = problem.half("a"), problem.half("b")
    maximum, grad_output = numpy.maximum(lse_a, lse_b), problem.grad_output
    power_a, power_b = numpy.exp(lse_a - maximum), numpy.exp(lse_b - maximum)
    total = power_a + power_b
    output = (power_a * output_a + power_b * output_b) / total
    grad_sum = grad_output / total
    grad_total = problem.grad_lse / total - _sum(grad_sum * output)
    moved_a = power_a * (_sum(grad_sum * output_a) + grad_total)
    moved_b = power_b * (_sum(grad_sum * output_b) + grad_total)
    grad_maximum = problem.grad_lse - moved_a - moved_b
    return problem.gradients(
        output_a=power_a * grad_sum,
        lse_a=moved_a + numpy.where(lse_a >= lse_b, grad_maximum, 0),
        output_b=power_b * grad_sum,
        lse_b=moved_b + numpy.where(lse_a < lse_b, grad_maximum, 0),
    )


GRADIENTS: dict[str, Callable[[MergeProblem], dict[str, numpy.ndarray]]] = {
    "closed form": in_closed_form,
    "two sigmoids": by_two_sigmoids,
    "interpolation, differentiated": through_interpolation,
    "exponentials, differentiated": through_exponentials,
    "maximum, differentiated": through_maximum,
}
