"""Predict the results of known mistakes on a case."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec_conformance.asking.calls import arranged, function_over, joined, layer_answers, named
from mha_spec_conformance.mistakes import ANY_SIZE, Sizes
from mha_spec_conformance.suite.changed import Changed
from mha_spec_conformance.suite.functions import FUNCTIONS, OF_ATTENTION
from mha_spec_conformance.suite.joined import Joined

from .bounds import SPECIFICATION, bounds
from .bounds.evaluation import in_float64

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.layer_steps import LayerSteps
    from mha_spec.steps import Steps
    from mha_spec.varlen_reference import VarlenSteps
    from mha_spec_conformance.mistakes import Mistake
    from mha_spec_conformance.suite.cases import Case

    from .bounds import Bounds, Precision

    PlainSteps = Steps | LayerSteps | VarlenSteps
    AnySteps = PlainSteps | Joined | Changed

__all__ = ["Predictions", "answer", "can_show", "elements", "scores_of"]

MOST_KEPT = 2**20
"""The largest number of scores of the evaluations of a case that are kept, because each holds many arrays of scores."""

CANNOT_ANSWER = (ArithmeticError, AttributeError, IndexError, TypeError, ValueError)
"""The exceptions of a mistaken reference on a case to which the mistake does not apply."""


def answer(
    steps: AnySteps, function: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, object]
) -> dict[str, numpy.ndarray]:
    """Return the outputs by name of the reference that is composed of these steps."""
    call = function_over(steps, function)
    if FUNCTIONS[function].of_layer:
        return joined(list(layer_answers(call, function, {**arrays, **options})))
    every_output = dict.fromkeys(FUNCTIONS[function].optional.values(), True)
    operands, keywords = arranged(function, {**arrays, **options, **every_output})
    results = named(function, keywords, call(*operands, **keywords))
    return {name: array for name, array in results.items() if array is not None}


def can_show(mistake: Mistake, case: Case, dtype: str | None = None) -> bool:
    """Tell whether the case calls a function of the mistake with the arguments, sizes and dtype that it needs."""
    if case.function not in mistake.functions or not _names(case).issuperset(mistake.needs):
        return False
    if mistake.dtypes and not set(mistake.dtypes) & ({dtype} if dtype else set(case.dtypes)):
        return False
    return mistake.past == ANY_SIZE or (case.expect != "error" and _passes(_sizes(case), mistake.past))


def _names(case: Case) -> set[str]:
    """Return the names of the arguments, and of the options of a rotation."""
    rotary = case.options.get("rotary")
    return {*case.options, *case.input_names, *(rotary if isinstance(rotary, dict) else ())}


def _passes(sizes: Sizes, least: Sizes) -> bool:
    """Tell whether each size is larger than the least, where that is not 0."""
    return all(size > bound for size, bound in zip(sizes, least, strict=True) if bound)


def _sizes(case: Case) -> Sizes:
    if "query" not in case.input_names:
        return Sizes(rows=case.shape_of("lse_a")[2])
    if FUNCTIONS[case.function].of_layer:
        return _sizes_of_layer(case)
    if case.function in VARLEN_FUNCTIONS:
        (rows, heads, _), keys = case.shape_of("query"), math.prod(case.shape_of("key")[:-2])
        return Sizes(rows, keys, heads)
    (_, heads, rows, _), (_, _, keys, _) = case.shape_of("query"), case.shape_of("key")
    return Sizes(rows, keys, heads)


def _sizes_of_layer(case: Case) -> Sizes:
    """Return the sizes of the attention within a layer, whose keys are all slots of a cache."""
    (_, rows, _), (_, heads, _) = case.shape_of("query"), case.shape_of("w_q")
    name = next((name for name in ("cache_key", "key") if name in case.input_names), None)
    keys = rows if name is None else case.shape_of(name)[2 if name == "cache_key" else 1]
    if "cache_block_table" in case.input_names:
        keys = case.shape_of("cache_key")[1] * case.shape_of("cache_block_table")[1]
    return Sizes(rows, keys, heads)


def scores_of(case: Case) -> int:
    """Return the number of scores of attention, or of the elements of another function's results."""
    if case.function not in OF_ATTENTION:
        return elements(case)
    return math.prod(case.shape_of("query")[:3]) * case.shape_of("key")[2]


def elements(case: Case) -> int:
    """Return the number of elements of the results."""
    return sum(math.prod(golden.shape) for golden in case.expected.values())


class Predictions:
    """The results and allowances of every mistake on a case.

    Most are in float64, and serve every dtype of the case; mistakes with parts in common share their results.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self._inputs: dict[str, dict[str, numpy.ndarray]] = {}
        self._outputs: dict[tuple[AnySteps, str], dict[str, numpy.ndarray] | None] = {}
        self._bounds: dict[tuple[AnySteps, str], Bounds | None] = {}

    def outputs(self, mistake: Mistake, dtype: str) -> dict[str, numpy.ndarray] | None:
        """Return the results of the mistaken reference, or None if it raises."""
        return self._answer(mistake.steps, dtype, mistake.native)

    def allowances(self, mistake: Mistake | None, dtype: str, run: Precision) -> dict[str, numpy.ndarray] | None:
        """Return the allowances of a mistake (None: of the specification), or None if it cannot be evaluated."""
        return self._allowances(SPECIFICATION if mistake is None else mistake.steps, dtype, run)

    def _arrays(self, dtype: str) -> dict[str, numpy.ndarray]:
        """Return copies of the inputs, because a mistake may write to them."""
        if dtype not in self._inputs:
            self._inputs[dtype] = self.case.inputs(dtype)
        return {name: array.copy() for name, array in self._inputs[dtype].items()}

    def _arguments(self, dtype: str) -> dict[str, Any]:
        return {**self._arrays(dtype), **self.case.options}

    def _answer(self, steps: AnySteps, dtype: str, native: bool) -> dict[str, numpy.ndarray] | None:
        """Return the results of steps, in float64 unless they depend on the dtype of the run."""
        if isinstance(steps, Joined):
            first, second = (self._answer(part, dtype, native) for part in (steps.first, steps.second))
            return None if first is None or second is None else steps.join(first, second)
        if isinstance(steps, Changed):
            unchanged = self._answer(steps.steps, dtype, native)
            return None if unchanged is None else steps.of(unchanged, self._arguments(dtype))
        key = steps, dtype if native else "float64"
        if key not in self._outputs:
            self._drop_oldest(self._outputs)
            self._outputs[key] = self._evaluate(steps, dtype, native)
        return self._outputs[key]

    def _evaluate(self, steps: PlainSteps, dtype: str, native: bool) -> dict[str, numpy.ndarray] | None:
        arrays = self._arrays(dtype) if native else in_float64(self._arrays(dtype))
        try:
            with numpy.errstate(all="ignore"):
                return answer(steps, self.case.function, arrays, self.case.options)
        except CANNOT_ANSWER:
            return None

    def _allowances(self, steps: AnySteps, dtype: str, run: Precision) -> dict[str, numpy.ndarray] | None:
        if isinstance(steps, Joined):
            first, second = (self._allowances(part, dtype, run) for part in (steps.first, steps.second))
            return None if first is None or second is None else steps.join(first, second)
        if isinstance(steps, Changed):
            unchanged = self._allowances(steps.steps, dtype, run)
            return None if unchanged is None else steps.of(unchanged, self._arguments(dtype))
        key = steps, dtype
        if key not in self._bounds:
            self._drop_oldest(self._bounds)
            self._bounds[key] = self._bounded(steps, dtype)
        case_bounds = self._bounds[key]
        try:
            return None if case_bounds is None else case_bounds.allowances(run)
        except CANNOT_ANSWER:
            return None

    def _drop_oldest(self, kept: dict[Any, Any]) -> None:
        """Drop the oldest evaluations if all of them hold too many scores."""
        while len(kept) * scores_of(self.case) > MOST_KEPT:
            del kept[next(iter(kept))]

    def _bounded(self, steps: PlainSteps, dtype: str) -> Bounds | None:
        try:
            rows = self.case.sampled_rows
            return bounds(self.case.function, self._arrays(dtype), self.case.options, steps, rows)
        except CANNOT_ANSWER:
            return None
