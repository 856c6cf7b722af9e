"""Ask the smoke cases, which distinguish a wrong target file (axes, tuple, dtype, mask) from a wrong attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import reference
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.mistakes import MISTAKES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mha_spec_conformance.asking.question import Answer, Question, Source
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.judging.judge import Judge
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Suite

__all__ = ["NothingToJudge", "try_smoke_cases"]

TAG = "smoke"

AXES = {"bhsd": "the heads before the tokens", "bshd": "the axes as (batch, length, heads, size)"}
"""The dense layouts."""

INVERTED = next(mistake for mistake in MISTAKES if mistake.variant == "mask_polarity=true_hides")


class NothingToJudge(MhaSpecError):
    """The target cannot be judged."""


@dataclass(frozen=True)
class Smoke:
    """One smoke case: the question, the answer and the result."""

    question: Question
    answer: Answer
    result: Result


def try_smoke_cases(suite: Suite, source: Source, judge: Judge) -> tuple[str, ...]:
    """Ask the smoke cases, in float32 if the target claims it, and return notes on the target file.

    Raises:
        NothingToJudge: Every answer has a wrong form or wrong axes, or the process ended.
    """
    claims = source.claims
    dtype = "float32" if "float32" in claims.dtypes else claims.dtypes[0]
    cases = [case for case in suite.cases if TAG in case.tags]
    asked = {ask.key: ask for ask in asks(cases, claims, Selection(dtypes=(dtype,)))}
    plain_first = sorted(asked.values(), key=lambda ask: len(ask.features))
    smokes: list[Smoke] = []
    for question, answer in source.answers([ask.question() for ask in plain_first]):
        smokes.append(Smoke(question, answer, _result(judge, asked[question.id, question.dtype], answer)))
        if answer.kind == "timeout":
            break
    smokes = [smoke for smoke in smokes if smoke.result.outcome != "unsupported"]
    if smokes and (fault := _fault(smokes, source)) is not None:
        raise NothingToJudge(f"target {claims.name} cannot be judged: {fault}")
    return tuple(_notes(smokes))


def _result(judge: Judge, ask: Ask, answer: Answer) -> Result:
    """Judge an answer, and name a mask of the other polarity."""
    result = judge.result(ask, answer)
    if result.wrong is None or not judge.recognition.explains(INVERTED, result.wrong):
        return result
    return judge.explained(result, [INVERTED])


def _fault(smokes: list[Smoke], source: Source) -> str | None:
    """Describe the fault of the target file if no answer can be compared."""
    first = smokes[0]
    if any(smoke.result.outcome == "pass" for smoke in smokes):
        return None
    if _takes_lengths_first(first, source):
        other = "bhsd" if source.claims.layout == "bshd" else "bshd"
        return f'the target takes {AXES[other]}: declare it in the target file, as layout = "{other}"'
    if any(_judged(smoke) for smoke in smokes):
        return None
    if first.answer.kind in ("crash", "timeout"):
        return f"the smoke cases end its process: {first.answer.reason}"
    if first.answer.kind == "raised":
        return (
            f"the smoke cases raise {first.answer.reason}; "
            "for arguments that it does not support the target must raise NotImplementedError"
        )
    return f"{first.result.reason}{_axes(first)}"


def _judged(smoke: Smoke) -> bool:
    """Tell whether an output can be compared."""
    return smoke.answer.kind == "returned" and not _shapes(smoke)


def _shapes(smoke: Smoke) -> bool:
    """Tell whether an output has a wrong shape."""
    expected = smoke.result.ask.case.expected
    return any(tuple(array.shape) != tuple(expected[name].shape) for name, array in smoke.answer.outputs.items())


def _axes(smoke: Smoke) -> str:
    """Name the order of axes that a wrong shape has."""
    if smoke.answer.kind != "returned":
        return ""
    batch, heads, q_len, v_dim = smoke.result.ask.case.expected["output"].shape
    received = tuple(smoke.answer.outputs["output"].shape)
    orders = {
        (batch, q_len, heads, v_dim): "(batch, q_len, heads, v_dim)",
        (batch, heads, v_dim, q_len): "(batch, heads, v_dim, q_len)",
        (batch, q_len, heads * v_dim): "(batch, q_len, heads * v_dim)",
    }
    if received not in orders:
        return ""
    advice = 'declare layout = "bshd"' if received[1:] == (q_len, heads, v_dim) else "permute them in the target file"
    return f": the axes are {orders[received]}; {advice}"


def _takes_lengths_first(smoke: Smoke, source: Source) -> bool:
    """Tell whether the target exchanges heads and lengths, by a call with as many heads as positions."""
    dense = smoke.question.function == "attention" and source.claims.layout in AXES
    if not dense or smoke.answer.kind in ("crash", "timeout"):
        return False
    arrays = {name: smoke.question.arrays[name] for name in ("query", "key", "value")}
    size = min(length for array in arrays.values() for length in array.shape[1:3])
    arrays = {name: array[:, :size, :size].copy() for name, array in arrays.items()}
    question = replace(smoke.question, arrays=arrays, options={}, outputs=("output",), further=())
    operands = [array.astype(numpy.float64) for array in arrays.values()]
    straight = numpy.asarray(reference.attention(*operands))
    swapped = numpy.asarray(reference.attention(*(x.swapaxes(1, 2) for x in operands))).swapaxes(1, 2)
    for _, answer in source.answers([question]):
        output = answer.outputs.get("output")
        if output is None or output.shape != swapped.shape or output.dtype.kind == "c":
            return False
        return float(abs(output.astype(numpy.float64) - swapped).max()) < abs(straight - swapped).max() / 64
    return False


def _notes(smokes: Iterable[Smoke]) -> list[str]:
    """Return notes on probable faults of a target file that can be judged."""
    return list(dict.fromkeys(note for smoke in smokes if (note := _note(smoke)) is not None))


def _note(smoke: Smoke) -> str | None:
    conventions = dict(smoke.result.conventions)
    if conventions.get("mask_polarity") == "true_hides":
        return "the target hides the pairs that a mask marks True: if it means that, pass ~mask in the target file"
    if "output_dtype" in conventions:
        dtypes = f"{conventions['output_dtype']} for {smoke.question.dtype}"
        return f"the target returns {dtypes}: if the target file converts, convert back"
    if smoke.answer.kind == "malformed" or (smoke.answer.kind == "returned" and _shapes(smoke)):
        return f"smoke case {smoke.question.id}: {smoke.result.reason}"
    return None
