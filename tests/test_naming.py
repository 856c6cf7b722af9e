"""Mistakes are named if they explain the failures, and not if a passing case refutes them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy
import pytest
from ml_dtypes import bfloat16

from mha_spec.steps import Steps
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.causes import find_causes
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.judging.naming import LEAST_OF_CELL, named
from mha_spec_conformance.judging.pairs import together
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.running.diagnosing import diagnosed
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.judging.causes import Findings
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Expected, Suite

BY_NAME = {mistake.name: mistake for mistake in MISTAKES}
KEYWORDS = ("mask", "causal", "softcap", "bias", "scale", "return_lse")
MORE = ("q_offset", "kv_lengths", "window", "sinks")
PATTERNS = ("attention/mask/", "attention/causal/", "attention/softcap", "attention/bias/", "attention/smoke/")


def judged(
    suite: Suite,
    attention: Callable[..., object],
    dtypes: Sequence[str] = ("float32",),
    patterns: tuple[str, ...] = PATTERNS,
    function: str = "attention",
) -> list[Result]:
    """Judge a function by a few cases, and name the mistakes that explain its failures."""
    keywords = KEYWORDS if function == "attention" else FUNCTIONS[function].keywords
    return judged_functions(suite, {function: attention}, {function: keywords}, dtypes, patterns)


def judged_functions(
    suite: Suite,
    functions: Mapping[str, Callable[..., object]],
    keywords: Mapping[str, tuple[str, ...]],
    dtypes: Sequence[str],
    patterns: tuple[str, ...],
    largest: int = 2000,
) -> list[Result]:
    claims = Claims("mine", keywords, tuple(dtypes))
    source, judge = InProcess(Target(functions, claims)), Judge(claims)
    asked = [ask for ask in asks(suite.cases, claims, Selection(patterns)) if _size(ask.case.expected) < largest]
    results = {ask.key: judge.result(ask, answer(source.target, ask.question())) for ask in asked}
    results |= {result.ask.key: result for result in list(diagnosed(source, judge, results))}
    return list(results.values())


class InProcess:
    """A source of answers that calls the target in this process."""

    def __init__(self, target: Target) -> None:
        self.target, self.claims = target, target.claims

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        for question in itertools.chain(*groups):
            yield question, answer(self.target, question)


def _size(expected: Mapping[str, Expected]) -> int:
    return sum(golden.values.size for golden in expected.values())


def findings(suite: Suite, attention: Callable[..., object], dtypes: Sequence[str] = ("float32",)) -> Findings:
    return find_causes(judged(suite, attention, dtypes))


def over(name: str) -> Callable[..., object]:
    return function_over(BY_NAME[name].steps, "attention")


RIGHT = function_over(Steps(), "attention")


@pytest.mark.parametrize("name", ["mask-ignored", "softcap-ignored", "mask-polarity-inverted", "causal-shows-the-next"])
def test_mistake_is_named_and_what_its_failures_share_is_told(suite: Suite, name: str) -> None:
    causes = findings(suite, over(name)).causes
    assert [cause.kind for cause in causes] == ["mistake"]
    assert BY_NAME[name].variant in (causes[0].name, *causes[0].others)
    feature = BY_NAME[name].needs[0]
    assert causes[0].features == (feature,)
    assert causes[0].story.share is not None
    assert feature in causes[0].story.share.properties
    assert set(causes[0].clauses) <= set(BY_NAME[name].clauses)


def test_right_attention_has_no_causes(suite: Suite) -> None:
    assert findings(suite, RIGHT).causes == ()


def test_name_that_passing_cases_refute_is_dropped(suite: Suite) -> None:
    """The mask is ignored for a single head size, so `mask-ignored` explains failures and is still not named."""

    def attention(query, key, value, *, mask=None, **options):
        return RIGHT(query, key, value, mask=None if key.shape[3] == 64 else mask, **options)

    results = judged(suite, attention)
    failed = [result for result in results if result.outcome == "fail"]
    assert len(failed) > 3
    assert not any("mask-ignored" in result.diagnosis for result in results)
    assert find_causes(results).causes[0].kind == "unknown"


def test_mistake_in_one_dtype_is_named_for_that_dtype(suite: Suite) -> None:
    wrong = over("softcap-ignored")

    def attention(query, key, value, **options):
        return (wrong if query.dtype.name == "float16" else RIGHT)(query, key, value, **options)

    causes = findings(suite, attention, ("float32", "float16")).causes
    assert [cause.name for cause in causes] == ["softcap-ignored"]
    assert {result.ask.dtype for result in causes[0].results} == {"float16"}
    assert causes[0].story.share is not None
    assert {"softcap", "dtype float16"} == set(causes[0].story.share.properties)


def test_mistake_of_one_function_in_one_dtype_is_named(suite: Suite) -> None:
    """The output ignores softcap in float16 alone; attention in float32 and the weights are right."""
    wrong = over("softcap-ignored")
    right = function_over(Steps(), "attention_weights")

    def attention(query, key, value, **options):
        return (wrong if query.dtype.name == "float16" else RIGHT)(query, key, value, **options)

    functions = {"attention": attention, "attention_weights": right}
    keywords = {"attention": KEYWORDS, "attention_weights": ("softcap", "mask", "causal")}
    patterns = ("attention/softcap", "attention_weights/softcap")
    causes = find_causes(judged_functions(suite, functions, keywords, ("float32", "float16"), patterns)).causes
    assert [cause.name for cause in causes] == ["softcap-ignored"]


def test_mistake_is_not_named_in_a_dtype_if_the_same_failures_have_another_cause_in_the_next(suite: Suite) -> None:
    """Float64 has only cases of 129 to 191 keys, where the last tile of 64 begins at key 128."""
    claims = Claims("mine", {"attention": (*KEYWORDS, *MORE)}, ("float64", "bfloat16"))
    target = Target({"attention": over("causal-lost-in-the-last-tile-of-64")}, claims)
    judge, mistake = Judge(claims), BY_NAME["causal-lost-from-key-128"]
    patterns = (
        "attention/last-tile/causal/129",
        "attention/causal+offset/lengths-67-131/",
        "attention/decode/100-of-200/",
    )
    asked = asks(suite.cases, claims, Selection(patterns))
    wrong = [judge.result(ask, answer(target, ask.question())).wrong for ask in asked]
    failures = [failure for failure in wrong if failure is not None]
    few = [failure for failure in failures if failure.ask.dtype == "float64"]
    assert len(named(few, [], judge.recognition, (mistake,))) == len(few) > LEAST_OF_CELL
    assert named(failures, [], judge.recognition, (mistake,)) == {}


def test_mistake_is_recognised_where_no_element_has_an_allowance(suite: Suite) -> None:
    """Every row is empty, so that the specification allows no error, and the mean of the values is rounded."""

    def attention(query, key, value, *, return_lse=False, **options):
        wide = (array.astype("float64") for array in (query, key, value))
        output, lse = _tuple(over("mask-added-as-the-lowest-number")(*wide, return_lse=True, **options))
        with numpy.errstate(over="ignore"):
            return (output.astype(query.dtype), lse.astype("float32")) if return_lse else output.astype(query.dtype)

    causes = find_causes(judged(suite, attention, patterns=("attention/broadcast/mask-1111/*",))).causes
    assert "mask-added-as-the-lowest-number" in {name for cause in causes for name in (cause.name, *cause.others)}


def test_unknown_failures_of_groups_are_not_blamed_on_other_features(suite: Suite) -> None:
    """A call of one query reads another head; the offsets and lengths of such calls have nothing to do with it."""

    def attention(query, key, value, **options):
        if query.shape[2] == 1:
            key, value = (numpy.roll(array, 1, axis=1) for array in (key, value))
        return RIGHT(query, key, value, **options)

    keywords = {"attention": (*KEYWORDS, *MORE)}
    patterns = ("attention/*one-query*", "attention/lengths-1-257-size-129/*", "attention/kv_lengths/*")
    causes = find_causes(judged_functions(suite, {"attention": attention}, keywords, ("float32",), patterns)).causes
    assert [(cause.kind, cause.features) for cause in causes] == [("unknown", ("groups",))]


def test_mistake_of_attention_is_named_in_a_layer(suite: Suite) -> None:
    layer = function_over(BY_NAME["mask-ignored"].steps, "multi_head_attention")
    patterns = ("multi_head_attention/mask", "multi_head_attention/self/", "multi_head_attention/cache/")
    causes = find_causes(judged(suite, layer, patterns=patterns, function="multi_head_attention")).causes
    assert [cause.name for cause in causes] == ["mask-ignored"]


def causes_in_packed_calls(suite: Suite, name: str, dtype: str) -> list[str | None]:
    """Return the names of all causes of the failures of packed and paged calls with a mistake."""
    functions = {function: function_over(BY_NAME[name].steps, function) for function in VARLEN_FUNCTIONS}
    keywords = {function: FUNCTIONS[function].keywords for function in VARLEN_FUNCTIONS}
    results = judged_functions(suite, functions, keywords, (dtype,), ("varlen*",))
    return [cause.name for cause in find_causes(results).causes]


@pytest.mark.parametrize("name", ["heads-tiled", "cap-slope-missing"])
def test_mistake_of_attention_is_named_in_packed_calls(suite: Suite, name: str) -> None:
    assert causes_in_packed_calls(suite, name, "float32") == [BY_NAME[name].variant]


@pytest.mark.parametrize("name", ["packed-tail-multiplied", "packed-sequences-multiplied"])
def test_nan_of_tokens_that_a_sequence_does_not_have_is_named(suite: Suite, name: str) -> None:
    assert causes_in_packed_calls(suite, name, "float64") == [name]


def test_wrong_shape_has_the_name_of_the_mistake_that_gives_it(suite: Suite) -> None:
    causes = findings(suite, over("lse-with-axes-exchanged")).causes
    assert [cause.name for cause in causes] == ["lse-with-axes-exchanged"]
    assert any("must have shape" in (result.reason or "") for result in causes[0].results)


def test_error_has_the_name_of_the_mistake_that_raises_it(suite: Suite) -> None:
    def attention(query, key, value, *, causal=False, **options):
        if causal and 1 != query.shape[2] != key.shape[2]:
            raise RuntimeError(f"mask of {query.shape[2]} x {query.shape[2]}")
        return RIGHT(query, key, value, causal=causal, **options)

    patterns = ("attention/causal", "attention/smoke/")
    results = judged_functions(
        suite, {"attention": attention}, {"attention": (*KEYWORDS, "q_offset")}, ("float32",), patterns
    )
    assert [cause.name for cause in find_causes(results).causes] == ["causal-mask-square"]


def test_wrong_factor_of_the_scores_is_not_called_rounding(suite: Suite) -> None:
    def layer(query, key, value, params, *, scale=None, **options):
        factor = params["w_q"].shape[2] ** -0.5 if scale is None else scale
        return right(query, key, value, params, scale=1.07 * factor, **options)

    right = function_over(Steps(), "multi_head_attention")
    patterns = tuple(f"multi_head_attention/{name}/" for name in ("self", "cross", "cube", "biases", "partial"))
    causes = find_causes(judged(suite, layer, patterns=patterns, function="multi_head_attention")).causes
    assert {cause.kind for cause in causes} == {"unknown"}


def test_failure_that_only_a_lesser_mistake_explains_is_not_named(suite: Suite) -> None:
    """The ignored mask explains what an ignored mask and bias explain, and more too; the rest is a coincidence."""
    mask = BY_NAME["mask-ignored"]
    lesser = together(mask, BY_NAME["bias-ignored"])
    assert lesser is not None
    lesser = replace(lesser, functions=("attention",), needs=("mask",))

    def attention(query, key, value, *, mask=None, bias=None, **options):
        return RIGHT(query, key, value, bias=None if mask is not None else bias, **options)

    functions = {"attention": attention, "attention_weights": function_over(mask.steps, "attention_weights")}
    keywords = dict.fromkeys(functions, (*KEYWORDS, "q_offset"))
    claims = Claims("mine", keywords, ("float32",))
    target, judge = Target(functions, claims), Judge(claims)
    both = "attention/causal+mask+bias+offset/generic-1"
    patterns = (both, "attention/mask/*", "attention/causal+mask/*", "attention_weights/mask+bias+softcap/*")
    asked = asks(suite.cases, claims, Selection(patterns))
    wrong = [judge.result(ask, answer(target, ask.question())).wrong for ask in asked]
    names = named([failure for failure in wrong if failure is not None], [], judge.recognition, (mask, lesser))
    assert {mistake.name for mistakes in names.values() for mistake in mistakes} == {mask.name, lesser.name}
    assert (both, "float32") not in names
    assert len(names) == len(wrong) - 1


@pytest.mark.parametrize("name", ["output-not-rescaled-in-tiles-of-64", "sum-not-rescaled-in-tiles-of-128"])
def test_tiles_that_are_not_rescaled_do_not_underflow(suite: Suite, name: str) -> None:
    """In float32 the exponentials of early tiles underflow relative to the maximum of all, and not to their own."""
    case = next(case for case in suite.cases if case.id == "attention/lengths-3-300/rising-1")
    call = function_over(BY_NAME[name].steps, "attention")
    narrow, wide = (
        numpy.asarray(call(*(case.input(name, dtype) for name in ("query", "key", "value")), **case.options))
        for dtype in ("float32", "float64")
    )
    assert numpy.allclose(narrow, wide, rtol=1e-3)
    assert abs(wide - case.expected["output"].values).max() > 1


def test_nan_of_another_origin_is_not_the_name_of_a_mistake_that_gives_nan(suite: Suite) -> None:
    """A NaN in one component is not that of a weight, and a NaN in every case not that of rows that see no key."""

    def vjp(component: int | slice) -> Callable[..., object]:
        def spoilt(*operands, **options):
            gradients = right(*operands, **options)
            gradients[1][..., component] = math.nan
            return gradients

        return spoilt

    right = function_over(Steps(), "attention_vjp")
    hiding = ("attention_vjp/bias/hidden-rows", "attention_vjp/bias/float64-hides/*")
    for component, patterns in ((-1, hiding), (slice(None), ("attention_vjp/bias/*",))):
        causes = find_causes(judged(suite, vjp(component), patterns=patterns, function="attention_vjp")).causes
        assert [cause.kind for cause in causes] == ["unknown"]


def test_nan_of_rows_that_see_no_key_is_named(suite: Suite) -> None:
    wrong = function_over(BY_NAME["empty-row-nan-in-all-gradients"].steps, "attention_vjp")
    patterns = ("attention_vjp/bias/*",)
    causes = find_causes(judged(suite, wrong, patterns=patterns, function="attention_vjp")).causes
    assert [cause.name for cause in causes] == ["empty-row-nan-in-all-gradients"]


@pytest.mark.parametrize("name", ["infinite-bias-shown", "wide-bias-saturated"])
def test_mistake_that_shows_only_where_operands_are_not_finite_is_named(suite: Suite, name: str) -> None:
    patterns = ("attention/bias/*", "attention/poison/unused/bias/*", "attention/poison/seen-by-some/bias/*")
    assert [cause.name for cause in find_causes(judged(suite, over(name), patterns=patterns)).causes] == [name]


def test_nan_of_a_sink_of_minus_infinity_is_named(suite: Suite) -> None:
    keywords = {"attention": (*KEYWORDS, "sinks")}
    patterns = ("attention/sinks/", "attention/causal+sinks/")
    results = judged_functions(suite, {"attention": over("sinks-infinite-nan")}, keywords, ("float32",), patterns)
    assert [cause.name for cause in find_causes(results).causes] == ["sinks-infinite-nan"]


@pytest.mark.parametrize(("function", "name"), [("", "merge-base-2"), ("_vjp", "merge-gradient-of-an-empty-half")])
def test_mistake_of_merging_is_named(suite: Suite, function: str, name: str) -> None:
    merge = function_over(BY_NAME[name].steps, f"merge_attention{function}")
    results = judged(suite, merge, patterns=(f"merge_attention{function}/*",), function=f"merge_attention{function}")
    assert [cause.name for cause in find_causes(results).causes] == [BY_NAME[name].variant]


def test_nan_of_two_empty_halves_is_named(suite: Suite) -> None:
    name = "merge-of-two-empty-nan"
    wrong = function_over(BY_NAME[name].steps, "merge_attention")
    results = judged(suite, wrong, patterns=("merge_attention/*",), function="merge_attention")
    assert [cause.name for cause in find_causes(results).causes] == [name]


@pytest.mark.parametrize("name", ["heads-merged-by-reshape", "hidden-key-leaks"])
def test_mistake_that_moves_elements_or_shows_hidden_keys_is_named(suite: Suite, name: str) -> None:
    """Moved elements have the allowances of their old places, and a NaN that remains changes no dtype."""
    patterns = ("attention/kv_lengths/*", "attention/bias/*", "attention/poison/unused/*")
    causes = find_causes(judged(suite, over(name), patterns=patterns)).causes
    assert [cause.kind for cause in causes] == ["mistake"]
    assert BY_NAME[name].variant in (causes[0].name, *causes[0].others)


def test_two_mistakes_are_named_where_one_does_not_suffice(suite: Suite) -> None:
    pair = together(BY_NAME["softcap-ignored"], BY_NAME["causal-shows-the-next"])
    assert pair is not None
    causes = findings(suite, function_over(pair.steps, "attention")).causes
    names = {name for cause in causes for name in (cause.name, *cause.others)}
    assert {"softcap-ignored", "causal-shows-the-next"} <= names
    assert all(cause.kind == "mistake" for cause in causes)


def test_rounding_cites_the_clause_of_accuracy(suite: Suite) -> None:
    def attention(query, key, value, **options):
        results = RIGHT(query, key, value, **options)
        narrowed = [array.astype(bfloat16).astype(array.dtype) for array in _tuple(results)]
        return narrowed[0] if len(narrowed) == 1 else tuple(narrowed)

    causes = find_causes(judged(suite, attention, patterns=("attention/scale/3/", "attention/smoke/"))).causes
    assert {cause.kind for cause in causes} == {"rounding"}
    assert {cause.name for cause in causes} == {"bfloat16"}
    assert all(result.clauses[0] == "MHA-ACC-1" for cause in causes for result in cause.results)


def test_scores_that_are_kept_in_16_bits_are_named_and_no_mistake_that_rounds_by_chance_alike(suite: Suite) -> None:
    """The query times the scale in 16 bits is what `input-scaled-in-place` reads, too, in some of these cases."""

    def attention(query, key, value):
        root = query.dtype.type(query.shape[3] ** -0.25)
        key, value = (numpy.repeat(array, query.shape[1] // array.shape[1], axis=1) for array in (key, value))
        scaled_query, scaled_key = ((array * root).astype(float) for array in (query, key))
        scores = (scaled_query @ scaled_key.swapaxes(2, 3)).astype(query.dtype).astype("float32")
        exponentials = numpy.exp(scores - scores.max(axis=3, keepdims=True))
        weights = (exponentials / exponentials.sum(axis=3, keepdims=True)).astype(query.dtype)
        return (weights.astype("float32") @ value.astype("float32")).astype(query.dtype)

    patterns = (
        "attention/lengths-1-257-size-129/*",
        "attention/one-*/*",
        "attention/smoke/plain",
        "attention/size-64/*",
        "attention/batch-equals-heads-equals-lengths/*",
    )
    functions, keywords = {"attention": attention}, {"attention": ()}
    results = judged_functions(suite, functions, keywords, ("float32", "float16", "bfloat16"), patterns, 10_000)
    causes = find_causes(results).causes
    names = {name for cause in causes for name in (cause.name, *cause.others)}
    assert names == {"precision=half_scores"}
    assert {result.ask.dtype for cause in causes for result in cause.results} == {"float16", "bfloat16"}


def _tuple(results: object) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def test_few_small_errors_are_not_called_rounding_if_most_failures_of_the_function_are_not(suite: Suite) -> None:
    """A change is small in the long rows of the only case that shows it in float64, and large in those of float32."""

    def attention(query, key, value, **options):
        output, lse = _tuple(RIGHT(query, key, value, **{**options, "return_lse": True}))
        noise = numpy.random.default_rng(1).uniform(-1, 1, output.shape[2])[:, None]
        output = (output + noise * (6e-4 if query.dtype == "float64" else 1)).astype(output.dtype)
        return (output, lse) if options.get("return_lse") else output

    claims = Claims("mine", {"attention": (*KEYWORDS, *MORE)}, ("float64", "float32"))
    target, judge = Target({"attention": attention}, claims), Judge(claims)
    asked = asks(
        suite.cases, claims, Selection(("attention/rounding/softcap+sinks/float64-spread-2", "attention/scale/3/*"))
    )
    results = [judge.result(ask, answer(target, ask.question())) for ask in asked]
    long = [result for result in results if "rounding" in result.ask.case.id]
    short = [result for result in results if result.ask.dtype == "float32"]
    assert [cause.kind for cause in find_causes(long).causes] == ["rounding"]
    assert {cause.kind for cause in find_causes([*long, *short]).causes} == {"unknown"}


def test_failures_of_nearly_every_question_of_a_function_are_one_cause(suite: Suite) -> None:
    """With 1 pass of 30, every property seems to separate failures from passes."""

    def merge(output_a, lse_a, output_b, lse_b):
        with numpy.errstate(all="ignore"):
            share = 1 / (1 + numpy.exp(0.3 * (lse_b - lse_a)))[..., None]
            return (share * output_a + (1 - share) * output_b).astype(output_a.dtype), numpy.logaddexp(lse_a, lse_b)

    claims = Claims("mine", {"merge_attention": ()}, ("float32",))
    target, judge = Target({"merge_attention": merge}, claims), Judge(claims)
    results = [judge.result(ask, answer(target, ask.question())) for ask in asks(suite.cases, claims, Selection())]
    assert any(result.outcome == "pass" for result in results)
    assert [cause.kind for cause in find_causes(results).causes] == ["unknown"]


def test_exceptions_are_grouped_by_their_text(suite: Suite) -> None:
    def attention(query, key, value, *, mask=None, **options):
        if mask is not None:
            raise RuntimeError(f"no kernel for {query.shape}")
        return RIGHT(query, key, value, **options)

    causes = findings(suite, attention).causes
    assert [cause.kind for cause in causes] == ["error"]
    assert causes[0].features == ("mask",)
    assert len({result.reason for result in causes[0].results}) > 1
