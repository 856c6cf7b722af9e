"""Error bounds of output, log-sum-exp and weights.

The letters are those of the formulas: s the logits, P the weights, m and l the maximum and the sum of exponentials of a
row, z the sink, sigma the absolute error of a logit plus the relative error of its exponential.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy

from .evaluation import AttentionBounds, Evaluation, weighted_sum
from .roundoff import unit_roundoff
from .shards import merging_errors, merging_variances

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.steps import Steps

    from .roundoff import Precision
    from .shards import Merging

__all__ = ["ForwardBounds", "ForwardErrors", "ForwardVariances", "WeightBounds"]

LEAST_EXPONENT = -746.0
"""exp is 0 in float64 from here on."""


class ForwardErrors:
    """The largest errors of an evaluation in a precision; a sum of n terms counts as n roundings."""

    def __init__(self, evaluation: Evaluation, precision: Precision) -> None:
        """Keep the evaluation and the precision; each error is computed at its first use."""
        self.evaluation = evaluation
        self.precision = precision

    @cached_property
    def score(self) -> numpy.ndarray:
        """sigma_ij, of logit and exponential: the product of qk_dim terms, the cap, the bias, s - m and exp."""
        e, p = self.evaluation, self.precision
        bias = e.dtypes.get("bias")
        roundings = 3 if bias is not None and unit_roundoff(bias) < p.u_a else 2
        after_cap = p.u_a * (roundings * abs(e.logits) + abs(e.maximum) + 2 * abs(e.linear_bias)) + p.e_x
        return e.seen(self.capped + after_cap)

    @cached_property
    def product(self) -> numpy.ndarray:
        """The error of scale * q.k: of its roundings, and of flushed factors and products (MHA-ACC-3)."""
        e, p, size = self.evaluation, self.precision, self.evaluation.trace.query.shape[-1]
        flushed = p.f * (1 + abs(e.trace.scale)) * e.seen(e.operand_sizes + 2 * size + 2)
        return p.u_a * (size + 3) * e.reach + flushed

    @cached_property
    def capped(self) -> numpy.ndarray:
        """The error of scale * q.k after the soft cap."""
        e, p, cap = self.evaluation, self.precision, self.evaluation.arguments.softcap
        if cap is None:
            return self.product
        return self.slope * self.before_cap + (p.e_t + 2 * p.u_a) * abs(e.capped) + 8 * p.u_a * cap

    @cached_property
    def before_cap(self) -> numpy.ndarray:
        """The error of x = scale * q.k as the argument of the soft cap."""
        return self.product + 2 * self.precision.u_a * abs(self.evaluation.scores)

    @cached_property
    def slope(self) -> numpy.ndarray | float:
        """The largest slope of the soft cap within the error of its argument."""
        e, cap = self.evaluation, self.evaluation.arguments.softcap
        if cap is None:
            return 1.0
        return 1 - numpy.tanh(numpy.maximum(0, abs(e.scores) - self.before_cap) / cap) ** 2

    @cached_property
    def sink(self) -> numpy.ndarray | float:
        """sigma_z: the error of a sink in the maximum, as a further column, or as a factor after the softmax."""
        e, p = self.evaluation, self.precision
        if e.sinks is None:
            return 0.0
        sinks, lse = abs(e.finite_sinks), abs(e.lse)
        return p.u_a * (2 * sinks + abs(e.maximum) + lse) + p.u_l * lse + 2 * p.e_x

    @cached_property
    def guard(self) -> numpy.ndarray:
        """G = exp(2 max_j sigma_ij) over keys of nonzero weight: a factor for the terms beyond the first order.

        Where G overflows, the results of the row can be anything, and their errors are infinite or NaN.
        """
        return numpy.exp(2 * self._largest(self.taking))

    @cached_property
    def taking(self) -> numpy.ndarray:
        """True for keys of nonzero weight, among them those that the errors of the logits can give a weight.

        Their weight is 0 in float64, but not in exact arithmetic.
        """
        e = self.evaluation
        return (e.weights > 0) | (e.pairs & (e.logits - e.maximum + self.score + self.lift > LEAST_EXPONENT))

    @cached_property
    def lift(self) -> numpy.ndarray:
        """The largest amount by which the error of another logit of the row can raise the weight of a key."""
        return numpy.maximum(self._largest(self.evaluation.weights > 0), self.sink)

    def _largest(self, pairs: numpy.ndarray) -> numpy.ndarray:
        """Return the largest error of a logit in each row, over some of its pairs."""
        return numpy.max(numpy.where(pairs, self.score, 0.0), axis=-1, keepdims=True, initial=0.0)

    @cached_property
    def mean(self) -> numpy.ndarray:
        """sum_j P sigma + P_z sigma_z: the relative error of the sum of exponentials."""
        e = self.evaluation
        return numpy.sum(e.weights * self.score, axis=-1, keepdims=True) + e.sink_weights * self.sink

    @cached_property
    def lse(self) -> numpy.ndarray:
        """The error of lse; in a row that sees no key, lse is the sink."""
        e, p = self.evaluation, self.precision
        stored = (p.u_a + p.u_l) * abs(e.lse)
        summed = self.guard * self.mean + p.u_a * (e.depth + 5) + stored + p.u_a * abs(e.maximum)
        return numpy.where(e.rows, summed + self.merging.lse, stored)

    @cached_property
    def merging(self) -> Merging:
        """The errors of merging the partial results of ranks."""
        return merging_errors(self.evaluation, self.precision)

    @cached_property
    def output(self) -> numpy.ndarray:
        """The error of the output: of the weights (by Cauchy-Schwarz), of storing them, of the sums, of rounding."""
        e, p = self.evaluation, self.precision
        spread = e.spread(e.weights * self.score, e.sink_weights * self.sink)
        size = abs(e.output)
        rounding = p.u_p + p.u_a * (e.depth + 2 * (e.kept is not None))
        error = self.guard * numpy.sqrt(self.mean * spread) + rounding * e.absolute_sum
        error = error + (p.u_a * (e.depth + 4) + p.u_o) * size + p.w * e.underflow_sum + p.f * e.flushed_sum
        return numpy.where(e.rows, error + self.merging.output, 0.0)

    @cached_property
    def weights(self) -> numpy.ndarray:
        """The error of the weights."""
        e, p = self.evaluation, self.precision
        relative = numpy.expm1(self.guard * (self.score + self.mean) + p.u_a * (e.depth + 6))
        return e.seen(e.weights * numpy.where(self.taking, relative + p.u_o, 0.0) + p.w)


class ForwardVariances:
    """The variances of the errors of the forward pass, if all roundings are independent."""

    def __init__(self, evaluation: Evaluation, precision: Precision, errors: ForwardErrors) -> None:
        """Keep the evaluation and the largest errors, whose slope the variances use."""
        self.evaluation = evaluation
        self.precision = precision
        self.errors = errors

    @cached_property
    def capped(self) -> numpy.ndarray:
        """The variance of scale * q.k after the soft cap."""
        e, p, cap = self.evaluation, self.precision, self.evaluation.arguments.softcap
        size = e.trace.query.shape[-1]
        squares = e.seen(e.trace.scale**2 * (e.trace.query**2 @ (e.trace.key**2).swapaxes(-1, -2)))
        product = p.u_a**2 * (size * (e.scores**2 / 3 + squares / 2) / 3 + squares)
        if cap is None:
            return product
        product = product + p.u_a**2 * 2 * e.scores**2 / 3
        return self.errors.slope**2 * product + (p.e_t**2 + 2 * p.u_a**2) / 3 * e.capped**2 + (4 * p.u_a * cap) ** 2 / 3

    @cached_property
    def score(self) -> numpy.ndarray:
        """The variance of a logit, plus the relative variance of its exponential."""
        e, p = self.evaluation, self.precision
        return e.seen(self.capped + p.u_a**2 * (4 * e.logits**2 + e.maximum**2 + 4 * e.linear_bias**2) / 3 + p.e_x**2)

    @cached_property
    def sink(self) -> numpy.ndarray | float:
        """The variance of the sink's weight, relative to it."""
        e, p = self.evaluation, self.precision
        if e.sinks is None:
            return 0.0
        rounded = 4 * e.finite_sinks**2 + e.maximum**2 + e.lse**2
        return (p.u_a**2 * rounded + p.u_l**2 * e.lse**2) / 3 + 2 * p.e_x**2

    @cached_property
    def mean(self) -> numpy.ndarray:
        """The variance of the sum of exponentials, relative to it; the error of exp may be equal at every key."""
        e, p = self.evaluation, self.precision
        independent = numpy.sum(e.weights**2 * self.score, axis=-1, keepdims=True) + e.sink_weights**2 * self.sink
        return independent + p.e_x**2 + p.u_a**2 * (e.depth / 9 + 4)

    @cached_property
    def lse(self) -> numpy.ndarray:
        """The variance of lse."""
        e, p = self.evaluation, self.precision
        stored = (p.u_a**2 + p.u_l**2) * e.lse**2 / 3
        summed = self.mean + stored + p.u_a**2 * e.maximum**2 / 3
        return numpy.where(e.rows, summed + self.merging.lse, stored)

    @cached_property
    def merging(self) -> Merging:
        """The variances of merging the partial results of ranks."""
        return merging_variances(self.evaluation, self.precision)

    @cached_property
    def output(self) -> numpy.ndarray:
        """The variance of the output."""
        e, p = self.evaluation, self.precision
        squared = e.weights**2
        dropped_squares = weighted_sum(e.dropped**2, e.value**2)
        variance = e.spread(squared * self.score, e.sink_weights**2 * self.sink)
        variance = variance + p.u_p**2 / 3 * numpy.maximum(dropped_squares, e.spread(squared, 0.0))
        variance = variance + p.u_a**2 * e.depth / 3 * (e.output**2 / 3 + dropped_squares / 2)
        variance = variance + (p.u_a**2 * (e.depth / 9 + 4) + p.u_o**2 / 3) * e.output**2
        variance = variance + (p.w * e.underflow_sum) ** 2
        return numpy.where(e.rows, variance + self.merging.output, 0.0)

    @cached_property
    def weights(self) -> numpy.ndarray:
        """The variance of the weights."""
        e, p = self.evaluation, self.precision
        return e.seen(e.weights**2 * (self.score + self.mean + p.u_o**2 / 3) + p.w**2)


class ForwardBounds(AttentionBounds[Evaluation]):
    """Bounds of `attention`: output and lse."""

    @numpy.errstate(all="ignore")
    def __init__(self, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], steps: Steps) -> None:
        """Evaluate the case."""
        self.evaluation = e = Evaluation(arrays, options, steps)
        self.values = {"output": e.output, "lse": e.trace.lse[..., 0]}

    @numpy.errstate(all="ignore")
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        errors = ForwardErrors(self.evaluation, precision)
        return {"output": errors.output, "lse": errors.lse[..., 0]}

    @numpy.errstate(all="ignore")
    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        variances = ForwardVariances(self.evaluation, precision, ForwardErrors(self.evaluation, precision))
        return {"output": numpy.sqrt(variances.output), "lse": numpy.sqrt(variances.lse)[..., 0]}


class WeightBounds(AttentionBounds[Evaluation]):
    """Bounds of `attention_weights`."""

    @numpy.errstate(all="ignore")
    def __init__(self, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], steps: Steps) -> None:
        """Evaluate the case."""
        self.evaluation = Evaluation(arrays, options, steps)
        self.values = {"weights": self.evaluation.trace.weights}

    @numpy.errstate(all="ignore")
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        return {"weights": ForwardErrors(self.evaluation, precision).weights}

    @numpy.errstate(all="ignore")
    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        errors = ForwardErrors(self.evaluation, precision)
        return {"weights": numpy.sqrt(ForwardVariances(self.evaluation, precision, errors).weights)}
