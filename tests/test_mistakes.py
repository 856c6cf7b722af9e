from __future__ import annotations

import itertools
import re
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest
from support.subject import Subject

from mha_spec.arguments import OPTIONS
from mha_spec.layer_steps import LayerSteps
from mha_spec.parameters import AXES
from mha_spec.steps import Steps
from mha_spec.varlen_arguments import VARLEN_OPTIONS
from mha_spec_conformance.judging.bounds import precision
from mha_spec_conformance.judging.prediction import Predictions, can_show
from mha_spec_conformance.mistakes import MISTAKES, Mistake
from mha_spec_conformance.mistakes.raising import RAISING
from mha_spec_conformance.suite.conventions import CONVENTIONS
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Case, Suite

REPORTED_WITHOUT_COMPARISON = {
    "alibi-in-the-dtype-of-the-slopes": "the report names the dtype",
    "bias-gradient-unbroadcast": "the report names the shape",
    "empty-input-refused": "the report has the exception",
    "input-scaled-in-place": "the report names the input that was written to",
    "output-float32": "the report names the deviation by the dtype of the result",
    "packed-lse-transposed": "the report names the shape",
    "output-float64": "the report names the deviation by the dtype of the result",
    "strides-ignored": "the report names the layout for which the result is wrong",
}
"""Mistakes that the report explains without comparing values."""

LEAST_CASES = 3
"""The number of cases that must catch each mistake."""

TILE = 64
"""The size from which a single case must catch a mistake, because cases that large take a second to judge."""

CAUGHT_BY_FEWER = {
    "cap-overflows": 1,
    "chunk-ignored-for-one-query": 2,
    "cotangents-unchecked": 2,
    "dropout-rate-without-mask-ignored": 2,
    "key-gradient-unset-without-queries": 2,
    "weights-after-dropout": 2,
    "cache-padding-kept": 2,
    "prefix-unchecked": 2,
    "starts-ignored-for-one-query": 2,
    "paged-window-dropped": 2,
    "window-cache-padding-kept": 1,
}
"""Mistakes that fewer cases can show, and how many."""

LAYER_INPUTS = {
    *AXES,
    "key",
    "value",
    "rotary",
    "norm_epsilon",
    "cache_lengths",
    "cache_block_table",
    "window_cache",
    "frequencies",
    "attention_factor",
    "positions",
    "sections",
}
"""Arguments of the layer, besides the options of attention, that a mistake may need."""

WITHOUT_A_MISTAKE = {"precision": ("strict",)}
"""Variants that are stricter than the specification."""


def failures(mistake: Mistake, cases: tuple[Case, ...]) -> Iterator[Result]:
    """Yield the results that do not pass because of the mistake, first for cases of its clauses, one dtype per case."""
    subject = Subject.over(mistake.steps)
    subject.judge.mistakes = [mistake]
    relevant = [case for case in cases if can_show(mistake, case)]
    for case in sorted(relevant, key=lambda case: not set(case.clauses) & set(mistake.clauses)):
        for dtype in dtypes_of(mistake, case):
            result = subject.outcome(case, dtype, every_layout="MHA-PURE-2" in mistake.clauses)
            if result.outcome != "pass":
                yield result
                break


def dtypes_of(mistake: Mistake, case: Case) -> list[str]:
    """Choose the dtypes in which a case is asked: all that matter to the mistake, or else a single dtype."""
    dtypes = [dtype for dtype in case.dtypes if can_show(mistake, case, dtype)]
    return dtypes if mistake.native else [dtype for dtype in dtypes if dtype == "float32"] or dtypes[:1]


def least_cases(mistake: Mistake) -> int:
    """Return the number of cases that must catch the mistake."""
    return CAUGHT_BY_FEWER.get(mistake.name, 1 if max(mistake.past) >= TILE else LEAST_CASES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_caught_and_recognised(mistake: Mistake, smallest_first: tuple[Case, ...]) -> None:
    least = least_cases(mistake)
    caught = list(itertools.islice(failures(mistake, smallest_first), least))
    assert len(caught) == least, f"{len(caught)} cases fail"
    assert all(result.reason for result in caught)
    for result in caught:
        if mistake.name in REPORTED_WITHOUT_COMPARISON or result.ask.case.expect == "error":
            assert not set(result.diagnosis) - {mistake.name}
        elif mistake not in RAISING and result.wrong is not None:
            assert mistake.name in result.diagnosis, f"{result.ask.case.id} {result.ask.dtype}: {result.reason}"


def test_mistakes_have_allowances_for_the_outputs_of_the_case(suite: Suite) -> None:
    """Allowances exist even if a mistake turns a mask into a bias."""
    case = next(case for case in suite.cases if case.id == "attention_vjp/mask/generic-1")
    predictions, run = Predictions(case), precision("float32")
    for mistake in MISTAKES:
        allowed = predictions.allowances(mistake, "float32", run) if can_show(mistake, case) else None
        assert allowed is None or allowed.keys() == case.expected.keys(), mistake.name


def test_allowances_are_where_the_numbers_of_a_mistake_are(suite: Suite) -> None:
    case = next(case for case in suite.cases if case.id == "attention/one-key/coded-1")
    predictions, run = Predictions(case), precision("float64")
    for mistake in MISTAKES:
        outputs = predictions.outputs(mistake, "float64") if can_show(mistake, case) else None
        allowed = predictions.allowances(mistake, "float64", run) if outputs is not None else None
        if outputs is not None and allowed is not None and "output" in outputs:
            assert allowed["output"].shape == outputs["output"].shape, mistake.name


def test_names_and_titles_are_unique_and_titles_begin_with_a_verb() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 70
    assert len({mistake.title for mistake in MISTAKES}) == len(MISTAKES)
    assert all(re.match("[a-z]+s ", mistake.title) for mistake in MISTAKES)


def test_mistakes_name_only_known_clauses_functions_and_arguments() -> None:
    for mistake in MISTAKES:
        assert mistake.clauses
        assert set(mistake.clauses) <= set(clauses())
        assert set(mistake.functions) <= set(FUNCTIONS)
        assert set(mistake.needs) <= {*OPTIONS, *VARLEN_OPTIONS, *LAYER_INPUTS, "cu_seqlens_kv", "grad_lse"}
        assert mistake.steps not in (Steps(), LayerSteps())


def test_every_variant_of_every_convention_has_a_mistake() -> None:
    made = {mistake.convention for mistake in MISTAKES if mistake.convention is not None}
    for name, (default, *others) in CONVENTIONS.items():
        assert (name, default) not in made or name == "causal_alignment"
        assert {(name, variant) for variant in others if variant not in WITHOUT_A_MISTAKE.get(name, ())} <= made


def test_every_step_is_replaced_by_some_mistake() -> None:
    default = Steps()
    replaced = {
        field.name
        for mistake in MISTAKES
        for field in fields(Steps)
        if isinstance(mistake.steps, Steps) and getattr(mistake.steps, field.name) is not getattr(default, field.name)
    }
    assert {field.name for field in fields(Steps)} - replaced == {"softmax_dtype"}


def test_every_step_of_the_layer_is_replaced_by_some_mistake() -> None:
    default, names = LayerSteps(), {field.name for field in fields(LayerSteps)}
    of_layer = [mistake.steps for mistake in MISTAKES if isinstance(mistake.steps, LayerSteps)]
    replaced = {name for name in names for steps in of_layer if getattr(steps, name) is not getattr(default, name)}
    # Mistakes of paged and window caches are in the steps around these.
    of_caches = {"store_pages", "append_paged", "attend_paged", "bounds", "integers", "capacity_of", "start_of_keys"}
    assert names - replaced == {"add_bias", "check_append", "check_library", "empty_cache"} | of_caches


def test_every_option_is_ignored_by_some_mistake() -> None:
    needed = {name for mistake in MISTAKES if "ignored" in mistake.name for name in mistake.needs}
    by_segments = {"kv_segment_ids"}
    by_key = {"dropout_key"}
    assert set(OPTIONS) - needed - by_segments - by_key == {"q_offset"}
    assert "offset-ignored" in {mistake.name for mistake in MISTAKES}
    assert "grad_lse" in needed
