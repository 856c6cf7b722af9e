"""Profiles and conventions: fused kernels, accepted precisions, alignments that are read off, unclaimed options."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.layouts import Inside, small_cases

from mha_spec import reference, steps
from mha_spec.reference import Reference
from mha_spec.steps import Steps
from mha_spec_conformance.asking.alignments import alignments
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.tiles import hidden_by_dense_alone
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.running.runner import Settings, judge_all
from mha_spec_conformance.suite.conventions import Convention
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

Array = numpy.ndarray
TF32 = frozenset({Convention("precision", "tf32")})


def claims(*words: str, **fields: Any) -> Claims:
    """Claim attention with these options, by default all of them."""
    taken = words or FUNCTIONS["attention"].keywords
    return Claims("kernel", {"attention": taken}, ("float32",), **fields)


@pytest.fixture
def judged(suite: Suite) -> Callable[..., Run]:
    """Judge an attention in this process."""

    def judged(
        attention: Callable[..., Any], claims: Claims, *only: str, accepted: frozenset[Convention] = frozenset()
    ) -> Run:
        settings = Settings(selection=Selection(only=only), accepted=accepted)
        return judge_all(
            Inside({"attention": attention}, claims), Judge(claims, accepted), small_cases(suite), settings
        )

    return judged


def with_dense_leak(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Multiply every value that no length, diagonal, window or segment hides by its weight, also by a weight of 0."""
    seen = numpy.isfinite(key).all(axis=3, keepdims=True) & numpy.isfinite(value).all(axis=3, keepdims=True)
    dense = {name: options[name] for name in ("mask", "bias") if name in options}
    result = reference.attention(query, key, value, **options)
    if not dense or seen.all():
        return result
    otherwise = reference.attention(query, key, value, **{n: v for n, v in options.items() if n not in dense})
    output, other = (x[0] if isinstance(x, tuple) else x for x in (result, otherwise))
    leaked = numpy.where(numpy.isnan(other), numpy.nan, output)
    return (leaked, *result[1:]) if isinstance(result, tuple) else leaked


def with_leak_past_lengths(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Multiply the values past the lengths by a weight of 0."""
    output = reference.attention(query, key, value, **options)
    return output + 0 * value.sum(axis=2, keepdims=True)[:, :1, :, :1] if "kv_lengths" in options else output


def to_11_bits(x: Array) -> Array:
    """Round to 11 significant bits."""
    mantissa, exponent = numpy.frexp(x)
    return numpy.ldexp(numpy.round(mantissa * 2.0**11), exponent - 11).astype(x.dtype)


def approximate_cap(scores: Array, softcap: float | None) -> Array:
    """Cap with a tanh of 11 significant bits."""
    return scores if softcap is None else softcap * to_11_bits(numpy.tanh(scores / scores.dtype.type(softcap)))


def truncated(x: Array) -> Array:
    """Truncate float32 to the ten stored bits of TF32."""
    return (numpy.ascontiguousarray(x).view(numpy.uint32) & numpy.uint32(0xFFFFE000)).view(numpy.float32)


IN_TF32 = replace(
    Steps(),
    scores=lambda query, key, scale: steps.scores(truncated(query), truncated(key), scale),
    sum_over_visible=lambda weights, values, visible: steps.sum_over_visible(
        truncated(weights), truncated(values), visible
    ),
)


def test_a_fused_kernel_conforms_and_the_verdict_names_the_profile(judged: Callable[..., Run]) -> None:
    assert judged(with_dense_leak, claims(), "poison/unused/bias/size").failures
    fused = judged(with_dense_leak, claims(profile="fused"), "poison/unused", "smoke")
    assert fused.status == 0
    assert {"poison", "mask"} <= set(fused.asked_features)
    relaxed = [result for result in fused.results if result.ask.relaxed]
    assert len([result for result in relaxed if result.outcome != "pass"]) > 4
    assert not any(result.must for result in relaxed)


def test_data_that_lengths_hide_stays_a_must_in_the_profile_fused(judged: Callable[..., Run]) -> None:
    run = judged(with_leak_past_lengths, claims("kv_lengths", profile="fused"), "poison/", "kv_lengths/", "smoke")
    assert len(run.failures) >= 3
    assert all("kv_lengths" in result.ask.features for result in run.failures)


def test_the_whole_verdict_of_a_fused_target(judged: Callable[..., Run]) -> None:
    run = judged(lower_right_of_lengths, claims("causal", profile="fused"))
    assert run.verdict.startswith("conformant (profile fused) on core")


def test_the_profile_fused_allows_an_approximate_tanh(judged: Callable[..., Run]) -> None:
    attention = Reference(replace(Steps(), soft_cap=approximate_cap)).attention
    assert judged(attention, claims(), "softcap/").failures
    assert not judged(attention, claims(profile="fused"), "softcap/").failures


def test_cases_of_which_a_mask_alone_hides_an_operand(suite: Suite) -> None:
    cases = {case.id: case for case in suite.cases}
    hidden = {name for name, case in cases.items() if hidden_by_dense_alone(case)}
    assert {"attention/poison/unused/mask/size-64", "attention/last-tile/mask/129"} <= hidden
    assert "attention/nonfinite/value-nan/mask/size-64" in hidden
    assert "attention/nonfinite/query-nan/mask/size-64" not in hidden, "the row is NaN anyway"
    assert not any("kv_lengths" in name and "mask" not in name and "bias" not in name for name in hidden)
    strict = {ask.case.id for ask in asks(suite.cases, claims(profile="strict"), Selection()) if ask.relaxed}
    assert not strict


def test_an_accepted_precision_clears_every_failure_that_it_explains(judged: Callable[..., Run]) -> None:
    patterns = ("rounding/plain", "lengths-67-131", "values/levels")
    attention = Reference(IN_TF32).attention
    assert len(judged(attention, claims(), *patterns).failures) > 10
    run = judged(attention, claims(), *patterns, accepted=TF32)
    assert not run.failures
    assert run.status == 0


def test_an_accepted_precision_does_not_clear_another_mistake(judged: Callable[..., Run]) -> None:
    wrong = Reference(replace(IN_TF32, see_causal=lambda distance: distance <= 1)).attention
    run = judged(wrong, claims(), "causal/", accepted=TF32)
    assert len(run.failures) >= 3


def lower_right_of_lengths(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Put the diagonal at kv_lengths - q_lengths."""
    positional = options.get("causal") or options.get("window")
    return reference.attention(query, key, value, **options, q_offset="lower_right" if positional else None)


WORDS = ("causal", "window", "q_lengths", "kv_lengths", "return_lse")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (WORDS, "lower_right_of_lengths"),
        (("causal", "kv_lengths"), "lower_right_of_kv_lengths"),
        (("causal", "window"), "lower_right"),
    ],
)
def test_an_alignment_that_is_read_off_is_asked(judged: Callable[..., Run], words: tuple[str, ...], name: str) -> None:
    patterns = ("causal", "window+offset")
    run = judged(lower_right_of_lengths, claims(*words), *patterns)
    assert run.alignment == name
    assert not run.failures
    declared = judged(lower_right_of_lengths, claims(*words, conventions={"causal_alignment": name}), *patterns)
    assert [r.ask.key for r in run.results] == [r.ask.key for r in declared.results]
    assert "offset" in run.asked_features
    for result in run.results:
        case = result.ask.case
        assert not {"causal", "window"} & {*case.options} or name in alignments(case), case.id


def test_lengths_without_an_offset_are_asked_only_of_alignments_that_agree(suite: Suite) -> None:
    case = next(case for case in suite.cases if case.id == "attention/causal+q_lengths/random-1")
    assert "lower_right_of_lengths" not in alignments(case)
    for name, asked in (("lower_right_of_lengths", 0), ("upper_left", 1)):
        declared = claims(*WORDS, conventions={"causal_alignment": name})
        assert len(asks([case], declared, Selection())) == asked


def test_options_that_nobody_claims_are_noted(judged: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "target.py"
    path.write_text("def attention(query, key, value): ...\ndef attention_vjp(g, q, k, v, **options): ...\n")
    assert load(str(path)).claims.unclaimed == ("attention_vjp",)
    path.write_text("features = ('mask',)\ndef attention(query, key, value, **options): ...\n")
    assert load(str(path)).claims.unclaimed == ()
    described = Claims("open", {"attention": ()}, ("float32",), unclaimed=("attention",))
    run = judged(reference.attention, described, "smoke")
    assert "attention takes any keyword but claims no option" in run.notes[0]
    assert "features = (" in run.notes[0]
