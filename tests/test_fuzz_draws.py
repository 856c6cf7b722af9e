"""What the fuzzer draws: ids of any type, numbers beyond the softmax's type, and numbers that vary between calls."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from hypothesis import HealthCheck, given, seed, settings
from support.searches import first_finding, mistaken
from support.subject import Subject

from mha_spec.arrays import dtype_name, library_of
from mha_spec.reference import attention
from mha_spec.steps import Steps
from mha_spec_conformance.fuzzing.call import ENTRIES, Call, Recipe
from mha_spec_conformance.fuzzing.case import case_of
from mha_spec_conformance.fuzzing.draw import calls
from mha_spec_conformance.fuzzing.expected import NotAdmitted
from mha_spec_conformance.fuzzing.script import script_of
from mha_spec_conformance.mistakes.caching import prefix_hidden_alone
from mha_spec_conformance.targets.loading import load

if TYPE_CHECKING:
    from mha_spec_conformance.targets.claims import Claims

STEPS = range(8)
FOUR = "random.standard_normal((2, 1, 3, 4))"


@pytest.mark.parametrize("name", ["segment-ids-cut-to-int32", "wide-bias-saturated"])
def test_mistake_with_numbers_near_the_end_of_a_type_is_found_and_named(name: str) -> None:
    assert name in first_finding(mistaken(name), functions=("attention",)).result.diagnosis


def _call(options: dict[str, Any], **integers: list[int]) -> Call:
    recipes = {name: Recipe(FOUR, "float32") for name in ("query", "key", "value")}
    arrays = {name: Recipe(f"numpy.array({values}, dtype='int64')", "int32") for name, values in integers.items()}
    return Call("attention", "float32", recipes | arrays, options)


@pytest.mark.parametrize("offset", [2**30, -(2**30), 0, "lower_right"])
def test_numbers_that_change_stay_legal(offset: int | str) -> None:
    options = {"causal": True, "q_offset": offset, "scale": 0.5, "softcap": 3.0, "window": (2, None), "chunk": 2**30}
    call = _call(options)
    call = replace(call, recipes=call.recipes | {"dropout_mask": Recipe("random.random((1, 1, 3, 1)) < 0.5", "bool")})
    call = replace(call, options=call.options | {"dropout_rate": 0.9})
    numbers = [call.varied(step, numbers=True) for step in STEPS]
    for name in call.options.keys() - {"causal", *(["q_offset"] if offset == "lower_right" else [])}:
        assert len({varied.options[name] for varied in numbers}) == len(numbers), name
    for varied in numbers:
        attention(**varied.arrays, **varied.options)


def test_lengths_and_offsets_change_between_0_and_the_drawn_ones() -> None:
    call = _call({"causal": True}, kv_lengths=[3, 0], q_offset=[-5, 2])
    arrays = [call.varied(step).arrays for step in STEPS]
    assert [array["kv_lengths"].tolist() for array in arrays[:5]] == [[3, 0], [2, 0], [1, 0], [0, 0], [3, 0]]
    assert [array["q_offset"].tolist() for array in arrays[:4]] == [[-5, 2], [-4, 1], [-3, 0], [-2, 2]]
    assert {str(array["kv_lengths"].dtype) for array in arrays} == {"int32"}


def test_lengths_on_the_host_change_only_with_the_numbers() -> None:
    call = replace(_call({}, kv_lengths=[3, 1]), host={"kv_lengths": "list"})
    assert call.varied(1).arrays["kv_lengths"].tolist() == [3, 1]
    assert call.varied(1, numbers=True).arrays["kv_lengths"].tolist() == [2, 0]


def drawn(number: int, claims: Claims | None = None) -> list[Call]:
    """Return calls of every function, as the fuzzer draws them, by default those of the reference."""
    drawn_calls: list[Call] = []

    @seed(3)
    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(claims or Subject.over(Steps()).target.claims))
    def keep(call: Call) -> None:
        drawn_calls.append(call)

    keep()
    return drawn_calls


def test_drawn_calls_stay_legal_when_their_numbers_change() -> None:
    changed: set[str] = set()
    for call in drawn(1000):
        varied = call.varied(7, numbers=True)
        changed.update(name for name in call.options if varied.options[name] != call.options[name])
        changed.update(
            name for name in ENTRIES if not numpy.array_equal(varied.arrays.get(name), call.arrays.get(name))
        )
        with suppress(NotAdmitted):
            case_of(varied, "varied")
    assert changed >= {"window", "chunk", "dropout_rate", "scale", "softcap", "kv_lengths", "q_lengths", "q_offset"}


def test_ids_of_two_types_and_numbers_beyond_the_softmax_are_drawn() -> None:
    drawn_calls = drawn(600)
    ids = [
        {call.recipes[f"{side}_segment_ids"].dtype for side in ("q", "kv")}
        for call in drawn_calls
        if "q_segment_ids" in call.recipes
    ]
    assert any(len(dtypes) == 2 for dtypes in ids)
    assert {"uint32", "int64"} <= set().union(*ids)
    for name in ("bias", "sinks"):
        wide = [call for call in drawn_calls if name in call.recipes and "1e300" in call.recipes[name].expression]
        assert wide, name
        assert {call.recipes[name].dtype for call in wide} == {"float64"}
        assert not {call.dtype for call in wide} & {"float64"}


def test_lengths_that_are_not_read_are_drawn_outside_their_buffers() -> None:
    functions: dict[str, set[str]] = {}
    for call in drawn(800, load("torch").claims):
        for name, recipe in call.beyond.items():
            passed, meant = recipe.array(), call.arrays[name]
            rooms = meant.max(initial=0)
            assert numpy.array_equal(passed.clip(0, rooms), meant), (name, passed, meant)
            assert passed.dtype == meant.dtype
            assert name not in call.host
            assert not numpy.array_equal(passed, meant)
            functions.setdefault(name, set()).add(call.function)
    assert functions.keys() == {"q_lengths", "kv_lengths", "kv_starts", "prefix_lengths", "seqused_kv"}
    layers = {"multi_head_attention", "multi_head_attention_and_weights"}
    assert layers & set().union(*functions.values())


def test_lengths_that_are_read_stay_within_their_buffers() -> None:
    assert not any(call.beyond for call in drawn(300))


@pytest.mark.parametrize(("name", "dtype"), [("kv_lengths", "int64"), ("q_lengths", "int32")])
def test_length_that_is_not_clamped_is_found(name: str, dtype: str) -> None:
    target = load("torch")

    def wrapping(query: Any, key: Any, value: Any, **options: Any) -> Any:
        lengths, size = options.get(name), (query if name == "q_lengths" else key).shape[2]
        if library_of(lengths) == "torch" and dtype_name(lengths) == dtype:
            options[name] = lengths % (size + 1)
        return target.functions["attention"](query, key, value, **options)

    wrong = replace(target, functions={**target.functions, "attention": wrapping})
    finding = first_finding(wrong, functions=("attention",))
    assert finding.call.beyond[name].dtype == dtype
    script = script_of(finding, "torch", "torch")
    assert finding.call.beyond[name].source in script
    assert finding.call.recipes[name].source not in script


def test_a_mistake_of_caches_answers_a_single_token_whose_call_has_no_offset() -> None:
    query, key = numpy.ones((3, 1, 1, 5)), numpy.ones((3, 1, 7, 5))
    assert prefix_hidden_alone(query, key, {"kv_lengths": numpy.array([2, 3, 7])}) is None
