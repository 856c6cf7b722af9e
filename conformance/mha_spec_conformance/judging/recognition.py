"""Recognise a known mistake in a wrong result, and tell in which questions a mistake shows.

A mistake explains a result if the result equals that of the mistaken reference, within the allowance of the mistaken
reference, and if the case distinguishes the mistaken reference from the specification.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy

from mha_spec.arrays import FLOATING, dtype_name
from mha_spec_conformance.mistakes import Compared, Mistake

from .axes import axes_of
from .bounds import precision, unit_roundoff
from .compare import ANY, EXACT, FINITE, NAN, NON_FINITE, golden_rows, judge, kinds_of_values
from .form import form_fault
from .prediction import Predictions, can_show

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mha_spec_conformance.asking.question import Answer
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.cases import Case, Expected
    from mha_spec_conformance.suite.conventions import Convention
    from mha_spec_conformance.targets.claims import Shards

    from .bounds import Precision
    from .compare import Judgement

    Outputs = Mapping[str, numpy.ndarray]

__all__ = ["Recognition", "Wrong"]

CLEARLY_OTHER = 0.25
"""A result that differs by this share of its largest number is not compared further."""

SAME = 1e-12
"""A prediction in float64 that differs by this share of the largest number is that of the specification."""

CLEARLY_WRONG = 4.0
"""The share of the allowance from which a predicted error must show in every right implementation of the mistake."""

SIMILAR = 4.0
"""Errors of two precisions are of similar size if they differ by at most this factor."""

ROUNDINGS = 16
"""The roundings that are allowed to the result of a mistake for which no element has an allowance."""

ALLOWED_OF_ACCEPTED = 32.0
"""The errors that an accepted precision explains, in those of the mistake, which rounds to nearest: an implementation
that truncates errs in a constant direction, so that the errors of a long sum do not cancel."""

KEPT = 128
"""The number of cases whose predictions are kept."""


@dataclass(frozen=True, eq=False)
class Wrong:
    """A wrong answer: the question, the outputs, and the allowances of the specification."""

    ask: Ask
    outputs: Outputs
    allowances: Outputs
    answer: Answer | None = None
    """The whole answer, with those to further calls."""
    verdicts: dict[str, bool] = field(default_factory=dict[str, bool], repr=False)
    """The mistakes that were compared with the answer, and whether they explain it."""

    @cached_property
    def of_finite_operands(self) -> bool:
        """True if every operand is finite; a bias may hide pairs by -inf."""
        return _are_finite(self.ask.case.inputs(self.ask.dtype))

    @cached_property
    def loses_finite(self) -> bool:
        """True if an element is not finite that must be."""
        return any(_loses_finite(golden, self.outputs[name]) for name, golden in self.ask.expected.items())

    @property
    def spreads(self) -> bool:
        """True if a number that is not finite spreads from an operand to an element that must be finite."""
        return not self.of_finite_operands and self.loses_finite

    @cached_property
    def only_spreads(self) -> bool:
        """True if, moreover, every finite element is right."""
        expected = self.ask.expected.items()
        return self.spreads and not any(
            _errs(golden, self.outputs[name], self.allowances[name]) for name, golden in expected
        )


class Recognition:
    """Compares wrong answers with the predictions of mistakes, and keeps what it computed."""

    def __init__(
        self,
        profile: str = "standard",
        accepted: frozenset[Convention] = frozenset(),
        shards: Shards | None = None,
    ) -> None:
        """Judge by what a target declares; an accepted precision explains all errors that it allows."""
        self.profile, self.shards = profile, shards
        self.accepted = accepted
        self._predictions: OrderedDict[str, Predictions] = OrderedDict()
        self._shown: dict[tuple[str, str, str, tuple[str, ...]], bool] = {}

    def explaining(self, mistakes: Iterable[Mistake], wrong: Wrong) -> list[Mistake]:
        """Return the mistakes that explain an answer; those of precision if no other explains more than rounding."""
        relevant = [mistake for mistake in mistakes if can_show(mistake, wrong.ask.case, wrong.ask.dtype)]
        by_errors = [mistake for mistake in relevant if mistake.compared is Compared.BY_SIZE_OF_ERRORS]
        by_value = [mistake for mistake in relevant if mistake.compared is not Compared.BY_SIZE_OF_ERRORS]
        explaining = [mistake for mistake in by_value if self.explains(mistake, wrong)]
        if all(self.rounds(mistake, wrong) for mistake in explaining):
            explaining += [mistake for mistake in by_errors if self.explains(mistake, wrong)]
        return explaining

    def explains(self, mistake: Mistake, wrong: Wrong) -> bool:
        """Tell whether the mistake gives this answer, and the specification gives another."""
        if mistake.name not in wrong.verdicts:
            able = can_show(mistake, wrong.ask.case, wrong.ask.dtype)
            wrong.verdicts[mistake.name] = able and self._comparison(wrong).explains(mistake)
        return wrong.verdicts[mistake.name]

    def fits(self, mistake: Mistake, wrong: Wrong) -> bool:
        """Tell whether the answer may be that of the mistake: it has its values, or no larger errors of rounding.

        Errors of rounding depend on the order of the sums. Those of the mistake may be small by chance where those of
        the answer are not.
        """
        by_errors = mistake.compared is Compared.BY_SIZE_OF_ERRORS
        able = by_errors and can_show(mistake, wrong.ask.case, wrong.ask.dtype)
        return self.explains(mistake, wrong) or (able and self._comparison(wrong).errs_alike(mistake, least=1.0))

    def rounds(self, mistake: Mistake, wrong: Wrong) -> bool:
        """Tell whether both the answer and the result of the mistake differ from the specification by rounding only."""
        able = mistake.native and can_show(mistake, wrong.ask.case, wrong.ask.dtype)
        return able and self._comparison(wrong).both_round(mistake)

    def shows(self, mistake: Mistake, ask: Ask) -> bool:
        """Tell whether an attention with the mistake clearly fails the question."""
        key = mistake.name, *ask.key, ask.outputs
        if key not in self._shown:
            self._shown[key] = can_show(mistake, ask.case, ask.dtype) and self._shows(mistake, ask)
        return self._shown[key]

    def gives_fault(self, mistake: Mistake, ask: Ask, fault: str | None) -> bool:
        """Tell whether the results of the mistake have this fault of form, in the same words; None: it raises."""
        if not can_show(mistake, ask.case, ask.dtype):
            return False
        mistaken = self._of(ask.case).outputs(mistake, ask.dtype)
        if mistaken is None or fault is None:
            return mistaken is None and fault is None
        return set(ask.outputs) <= set(mistaken) and form_fault(ask, mistaken) == fault

    def _shows(self, mistake: Mistake, ask: Ask) -> bool:
        predictions = self._of(ask.case)
        mistaken = predictions.outputs(mistake, ask.dtype)
        if mistaken is None or any(name not in mistaken for name in ask.outputs):
            return False
        golden = ask.expected
        if mistake.compared is Compared.WITHOUT_EMPTY_LSE:
            mistaken = {name: _with_empty_lse(golden[name], mistaken[name]) for name in golden}
        if all(_distance(golden[name], mistaken[name]) < SAME for name in golden):
            return False
        if any(_distance(golden[name], mistaken[name]) > CLEARLY_OTHER for name in golden):
            return True
        return self._used(ask, mistaken) > CLEARLY_WRONG

    def share(self, mistake: Mistake, ask: Ask) -> float | None:
        """Return the largest share of its allowance that a result of the mistake uses; None if it gives no result."""
        mistaken = self._of(ask.case).outputs(mistake, ask.dtype)
        return None if mistaken is None else self._used(ask, mistaken)

    def _used(self, ask: Ask, outputs: Outputs) -> float:
        run = self._precision(ask)
        allowed = self._of(ask.case).allowances(None, ask.dtype, run) or {}
        return judge(ask.case, ask.expected, outputs, allowed, run).allowance_used

    def _comparison(self, wrong: Wrong) -> _Comparison:
        return _Comparison(self._of(wrong.ask.case), wrong, self._precision(wrong.ask), self.accepted)

    def _precision(self, ask: Ask) -> Precision:
        return precision(ask.dtype, self.profile, self.shards)

    def _of(self, case: Case) -> Predictions:
        """Return the predictions on a case; those of the cases that were used least recently are dropped."""
        predictions = self._predictions.pop(case.id, None)
        if predictions is None or predictions.case is not case:
            predictions = Predictions(case)
        self._predictions[case.id] = predictions
        if len(self._predictions) > KEPT:
            self._predictions.popitem(last=False)
        return predictions


def _are_finite(inputs: Mapping[str, numpy.ndarray]) -> bool:
    """Tell whether every operand is finite."""
    operands = (x for name, x in inputs.items() if name != "bias" and dtype_name(x) in FLOATING)
    return all(numpy.isfinite(array.astype(numpy.float64)).all() for array in operands)


def _loses_finite(golden: Expected, output: numpy.ndarray) -> bool:
    """Tell whether an element is not finite that must be."""
    got = golden_rows(output.astype(numpy.float64), golden).ravel()
    return bool((_must_be_finite(golden) & ~numpy.isfinite(got)).any())


def _errs(golden: Expected, output: numpy.ndarray, allowance: numpy.ndarray) -> bool:
    """Tell whether a finite element exceeds its allowance."""
    got, allowed = (golden_rows(array.astype(numpy.float64), golden).ravel() for array in (output, allowance))
    compared = _must_be_finite(golden) & numpy.isfinite(got)
    return bool((abs(got - golden.values.ravel())[compared] > allowed[compared]).any())


def _must_be_finite(golden: Expected) -> numpy.ndarray:
    """Tell which elements of the golden must be finite, as an array with one axis."""
    finite = numpy.isfinite(golden.values).ravel()
    return finite if golden.kinds is None else finite & numpy.isin(golden.kinds.ravel(), (FINITE, EXACT))


def _distance(golden: Expected, mistaken: numpy.ndarray) -> float:
    """Return the largest difference as a share of the largest number; infinite where just a single number is finite."""
    if mistaken.shape != tuple(golden.shape):
        return numpy.inf
    got, values = golden_rows(mistaken.astype(numpy.float64), golden).ravel(), golden.values.ravel()
    if golden.kinds is not None:
        kinds = golden.kinds.ravel()
        compared = (kinds != ANY) & ~((kinds == NON_FINITE) & ~numpy.isfinite(got))
        got, values = got[compared], values[compared]
    with numpy.errstate(invalid="ignore"):
        differing = (got != values) & ~(numpy.isnan(got) & numpy.isnan(values))
        size = abs(values[numpy.isfinite(values)]).max(initial=0.0)
        distance = abs(got[differing] - values[differing]).max(initial=0.0)
    return float(distance / size) if size and numpy.isfinite(distance) else numpy.inf if differing.any() else 0.0


def _with_empty_lse(golden: Expected, mistaken: numpy.ndarray) -> numpy.ndarray:
    """Return the result of a mistake that keeps an lse of -inf."""
    if mistaken.shape != tuple(golden.shape) or not (golden.values == -numpy.inf).any():
        return mistaken
    kept = (
        mistaken.reshape(-1, 1) if golden.rows is None else mistaken.reshape(-1, golden.values.size // len(golden.rows))
    )
    rows = slice(None) if golden.rows is None else golden.rows
    kept = kept.copy()
    kept[rows] = numpy.where(golden.values.reshape(kept[rows].shape) == -numpy.inf, -numpy.inf, kept[rows])
    return kept.reshape(mistaken.shape)


class _Comparison:
    """Compares a wrong answer with the expected values and with the results of mistakes."""

    def __init__(self, predictions: Predictions, wrong: Wrong, run: Precision, accepted: frozenset[Convention]) -> None:
        self.accepted = accepted
        self.predictions = predictions
        self.case = predictions.case
        self.dtype = wrong.ask.dtype
        self.outputs = wrong.outputs
        self.golden = wrong.ask.expected
        self.standard = run
        self.allowed = wrong.allowances

    def explains(self, mistake: Mistake) -> bool:
        """Tell whether the mistake gives this result, and the specification gives another."""
        if mistake.compared is Compared.BY_SIZE_OF_ERRORS:
            return self.errs_alike(mistake)
        mistaken = self.predictions.outputs(mistake, self.dtype)
        if mistaken is None or not self._alike(mistaken):
            return False
        if self._judge(self.golden, mistaken, self.allowed).passed:
            return False
        allowed = self.predictions.allowances(mistake, self.dtype, self.standard)
        if allowed is None:
            return False
        expected = {name: self._expected(golden, mistaken[name], mistake) for name, golden in self.golden.items()}
        allowed = {
            name: self._allowed(name, array, mistaken[name], 2 if mistake.native else 1)
            for name, array in allowed.items()
            if name in self.golden
        }
        if mistake.compared is Compared.WHERE_NOT_FINITE:
            expected, allowed = self._either(expected, allowed)
        return self._judge(expected, self.outputs, allowed).passed

    def errs_alike(self, mistake: Mistake, least: float = 0.0) -> bool:
        """Tell whether the result has only errors of rounding, about as large as those of the mistake.

        The errors of the mistake must exceed the allowance, of which they count as at least the share `least`.
        """
        mistaken = self.predictions.outputs(mistake, self.dtype)
        if mistaken is None or not self._rounds(self.outputs):
            return False
        share = self._judge(self.golden, mistaken, self.allowed).allowance_used
        received = self._judge(self.golden, self.outputs, self.allowed).allowance_used
        if mistake.convention in self.accepted:
            return received <= ALLOWED_OF_ACCEPTED * share
        return max(share, least) >= 1 and share / SIMILAR <= received <= SIMILAR * max(share, least)

    def both_round(self, mistake: Mistake) -> bool:
        """Tell whether the results of target and mistake have only errors of rounding."""
        mistaken = self.predictions.outputs(mistake, self.dtype)
        return mistaken is not None and self._alike(mistaken) and self._rounds(self.outputs) and self._rounds(mistaken)

    def _rounds(self, outputs: Mapping[str, numpy.ndarray]) -> bool:
        """Tell whether results are those of the specification with roundings to 8 bits, the coarsest of all dtypes."""
        coarser = unit_roundoff("bfloat16") / self.standard.u_a
        loose = {name: coarser * array for name, array in self.allowed.items()}
        return self._judge(self.golden, outputs, loose).passed

    def _alike(self, mistaken: Mapping[str, numpy.ndarray]) -> bool:
        """Compare the shapes and the large differences with the result, which is fast."""
        for name in self.golden:
            if name not in mistaken or mistaken[name].shape != self.outputs[name].shape:
                return False
            a, b = (golden_rows(x, self.golden[name]).astype(float) for x in (mistaken[name], self.outputs[name]))
            finite = numpy.isfinite(a) & numpy.isfinite(b)
            a, b = a[finite], b[finite]
            if a.size and not abs(a - b).max() <= CLEARLY_OTHER * max(abs(a).max(), abs(b).max()):
                return False
        return True

    def _allowed(self, name: str, allowed: numpy.ndarray, mistaken: numpy.ndarray, errors: int) -> numpy.ndarray:
        """Return the allowance of the mistake; if it is not finite, that of the specification, or else the largest.

        The specification allows no error where its result is exact, as in an empty row; the mistake has errors there.
        If every row is empty, there is no allowance, and a few roundings of the largest number are allowed.
        """
        finite = [array[numpy.isfinite(array)].max(initial=0.0) for array in (allowed, self.allowed[name])]
        largest = abs(mistaken[numpy.isfinite(mistaken)].astype(numpy.float64)).max(initial=0.0)
        has_errors = numpy.isfinite(self.allowed[name]) & (self.allowed[name] > 0)
        substitute = numpy.where(has_errors, self.allowed[name], max(finite) or ROUNDINGS * self.standard.u_o * largest)
        return errors * numpy.where(numpy.isfinite(allowed), allowed, substitute)

    def _judge(
        self,
        expected: Mapping[str, Expected],
        outputs: Mapping[str, numpy.ndarray],
        allowed: Mapping[str, numpy.ndarray],
    ) -> Judgement:
        return judge(self.case, expected, outputs, allowed, self.standard)

    def _expected(self, golden: Expected, mistaken: numpy.ndarray, mistake: Mistake) -> Expected:
        """Return the results of a mistake as expected values, at the elements that the golden compares."""
        values = golden_rows(mistaken.astype(numpy.float64), golden)
        kinds = kinds_of_values(values)
        golden_kinds = _kinds(golden, values.shape)
        unspecified = (golden_kinds == ANY) | ((golden_kinds == NON_FINITE) & (kinds != FINITE))
        kinds = numpy.where(unspecified, golden_kinds, kinds)
        if mistake.compared is Compared.ANYTHING_FOR_NAN:
            kinds = numpy.where(kinds == NAN, ANY, kinds)
        if mistake.compared is Compared.WITHOUT_EMPTY_LSE:
            kinds = numpy.where(golden.values.reshape(values.shape) == -numpy.inf, ANY, kinds)
        return replace(golden, values=values, kinds=kinds.astype(numpy.uint8))

    def _either(
        self, expected: Mapping[str, Expected], allowed: Mapping[str, numpy.ndarray]
    ) -> tuple[dict[str, Expected], dict[str, numpy.ndarray]]:
        """Expect the golden at right elements, because the reach of a NaN depends on the size of tiles.

        A NaN that is made in the call is that of a weight, and reaches every component of a row.
        """
        made_in_call = _are_finite(self.case.inputs(self.dtype))
        merged, allowances = dict(expected), dict(allowed)
        for name, golden in self.golden.items():
            got = golden_rows(self.outputs[name], golden)
            true = golden.values.reshape(got.shape)
            right = (
                (numpy.isfinite(got) & numpy.isfinite(true)) | (got == true) | (numpy.isnan(got) & numpy.isnan(true))
            )
            if made_in_call and axes_of(name, len(golden.shape), self.case.function)[-1:] == ("component",):
                right = numpy.broadcast_to(right.all(axis=-1, keepdims=True), right.shape)
            values = numpy.where(right, true, expected[name].values)
            kinds = numpy.where(right, _kinds(golden, got.shape), _kinds(expected[name], got.shape))
            merged[name] = replace(golden, values=values, kinds=kinds)
            allowances[name] = numpy.fmax(allowed[name], self.allowed[name])
        return merged, allowances


def _kinds(expected: Expected, shape: tuple[int, ...]) -> numpy.ndarray:
    """Return the kind of each element of an output; without kinds every element is finite."""
    return numpy.full(shape, FINITE, numpy.uint8) if expected.kinds is None else expected.kinds.reshape(shape)
