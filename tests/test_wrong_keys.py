"""Wrong keys are located: attentions with planted mistakes are asked again with values that tell keys apart."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mha_spec.steps import Steps
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.question import Answer
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.reporting.html import page
from mha_spec_conformance.reporting.report import as_json
from mha_spec_conformance.running.keys import MOST_CALLS, with_wrong_keys
from mha_spec_conformance.running.run import Run
from mha_spec_conformance.running.runner import Settings, judge_all, run
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mha_spec_conformance.asking.question import Question
    from mha_spec_conformance.suite.cases import Suite

    Array = numpy.ndarray
    Change = Callable[[Array], Array]

KEYWORDS = ("mask", "causal", "window", "kv_lengths", "q_offset", "scale", "return_lse")
RIGHT = Steps()


class InThisProcess:
    """A source whose target is called in this process; `further` are the questions that are asked again."""

    def __init__(self, steps: Steps, dtypes: tuple[str, ...] = ("float32",)) -> None:
        self.claims = Claims("mine", {"attention": KEYWORDS}, dtypes)
        self.target = Target({"attention": function_over(steps, "attention")}, self.claims)
        self.further: list[Question] = []

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        for question in itertools.chain(*groups):
            self.further += [question] if "/keys-" in question.id else []
            yield question, self.answer(question)

    def answer(self, question: Question) -> Answer:
        return answer(self.target, question)


class Failing(InThisProcess):
    """A source that gives no outputs for the questions that are asked again."""

    def __init__(self, steps: Steps, kind: str) -> None:
        super().__init__(steps)
        self.kind = kind

    def answer(self, question: Question) -> Answer:
        return Answer(self.kind) if "/keys-" in question.id else super().answer(question)


def judged(suite: Suite, source: InThisProcess, *only: str) -> Run:
    """Judge a few cases, without names of mistakes, and ask the failures again."""
    selection, judge = Selection(only, source.claims.dtypes), Judge(source.claims)
    asked = {ask.key: ask for ask in asks(suite.cases, source.claims, selection)}
    answers = source.answers([ask.question() for ask in asked.values()])
    results = tuple(judge.result(asked[question.id, question.dtype], reply) for question, reply in answers)
    return with_wrong_keys(source, Run(suite, source.claims, selection, results, finished=True))


def keys(run: Run) -> list[str]:
    """Return the descriptions of the wrong keys of all causes."""
    return [cause.story.keys.text for cause in run.findings.causes if cause.story.keys is not None]


def index(pairs: Array) -> Array:
    """Return the indices of the keys of pairs."""
    return numpy.arange(pairs.shape[-1])


def seen(change: Change) -> Steps:
    """Change the visible pairs."""
    return replace(RIGHT, all_of=lambda constraints: change(RIGHT.all_of(constraints)))


def in_other_order(weights: Array, values: Array, visible: Array) -> Array:
    """Read the values in tiles of 64 keys, the last tile first."""
    tiles = [values[:, :, start : start + 64] for start in range(0, values.shape[2], 64)]
    return RIGHT.sum_over_visible(weights, numpy.concatenate(tiles[::-1], axis=2), visible)


def doubled(exponentials: Array) -> Array:
    """Double the sum of each row."""
    return 2 * RIGHT.sum_exponentials(exponentials)


def heavy(logits: Array) -> tuple[Array, Array]:
    """Double the weight of every fourth key."""
    return RIGHT.exponentials(logits + numpy.log(2) * (index(logits) % 4 == 3))


HIDDEN, VISIBLE = " (hidden, but with a weight)", " (visible, but without a weight)"
DECODING = "attention/decode/33-of-300/"
MASKED = "attention/tiles/257/mask/3"

PLANTED = {
    "the mask is lost from key 64 on": (
        replace(RIGHT, see_mask=lambda mask: mask | (index(mask) >= 64)),
        MASKED,
        f"only keys from 64 on{HIDDEN}",
    ),
    "the mask is lost": (
        replace(RIGHT, see_mask=numpy.ones_like),
        MASKED,
        "only hidden keys, which have a weight",
    ),
    "a tile is skipped": (
        seen(lambda pairs: pairs & ((index(pairs) < 64) | (index(pairs) >= 128))),
        MASKED,
        f"only keys 64 to 127{VISIBLE}",
    ),
    "the last key is dropped": (
        seen(lambda pairs: pairs & (index(pairs) < pairs.shape[-1] - 1)),
        "attention/smoke/plain",
        f"only the last key{VISIBLE}",
    ),
    "every fourth key is skipped": (
        seen(lambda pairs: pairs & (index(pairs) % 4 != 3)),
        f"{DECODING}scale/1",
        f"only keys 3 modulo 4{VISIBLE}",
    ),
    "every fourth key counts twice": (
        replace(RIGHT, exponentials=heavy),
        f"{DECODING}scale/1",
        "only keys 3 modulo 4",
    ),
    "kv_lengths + 1": (
        replace(RIGHT, see_kv_lengths=lambda positions, lengths: positions <= lengths),
        f"{DECODING}kv_lengths/1",
        f"only the first key past kv_lengths{HIDDEN}",
    ),
    "kv_lengths - 1": (
        replace(RIGHT, see_kv_lengths=lambda positions, lengths: positions < lengths - 1),
        f"{DECODING}kv_lengths/1",
        f"only the last key of kv_lengths{VISIBLE}",
    ),
    "kv_lengths are ignored": (
        replace(RIGHT, see_kv_lengths=lambda positions, lengths: positions < lengths + 300),
        f"{DECODING}kv_lengths/1",
        f"only keys past kv_lengths{HIDDEN}",
    ),
    "the window ends too early": (
        replace(RIGHT, see_window_left=lambda distance, left: distance > -left),
        f"{DECODING}window/1",
        f"only the first key of the window{VISIBLE}",
    ),
    "the window ends too late": (
        replace(RIGHT, see_window_left=lambda distance, left: distance >= -left - 1),
        f"{DECODING}window/1",
        f"only the last key before the window{HIDDEN}",
    ),
    "causal shows the next key": (
        replace(RIGHT, see_causal=lambda distance: distance <= 1),
        f"{DECODING}causal/1",
        f"only the first key after the diagonal{HIDDEN}",
    ),
    "causal is ignored in a tile": (
        replace(RIGHT, see_causal=lambda distance: (distance <= 0) | (index(distance) // 64 == 3)),
        "attention/tiles/257/causal/3",
        f"only keys 192 to 255 after the diagonal{HIDDEN}",
    ),
    "tiles are read in reversed order": (
        replace(RIGHT, sum_over_visible=in_other_order),
        f"{DECODING}scale/1",
        "each key has the weight of another, as if the tiles of 64 keys were in the reversed order",
    ),
    "the sum of the row is wrong": (
        replace(RIGHT, sum_exponentials=doubled),
        f"{DECODING}scale/1",
        "no key in particular: all weights of a row are wrong by the same factor",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_wrong_keys_are_located(suite: Suite, name: str) -> None:
    steps, case, text = PLANTED[name]
    source = InThisProcess(steps)
    done = judged(suite, source, case)
    assert keys(done) == [text]
    assert 0 < len(source.further) <= MOST_CALLS


def test_sums_of_tiles_locate_many_keys(suite: Suite) -> None:
    skipped = seen(lambda pairs: pairs & ((index(pairs) < 64) | (index(pairs) >= 128)))
    source = InThisProcess(skipped)
    assert keys(judged(suite, source, "attention/lengths-3-300/generic-1")) == ["only keys 64 to 127"]
    assert len(source.further) <= MOST_CALLS
    assert all(question.arrays["value"].sum(axis=2).max() == 4 for question in source.further)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_wrong_keys_are_located_in_every_dtype(suite: Suite, dtype: str) -> None:
    skipped = seen(lambda pairs: pairs & (index(pairs) < 64))
    done = judged(suite, InThisProcess(skipped, (dtype,)), "attention/lengths-65-129/generic-1")
    assert keys(done) == [f"only keys from 64 on{VISIBLE}"]


def test_right_attention_is_not_asked_again(suite: Suite) -> None:
    source = InThisProcess(RIGHT)
    assert keys(judged(suite, source, "attention/tiles/128/")) == []
    assert source.further == []


def test_wrong_values_of_right_weights_are_not_wrong_keys(suite: Suite) -> None:
    source = InThisProcess(
        replace(
            RIGHT, sum_over_visible=lambda w, values, seen: RIGHT.sum_over_visible(w, values[..., ::-1, :, :], seen)
        )
    )
    assert keys(judged(suite, source, "attention/smoke/head-layout")) == []
    assert source.further


def test_rows_of_nan_have_no_wrong_keys(suite: Suite) -> None:
    """A tile of 64 keys that a row does not see makes all its weights NaN; no key is to blame."""

    def exponentials(logits: Array) -> tuple[Array, Array]:
        numbers, maximum = RIGHT.exponentials(logits)
        hidden = (logits[..., 64:128] == -numpy.inf).all(axis=-1, keepdims=True)
        return numpy.where(hidden, numpy.nan, numbers), maximum

    assert (
        keys(judged(suite, InThisProcess(replace(RIGHT, exponentials=exponentials)), "attention/tiles/257/causal/*"))
        == []
    )


def test_equal_weights_of_a_few_rows_do_not_make_a_key_wrong(suite: Suite) -> None:
    """An even function of the scores leaves a common factor in the rows in which two scores have the same size."""

    def scores(query: Array, key: Array, scale: float) -> Array:
        right = RIGHT.scores(query, key, scale)
        return right * numpy.tanh(right / 2)

    source = InThisProcess(replace(RIGHT, scores=scores), ("float64",))
    source.claims = replace(source.claims, keywords={"attention": (*KEYWORDS, "softcap")})
    assert keys(judged(suite, source, "attention/scale+softcap+kv_lengths/generic-1")) == []


def test_few_causes_are_asked_again_in_few_calls(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated runs give the same report."""
    monkeypatch.setattr("mha_spec_conformance.running.keys.MOST_CAUSES", 1)
    hides_its_last_key = seen(lambda pairs: pairs & (index(pairs) < pairs.shape[-1] - 1))
    sources = [InThisProcess(hides_its_last_key), InThisProcess(hides_its_last_key)]
    runs = [judged(suite, source, "attention/causal/", "attention/lengths-") for source in sources]
    assert as_json(runs[0])["causes"] == as_json(runs[1])["causes"]
    assert len(runs[0].findings.causes) > 1
    assert len({question.id.partition("/keys-")[0] for question in sources[0].further}) == 1


@pytest.mark.parametrize("kind", ["crash", "timeout", "raised", "unsupported", "returned"])
def test_missing_answer_leaves_the_report_as_it_is(suite: Suite, kind: str) -> None:
    lost = seen(lambda pairs: pairs & (index(pairs) < 64))
    source = Failing(lost, kind)
    done = judged(suite, source, "attention/lengths-65-129/generic-1")
    assert len(source.further) == 1
    assert done.located is None
    assert [cause.story.keys for cause in done.findings.causes] == [None]


TARGET = """
import os
import numpy
from mha_spec import reference

def attention(query, key, value, *, mask=None):
    if (value.max(), value.min()) == (1, 0):
        {further}
    seen = numpy.arange(key.shape[2]) % 4 != 3
    return reference.attention(query, key, value, mask=seen.reshape(1, 1, 1, -1) if mask is None else mask & seen)
"""


@pytest.mark.parametrize(("further", "text"), [("pass", f"only key 3{VISIBLE}"), ("os._exit(7)", None)])
def test_keys_are_asked_in_the_process_of_the_target(
    suite: Suite, tmp_path: Path, further: str, text: str | None
) -> None:
    """A process that ends changes nothing in the report; the text is in each form of the report."""
    path = tmp_path / "target.py"
    path.write_text(TARGET.format(further=further))
    done = run(str(path), suite, Settings(Selection(("attention/smoke/plain",), ("float32",))))
    assert [result.outcome for result in done.results] == ["fail"]
    assert keys(done) == ([] if text is None else [text])
    report: dict[str, Any] = as_json(done)
    assert report["shared"]["keys"] == report["causes"][0]["keys"]
    assert ("asked again" in page(done)) == (text is not None)
    if text is not None:
        assert report["causes"][0]["keys"] == {"text": text, "id": "attention/smoke/plain", "dtype": "float32"}
        assert f"{text} [asked again: attention/smoke/plain float32]" in done.findings.causes[0].story.where


def test_stopped_run_is_not_asked_again(suite: Suite) -> None:
    source = InThisProcess(seen(lambda pairs: pairs & (index(pairs) < 64)))
    settings = Settings(Selection(("attention/lengths-65-129/",), ("float32",)), max_fail=1)
    assert judge_all(source, Judge(source.claims), suite, settings).status == 1
    assert source.further == []
