"""The table of functions agrees with the reference, and the layer can be asked for output and weights."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy
import pytest
from support.subject import Subject

from mha_spec import layer_steps, reference
from mha_spec.layer_steps import LayerSteps
from mha_spec.steps import Steps
from mha_spec_conformance.suite.functions import DECLARED_FEATURES, FUNCTIONS, Function

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Case, Suite

OUTPUT_AND_WEIGHTS = "multi_head_attention_and_weights"


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda function: function.name)
def test_table_has_the_signatures_of_the_specification(function: Function) -> None:
    parameters = inspect.signature(getattr(reference, function.name)).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert by_position == list(function.operands)
    assert sorted(by_keyword) == sorted(function.keywords)


def test_keywords_of_features_and_of_optional_outputs_are_accepted() -> None:
    for function in FUNCTIONS.values():
        words = {word for words in function.keyword_features.values() for word in words}
        assert words - set(DECLARED_FEATURES) | set(function.optional.values()) <= set(function.keywords)
        assert set(function.optional) <= set(function.outputs)


def with_weights(case: Case) -> Case:
    """Turn a case of multi_head_attention into one that also asks for the weights, which the reference computes."""
    arguments = case.inputs("float64") | dict(case.options)
    params = {name: arguments.pop(name) for name in list(arguments) if name.startswith(("w_", "b_"))}
    query, key, value = (arguments.pop(name, None) for name in ("query", "key", "value"))
    weights = reference.multi_head_attention_and_weights(query, key, value, params, **arguments)[1]
    entry = {"file": "computed", "tensor": case.id, "kinds": None, "rows": None, "shape": weights.shape}
    return replace(
        case,
        function=OUTPUT_AND_WEIGHTS,
        output_entries=case.output_entries | {"weights": entry},
        tensors=case.tensors | {("computed", case.id): weights},
    )


@pytest.fixture(scope="module")
def case(suite: Suite) -> Case:
    """Return a case of the layer without options."""
    plain = (case for case in suite.cases if case.function == "multi_head_attention" and case.expect == "values")
    return with_weights(next(case for case in plain if set(case.expected) == {"output"} and not case.options))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_output_and_weights_of_the_layer_can_be_asked(case: Case, dtype: str) -> None:
    result = Subject.over(Steps()).outcome(case, dtype)
    assert (result.outcome, result.reason) == ("pass", None)


@pytest.mark.parametrize("name", ["attend", "weigh"])
def test_both_results_are_compared(case: Case, name: str) -> None:
    step = getattr(layer_steps, name)

    def shifted(*operands: numpy.ndarray, **options: object) -> numpy.ndarray:
        return step(*operands, **options) + 0.1

    result = Subject.over(replace(LayerSteps(), **{name: shifted})).outcome(case, "float32")
    assert result.outcome == "fail"
    assert result.worst.output == {"attend": "output", "weigh": "weights"}[name]


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_results_is_malformed(case: Case, count: int) -> None:
    def call(*_: object, **__: object) -> object:
        return (numpy.ones(1),) * count

    result = Subject(dict.fromkeys(FUNCTIONS, call)).outcome(case, "float32")
    assert result.malformed
    assert result.reason == f"{OUTPUT_AND_WEIGHTS} must return (output, weights), received a tuple of {count}"
