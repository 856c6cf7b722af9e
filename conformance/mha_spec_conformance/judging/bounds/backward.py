"""Error bounds of the gradients.

The letters are those of the formulas: P the weights, dP and dS the gradients of weights and logits, D the dot product
of a row, dX the gradient of the scores before the soft cap, rho the relative error of weights rebuilt from lse, eta the
error of dP.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy

from .evaluation import AttentionBounds, Evaluation, weighted_sum
from .forward import ForwardErrors, ForwardVariances
from .roundoff import underflow, unit_roundoff

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.arrays import Array
    from mha_spec.steps import Steps

    from .roundoff import Precision

__all__ = ["BackwardBounds", "BackwardErrors", "GradientEvaluation"]


class GradientEvaluation(Evaluation):
    """One call of attention_vjp in float64; its matrices are 0 at hidden pairs too."""

    def __init__(
        self,
        arrays: Mapping[str, numpy.ndarray],
        options: Mapping[str, Any],
        steps: Steps,
        kv_len: int | None = None,
    ) -> None:
        """Run the steps of the reference, forward and backward; see `Evaluation` for `kv_len`."""
        forward = {name: x for name, x in arrays.items() if not name.startswith("grad_")}
        super().__init__(forward, options, steps, kv_len)
        a, t = self.arguments, self.trace
        self.grad_output = arrays["grad_output"].astype(numpy.float64)
        grad_lse = arrays.get("grad_lse")
        self.grad_lse = numpy.zeros_like(t.lse) if grad_lse is None else grad_lse.astype(numpy.float64)[..., None]

        grad_weights = steps.drop(steps.grad_weights(self.grad_output, self.value), a.dropout_mask, a.dropout_rate)
        row_dot = steps.row_dot(t.weights, grad_weights, t.visible, None if grad_lse is None else self.grad_lse)
        grad_logits = steps.grad_logits(t.weights, grad_weights, row_dot, t.visible)
        self.grad_weights = self.seen(grad_weights)
        self.row_dot = row_dot
        self.grad_logits = self.seen(grad_logits)
        self.cap_slope = self.seen(steps.cap_slope(t.scores, a.softcap))
        self.grad_scores = self.seen(grad_logits * steps.cap_slope(t.scores, a.softcap))

    @cached_property
    def grad_query(self) -> numpy.ndarray:
        """The gradient of the query."""
        t = self.trace
        return self.steps.grad_query(self.grad_scores, t.key, t.visible, t.scale)

    @cached_property
    def grad_key(self) -> numpy.ndarray:
        """The gradient of the key."""
        t, steps = self.trace, self.steps
        return steps.sum_group(steps.grad_key(self.grad_scores, t.query, t.visible, t.scale), self.arguments.kv_heads)

    @cached_property
    def grad_value(self) -> numpy.ndarray:
        """The gradient of the value."""
        a, t, steps = self.arguments, self.trace, self.steps
        dropped = steps.drop(t.weights, a.dropout_mask, a.dropout_rate)
        return steps.sum_group(steps.grad_value(dropped, self.grad_output, t.visible), a.kv_heads)

    @cached_property
    def grad_bias(self) -> numpy.ndarray:
        """The gradient of the bias."""
        bias: Array = self.arguments.bias
        return self.steps.grad_bias(self.grad_logits, bias.shape)

    @cached_property
    def grad_sinks(self) -> numpy.ndarray:
        """The gradient of the sinks."""
        return self.steps.grad_sinks(self.trace.sink_weights, self.row_dot)

    @property
    def values(self) -> dict[str, numpy.ndarray]:
        """The gradients of the call by name."""
        names = ["grad_query", "grad_key", "grad_value"]
        names += ["grad_bias"] if self.arguments.bias is not None and "bias" in self.arrays else []
        names += ["grad_sinks"] if self.arguments.sinks is not None else []
        return {name: getattr(self, name) for name in names}

    @cached_property
    def grad_weight_sizes(self) -> numpy.ndarray:
        """sum_c |dO_ic| |v_jc|: the sum of the sizes of the terms of dP."""
        return self.keep(self.seen(abs(self.grad_output) @ abs(self.value).swapaxes(-1, -2)))

    @cached_property
    def grad_operand_sizes(self) -> numpy.ndarray:
        """The change of dP, per flushed amount, if each product and each of its factors is flushed."""
        gradient, value = (numpy.sum(abs(array), axis=-1) for array in (self.grad_output, self.value))
        factors = self.seen(gradient[..., :, None] + value[..., None, :] + 2 * self.value.shape[-1])
        return self.seen(self.keep(factors) + 1)

    @cached_property
    def query_sizes(self) -> numpy.ndarray:
        """sum_j |dX_ij| + |k_jc|: the change of the query's gradient, per flushed amount, by flushed factors."""
        key = weighted_sum(self.indicator, abs(self.trace.key))
        return numpy.sum(abs(self.grad_scores), axis=-1, keepdims=True) + key

    @cached_property
    def key_sizes(self) -> numpy.ndarray:
        """sum_i |dX_ij| + |q_ic|: the change of the key's gradient, per flushed amount, by flushed factors."""
        query = self.over_rows(self.indicator, abs(self.trace.query))
        return self.over_rows(abs(self.grad_scores), self.ones) + query

    @cached_property
    def value_sizes(self) -> numpy.ndarray:
        """sum_i |dO_ic| over the rows that see a key, after dropout."""
        return self.over_rows(self.keep(self.indicator), abs(self.grad_output))

    @cached_property
    def value_flushes(self) -> numpy.ndarray:
        """sum_i P_ij + 2: the change of the value's gradient, per flushed amount, by a flushed cotangent or product."""
        return self.over_rows(self.dropped + 2 * self.keep(self.indicator), self.ones)

    @cached_property
    def difference(self) -> numpy.ndarray:
        """|dP - D|, at least the roundoff of the two, which cancel where a single key has nearly all the weight."""
        sizes = self.grad_weight_sizes
        size = sizes + numpy.sum(self.weights * sizes, axis=-1, keepdims=True) + abs(self.grad_lse)
        roundoff = self.roundoff + self.value.shape[-1] * unit_roundoff("float64")
        return abs(self.grad_weights - self.row_dot) + roundoff * size

    @property
    def group(self) -> int:
        """Number of query heads that read the same key/value head."""
        return self.arguments.heads // self.arguments.kv_heads

    @property
    def q_depth(self) -> int:
        """Number of rows in the sum of a key's gradient: the rows of every head of its group."""
        return self.arguments.q_len * self.group

    def over_rows(self, weights: numpy.ndarray, values: numpy.ndarray) -> numpy.ndarray:
        """Compute sum_i weights_ij values_ic, summed over the group."""
        return self.steps.sum_group(weighted_sum(weights.swapaxes(-1, -2), values), self.arguments.kv_heads)

    @cached_property
    def read(self) -> numpy.ndarray:
        """True for keys that some row sees, (batch, kv_heads, kv_len, 1)."""
        return self.over_rows(self.indicator, self.ones) > 0

    @property
    def ones(self) -> numpy.ndarray:
        """A column of ones, which counts rows in a sum over rows."""
        return numpy.ones((*self.pairs.shape[:3], 1))

    def over_pairs(self, matrix: numpy.ndarray) -> numpy.ndarray:
        """Sum a matrix over the pairs that read the same element of the bias."""
        return self.steps.grad_bias(matrix, self.arrays["bias"].shape)

    def gradient_precision(self, operand: str, precision: Precision) -> tuple[float, float]:
        """Return unit roundoff and underflow of a gradient that has the dtype of its operand."""
        dtype = self.dtypes[operand]
        return max(unit_roundoff(dtype), precision.u_a), max(underflow(dtype), precision.w)


class BackwardErrors:
    """The largest errors of the gradients in a precision."""

    def __init__(self, evaluation: GradientEvaluation, precision: Precision) -> None:
        """Keep the evaluation and the precision; each error is computed at its first use."""
        self.evaluation = evaluation
        self.precision = precision
        self.forward = ForwardErrors(evaluation, precision)

    @cached_property
    def weights(self) -> numpy.ndarray:
        """rho_ij: the relative error of weights rebuilt from scores and lse."""
        e, p = self.evaluation, self.precision
        exponent = self.forward.score + self.forward.lse + p.u_a * (abs(e.logits) + abs(e.lse)) + p.e_x
        return numpy.where(self.forward.taking, numpy.expm1(exponent), 0.0)

    @cached_property
    def sink_weights(self) -> numpy.ndarray | float:
        """rho_z: the relative error of the sink's weight, rebuilt from lse."""
        e, p = self.evaluation, self.precision
        sinks = abs(e.finite_sinks)
        return numpy.expm1(self.forward.sink + self.forward.lse + p.u_a * (sinks + abs(e.lse)) + p.e_x)

    @cached_property
    def grad_weights(self) -> numpy.ndarray:
        """eta_ij: the error of dP, a sum of v_dim products that may be stored."""
        e, p = self.evaluation, self.precision
        stored = p.u_dp + 2 * p.u_a * (e.kept is not None)
        rounded = e.grad_weight_sizes * p.u_a * e.value.shape[-1] + stored * abs(e.grad_weights)
        return rounded + p.f * e.grad_operand_sizes

    @cached_property
    def row_dot(self) -> numpy.ndarray:
        """The error of D, computed from the stored output or from P and dP, whichever error is larger."""
        e, p = self.evaluation, self.precision
        gradient = numpy.where(e.rows, abs(e.grad_output), 0.0)
        product = p.u_a * e.value.shape[-1] * abs(e.output)
        terms = gradient * (self.forward.output + product) + p.f * (gradient + abs(e.output) + 2)
        from_output = numpy.sum(terms, axis=-1, keepdims=True)
        relative = self.weights + p.u_p + p.u_a * e.kv_len
        terms = e.weights * (relative * abs(e.grad_weights) + self.grad_weights)
        terms = terms + p.f * (e.weights + abs(e.grad_weights) + 2)
        from_weights = numpy.sum(terms, axis=-1, keepdims=True)
        rounding = p.u_a * (abs(e.row_dot + e.grad_lse) + abs(e.grad_lse))
        return numpy.where(e.rows, numpy.maximum(from_output, from_weights), 0.0) + rounding

    @cached_property
    def grad_logits(self) -> numpy.ndarray:
        """F_ij: the error of dS without the error of D, which is the same in the whole row."""
        e, p = self.evaluation, self.precision
        difference = e.difference
        error = e.weights * ((self.weights + 2 * p.u_a) * difference + self.grad_weights)
        return e.seen(error + p.u_p * abs(e.grad_logits) + 4 * p.w * (1 + difference))

    @cached_property
    def cap_slope(self) -> numpy.ndarray | float:
        """The error of the slope of the soft cap."""
        e, p, cap = self.evaluation, self.precision, self.evaluation.arguments.softcap
        if cap is None:
            return 0.0
        tanh, error = abs(e.capped) / cap, self.forward.capped / cap
        return e.seen(2 * tanh * error + error**2 + 3 * p.u_a)

    @cached_property
    def grad_scores(self) -> numpy.ndarray:
        """C_ij: the error of dX without the error of D; the slope does not scale the underflow of a stored dX."""
        e, p = self.evaluation, self.precision
        error = self.grad_logits * (e.cap_slope + self.cap_slope) + abs(e.grad_logits) * self.cap_slope
        return e.seen(error + p.w)

    def grad_query(self) -> numpy.ndarray:
        """Return the error of the query's gradient."""
        e, p = self.evaluation, self.precision
        summed = self.grad_scores + p.u_a * (e.kv_len + 1) * abs(e.grad_scores)
        shared = self.row_dot * abs(weighted_sum(e.weights * e.cap_slope, e.trace.key))
        error = abs(e.trace.scale) * (weighted_sum(summed, abs(e.trace.key)) + shared)
        rounded = (p.u_o + 2 * p.u_a) * abs(e.grad_query)
        flushed = p.f * (1 + abs(e.trace.scale)) * (e.query_sizes + 2 * e.kv_len + 1)
        return numpy.where(e.rows, error + rounded + p.w + flushed, 0.0)

    def grad_key(self) -> numpy.ndarray:
        """Return the error of the key's gradient; the gradient of each head of a group may be rounded first."""
        e, p = self.evaluation, self.precision
        partial = p.u_a * (e.q_depth + 1) + p.u_o * (e.group - 1)
        shared = e.seen(e.weights * self.row_dot * (e.cap_slope + self.cap_slope))
        summed = self.grad_scores + shared + partial * abs(e.grad_scores)
        error = abs(e.trace.scale) * e.over_rows(summed, abs(e.trace.query))
        rounded = (p.u_o + 2 * p.u_a) * abs(e.grad_key)
        flushed = p.f * (1 + abs(e.trace.scale)) * (e.key_sizes + 2 * e.q_depth + e.group)
        return numpy.where(e.read, error + rounded + p.w * e.group + flushed, 0.0)

    def grad_value(self) -> numpy.ndarray:
        """Return the error of the value's gradient."""
        e, p = self.evaluation, self.precision
        stored = p.u_p + 2 * p.u_a * (e.kept is not None)
        relative = self.weights + stored + p.u_a * e.q_depth + p.u_o * (e.group - 1)
        error = e.over_rows(e.dropped * relative, abs(e.grad_output)) + p.u_o * abs(e.grad_value)
        flushed = p.f * (e.value_flushes + e.value_sizes + e.group)
        return numpy.where(e.read, error + p.w * (e.group + e.value_sizes) + flushed, 0.0)

    def grad_bias(self) -> numpy.ndarray:
        """Return the error of the bias's gradient."""
        e, p = self.evaluation, self.precision
        roundoff, lost = e.gradient_precision("bias", p)
        values = e.grad_bias
        terms = e.pairs.size // max(values.size, 1)
        shared = e.seen(self.grad_logits + e.weights * self.row_dot)
        error = e.over_pairs(shared + p.u_a * terms * abs(e.grad_logits)) + roundoff * abs(values) + lost
        return numpy.where(e.over_pairs(e.indicator) > 0, error + p.f * terms, 0.0)

    def grad_sinks(self) -> numpy.ndarray:
        """Return the error of the sinks' gradient."""
        e, p = self.evaluation, self.precision
        roundoff, lost = e.gradient_precision("sinks", p)
        size = abs(e.row_dot)
        terms = e.arguments.batch * e.arguments.q_len
        relative = self.sink_weights + p.u_a * (1 + terms)
        error = e.sink_weights * (relative * size + self.row_dot) + 4 * p.w * (1 + size)
        error = numpy.sum(error, axis=(0, 2, 3)) + roundoff * abs(e.grad_sinks) + lost
        return numpy.where(e.arrays["sinks"] == -numpy.inf, 0.0, error)


class BackwardVariances:
    """The variances of the same errors, if all roundings are independent."""

    def __init__(self, evaluation: GradientEvaluation, precision: Precision) -> None:
        """Keep the evaluation and the precision."""
        self.evaluation = evaluation
        self.precision = precision
        self.forward = ForwardVariances(evaluation, precision, ForwardErrors(evaluation, precision))

    @cached_property
    def weights(self) -> numpy.ndarray:
        """The variance of weights rebuilt from scores and lse, relative to them."""
        e, p = self.evaluation, self.precision
        return e.seen(self.forward.score + self.forward.lse + p.u_a**2 * (e.logits**2 + e.lse**2) / 3 + p.e_x**2)

    @cached_property
    def grad_weights(self) -> numpy.ndarray:
        """The variance of dP."""
        e, p = self.evaluation, self.precision
        squares = e.keep(e.keep(e.seen(e.grad_output**2 @ (e.value**2).swapaxes(-1, -2))))
        size = e.value.shape[-1]
        product = p.u_a**2 * (size * (e.grad_weights**2 / 3 + squares / 2) / 3 + squares)
        return product + p.u_dp**2 / 3 * e.grad_weights**2

    @cached_property
    def row_dot(self) -> numpy.ndarray:
        """The variance of D."""
        e, p = self.evaluation, self.precision
        gradient = numpy.where(e.rows, e.grad_output, 0.0)
        dot = e.row_dot + e.grad_lse
        squares = numpy.sum((gradient * e.output) ** 2, axis=-1, keepdims=True)
        size = e.value.shape[-1]
        from_output = numpy.sum(gradient**2 * self.forward.output, axis=-1, keepdims=True)
        from_output = from_output + p.u_a**2 * (size * (dot**2 / 3 + squares / 2) / 3 + squares)
        relative = self.weights + p.u_p**2 / 3 + p.u_a**2 * e.kv_len / 6
        products = e.weights**2 * (relative * e.grad_weights**2 + self.grad_weights)
        from_weights = numpy.sum(products, axis=-1, keepdims=True) + p.u_a**2 * e.kv_len / 9 * dot**2
        rounding = p.u_a**2 * (dot**2 + e.grad_lse**2) / 3
        return numpy.where(e.rows, numpy.maximum(from_output, from_weights), 0.0) + rounding

    @cached_property
    def grad_logits(self) -> numpy.ndarray:
        """The variance of dS without that of D."""
        e, p = self.evaluation, self.precision
        difference = e.grad_weights - e.row_dot
        variance = e.weights**2 * ((self.weights + p.u_a**2) * difference**2 + self.grad_weights)
        return e.seen(variance + p.u_p**2 / 3 * e.grad_logits**2 + (4 * p.w * (1 + abs(difference))) ** 2)

    @cached_property
    def grad_scores(self) -> numpy.ndarray:
        """The variance of dX without that of D."""
        e, p, cap = self.evaluation, self.precision, self.evaluation.arguments.softcap
        slope = 0.0 if cap is None else 4 * (e.capped / cap) ** 2 * self.forward.capped / cap**2 + 3 * p.u_a**2
        return e.seen(self.grad_logits * e.cap_slope**2 + e.grad_logits**2 * slope + p.w**2)

    def grad_query(self) -> numpy.ndarray:
        """Return the variance of the query's gradient."""
        e, p = self.evaluation, self.precision
        depth = e.kv_len
        summed = self.grad_scores + p.u_a**2 * depth / 6 * e.grad_scores**2
        shared = self.row_dot * weighted_sum(e.weights * e.cap_slope, e.trace.key) ** 2
        variance = e.trace.scale**2 * (weighted_sum(summed, e.trace.key**2) + shared)
        rounded = (p.u_o**2 / 3 + p.u_a**2 * depth / 9) * e.grad_query**2
        return numpy.where(e.rows, variance + rounded + p.w**2, 0.0)

    def grad_key(self) -> numpy.ndarray:
        """Return the variance of the key's gradient."""
        e, p = self.evaluation, self.precision
        shared = e.seen((e.weights * e.cap_slope) ** 2 * self.row_dot)
        summed = self.grad_scores + shared + self._partial() / 6 * e.grad_scores**2
        variance = e.trace.scale**2 * e.over_rows(summed, e.trace.query**2)
        rounded = self._rounded() * e.grad_key**2
        return numpy.where(e.read, variance + rounded + (p.w * e.group) ** 2, 0.0)

    def grad_value(self) -> numpy.ndarray:
        """Return the variance of the value's gradient."""
        e, p = self.evaluation, self.precision
        squares = e.grad_output**2
        variance = e.over_rows(e.dropped**2 * (self.weights + p.u_p**2 / 3 + self._partial() / 6), squares)
        rounded = self._rounded() * e.grad_value**2
        return numpy.where(e.read, variance + rounded + (p.w * (e.group + e.value_sizes)) ** 2, 0.0)

    def grad_bias(self) -> numpy.ndarray:
        """Return the variance of the bias's gradient."""
        e, p = self.evaluation, self.precision
        roundoff, lost = e.gradient_precision("bias", p)
        values = e.grad_bias
        terms = e.pairs.size // max(values.size, 1)
        whole_row = e.arrays["bias"].shape[-1] == 1
        together = numpy.sum(e.weights, axis=-1, keepdims=True) if whole_row else e.weights
        summed = (
            self.grad_logits + e.seen(e.weights * together * self.row_dot) + p.u_a**2 * terms / 6 * e.grad_logits**2
        )
        variance = e.over_pairs(summed) + (roundoff**2 / 3 + p.u_a**2 * terms / 9) * values**2 + lost**2
        return numpy.where(e.over_pairs(e.indicator) > 0, variance, 0.0)

    def grad_sinks(self) -> numpy.ndarray:
        """Return the variance of the sinks' gradient."""
        e, p = self.evaluation, self.precision
        roundoff, lost = e.gradient_precision("sinks", p)
        terms = e.arguments.batch * e.arguments.q_len
        relative = self.forward.sink + self.forward.lse + p.u_a**2 * (1 + e.lse**2 / 3 + terms / 6) + p.e_x**2
        variance = e.sink_weights**2 * (relative * e.row_dot**2 + self.row_dot) + (4 * p.w * (1 + abs(e.row_dot))) ** 2
        values = e.grad_sinks
        variance = numpy.sum(variance, axis=(0, 2, 3)) + (roundoff**2 / 3 + p.u_a**2 * terms / 9) * values**2 + lost**2
        return numpy.where(e.arrays["sinks"] == -numpy.inf, 0.0, variance)

    def _partial(self) -> float:
        e, p = self.evaluation, self.precision
        return p.u_a**2 * e.q_depth + p.u_o**2 * (e.group - 1)

    def _rounded(self) -> float:
        e, p = self.evaluation, self.precision
        return p.u_o**2 * (1 + (e.group - 1) / 3) / 3 + p.u_a**2 * e.q_depth / 9


class BackwardBounds(AttentionBounds[GradientEvaluation]):
    """Bounds of `attention_vjp`: the gradients of query, key, value, and of bias and sinks if the call has them."""

    @numpy.errstate(all="ignore")
    def __init__(self, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], steps: Steps) -> None:
        """Evaluate the case."""
        self.evaluation = GradientEvaluation(arrays, options, steps)
        self.values = self.evaluation.values

    @numpy.errstate(all="ignore")
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        errors = BackwardErrors(self.evaluation, precision)
        return {name: getattr(errors, name)() for name in self.values}

    @numpy.errstate(all="ignore")
    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        variances = BackwardVariances(self.evaluation, precision)
        return {name: numpy.sqrt(getattr(variances, name)()) for name in self.values}
