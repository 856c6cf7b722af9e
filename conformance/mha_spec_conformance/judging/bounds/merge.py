"""Error bounds of merging two halves of a softmax, and of its gradients.

The letters are those of the formulas: a and b the shares of the halves, d the distance of their lse, r the relative
error of a share; in the gradients, g the cotangent of lse and t the part through the shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import dtype_name
from mha_spec.reference import Reference

from .evaluation import as_float64
from .roundoff import ERROR_OF_EXP, unit_roundoff

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.steps import Steps

    from .roundoff import Precision

    Arrays = Mapping[str, numpy.ndarray]

__all__ = ["MergeBounds", "MergeGradientBounds"]

GRADIENTS = ("grad_output_a", "grad_lse_a", "grad_output_b", "grad_lse_b")
"""Names of the results of `merge_attention_vjp`, in order."""


@dataclass(frozen=True)
class Half:
    """One half of each row. lse and output are 0 where either half is empty; `live` is True where it is not empty."""

    name: str
    live: numpy.ndarray
    lse: numpy.ndarray
    output: numpy.ndarray
    share: numpy.ndarray

    def gradients(self, output: numpy.ndarray, lse: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """Return the errors or deviations of both gradients of the half by name, 0 where the half is empty."""
        return {
            f"grad_output_{self.name}": numpy.where(self.live[..., None], output, 0.0),
            f"grad_lse_{self.name}": numpy.where(self.live, lse, 0.0),
        }


class Halves:
    """Two halves in float64, with the errors of their joint lse and of their shares.

    The errors hold for exponentials of each half, for a sigmoid of the difference, and for interpolation between the
    halves. They are 0 where a half is empty, because nothing is computed there (MHA-MERGE-2, MHA-MERGE-3).
    """

    def __init__(self, arrays: Arrays, lse: numpy.ndarray) -> None:
        """Convert the halves to float64, and keep their joint lse."""
        self.type_of_lse = dtype_name(arrays["lse_a"])
        wide = {name: as_float64(array) for name, array in arrays.items()}
        live = {name: wide[f"lse_{name}"] != -numpy.inf for name in "ab"}
        self.both_live = live["a"] & live["b"]
        self.lse = lse
        self.a, self.b = (self._half(wide, name, live[name]) for name in "ab")
        self.distance = abs(self.a.lse - self.b.lse)
        self.smaller = numpy.minimum(self.a.share, self.b.share)

    def _half(self, arrays: Arrays, name: str, live: numpy.ndarray) -> Half:
        lse = numpy.where(self.both_live, arrays[f"lse_{name}"], 0.0)
        output = numpy.where(self.both_live[..., None], arrays[f"output_{name}"], 0.0)
        share = numpy.where(self.both_live, numpy.exp(lse - numpy.where(self.both_live, self.lse, 0.0)), live)
        return Half(name, live, lse, output, share)

    @property
    def mean_size(self) -> numpy.ndarray:
        """M: the mean of |output_a| and |output_b|, weighted by the shares."""
        return self.a.share[..., None] * abs(self.a.output) + self.b.share[..., None] * abs(self.b.output)

    def unit_of_lse(self, precision: Precision) -> float:
        """Return u_l, the unit roundoff of the lse's dtype, or of the accumulator if that is larger."""
        return max(precision.u_a, unit_roundoff(self.type_of_lse))

    def error(self, precision: Precision) -> numpy.ndarray:
        """Return E_0, the error of the joint lse without that of reading the lse of the halves."""
        p, exp = precision, ERROR_OF_EXP * precision.u_a
        stored = (p.u_a + self.unit_of_lse(p)) * abs(self.lse)
        return self._where_both_live(self.smaller * (p.u_a * self.distance + exp) + 4 * p.u_a + stored)

    def share_error(self, precision: Precision) -> numpy.ndarray:
        """Return r, the relative error of a share."""
        p = precision
        return self._where_both_live(self.error(p) + p.u_a * self.distance + 2 * ERROR_OF_EXP * p.u_a + 4 * p.u_a)

    def variance(self, precision: Precision) -> numpy.ndarray:
        """Return U_lse, the variance of the joint lse."""
        p, exp = precision, ERROR_OF_EXP * precision.u_a
        computed = self.smaller**2 * (p.u_a**2 * self.distance**2 / 3 + exp**2) + 4 * p.u_a**2
        read = p.u_a**2 * (self.a.lse**2 + self.b.lse**2 + self.lse**2) / 3
        return self._where_both_live(computed + read + self.unit_of_lse(p) ** 2 * self.lse**2 / 3)

    def share_variance(self, precision: Precision) -> numpy.ndarray:
        """Return R, the relative variance of a share."""
        p, exp = precision, ERROR_OF_EXP * precision.u_a
        return self._where_both_live(self.variance(p) + p.u_a**2 * self.distance**2 / 3 + 2 * exp**2 + 4 * p.u_a**2)

    def _where_both_live(self, x: numpy.ndarray) -> numpy.ndarray:
        return numpy.where(self.both_live, x, 0.0)


class MergeBounds:
    """Bounds of `merge_attention`: output and lse."""

    @numpy.errstate(all="ignore")
    def __init__(self, arrays: Arrays, options: Mapping[str, Any], steps: Steps) -> None:
        """Evaluate the case."""
        wide = {name: as_float64(array) for name, array in arrays.items()}
        self._output, lse = Reference(steps).merge_attention(**wide, **options)
        self.values = {"output": self._output, "lse": lse}
        self._halves = Halves(arrays, lse)

    @numpy.errstate(all="ignore")
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        h = self._halves
        lse = h.error(precision) + 2 * precision.u_a * (abs(h.a.lse) + abs(h.b.lse))
        return {"output": output_error(h, self._output, precision), "lse": numpy.where(h.both_live, lse, 0.0)}

    @numpy.errstate(all="ignore")
    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        h = self._halves
        output = numpy.sqrt(output_variance(h, self._output, precision))
        return {"output": output, "lse": numpy.sqrt(h.variance(precision))}


def output_error(halves: Halves, output: numpy.ndarray, precision: Precision) -> numpy.ndarray:
    """Return E_output, the largest error of the joint output."""
    p, a, b = precision, halves.a.output, halves.b.output
    error = halves.share_error(p)[..., None] * halves.mean_size + 4 * p.u_a * abs(a - b)
    error = error + p.u_o * abs(output) + p.w + p.f * (abs(a) + abs(b))
    return numpy.where(halves.both_live[..., None], error, 0.0)


def output_variance(halves: Halves, output: numpy.ndarray, precision: Precision) -> numpy.ndarray:
    """Return U_output, the variance of the joint output."""
    p = precision
    squares = sum(half.share[..., None] ** 2 * half.output**2 for half in (halves.a, halves.b))
    variance = halves.share_variance(p)[..., None] * squares
    variance = variance + 4 * p.u_a**2 * (halves.a.output - halves.b.output) ** 2 / 3
    return numpy.where(halves.both_live[..., None], variance + p.u_o**2 / 3 * output**2 + p.w**2, 0.0)


class MergeGradientBounds:
    """Bounds of `merge_attention_vjp`: gradients of both outputs and both lse, 0 for an empty half (MHA-MERGE-7).

    If the other half is empty, a gradient is its cotangent, rounded to the dtype of the operand.
    """

    @numpy.errstate(all="ignore")
    def __init__(self, arrays: Arrays, options: Mapping[str, Any], steps: Steps) -> None:
        """Evaluate the case."""
        wide = {name: as_float64(array) for name, array in arrays.items()}
        reference = Reference(steps)
        gradients = reference.merge_attention_vjp(**wide, **options)
        self.values: dict[str, numpy.ndarray] = dict(zip(GRADIENTS, gradients, strict=True))
        operands = {name: array for name, array in arrays.items() if not name.startswith("grad_")}
        self._output, lse = reference.merge_attention(**{name: wide[name] for name in operands})
        self._halves = Halves(operands, lse)
        self._size = abs(wide["grad_output"])
        self._grad_lse = abs(wide.get("grad_lse", numpy.zeros_like(wide["lse_a"])))
        self._through_shares = abs(self._sum(wide["grad_output"] * (self._halves.a.output - self._halves.b.output)))

    @staticmethod
    def _sum(x: numpy.ndarray) -> numpy.ndarray:
        return numpy.sum(x, axis=-1)

    @property
    def _depth(self) -> int:
        return self._size.shape[-1]

    @property
    def _outputs(self) -> numpy.ndarray:
        """|output_a| + |output_b|."""
        return abs(self._halves.a.output) + abs(self._halves.b.output)

    @numpy.errstate(all="ignore")
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        p, h, size = precision, self._halves, self._size
        rs = h.share_error(p)
        flushed = self._sum((1 + size) * self._outputs + size) + 2 * self._depth + self._grad_lse
        errors: dict[str, numpy.ndarray] = {}
        for half in (h.a, h.b):
            t, share = self._error_through_shares(half, p), half.share[..., None]
            output = ((rs[..., None] + p.u_a + p.u_o) * share + 4 * p.u_a) * size + p.w + p.f * size
            lse = t + (rs + 4 * p.u_a) * half.share * self._grad_lse
            lse = lse + 4 * p.u_a * (self._through_shares + self._grad_lse)
            lse = lse + h.unit_of_lse(p) * abs(self.values[f"grad_lse_{half.name}"]) + p.w + p.f * flushed
            errors |= half.gradients(output, lse)
        return errors

    def _error_through_shares(self, half: Half, precision: Precision) -> numpy.ndarray:
        """Return E_t: t is computed from the outputs of both halves, or from that of this half and the joint output."""
        p, h = precision, self._halves
        rs, shared = h.share_error(p), h.a.share * h.b.share
        t, depth = shared * self._through_shares, p.u_a * (self._depth + 4)
        from_halves = shared * depth * self._sum(self._size * self._outputs) + (2 * rs + 4 * p.u_a) * t
        terms = output_error(h, self._output, p) + depth * (abs(half.output) + h.mean_size)
        from_joint = half.share * self._sum(self._size * terms) + (rs + 4 * p.u_a) * t
        return numpy.where(h.both_live, numpy.maximum(from_halves, from_joint), 0.0)

    @numpy.errstate(all="ignore")
    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        p, h, size = precision, self._halves, self._size
        r = h.share_variance(p)
        squares = self._sum(size**2 * (h.a.output**2 + h.b.output**2))
        errors: dict[str, numpy.ndarray] = {}
        for half in (h.a, h.b):
            share = half.share[..., None]
            output = share**2 * size**2 * (r[..., None] + (p.u_a**2 + p.u_o**2) / 3)
            output = output + (4 * p.u_a) ** 2 * size**2 / 3 + p.w**2
            lse = self._variance_through_shares(half, squares, p) + half.share**2 * r * self._grad_lse**2
            lse = lse + (4 * p.u_a) ** 2 * (self._through_shares**2 + self._grad_lse**2) / 3 + p.w**2
            lse = lse + h.unit_of_lse(p) ** 2 * self.values[f"grad_lse_{half.name}"] ** 2 / 3
            errors |= half.gradients(numpy.sqrt(output), numpy.sqrt(lse))
        return errors

    def _variance_through_shares(self, half: Half, squares: numpy.ndarray, precision: Precision) -> numpy.ndarray:
        """Return U_t, the larger of the variances of t over the two ways to compute it."""
        p, h = precision, self._halves
        shared, difference = h.a.share * h.b.share, self._through_shares**2
        summed = p.u_a**2 * (self._depth * (difference / 3 + squares / 2) / 3 + squares)
        from_halves = shared**2 * (4 * h.share_variance(p) * difference + summed)
        joint = self._sum(self._size**2 * output_variance(h, self._output, p))
        from_joint = half.share**2 * (joint + summed) + shared**2 * h.share_variance(p) * difference
        return numpy.where(h.both_live, numpy.maximum(from_halves, from_joint), 0.0)
