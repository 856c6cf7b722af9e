"""What an answer is worth: one outcome for each case and dtype, with the reason in words that a person can act on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mha_spec.arrays import dtype_name, softmax_dtype_name

from .accuracy import bounds, precision
from .compare import gate_b, judge
from .diagnosis import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy

    from .accuracy import Precision
    from .asking import Ask
    from .compare import Judgement, Worst
    from .question import Answer, Claims, Question

__all__ = ["FAILING", "OUTCOMES", "Judge", "Result", "form"]

OUTCOMES = ("pass", "fail", "deviation", "error", "crash", "timeout", "unsupported")
FAILING = frozenset({"fail", "deviation", "error", "crash", "timeout"})
"""The outcomes that make a target not conformant, unless they are accepted or known."""

INTEGERS = ("int32", "int64", "int16", "int8", "uint32", "uint64", "uint16", "uint8")
"""What the lengths of a cache may be."""


@dataclass(frozen=True)
class Result:
    """The outcome of one case in one dtype."""

    ask: Ask
    outcome: str
    reason: str | None = None
    allowance_used: float | None = None
    worst: Worst | None = None
    diagnosis: tuple[str, ...] = ()
    conventions: tuple[tuple[str, str], ...] = ()
    deterministic: bool | None = None
    clauses: tuple[str, ...] = ()
    seconds: float = 0.0
    note: str | None = None
    malformed: bool = False

    @property
    def compared(self) -> bool:
        """Whether there were arrays that a clause could be held against."""
        return not self.malformed and self.outcome not in ("error", "crash", "timeout", "unsupported")

    @property
    def must(self) -> bool:
        """Whether it counts for the exit status."""
        return self.ask.case.level == "MUST"


class Judge:
    """Judges the answers of one target; it remembers which mistakes explained its failures before."""

    def __init__(self, claims: Claims, accepted: frozenset[tuple[str, str]] = frozenset()) -> None:
        self.claims = claims
        self.accepted = accepted
        self.diagnosis = Diagnosis()

    def result(self, ask: Ask, question: Question, answer: Answer) -> Result:
        """Judge one answer."""
        judged = self._result(ask, question, answer)
        clauses = judged.clauses or tuple(ask.case.clauses)
        return replace(judged, clauses=clauses, seconds=answer.seconds, deterministic=answer.deterministic)

    def _result(self, ask: Ask, question: Question, answer: Answer) -> Result:
        if answer.came in ("crash", "timeout", "unsupported"):
            return Result(ask, answer.came, answer.reason)
        if ask.case.expect == "error":
            return _refusal(ask, answer)
        if answer.came == "raised":
            return Result(ask, "error", answer.reason)
        if answer.came == "malformed":
            return Result(ask, "fail", answer.reason, malformed=True)
        if (reason := form(ask, answer.outputs)) is not None:
            return Result(ask, "fail", reason, clauses=_form_clauses(ask, answer.outputs))
        if self.claims.registered and answer.foreign is not None:
            return Result(
                ask, "fail", f"an output is an array of {answer.foreign}, the inputs are of {self.claims.arrays}"
            )
        return self._values(ask, question, answer)

    def _values(self, ask: Ask, question: Question, answer: Answer) -> Result:
        standard = precision(ask.dtype, self.claims.profile)
        arrays = ask.case.inputs(ask.dtype) if ask.omitted else question.arrays
        case_bounds = bounds(ask.case.function, arrays, ask.case.options)
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
        if (name := _wrong_dtype(ask, answer.outputs)) is not None:
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
                plain = "right" if found.outcome == "pass" else "=".join(found.conventions[0])
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
        convention = next((one for one in conventions if one in self.accepted), conventions[0])
        return replace(found, outcome="deviation", reason="=".join(convention), conventions=(convention,))


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
        conventions=(*found.conventions, ("output_dtype", dtype_name(outputs[name]))),
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


def form(ask: Ask, outputs: Mapping[str, numpy.ndarray]) -> str | None:
    """What is wrong with the shape of an output, or with a dtype that no convention names; None where nothing is."""
    for name in ask.outputs:
        shape, wanted = tuple(outputs[name].shape), tuple(ask.case.expected[name].shape)
        if shape != wanted:
            return f"`{name}` must have shape={wanted}, received shape={shape}"
        if dtype_name(outputs[name]) not in (*expected_dtypes(ask, name), "float32", "float64"):
            return dtype_fault(ask, name, outputs)
    return None


def _form_clauses(ask: Ask, outputs: Mapping[str, numpy.ndarray]) -> tuple[str, ...]:
    """The clause that a wrong form breaks: that of shapes, else that of the first dtype that is wrong."""
    if any(outputs[name].shape != tuple(ask.case.expected[name].shape) for name in ask.outputs):
        return ("MHA-SHAPE-1",)
    name = _wrong_dtype(ask, outputs)
    return () if name is None else (dtype_clause(name),)


def dtype_fault(ask: Ask, name: str, outputs: Mapping[str, numpy.ndarray]) -> str:
    """What is wrong with the dtype of an output."""
    return f"`{name}` must have dtype={expected_dtypes(ask, name)[0]}, received {dtype_name(outputs[name])}"


def dtype_clause(name: str) -> str:
    """The clause that gives the dtype of an output."""
    return "MHA-LSE-2" if name == "lse" else "MHA-DTYPE-2" if name.startswith("grad_") else "MHA-DTYPE-1"


def expected_dtypes(ask: Ask, name: str) -> tuple[str, ...]:
    """The dtypes that an output may have: an lse and the bias of ALiBi have the softmax's, a gradient its operand's.

    The lengths of a cache are integers of any width; everything else has the dtype of the run.
    """
    if name in ("lse", "bias"):
        return (softmax_dtype_name(ask.dtype),)
    if name == "cache_lengths":
        return INTEGERS
    operand = name.removeprefix("grad_")
    if operand in ("bias", "sinks"):
        return (dtype_name(ask.case.inputs(ask.dtype)[operand]),)
    return (ask.dtype,)


def _wrong_dtype(ask: Ask, outputs: Mapping[str, numpy.ndarray]) -> str | None:
    """The first output whose dtype is not what it must be."""
    return next((name for name in ask.outputs if dtype_name(outputs[name]) not in expected_dtypes(ask, name)), None)
