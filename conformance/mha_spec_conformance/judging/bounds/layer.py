"""Error bounds of the layer: each step adds its roundings to the errors of its operands.

The layer runs the specification's steps in float64. For each array that a step returns, `StepErrors` keeps the error
that the array may have in the precision of the run. The bounds of attention treat the errors of query and key as
further errors of the scores, and the weights average the errors of the value.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import dtype_name
from mha_spec.cache import KVCache
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps, for_each_pair, turn
from mha_spec.steps import Steps
from mha_spec_conformance.asking.calls import joined, layer_answers, layer_over, with_contiguous_cache
from mha_spec_conformance.suite.functions import FUNCTIONS

from .evaluation import Evaluation, as_float64, in_float64, weighted_sum
from .forward import ForwardErrors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .roundoff import Precision

    Turns = tuple[numpy.ndarray, numpy.ndarray]

__all__ = ["AlibiBounds", "LayerBounds"]

ERROR_OF_POWER = 8
"""Allowed relative error of a power of two, in unit roundoffs of the accumulator."""


class AttentionErrors(ForwardErrors):
    """The errors of attention whose query, key and value have errors."""

    def __init__(self, evaluation: Evaluation, precision: Precision, *operands: numpy.ndarray) -> None:
        """Keep the errors of query, key and value, with the heads of key and value repeated."""
        super().__init__(evaluation, precision)
        heads = evaluation.arguments.heads
        self._query, self._key, self._value = (evaluation.steps.repeat_heads(error, heads) for error in operands)

    @cached_property
    def product(self) -> numpy.ndarray:
        """The error of scale * q.k, of the product and of its factors."""
        t = self.evaluation.trace
        query, key = abs(t.query), (abs(t.key) + self._key).swapaxes(-1, -2)
        factors = self._query @ key + query @ self._key.swapaxes(-1, -2)
        return super().product + self.evaluation.seen(abs(t.scale) * factors)

    @cached_property
    def output(self) -> numpy.ndarray:
        """The error of the output, with that of the values, of which it is a weighted mean."""
        e = self.evaluation
        return super().output + numpy.where(e.rows, self.guard * weighted_sum(e.dropped, self._value), 0.0)


class StepErrors:
    """Steps of the layer that record the error of each array that they return.

    A layer runs with `steps`; then `of` returns the error of an array. Errors are kept by identity of the array.
    """

    def __init__(self, steps: LayerSteps, attention: Steps, precision: Precision, dtypes: Mapping[str, str]) -> None:
        """Wrap the steps of a layer and of its attention; arrays that no step returned have the error 0."""
        self._attention, self._precision, self._dtypes = attention, precision, dtypes
        self._errors: dict[int, tuple[object, Any]] = {}
        self._depths: dict[int, int] = {}
        names = ("project", "add_bias", "normalise", "turns", "magnify", "turn", "append", "attend", "weigh")
        names += ("normalise_jointly", "merge_heads", "combine", "add_output_bias")
        self.steps = replace(steps, **{name: self._recording(name, getattr(steps, name)) for name in names})

    def of(self, array: object) -> Any:
        """Return the error of an array."""
        kept = self._errors.get(id(array))
        return numpy.zeros_like(array) if kept is None else kept[1]

    def _recording(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            errors = getattr(self, f"_{name}")(step, result, *arguments, **options)
            for array, error in zip(result, errors, strict=False) if isinstance(result, tuple) else ((result, errors),):
                # The array is kept too, because its id could be reused after it is freed.
                self._errors[id(array)] = array, error
            return result

        return recording

    def _rounded(self, error: numpy.ndarray, result: numpy.ndarray) -> numpy.ndarray:
        """Add the error of storing the result in the dtype of the run."""
        return error + self._precision.u_o * abs(result) + self._precision.w

    def _project(self, step: Callable[..., Any], result: Any, x: Any, weight: Any) -> Any:
        return self._sum_of_products(step, result, x, weight, weight.shape[0])

    def _sum_of_products(self, step: Callable[..., Any], result: Any, x: Any, weight: Any, depth: int) -> Any:
        self._depths[id(result)] = depth
        return self._rounded(step(self.of(x) + self._precision.u_a * depth * abs(x), abs(weight)), result)

    def _add_bias(self, step: Callable[..., Any], result: Any, x: Any, bias: Any) -> Any:
        """A fused product begins its sum with the bias, which is then part of everything that each addition rounds."""
        if bias is None:
            return self.of(x)
        error = step(self.of(x), self._precision.u_a * self._depths[id(x)] * abs(bias))
        return self._rounded(error, result)

    _add_output_bias = _add_bias

    def _normalise(self, step: Callable[..., Any], result: Any, x: Any, gain: Any, epsilon: float) -> Any:
        return self._normalised(result, x, gain, epsilon, axes=(3,))

    def _normalise_jointly(self, step: Callable[..., Any], result: Any, x: Any, gain: Any, epsilon: float) -> Any:
        return self._normalised(result, x, gain[:, None, :], epsilon, axes=(1, 3))

    def _normalised(self, result: Any, x: Any, gain: Any, epsilon: float, axes: tuple[int, ...]) -> Any:
        """Bound x / rms(x) with the rms of the smallest and of the largest vector that x may be."""
        error, size, terms = self.of(x), abs(x), math.prod(x.shape[axis] for axis in axes)

        def inverse(vector: numpy.ndarray) -> numpy.ndarray:
            return 1 / numpy.sqrt(numpy.mean(vector**2, axis=axes, keepdims=True) + epsilon)

        factor, most, least = inverse(x), inverse(numpy.maximum(size - error, 0)), inverse(size + error)
        moved = error * most + size * numpy.maximum(most - factor, factor - least)
        roundings = (self._precision.u_a * (terms / 2 + 8) + self._precision.u_o) * abs(result)
        return self._rounded(abs(gain) * moved + roundings, result)

    def _turns(self, step: Callable[..., Any], result: Any, positions: Any, frequencies: Any, like: Any) -> Turns:
        """Bound the error of cosine and sine: of the angle, whose frequency is a power, and of the functions."""
        p = self._precision
        angles = for_each_pair(numpy.asarray(positions, dtype=numpy.float64)) * frequencies
        logarithms = numpy.log(numpy.where(frequencies == 0, 1.0, frequencies))  # A pair may not turn at all.
        angle = p.u_a * abs(angles) * (10 + abs(logarithms))
        angle = angle[:, None] if result[0].ndim == 4 else angle
        second_order = angle**2 / 2 + p.e_x
        cosine, sine = (numpy.minimum(abs(other) * angle + second_order, 2.0) for other in reversed(result))
        return cosine, sine

    def _magnify(self, step: Callable[..., Any], result: Any, turns: Turns, factor: float) -> Turns:
        """Bound the error of cosine and sine times the factor; a factor of 1 does not round."""
        rounding = 0.0 if factor == 1 else self._precision.u_a
        cosine, sine = (factor * self.of(turn) + rounding * abs(factor * turn) for turn in turns)
        return cosine, sine

    def _turn(self, step: Callable[..., Any], result: Any, x: Any, turns: Turns, interleaved: bool) -> Any:
        size, error = (abs(turn) for turn in turns), tuple(self.of(turn) for turn in turns)
        cosine, sine = size
        wide = (cosine + error[0], sine + error[1])
        reach = partial(_reach, interleaved=interleaved)
        turned = reach(self.of(x), wide) + reach(abs(x), error) - reach(abs(x), (0 * cosine, 0 * sine))
        return self._rounded(turned + 3 * self._precision.u_a * reach(abs(x), (cosine, sine)), result)

    def _append(
        self,
        step: Callable[..., Any],
        result: Any,
        cache: KVCache,
        key: Any,
        value: Any,
        counts: Any,
        steps: LayerSteps,
    ) -> Any:
        """Store the errors in the same slots as the arrays, because storing does not round."""
        errors = KVCache(self.of(cache.key), self.of(cache.value), cache.lengths)
        new = step(errors, self.of(key), None if value is None else self.of(value), counts, steps)
        return new.key, new.value

    def _evaluation(self, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Evaluation:
        evaluation = Evaluation(arrays, options, self._attention)
        evaluation.dtypes = {**evaluation.dtypes, **self._dtypes}
        return evaluation

    def _attend(self, step: Callable[..., Any], result: Any, query: Any, key: Any, value: Any, **options: Any) -> Any:
        evaluation = self._evaluation({"query": query, "key": key, "value": value}, options)
        return AttentionErrors(evaluation, self._precision, self.of(query), self.of(key), self.of(value)).output

    def _weigh(self, step: Callable[..., Any], result: Any, query: Any, key: Any, **options: Any) -> Any:
        errors = [self.of(query), self.of(key)]
        evaluation = self._evaluation({"query": query, "key": key}, options)
        return AttentionErrors(evaluation, self._precision, *errors, errors[1]).weights

    def _merge_heads(self, step: Callable[..., Any], result: Any, x: Any) -> Any:
        return step(self.of(x))

    def _combine(self, step: Callable[..., Any], result: Any, x: Any, weight: Any) -> Any:
        return self._sum_of_products(step, result, x, weight, weight.shape[0] * weight.shape[1])


def _reach(x: Any, turns: Turns, *, interleaved: bool) -> Any:
    """Compute |a| |cosine| + |b| |sine| for both components of each pair."""
    cosine, sine = turns
    return numpy.maximum(turn(x, (cosine, sine), interleaved), turn(x, (cosine, -sine), interleaved))


class LayerBounds:
    """Bounds of the functions of the layer; a sequence of calls is a single evaluation."""

    @numpy.errstate(all="ignore")
    def __init__(
        self, function: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], steps: object
    ) -> None:
        """Evaluate the case."""
        self._function = function
        self._attention = steps if isinstance(steps, Steps) else Steps()
        self._steps = steps if isinstance(steps, LayerSteps) else layer_over(self._attention)
        self._dtypes = {name: dtype_name(array) for name, array in arrays.items() if name in ("bias", "sinks")}
        self._arguments = in_float64(arrays) | dict(options)

    @property
    def values(self) -> dict[str, numpy.ndarray]:
        """The results in float64; an allowance needs none of them."""
        return self._values

    @cached_property
    @numpy.errstate(all="ignore")
    def _values(self) -> dict[str, numpy.ndarray]:
        return joined(self._answers(self._steps, self._arguments))

    def _answers(self, steps: LayerSteps, arguments: Mapping[str, Any]) -> list[dict[str, numpy.ndarray]]:
        call = getattr(Layer(steps), self._function)
        if FUNCTIONS[self._function].of_layer:
            return list(layer_answers(call, self._function, arguments))
        return [{"output": call(**arguments)}]

    @numpy.errstate(all="ignore")
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        errors = StepErrors(self._steps, self._attention, precision, self._dtypes)
        answers = self._answers(errors.steps, with_contiguous_cache(self._arguments))
        return joined([{name: errors.of(array) for name, array in part.items()} for part in answers])

    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return nothing: a rounding in a projection moves many scores, so that errors are not independent."""
        return {}


class AlibiBounds:
    """Bounds of `alibi_slopes` and `alibi_bias`: a power of two, and its product with a whole number."""

    def __init__(
        self, function: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], steps: object
    ) -> None:
        """Evaluate the case."""
        layer = Layer(steps if isinstance(steps, LayerSteps) else LayerSteps())
        if function == "alibi_slopes":
            self.values = {"slopes": layer.alibi_slopes(**options, dtype="float64")}
        else:
            wide = {name: as_float64(array) for name, array in arrays.items()}
            self.values = {"bias": layer.alibi_bias(**wide, **options)}

    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        return {name: ERROR_OF_POWER * precision.u_a * abs(array) for name, array in self.values.items()}

    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return nothing."""
        return {}
