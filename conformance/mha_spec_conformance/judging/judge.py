"""Judge answers: give each case and dtype an outcome, with a reason that a user can act on."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from mha_spec.arrays import dtype_name
from mha_spec_conformance.asking.question import AGAIN
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.conventions import Convention
from mha_spec_conformance.suite.text import one_line, text_of
from mha_spec_conformance.targets.conversion import same_bits

from .bounds import SharedBounds, precision
from .compare import gate_b, judge
from .form import dtype_clause, dtype_fault, form_clauses, form_fault, wrong_dtype
from .recognition import Recognition, Wrong
from .result import INTERNAL, Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy

    from mha_spec_conformance.asking.question import Answer
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.mistakes import Mistake
    from mha_spec_conformance.targets.claims import Claims

    from .bounds import Precision
    from .compare import Judgement

__all__ = ["Judge"]

MOST_BYTES = 2**31
"""The size from which outputs are not compared bit by bit; they have a wrong shape, and perhaps no memory."""


class Judge:
    """Judges the answers of a target.

    An answer is compared with few mistakes when it arrives, by default with the accepted conventions. When all answers
    are known, `judging.naming` finds the other mistakes, and `explained` gives a result their names.
    """

    def __init__(
        self,
        claims: Claims,
        accepted: frozenset[Convention] = frozenset(),
        mistakes: Sequence[Mistake] | None = None,
    ) -> None:
        self.claims = claims
        self.accepted = accepted
        self.mistakes = [m for m in MISTAKES if m.convention in accepted] if mistakes is None else mistakes
        self.recognition = Recognition(claims.profile, accepted, claims.shards)
        self._bounds = SharedBounds()

    def result(self, ask: Ask, answer: Answer) -> Result:
        """Judge an answer; a fault of the judgement is the outcome `internal`."""
        try:
            result = self._result(ask, answer)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = one_line(f"{type(error).__name__}: {text_of(error)} ({place.filename}:{place.lineno})")
            result = Result(ask, INTERNAL, reason)
        return replace(
            result,
            clauses=result.clauses or tuple(ask.case.clauses),
            seconds=answer.seconds,
            deterministic=_deterministic(answer) if result.compared else None,
            refused=tuple(name for name, further in answer.further.items() if further.kind == "unsupported"),
        )

    def _result(self, ask: Ask, answer: Answer) -> Result:
        if answer.kind in ("crash", "timeout", "unsupported", "internal"):
            return Result(ask, answer.kind, answer.reason)
        if ask.case.expect == "error":
            return _refusal(ask, answer)
        if answer.kind == "raised":
            return Result(ask, "error", answer.reason)
        if answer.kind == "malformed":
            return Result(ask, "fail", answer.reason, malformed=True)
        if (reason := form_fault(ask, answer.outputs)) is not None:
            return Result(ask, "fail", reason, clauses=form_clauses(ask, answer.outputs))
        if self.claims.registered and answer.foreign is not None:
            return Result(
                ask,
                "fail",
                f"an output is an array of {answer.foreign}, but the inputs are arrays of {self.claims.arrays}",
            )
        return self._values(ask, answer)

    def _values(self, ask: Ask, answer: Answer) -> Result:
        run_precision = self._precision(ask)
        case = ask.case
        case_bounds = self._bounds.of(case, ask.dtype)
        allowances = case_bounds.allowances(run_precision)
        judgement = _compare(ask, answer.outputs, allowances, run_precision)
        if judgement.passed:
            result = Result(ask, "pass", None, judgement.allowance_used, judgement.worst)
        else:
            wrong = Wrong(ask, answer.outputs, allowances, answer)
            mistakes = self.recognition.explaining(self.mistakes, wrong)
            result = Result(ask, "fail", judgement.reason, judgement.allowance_used, judgement.worst, wrong=wrong)
            result = self._with_names(result, mistakes)
        result = self._completed(result, answer, allowances)
        if result.outcome == "pass" and "generic" in ask.case.tags:
            return replace(result, note=_note(ask, answer, case_bounds.deviations(run_precision)))
        return result

    def _precision(self, ask: Ask) -> Precision:
        return precision(ask.dtype, self.claims.profile, self.claims.shards)

    def explained(self, result: Result, mistakes: Sequence[Mistake]) -> Result:
        """Give a result of wrong values the names of the mistakes that explain it."""
        wrong = result.wrong
        if wrong is None or wrong.answer is None:
            return result
        return self._completed(self._with_names(result, mistakes), wrong.answer, wrong.allowances, mistakes)

    def _with_names(self, result: Result, mistakes: Sequence[Mistake]) -> Result:
        """Make a result a deviation if a convention is among the mistakes that explain it."""
        ordered = sorted(mistakes, key=lambda mistake: mistake.convention is None)
        conventions = [mistake.convention for mistake in ordered if mistake.convention is not None]
        result = replace(result, diagnosis=tuple(mistake.name for mistake in ordered))
        if not conventions:
            return result
        accepted = [convention for convention in conventions if convention in self.accepted]
        convention = (accepted or conventions)[0]
        return replace(result, outcome="deviation", reason=str(convention), conventions=(convention,))

    def _completed(
        self,
        result: Result,
        answer: Answer,
        allowances: Mapping[str, numpy.ndarray],
        mistakes: Sequence[Mistake] = (),
    ) -> Result:
        """Judge the further calls and the dtype of a result that is right or follows a convention."""
        if result.outcome == "fail":
            return result
        for fault, clause in self._further_faults(result, answer, allowances, mistakes):
            return _failed(result, fault, clause)
        if (name := wrong_dtype(result.ask, answer.outputs)) is not None:
            return _with_dtype(result, name, answer.outputs)
        return result

    def _further_faults(
        self,
        result: Result,
        answer: Answer,
        allowances: Mapping[str, numpy.ndarray],
        mistakes: Sequence[Mistake],
    ) -> Iterator[tuple[str, str]]:
        """Return the faults of the calls, each with its clause: side effects, then wrong answers to further calls."""
        run_precision = self._precision(result.ask)
        for name, written in (("plain", answer.written), *((n, f.written) for n, f in answer.further.items())):
            if written:
                inputs = "" if name in ("plain", AGAIN) else f" in a call with {_shown(name)} inputs"
                yield f"the call wrote to its input {', '.join(written)}{inputs}", "MHA-PURE-1"
        if answer.overwritten:
            yield f"a later call overwrote its result {', '.join(answer.overwritten)}", "MHA-PURE-4"
        for name, further in answer.further.items():
            reason = further.reason
            if further.kind == "returned" and (reason := form_fault(result.ask, further.outputs)) is None:
                judgement = _compare(result.ask, further.outputs, allowances, run_precision)
                reason = self._unlike(result, further.outputs, judgement, allowances, mistakes)
            if reason is not None and (further.kind != "unsupported" or name == AGAIN):
                yield _otherwise(result, name, reason), "MHA-PURE-3" if name == AGAIN else "MHA-PURE-2"

    def _unlike(
        self,
        result: Result,
        outputs: Mapping[str, numpy.ndarray],
        judgement: Judgement,
        allowances: Mapping[str, numpy.ndarray],
        mistakes: Sequence[Mistake],
    ) -> str | None:
        """Return the reason why the outputs of a further call are not judged like those of the first call.

        The errors of a lower precision differ from call to call, so they may exceed the allowance in a single call.
        """
        conventions = result.conventions[:1] or [pair for pair in self.accepted if "precision" in pair]
        if judgement.passed:
            follows = result.outcome == "pass" or "precision" in result.conventions[0]
            return None if follows else "it follows the specification"
        named = [mistake for mistake in (*mistakes, *MISTAKES) if mistake.convention in conventions]
        same = self.recognition.explaining(named, Wrong(result.ask, outputs, allowances))
        return None if same else judgement.reason

    def accepts(self, result: Result) -> bool:
        """Tell whether a result is right, or follows accepted conventions."""
        return result.outcome == "pass" or (
            result.outcome == "deviation" and self.accepted.issuperset(result.conventions)
        )


def _deterministic(answer: Answer) -> bool | None:
    """Tell whether the same call gave the same bits again; None if it was not made, or returned nothing."""
    again = answer.further.get(AGAIN)
    if again is None or again.kind != "returned":
        return None
    pairs = [(array, again.outputs[name]) for name, array in answer.outputs.items()]
    return all(a.shape == b.shape and a.nbytes <= MOST_BYTES and same_bits(a, b) for a, b in pairs)


def _shown(layout: str) -> str:
    return layout.replace("_", "-")


def _otherwise(result: Result, name: str, reason: str) -> str:
    """Describe a wrong answer to a further call."""
    first = "right" if result.outcome == "pass" else str(result.conventions[0])
    if name == AGAIN:
        return f"the first call is {first}, but the same call again is wrong: {reason}"
    return f"the result is {first} for plain inputs, but wrong for {_shown(name)} inputs: {reason}"


def _failed(result: Result, fault: str, clause: str) -> Result:
    """Return a failure that no convention explains, so that no accepted convention excuses it."""
    return replace(result, outcome="fail", reason=fault, clauses=(clause,), diagnosis=(), conventions=(), wrong=None)


def _with_dtype(result: Result, name: str, outputs: Mapping[str, numpy.ndarray]) -> Result:
    """Add the convention of another output dtype; if the values are right, the clause is that of the dtype."""
    fault = dtype_fault(result.ask, name, outputs)
    return replace(
        result,
        outcome="deviation",
        reason=fault if result.reason is None else f"{result.reason}; {fault}",
        clauses=(dtype_clause(name),) if result.outcome == "pass" else result.clauses,
        conventions=(*result.conventions, Convention("output_dtype", dtype_name(outputs[name]))),
    )


def _refusal(ask: Ask, answer: Answer) -> Result:
    """Judge a call that must raise an error of mha-spec that has the right kind and names the argument."""
    required = ask.case.error or {}
    kind, argument = {"type": "TypeError", "value": "ValueError"}[required["kind"]], required["argument"]
    expected = f"a MhaSpecError that is a {kind} and names `{argument}`"
    if answer.raised is None:
        return Result(ask, "fail", f"expected {expected}, but the call returned")
    if not {"MhaSpecError", kind} <= set(answer.raised.classes) or argument not in answer.raised.message:
        return Result(ask, "fail", f"expected {expected}, received {answer.raised}")
    return Result(ask, "pass")


def _compare(
    ask: Ask, outputs: Mapping[str, numpy.ndarray], allowances: Mapping[str, numpy.ndarray], run_precision: Precision
) -> Judgement:
    return judge(ask.case, ask.expected, outputs, allowances, run_precision)


def _note(ask: Ask, answer: Answer, deviations: Mapping[str, numpy.ndarray]) -> str | None:
    """Describe the errors of a generic case that are too large for independent roundings (MHA-ACC-2)."""
    notes = ((name, statistics.note) for name, statistics in gate_b(ask.expected, answer.outputs, deviations).items())
    return next((f"`{name}`: {note}" for name, note in notes if note is not None), None)
