"""Attention evaluated in float64, with the quantities that its error bounds use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy

from mha_spec.arguments import Arguments
from mha_spec.arrays import FLOATING, Array, dtype_name, softmax_dtype_name
from mha_spec.reference import Reference
from mha_spec.steps import Steps, sum_over_visible

from .roundoff import unit_roundoff

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .roundoff import Precision

__all__ = ["AttentionBounds", "Evaluation", "as_float64", "in_float64", "weighted_sum"]


def as_float64(array: numpy.ndarray) -> numpy.ndarray:
    """Convert floating data to float64; masks, lengths and ids keep their dtype."""
    return array.astype(numpy.float64) if dtype_name(array) in FLOATING else array


def in_float64(arrays: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Convert the arrays of a call; what overflows the softmax's type becomes infinite (MHA-BIAS-2, MHA-SINK-1)."""
    converted = {name: as_float64(array) for name, array in arrays.items()}
    for name in {"bias", "sinks"} & arrays.keys() if "query" in arrays else ():
        with numpy.errstate(over="ignore"):
            narrow = arrays[name].astype(softmax_dtype_name(dtype_name(arrays["query"])))
        converted[name] = numpy.where(numpy.isinf(narrow), narrow, converted[name])
    return converted


def weighted_sum(weights: numpy.ndarray, values: numpy.ndarray) -> numpy.ndarray:
    """Compute sum_j weights_ij values_jc; a value of weight 0 adds nothing, even if it is not finite."""
    if numpy.isfinite(values).all():
        return weights @ values
    return sum_over_visible(weights, values, weights != 0)


class Evaluation:
    """One call of attention in float64; every matrix over (i, j) is 0 at hidden pairs.

    The axes are (batch, heads, q_len, kv_len), with the heads of key and value repeated; quantities of a row keep a
    last axis of 1. Hidden keys and values affect nothing, even if they are not finite.
    """

    def __init__(
        self,
        arrays: Mapping[str, numpy.ndarray],
        options: Mapping[str, Any],
        steps: Steps,
        kv_len: int | None = None,
    ) -> None:
        """Run the steps of the reference.

        `kv_len` is the number of keys over which an implementation sums, if the arrays do not hold all of them because
        no row sees the others.
        """
        self.steps = steps
        self.dtypes: Mapping[str, str] = {name: dtype_name(array) for name, array in arrays.items()}
        self.arrays = in_float64(arrays)
        self.linear_bias: numpy.ndarray | float = 0.0
        """The bias that the call computes from slopes."""
        function = "attention" if "value" in self.arrays else "attention_weights"
        arguments: dict[str, Any] = {"value": None, **self.arrays, **options, "function": function}
        self.arguments = steps.check(Arguments(**arguments))
        self.kv_len = self.arguments.kv_len if kv_len is None else kv_len
        self.trace = Reference(steps).trace(self.arguments)
        self.value: Array = self.trace.value
        self.pairs = self.trace.visible | (self.trace.weights > 0)
        self.rows = self.pairs.any(axis=-1, keepdims=True)
        self.weights = self.seen(self.trace.weights)
        self.scores = self.seen(self.trace.scores)
        hidden = steps.hide(self.trace.logits, self.trace.visible)
        self.logits = self.seen(numpy.where(hidden == -numpy.inf, 0.0, hidden))

    def seen(self, matrix: numpy.ndarray | float) -> numpy.ndarray:
        """Set a matrix over (i, j) to 0 at hidden pairs."""
        return numpy.where(self.pairs, matrix, 0.0)

    @cached_property
    def indicator(self) -> numpy.ndarray:
        """1 at visible pairs."""
        return self.pairs.astype(numpy.float64)

    @cached_property
    def operand_sizes(self) -> numpy.ndarray:
        """sum_c |q_ic| + |k_jc|: the change of a score, per flushed amount, if a factor of each product is flushed."""
        t = self.trace
        query, key = (numpy.sum(abs(array), axis=-1) for array in (t.query, t.key))
        return self.seen(query[..., :, None] + key[..., None, :])

    @cached_property
    def reach(self) -> numpy.ndarray:
        """|scale| sum_c |q_ic| |k_jc|: the sum of the sizes of the terms of a score."""
        t = self.trace
        return self.seen(abs(t.scale) * (abs(t.query) @ abs(t.key).swapaxes(-1, -2)))

    @cached_property
    def capped(self) -> numpy.ndarray:
        """The scores after the soft cap and before the bias."""
        return self.seen(self.steps.soft_cap(self.trace.scores, self.arguments.softcap))

    @cached_property
    def sinks(self) -> numpy.ndarray | None:
        """The sinks, (1, heads, 1, 1); None if no head has a sink."""
        sinks = self.arguments.sinks
        return None if sinks is None or (sinks == -numpy.inf).all() else sinks.reshape(1, -1, 1, 1)

    @cached_property
    def finite_sinks(self) -> numpy.ndarray | float:
        """The sinks, with 0 for a head without a sink."""
        return 0.0 if self.sinks is None else numpy.where(self.sinks == -numpy.inf, 0.0, self.sinks)

    @property
    def depth(self) -> int:
        """Number of terms in the sum of a row: its keys, visible or not, and the sink."""
        return self.kv_len + (self.sinks is not None)

    @cached_property
    def sink_weights(self) -> numpy.ndarray:
        """The weight of the sink in each row."""
        return self.trace.sink_weights

    @cached_property
    def lse(self) -> numpy.ndarray:
        """The log-sum-exp of each row; 0 for a row that has neither a visible key nor a sink."""
        return numpy.where(self.trace.lse == -numpy.inf, 0.0, self.trace.lse)

    @cached_property
    def maximum(self) -> numpy.ndarray:
        """The largest logit of each row, the sink included; 0 for a row that has neither a visible key nor a sink."""
        logits = numpy.where(self.pairs, self.logits, -numpy.inf)
        largest = numpy.max(logits, axis=-1, keepdims=True, initial=-numpy.inf)
        if self.sinks is not None:
            largest = numpy.maximum(largest, self.sinks)
        return numpy.where(largest == -numpy.inf, 0.0, largest)

    @cached_property
    def total(self) -> numpy.ndarray:
        """The sum of exp(s - m) over each row, the sink included."""
        return numpy.exp(self.lse - self.maximum)

    @cached_property
    def kept(self) -> numpy.ndarray | None:
        """The factor of each weight, dropout_mask / (1 - dropout_rate); None without dropout."""
        a = self.arguments
        if a.dropout_mask is None:
            return None
        return self.seen(self.steps.drop(numpy.ones_like(self.weights), a.dropout_mask, a.dropout_rate))

    def keep(self, matrix: numpy.ndarray) -> numpy.ndarray:
        """Apply dropout to a matrix."""
        return matrix if self.kept is None else matrix * self.kept

    @cached_property
    def dropped(self) -> numpy.ndarray:
        """The weights after dropout."""
        return self.keep(self.weights)

    @cached_property
    def output(self) -> numpy.ndarray:
        """The output of each row."""
        dropped = self.steps.drop(self.trace.weights, self.arguments.dropout_mask, self.arguments.dropout_rate)
        return self.steps.sum_over_visible(dropped, self.value, self.trace.visible)

    @cached_property
    def absolute_sum(self) -> numpy.ndarray:
        """sum_j P_ij |v_jc|, P after dropout."""
        return weighted_sum(self.dropped, abs(self.value))

    @cached_property
    def underflow_sum(self) -> numpy.ndarray:
        """Number of underflows in an element of the output: sum_j |v_jc| / l + 1 over visible keys."""
        return self.value_sum / self.total + 1

    @cached_property
    def value_sum(self) -> numpy.ndarray:
        """sum_j |v_jc| over visible keys, with dropout applied to v."""
        return weighted_sum(self.keep(self.indicator), abs(self.value))

    @cached_property
    def flushed_sum(self) -> numpy.ndarray:
        """The change of an output, per flushed amount, if each product and each of its factors is flushed."""
        counts = numpy.sum(self.dropped + 2 * self.keep(self.indicator), axis=-1, keepdims=True)
        return counts + self.value_sum + 2

    def spread(self, weights: numpy.ndarray, sink_weights: numpy.ndarray | float) -> numpy.ndarray:
        """Compute sum_j weights_ij (v_jc - o_ic)^2 + sink_weights_i o_ic^2, with dropout on v, by three products.

        The products cancel where a single key has nearly all the weight. The guard of MHA-ACC-1 may multiply even a
        spread below the roundoff of the products, so their roundoff is added.
        """
        value, dropped = self.value, self.keep(weights)
        squares = weighted_sum(self.keep(dropped), value**2)
        total = self.output**2 * (numpy.sum(weights, axis=-1, keepdims=True) + sink_weights)
        spread = numpy.maximum(squares - 2 * self.output * weighted_sum(dropped, value) + total, 0.0)
        return spread + self.roundoff * (squares + total)

    @property
    def roundoff(self) -> float:
        """The relative error of a sum over the keys in float64, with a few further operations."""
        return 2 * (self.kv_len + 4) * unit_roundoff("float64")


E = TypeVar("E", bound=Evaluation)


class AttentionBounds(ABC, Generic[E]):
    """Bounds that are computed from an evaluation of attention."""

    evaluation: E
    values: dict[str, numpy.ndarray]

    def use(self, dtypes: Mapping[str, str]) -> None:
        """Bound the errors of a run whose arrays have the same numbers in other dtypes."""
        self.evaluation.dtypes = dtypes

    @abstractmethod
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""

    @abstractmethod
    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
