"""Read off the conventions that a target follows, from its answers to the few questions that tell readings apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mha_spec.arrays import dtype_name
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.suite.conventions import CONVENTIONS

from .evidence import Answered, Evidence, conventions_followed
from .runner import without_progress
from .smoke import try_smoke_cases
from .witnesses import questions_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mha_spec_conformance.asking.question import Source
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.mistakes import Mistake
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

    from .runner import Progress
    from .witnesses import Group, Questions

    Key = tuple[object, ...]

__all__ = ["BY_OFFSET", "NEITHER", "NOT_ASKED", "NOT_TOLD", "Detection", "Reading", "detect", "readings"]

NOT_ASKED, NOT_TOLD, NEITHER = "not asked", "not told apart", "neither"

BY_OFFSET = "by q_offset"
"""The alignment of a target that takes an offset and obeys it."""

NOT_TAKEN = "the target does not take what the cases need"


@dataclass(frozen=True)
class Reading:
    """The variant of a convention that the answers show, or NOT_ASKED, NOT_TOLD, NEITHER or BY_OFFSET; the evidence."""

    convention: str
    variant: str
    evidence: str
    dtype: str | None = None
    """The dtype of the answers, if the convention is a precision."""

    @property
    def is_variant(self) -> bool:
        """True if the convention has the variant."""
        return self.variant in CONVENTIONS[self.convention]


@dataclass(frozen=True)
class Detection:
    """The readings of all conventions, and notes on the target file."""

    claims: Claims
    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """The deviations from the specification in the words of `--accept`."""
        return tuple(
            dict.fromkeys(f"{r.convention}={r.variant}" for r in self.readings if r.is_variant and self._deviates(r))
        )

    def _deviates(self, reading: Reading) -> bool:
        """Tell whether `check` would report the reading; it asks a target without offset for its alignment."""
        if reading.convention == "causal_alignment":
            return _takes_offset(self.claims)
        return reading.variant not in (CONVENTIONS[reading.convention][0], "strict")

    @property
    def declared(self) -> dict[str, object]:
        """The names and values that the target file can declare."""
        alignments = [r for r in self.readings if r.convention == "causal_alignment" and r.is_variant]
        declared: dict[str, object] = {}
        if alignments and not self._deviates(alignments[0]):
            declared["conventions"] = {"causal_alignment": alignments[0].variant}
        if any(reading.variant == "strict" for reading in self.readings):
            declared["profile"] = "strict"
        return declared


def detect(source: Source, suite: Suite, progress: Progress = without_progress) -> Detection:
    """Ask a target a few questions about each convention; `progress` is called as by `runner.run`, without failures.

    Raises:
        NothingToJudge: No answer to a smoke case can be compared.
    """
    notes = try_smoke_cases(suite, source, Judge(source.claims))
    return Detection(source.claims, readings(source, questions_of(suite, source.claims), progress), notes)


def readings(source: Source, questions: Questions, progress: Progress = without_progress) -> tuple[Reading, ...]:
    """Ask the questions, and return the readings of all conventions."""
    claims, judge = source.claims, Judge(source.claims, mistakes=())
    answers = _answers(source, questions.asks, judge, progress)

    def of(asks: Sequence[Ask]) -> list[Answered]:
        return [answers[_key(ask)] for ask in asks]

    groups = {g: Evidence(g.convention, of(g.asks), questions.recognition) for g in questions.groups}
    chosen = conventions_followed(groups)
    groups = {group: _relative(evidence, chosen, judge) for group, evidence in groups.items()}
    by_name: dict[str, list[Reading]] = {name: [] for name in CONVENTIONS}
    for group, evidence in groups.items():
        by_name[group.convention].append(_reading(group, evidence))
    alignment = "causal_alignment"
    probes = {v: Evidence(alignment, of(asks), questions.recognition) for v, asks in questions.probes.items()}
    probes = {variant: evidence.allowing_for(chosen) for variant, evidence in probes.items()}
    by_name[alignment] = [_aligned(by_name[alignment][0], probes, takes_offset=_takes_offset(claims))]
    by_name["output_dtype"] = [_output_dtype(of(questions.dtypes))]
    strict = of(questions.strict)
    by_name["precision"] = [_strict(reading, strict, claims) for reading in by_name["precision"]]
    return tuple(reading for of_name in by_name.values() for reading in of_name)


def _takes_offset(claims: Claims) -> bool:
    return "q_offset" in claims.words("attention")


def _answers(source: Source, asks: Sequence[Ask], judge: Judge, progress: Progress) -> dict[Key, Answered]:
    """Ask each question once, and judge the answers."""
    named = {f"{ask.case.id}/detect-{i}": ask for i, ask in enumerate({_key(ask): ask for ask in asks}.values())}
    answers: dict[Key, Answered] = {}
    for question, answer in source.answers(*([replace(ask.question(), id=name)] for name, ask in named.items())):
        # Inputs that the call wrote to say nothing about a convention.
        ask, unwritten = named[question.id], replace(answer, written=())
        answers[_key(ask)] = Answered(ask, unwritten, judge.result(ask, unwritten))
        progress(len(answers), len(named), 0)
    return answers


def _key(ask: Ask) -> Key:
    return *ask.key, ask.outputs, ask.omitted


def _relative(evidence: Evidence, chosen: Mapping[str, Sequence[Mistake]], judge: Judge) -> Evidence:
    """Return evidence that allows for the other conventions that the target follows."""
    of_attention = any("attention" in mistake.functions for mistake in chosen.get("lse_base", ()))
    if evidence.convention != "empty_row_lse" or not of_attention:
        return evidence.allowing_for(chosen)
    # Both change the same step, so that they have no joint prediction: the base is taken out of the answers.
    natural = [_natural(answered, judge) for answered in evidence.answers]
    others = {name: mistakes for name, mistakes in chosen.items() if name != "lse_base"}
    return replace(evidence, answers=natural).allowing_for(others)


def _natural(answered: Answered, judge: Judge) -> Answered:
    """Convert an lse of base 2."""
    outputs = {name: (array * math.log(2)).astype(array.dtype) for name, array in answered.answer.outputs.items()}
    answer = replace(answered.answer, outputs=outputs)
    return Answered(answered.ask, answer, judge.result(answered.ask, answer))


def _reading(group: Group, evidence: Evidence) -> Reading:
    """Return the variant of a convention that all answers show."""
    name, dtype = group.convention, group.dtype if group.convention == "precision" else None
    if not evidence.answers:
        return Reading(name, NOT_ASKED, NOT_TAKEN, dtype)
    if not evidence.judged:
        refused = Reading(name, NOT_ASKED, f"the target refuses: {evidence.answers[0].result.reason}", dtype)
        return Reading(name, NEITHER, _no_result(evidence.silent), dtype) if evidence.silent else refused
    if not evidence.wrong:
        return Reading(name, *_of_specification(evidence), dtype)
    if variants := evidence.variants():
        return Reading(name, variants[0], _confirmed(evidence, variants), dtype)
    return Reading(name, NEITHER, _mixed(evidence), dtype)


def _of_specification(evidence: Evidence) -> tuple[str, str]:
    """Return the reading of the specification, with the readings that answers refute."""
    counts = evidence.refuted()
    refuted, left = ([v for v, number in counts.items() if bool(number) is wanted] for wanted in (True, False))
    if not refuted:
        others = dict.fromkeys(str(mistake.convention) for mistake in evidence.following())
        return NOT_TOLD, f"{_counted(evidence.judged)} do not tell {', '.join(left)} from {', '.join(others)}"
    remark = f"; no question tells {', '.join(left)} from it" if left else ""
    variant = BY_OFFSET if evidence.convention == "causal_alignment" else CONVENTIONS[evidence.convention][0]
    return variant, f"{_counted(evidence.judged)} refute {', '.join(refuted)}{remark}"


def _confirmed(evidence: Evidence, variants: Sequence[str]) -> str:
    how = "are as wrong as" if evidence.convention == "precision" else "are those of"
    remark = f"; they do not exclude {', '.join(variants[1:])}" if len(variants) > 1 else ""
    return f"{len(evidence.wrong)} of {_counted(evidence.judged)} {how} {variants[0]}{remark}"


def _mixed(evidence: Evidence) -> str:
    """Say which variants explain how many wrong answers, with an example."""
    counts, left = evidence.shared_out()
    counts |= {"no variant": len(left)} if left else {}
    parts = ", ".join(f"{number} of {variant}" for variant, number in counts.items())
    example = (left or evidence.wrong)[0]
    where = f"{example.ask.case.id} {example.ask.dtype}"
    return f"{_counted(evidence.judged)}, among them {parts}; in {where} {example.result.reason}"


def _no_result(silent: Sequence[Answered]) -> str:
    return f"no call returned a result: {silent[0].result.reason}"


def _counted(answers: Sequence[Answered]) -> str:
    return f"{len(answers)} answer{'s' * (len(answers) != 1)}"


def _aligned(reading: Reading, asked: Mapping[str, Evidence], *, takes_offset: bool) -> Reading:
    """Return the alignment of a target without q_offset, or BY_OFFSET for a target that obeys its q_offset."""
    name = reading.convention
    fitting = [variant for variant, evidence in asked.items() if evidence.judged and not evidence.wrong]
    silent = [answered for evidence in asked.values() for answered in evidence.silent]
    if takes_offset and reading.variant == BY_OFFSET:
        return replace(reading, evidence=f"{reading.evidence}{_without_offset(fitting, silent)}")
    judged = {variant: evidence for variant, evidence in asked.items() if evidence.judged}
    if takes_offset:
        return reading
    if not judged:
        return Reading(name, NEITHER, _no_result(silent)) if silent else Reading(name, NOT_ASKED, NOT_TAKEN)
    if not fitting:
        wrong = ", ".join(f"{v} ({len(evidence.wrong)} of {len(evidence.judged)})" for v, evidence in judged.items())
        return Reading(name, NEITHER, f"without an offset, answers refute {wrong}")
    fitting.sort(key=lambda variant: -len(asked[variant].judged))
    others = f"; others fit as well: {', '.join(fitting[1:])}" if fitting[1:] else ""
    return Reading(name, fitting[0], f"{_counted(asked[fitting[0]].judged)} without an offset have it{others}")


def _without_offset(fitting: Sequence[str], silent: Sequence[Answered]) -> str:
    """Describe the calls without q_offset of a target that obeys it."""
    if any(answered.result.outcome == "error" for answered in silent):
        return "; a call without it raises where the readings differ"
    return f"; a call without it has {fitting[0]}" if fitting else ""


def _output_dtype(answers: Sequence[Answered]) -> Reading:
    """Return the dtype of outputs, from an answer in each dtype."""
    name = "output_dtype"
    returned = {a.ask.dtype: dtype_name(a.answer.outputs["output"]) for a in answers if a.answer.kind == "returned"}
    text = ", ".join(f"{output} for {dtype}" for dtype, output in returned.items())
    if not returned:
        return Reading(name, NOT_ASKED, "no call returned" if answers else NOT_TAKEN)
    if all(dtype == output for dtype, output in returned.items()):
        return Reading(name, CONVENTIONS[name][0], text)
    different = set(returned.values())
    variant = different.pop() if len(different) == 1 else NEITHER
    return Reading(name, variant if variant in CONVENTIONS[name] else NEITHER, text)


def _strict(reading: Reading, answers: Sequence[Answered], claims: Claims) -> Reading:
    """Return the reading `strict` if the answers are more accurate than rounded weights allow."""
    of_dtype = [answered for answered in answers if answered.ask.dtype == reading.dtype]
    judge = Judge(replace(claims, profile="strict"), mistakes=())
    exact = [Answered(a.ask, a.answer, judge.result(a.ask, a.answer)).right for a in of_dtype]
    if reading.variant != CONVENTIONS[reading.convention][0] or not exact or not all(exact):
        return reading
    return replace(reading, variant="strict", evidence=f"{_counted(of_dtype)} are better than rounded weights allow")
