"""Predict the results of known mistakes on a case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.asking.calls import arranged, function_over, joined, layer_answers, named
from mha_spec_conformance.suite.functions import FUNCTIONS

from .bounds import SPECIFICATION, bounds
from .bounds.evaluation import in_float64

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.layer_steps import LayerSteps
    from mha_spec.steps import Steps
    from mha_spec_conformance.mistakes import Mistake
    from mha_spec_conformance.suite.cases import Case

    from .bounds import Bounds, Precision

__all__ = ["Predictions", "answer", "can_show"]

CANNOT_ANSWER = (ArithmeticError, IndexError, TypeError, ValueError)
"""The exceptions of a mistaken reference on a case to which the mistake does not apply."""


def answer(
    steps: Steps | LayerSteps, function: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, object]
) -> dict[str, numpy.ndarray]:
    """Give the outputs by name of the reference that is composed of these steps."""
    call = function_over(steps, function)
    if FUNCTIONS[function].of_layer:
        return joined(list(layer_answers(call, function, {**arrays, **options})))
    every_output = dict.fromkeys(FUNCTIONS[function].optional.values(), True)
    operands, keywords = arranged(function, {**arrays, **options, **every_output})
    results = named(function, keywords, call(*operands, **keywords))
    return {name: array for name, array in results.items() if array is not None}


def can_show(mistake: Mistake, case: Case) -> bool:
    """Tell whether the case calls a function of the mistake with every argument that the mistake needs."""
    arguments = {*case.options, *case.input_names}
    return case.function in mistake.functions and arguments.issuperset(mistake.needs)


class Predictions:
    """The results and allowances of every mistake on a case; most are in float64, and serve every dtype of the case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._outputs: dict[tuple[str, str], dict[str, numpy.ndarray] | None] = {}
        self._bounds: dict[tuple[str, str], Bounds | None] = {}

    def outputs(self, mistake: Mistake, dtype: str) -> dict[str, numpy.ndarray] | None:
        """Give the results of the mistaken reference, or None if it raises."""
        key = mistake.name, dtype if mistake.native else "float64"
        if key not in self._outputs:
            self._outputs[key] = self._answer(mistake, dtype)
        return self._outputs[key]

    def allowances(self, mistake: Mistake | None, dtype: str, run: Precision) -> dict[str, numpy.ndarray] | None:
        """Give the allowances of a mistake (None: of the specification), or None if it cannot be evaluated."""
        key = "" if mistake is None else mistake.name, dtype
        if key not in self._bounds:
            self._bounds[key] = self._evaluate(SPECIFICATION if mistake is None else mistake.steps, dtype)
        case_bounds = self._bounds[key]
        return None if case_bounds is None else case_bounds.allowances(run)

    def _answer(self, mistake: Mistake, dtype: str) -> dict[str, numpy.ndarray] | None:
        arrays = self.case.inputs(dtype)
        arrays = arrays if mistake.native else in_float64(arrays)
        try:
            with numpy.errstate(all="ignore"):
                return answer(mistake.steps, self.case.function, arrays, self.case.options)
        except CANNOT_ANSWER:
            return None

    def _evaluate(self, steps: Steps | LayerSteps, dtype: str) -> Bounds | None:
        try:
            return bounds(self.case.function, self.case.inputs(dtype), self.case.options, steps)
        except CANNOT_ANSWER:
            return None
