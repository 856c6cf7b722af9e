"""`mha-spec detect` names the conventions that a target follows, from its answers alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from typer.testing import CliRunner

from mha_spec.errors import MhaSpecError
from mha_spec.steps import Steps
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.commands.cli import app
from mha_spec_conformance.commands.detect import detect as command
from mha_spec_conformance.judging.pairs import together
from mha_spec_conformance.mistakes import MISTAKES, Mistake
from mha_spec_conformance.mistakes.mistake import replacing
from mha_spec_conformance.running.detecting import (
    BY_OFFSET,
    NEITHER,
    NOT_ASKED,
    NOT_TOLD,
    Detection,
    Reading,
    detect,
    readings,
)
from mha_spec_conformance.running.runner import NothingToJudge
from mha_spec_conformance.running.witnesses import Questions, questions_of
from mha_spec_conformance.suite.conventions import CONVENTIONS
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.suite.cases import Suite

CALLS = ("attention", "attention_vjp", "merge_attention")


class InThisProcess:
    """A source whose target is called in this process."""

    def __init__(self, functions: dict[str, Callable[..., Any]], dtypes: tuple[str, ...] = ("float32",)) -> None:
        self.claims = Claims("mine", {name: FUNCTIONS[name].keywords for name in functions}, dtypes)
        self.target = Target(functions, self.claims)

    def without(self, *keywords: str) -> InThisProcess:
        """Claim all but these keywords."""
        claimed = {
            f: tuple(word for word in words if word not in keywords) for f, words in self.claims.keywords.items()
        }
        self.claims = replace(self.claims, keywords=claimed)
        self.target = Target(self.target.functions, self.claims)
        return self

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        for group in groups:
            for question in group:
                yield question, answer(self.target, question)


def planted(mistake: Mistake, *dtypes: str) -> InThisProcess:
    """Make a target whose functions have a mistake."""
    functions = {name: function_over(mistake.steps if name in mistake.functions else Steps(), name) for name in CALLS}
    return InThisProcess(functions, dtypes)


def variants(detected: Iterable[Reading]) -> dict[str, set[str]]:
    """Return the variants of each convention."""
    by_name: dict[str, set[str]] = {name: set() for name in CONVENTIONS}
    for reading in detected:
        by_name[reading.convention].add(reading.variant)
    return by_name


RIGHT = {name: {variants[0]} for name, variants in CONVENTIONS.items()} | {"causal_alignment": {BY_OFFSET}}
PLANTED = [mistake for mistake in MISTAKES if mistake.convention is not None]


@pytest.fixture(scope="module")
def questions(suite: Suite) -> dict[str, Questions]:
    """The questions that every planted target is asked, by its dtype."""
    return {
        dtype: questions_of(suite, planted(PLANTED[0], dtype).claims) for dtype in ("float32", "float16", "bfloat16")
    }


@pytest.mark.parametrize("mistake", PLANTED, ids=lambda mistake: mistake.name)
def test_a_planted_convention_is_named_and_no_other(questions: dict[str, Questions], mistake: Mistake) -> None:
    assert mistake.convention is not None
    name, variant = mistake.convention
    dtype = "float16" if name == "output_dtype" else "float32"
    dtype = mistake.dtypes[0] if mistake.dtypes and dtype not in mistake.dtypes else dtype
    source = planted(mistake, dtype)
    detected = readings(source, questions[dtype])
    # A row of NaN has an lse of NaN, which tells nothing about the lse of an empty row.
    with_it = {"empty_row_lse": {NOT_TOLD}} if mistake.name == "empty-row-nan" else {}
    assert variants(detected) == RIGHT | {name: {variant}} | with_it, detected
    assert Detection(source.claims, detected).accepted == (str(mistake.convention),)


def test_conventions_that_hide_each_other_are_both_named(questions: dict[str, Questions]) -> None:
    by_name = {mistake.name: mistake for mistake in PLANTED}
    for first, second in (
        ("mask-polarity-inverted", "empty-row-nan"),
        ("lse-base-2", "lse-empty-0"),
        ("heads-tiled", "window-left-exclusive"),
    ):
        both = [by_name[first], by_name[second]]
        followed = variants(readings(planted(made(*both), "float32"), questions["float32"]))
        for mistake in both:
            assert followed[mistake.convention.name] == {mistake.convention.variant}, (first, second, followed)


def made(first: Mistake, second: Mistake) -> Mistake:
    """Join two mistakes."""
    if first.name == "lse-base-2":
        assert isinstance(second.steps, Steps)
        in_base_e = second.steps.log_sum_exp
        steps = replacing(log_sum_exp=lambda *a: in_base_e(*a) / math.log(2))
        return replace(first, steps=steps)
    pair = together(first, second)
    assert pair is not None
    return pair


def test_rows_that_are_empty_by_a_mask_of_the_other_polarity_are_read(suite: Suite) -> None:
    inverted, mean = (m for m in PLANTED if m.name in ("mask-polarity-inverted", "empty-row-mean"))
    attention = function_over(made(inverted, mean).steps, "attention")
    others = [word for word in FUNCTIONS["attention"].keywords if word != "mask"]
    detection = detect(InThisProcess({"attention": attention}).without(*others), suite)
    assert detection.accepted == ("mask_polarity=true_hides", "fully_masked_row=mean_of_values")


@pytest.mark.parametrize("alignment", CONVENTIONS["causal_alignment"])
def test_the_alignment_of_a_target_without_an_offset_is_read_off(suite: Suite, alignment: str) -> None:
    attention = function_over(Steps(), "attention")

    def aligned(query: Any, key: Any, value: Any, **options: Any) -> Any:
        q_len, kv_len = query.shape[2], key.shape[2]
        kv_lengths = numpy.asarray(options.get("kv_lengths", kv_len))
        offsets = {
            "upper_left": 0,
            "lower_right": kv_len - q_len,
            "lower_right_of_kv_lengths": kv_lengths - q_len,
            "lower_right_of_lengths": kv_lengths - options.get("q_lengths", q_len),
        }
        offset = numpy.broadcast_to(offsets[alignment], len(query)).astype(numpy.int32)
        positions = {"q_offset": offset} if options.get("causal") or options.get("window") else {}
        return attention(query, key, value, **options, **positions)

    detection = detect(InThisProcess({"attention": aligned}).without("q_offset"), suite)
    assert variants(detection.readings)["causal_alignment"] == {alignment}
    assert detection.declared == {"conventions": {"causal_alignment": alignment}}
    assert not detection.accepted


def test_a_target_that_takes_nothing_is_asked_what_it_can_be_asked(suite: Suite) -> None:
    attention = function_over(Steps(), "attention")
    detection = detect(InThisProcess({"attention": attention}).without(*FUNCTIONS["attention"].keywords), suite)
    asked = {r.convention: r.variant for r in detection.readings if r.variant != NOT_ASKED}
    assert asked == {"group_order": "repeat", "output_dtype": "query", "precision": "standard", "nonfinite": "excluded"}
    assert not detection.accepted
    assert not detection.declared


def test_a_right_attention_without_other_functions_has_the_readings_of_the_specification(suite: Suite) -> None:
    attention = function_over(Steps(), "attention")
    followed = variants(detect(InThisProcess({"attention": attention}), suite).readings)
    assert followed == RIGHT


def test_weights_that_are_not_rounded_are_the_profile_strict(suite: Suite) -> None:
    attention = function_over(Steps(), "attention")
    detection = detect(InThisProcess({"attention": attention}, ("bfloat16",)), suite)
    assert variants(detection.readings)["precision"] == {"strict"}
    assert detection.declared["profile"] == "strict"


FILE = """
import math, os
import numpy

def attention(query, key, value, *, mask=None, causal=False, softcap=None, bias=None, window=None):
    if softcap is not None and bias is not None:
        os._exit(3)
    if causal:
        raise RuntimeError("no causal here")
    if window is not None:
        raise NotImplementedError("no window here")
    key, value = (numpy.repeat(x, query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.swapaxes(2, 3) / math.sqrt(query.shape[3])
    scores = numpy.where(False if mask is None else mask, -numpy.inf, scores)
    weights = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value
"""


def test_the_command_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    (tmp_path / "hides.py").write_text("dtypes = ('float32',)\n" + FILE)
    target, file = str(tmp_path / "hides.py"), tmp_path / "conventions.json"
    done = CliRunner().invoke(app, ["detect", target, "--json", str(file)])
    assert done.exit_code == 0, done.output
    data = json.loads(file.read_text())
    by_name = {entry["convention"]: entry for entry in data["conventions"]}
    assert by_name["mask_polarity"]["variant"] == "true_hides"
    assert by_name["causal_alignment"]["variant"] == NEITHER
    assert "RuntimeError: no causal here" in by_name["causal_alignment"]["evidence"]
    assert by_name["softcap_order"]["variant"] == NEITHER
    assert "exit status 3" in by_name["softcap_order"]["evidence"]
    assert by_name["window_left"]["variant"] == NOT_ASKED
    assert by_name["window_left"]["evidence"] == "the target refuses: no window here"
    assert "mask_polarity=true_hides" in data["accept"]
    lines = done.output.splitlines()
    assert any(line.split()[:2] == ["mask_polarity", "true_hides"] for line in lines)
    assert any(f"mha-spec check {target}" in line and "--accept mask_polarity=true_hides" in line for line in lines)


def test_a_target_of_which_nothing_can_be_compared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import os\n\ndef attention(query, key, value):\n    os._exit(3)\n")
    with pytest.raises(NothingToJudge, match="end its process"):
        command(str(tmp_path / "ends.py"))
    with pytest.raises(MhaSpecError, match="--json"):
        command(str(tmp_path / "ends.py"), json_file=tmp_path)
