"""What an answer is worth: one outcome for each case and dtype, with the reason in words that a person can act on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mha_spec.arrays import dtype_name
from mha_spec_conformance.suite.conventions import Convention

from .bounds import bounds, precision
from .compare import gate_b, judge
from .diagnosis import Diagnosis
from .form import dtype_clause, dtype_fault, form, form_clauses, wrong_dtype
from .result import Result

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy

    from mha_spec_conformance.asking.question import Answer
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.targets.claims import Claims

    from .bounds import Precision
    from .compare import Judgement

__all__ = ["Judge"]


class Judge:
    """Judges the answers of one target, and remembers which mistakes have explained its failures."""

    def __init__(self, claims: Claims, accepted: frozenset[Convention] = frozenset()) -> None:
        self.claims = claims
        self.accepted = accepted
        self.diagnosis = Diagnosis()

    def result(self, ask: Ask, answer: Answer) -> Result:
        """Judge one answer."""
        judged = self._result(ask, answer)
        clauses = judged.clauses or tuple(ask.case.clauses)
        return replace(judged, clauses=clauses, seconds=answer.seconds, deterministic=answer.deterministic)

    def _result(self, ask: Ask, answer: Answer) -> Result:
        if answer.came in ("crash", "timeout", "unsupported"):
            return Result(ask, answer.came, answer.reason)
        if ask.case.expect == "error":
            return _refusal(ask, answer)
        if answer.came == "raised":
            return Result(ask, "error", answer.reason)
        if answer.came == "malformed":
            return Result(ask, "fail", answer.reason, malformed=True)
        if (reason := form(ask, answer.outputs)) is not None:
            return Result(ask, "fail", reason, clauses=form_clauses(ask, answer.outputs))
        if self.claims.registered and answer.foreign is not None:
            return Result(
                ask, "fail", f"an output is an array of {answer.foreign}, the inputs are of {self.claims.arrays}"
            )
        return self._values(ask, answer)

    def _values(self, ask: Ask, answer: Answer) -> Result:
        standard = precision(ask.dtype, self.claims.profile)
        case_bounds = bounds(ask.case.function, ask.case.inputs(ask.dtype), ask.case.options)
        allowances = case_bounds.allowances(standard)
        judgement = _compare(ask, answer.outputs, allowances, standard)
        if judgement.passed:
            found = Result(ask, "pass", None, judgement.allowance_used, judgement.worst)
        else:
            found = self._named(ask, answer.outputs, judgement)
        if found.outcome == "fail":
            return found
        if (fault := self._layout_fault(found, answer, allowances, standard)) is not None:
            return _spoiled(found, fault, "MHA-PURE-2")
        if answer.written:
            return _spoiled(found, f"wrote to its input {', '.join(answer.written)}", "MHA-PURE-1")
        if (name := wrong_dtype(ask, answer.outputs)) is not None:
            return _of_other_dtype(found, name, answer.outputs)
        if found.outcome == "pass" and "generic" in ask.case.tags:
            return replace(found, note=_note(ask, answer, case_bounds.deviations(standard)))
        return found

    def _layout_fault(
        self, found: Result, answer: Answer, allowances: Mapping[str, numpy.ndarray], standard: Precision
    ) -> str | None:
        """What goes wrong where the inputs lie otherwise in memory."""
        for layout, outputs in answer.layouts.items():
            reason = outputs if isinstance(outputs, str) else form(found.ask, outputs)
            if reason is None and not isinstance(outputs, str):
                reason = self._unlike(found, outputs, _compare(found.ask, outputs, allowances, standard))
            if reason is not None:
                plain = "right" if found.outcome == "pass" else str(found.conventions[0])
                return f"{plain} for plain inputs, wrong for {layout.replace('_', '-')} ones: {reason}"
        return None

    def _unlike(self, found: Result, outputs: Mapping[str, numpy.ndarray], judgement: Judgement) -> str | None:
        """What is wrong with outputs that must be right as those for plain inputs are, or of the same convention."""
        if found.outcome == "pass" or judgement.passed:
            return judgement.reason if found.outcome == "pass" else "they follow the specification"
        ask = found.ask
        mistakes = self.diagnosis.explain(ask.case, ask.dtype, outputs, ask.outputs, self.claims.profile)
        same = found.conventions[0] in [mistake.convention for mistake in mistakes]
        return None if same else judgement.reason

    def _named(self, ask: Ask, outputs: Mapping[str, numpy.ndarray], judgement: Judgement) -> Result:
        """A wrong result: a deviation where it is another convention, else a failure with the mistakes it matches."""
        mistakes = self.diagnosis.explain(ask.case, ask.dtype, outputs, ask.outputs, self.claims.profile)
        found = Result(
            ask, "fail", judgement.reason, judgement.allowance_used, judgement.worst, tuple(m.name for m in mistakes)
        )
        conventions = [mistake.convention for mistake in mistakes if mistake.convention is not None]
        if not conventions:
            return found
        accepted = [convention for convention in conventions if convention in self.accepted]
        convention = (accepted or conventions)[0]
        return replace(found, outcome="deviation", reason=str(convention), conventions=(convention,))


def _spoiled(found: Result, fault: str, clause: str) -> Result:
    """A fault that no convention explains, and that none therefore excuses."""
    return replace(found, outcome="fail", reason=fault, clauses=(clause,), diagnosis=(), conventions=())


def _of_other_dtype(found: Result, name: str, outputs: Mapping[str, numpy.ndarray]) -> Result:
    """The same with one convention more; right values of another dtype break a clause of their own."""
    fault = dtype_fault(found.ask, name, outputs)
    return replace(
        found,
        outcome="deviation",
        reason=fault if found.reason is None else f"{found.reason}; {fault}",
        clauses=(dtype_clause(name),) if found.outcome == "pass" else (),
        conventions=(*found.conventions, Convention("output_dtype", dtype_name(outputs[name]))),
    )


def _refusal(ask: Ask, answer: Answer) -> Result:
    """A call that must be refused: by an error of ours, of the right kind, that names the argument."""
    wanted = ask.case.error or {}
    kind, argument = {"type": "TypeError", "value": "ValueError"}[wanted["kind"]], wanted["argument"]
    expected = f"a MhaSpecError that is a {kind} and names `{argument}`"
    if answer.raised is None:
        return Result(ask, "fail", f"expected {expected}, but the call was answered")
    if not {"MhaSpecError", kind} <= set(answer.raised.classes) or argument not in answer.raised.message:
        return Result(ask, "fail", f"expected {expected}, received {answer.raised}")
    return Result(ask, "pass")


def _compare(
    ask: Ask, outputs: Mapping[str, numpy.ndarray], allowances: Mapping[str, numpy.ndarray], standard: Precision
) -> Judgement:
    expected = {name: ask.case.expected[name] for name in ask.outputs}
    return judge(ask.case, expected, outputs, allowances, standard)


def _note(ask: Ask, answer: Answer, deviations: Mapping[str, numpy.ndarray]) -> str | None:
    """What is remarkable about the errors of a generic case, all of them within their allowance (MHA-ACC-2)."""
    expected = {name: ask.case.expected[name] for name in ask.outputs}
    notes = ((name, statistics.note) for name, statistics in gate_b(expected, answer.outputs, deviations).items())
    return next((f"`{name}`: {note}" for name, note in notes if note is not None), None)
