"""Find the known mistakes that explain a wrong result.

A mistake is named if the result equals that of the mistaken reference, within the allowance of the mistaken reference,
and if the case distinguishes the mistaken reference from the specification. If several mistakes are named, the case
does not distinguish them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.mistakes import MISTAKES, Compared, Mistake

from .bounds import precision, unit_roundoff
from .compare import ANY, EXACT, FINITE, NAN, NON_FINITE, golden_rows, judge
from .prediction import Predictions, can_show

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mha_spec_conformance.suite.cases import Case, Expected

    from .compare import Judgement
    from .result import Result

__all__ = ["Diagnosis", "summarise"]

CLEARLY_OTHER = 0.25
"""A result that differs by this share of its largest number is not compared further."""

PATIENCE = 50
"""After this number of unexplained failures, only mistakes that have explained a failure are tried."""

SIMILAR = 4.0
"""Errors of two precisions are of similar size if they differ by at most this factor."""


class Diagnosis:
    """Explains the failures of a target; mistakes that explained an earlier failure are tried first."""

    def __init__(self, mistakes: Sequence[Mistake] = MISTAKES) -> None:
        """Search among these mistakes."""
        self.mistakes = mistakes
        self.suspects: set[str] = set()
        self.unexplained = 0
        self._last: Predictions | None = None

    def explain(
        self,
        case: Case,
        dtype: str,
        outputs: Mapping[str, numpy.ndarray],
        compared: Sequence[str],
        profile: str = "standard",
    ) -> list[Mistake]:
        """Give the known mistakes that have these results, conventions first.

        Args:
            case: The case that failed.
            dtype: The dtype of the run.
            outputs: The results of the target, by output name.
            compared: The names of the outputs that are compared.
            profile: The profile of precision that the target declares.
        """
        if self._last is None or self._last.case is not case:
            self._last = Predictions(case)
        comparison = _Comparison(self._last, dtype, outputs, compared, profile)
        relevant = [mistake for mistake in self.mistakes if can_show(mistake, case)]
        suspected = [mistake for mistake in relevant if mistake.name in self.suspects]
        others = [mistake for mistake in relevant if mistake.name not in self.suspects]
        mistakes = comparison.explaining(suspected)
        if not mistakes and self.unexplained < PATIENCE:
            mistakes = comparison.explaining(others)
        self.unexplained += not mistakes
        self.suspects.update(mistake.name for mistake in mistakes)
        return sorted(mistakes, key=lambda mistake: mistake.convention is None)


class _Comparison:
    """Compares a wrong result with the expected values and with the results of mistakes."""

    def __init__(
        self,
        predictions: Predictions,
        dtype: str,
        outputs: Mapping[str, numpy.ndarray],
        compared: Sequence[str],
        profile: str,
    ) -> None:
        self.predictions = predictions
        self.case = predictions.case
        self.dtype = dtype
        self.outputs = outputs
        self.golden = {name: self.case.expected[name] for name in compared}
        self.standard = precision(dtype, profile)
        self.allowed = predictions.allowances(None, dtype, self.standard) or {}

    def explaining(self, mistakes: Sequence[Mistake]) -> list[Mistake]:
        """Give the mistakes that explain the result; mistakes of precision only if no other mistake does."""
        by_value = [mistake for mistake in mistakes if mistake.compared is not Compared.BY_SIZE_OF_ERRORS]
        by_errors = [mistake for mistake in mistakes if mistake.compared is Compared.BY_SIZE_OF_ERRORS]
        return [mistake for mistake in by_value if self.explains(mistake)] or self.precisions(by_errors)

    def explains(self, mistake: Mistake) -> bool:
        """Tell whether the mistake gives this result, and the specification gives another."""
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
            name: self._allowed(name, array, 2 if mistake.native else 1)
            for name, array in allowed.items()
            if name in self.golden
        }
        if mistake.compared is Compared.WHERE_NOT_FINITE:
            expected, allowed = self._either(expected, allowed)
        return self._judge(expected, self.outputs, allowed).passed

    def precisions(self, mistakes: Iterable[Mistake]) -> list[Mistake]:
        """Give the mistakes of precision with errors of similar size, if the result has only errors of rounding."""
        coarser = unit_roundoff("bfloat16") / self.standard.u_a
        loose = {name: coarser * array for name, array in self.allowed.items()}
        if not self._judge(self.golden, self.outputs, loose).passed:
            return []
        share = self._judge(self.golden, self.outputs, self.allowed).allowance_used
        return [mistake for mistake in mistakes if 1 / SIMILAR <= share / self._share_of(mistake) <= SIMILAR]

    def _share_of(self, mistake: Mistake) -> float:
        mistaken = self.predictions.outputs(mistake, self.dtype)
        share = 0.0 if mistaken is None else self._judge(self.golden, mistaken, self.allowed).allowance_used
        return share if share > 1 else numpy.inf

    def _alike(self, mistaken: Mapping[str, numpy.ndarray]) -> bool:
        """Compare the shapes and the large differences with the result, which is fast."""
        for name in self.golden:
            if name not in mistaken or mistaken[name].shape != self.outputs[name].shape:
                return False
            a, b = mistaken[name].astype(numpy.float64), self.outputs[name].astype(numpy.float64)
            finite = numpy.isfinite(a) & numpy.isfinite(b)
            a, b = a[finite], b[finite]
            if a.size and not abs(a - b).max() <= CLEARLY_OTHER * max(abs(a).max(), abs(b).max()):
                return False
        return True

    def _allowed(self, name: str, allowed: numpy.ndarray, errors: int) -> numpy.ndarray:
        """Give the allowance of the mistake; if it is not finite, that of the specification, or else the largest."""
        finite = [array[numpy.isfinite(array)].max(initial=0.0) for array in (allowed, self.allowed[name])]
        substitute = numpy.where(numpy.isfinite(self.allowed[name]), self.allowed[name], max(finite))
        return errors * numpy.where(numpy.isfinite(allowed), allowed, substitute)

    def _judge(
        self,
        expected: Mapping[str, Expected],
        outputs: Mapping[str, numpy.ndarray],
        allowed: Mapping[str, numpy.ndarray],
    ) -> Judgement:
        return judge(self.case, expected, outputs, allowed, self.standard)

    def _expected(self, golden: Expected, mistaken: numpy.ndarray, mistake: Mistake) -> Expected:
        """Give the results of a mistake as expected values, at the elements that the golden compares."""
        values = golden_rows(mistaken.astype(numpy.float64), golden)
        kinds = numpy.where(numpy.isnan(values), NAN, numpy.where(numpy.isinf(values), EXACT, FINITE))
        golden_kinds = _kinds(golden, values.shape)
        unspecified = (golden_kinds == ANY) | ((golden_kinds == NON_FINITE) & (kinds != FINITE))
        kinds = numpy.where(unspecified, golden_kinds, kinds)
        if mistake.compared is Compared.WITHOUT_EMPTY_LSE:
            kinds = numpy.where(golden.values.reshape(values.shape) == -numpy.inf, ANY, kinds)
        return replace(golden, values=values, kinds=kinds.astype(numpy.uint8))

    def _either(
        self, expected: Mapping[str, Expected], allowed: Mapping[str, numpy.ndarray]
    ) -> tuple[dict[str, Expected], dict[str, numpy.ndarray]]:
        """Expect the golden at right elements, because the reach of a NaN depends on the size of tiles."""
        merged, allowances = dict(expected), dict(allowed)
        for name, golden in self.golden.items():
            got = golden_rows(self.outputs[name], golden)
            true = golden.values.reshape(got.shape)
            right = (
                (numpy.isfinite(got) & numpy.isfinite(true)) | (got == true) | (numpy.isnan(got) & numpy.isnan(true))
            )
            values = numpy.where(right, true, expected[name].values)
            kinds = numpy.where(right, _kinds(golden, got.shape), _kinds(expected[name], got.shape))
            merged[name] = replace(golden, values=values, kinds=kinds)
            allowances[name] = numpy.fmax(allowed[name], self.allowed[name])
        return merged, allowances


def _kinds(expected: Expected, shape: tuple[int, ...]) -> numpy.ndarray:
    """Give the kind of each element of an output; without kinds every element is finite."""
    return numpy.full(shape, FINITE, numpy.uint8) if expected.kinds is None else expected.kinds.reshape(shape)


def summarise(results: Iterable[Result]) -> list[dict[str, object]]:
    """Choose few mistakes that together explain all explained results, in order of the number that each explains.

    Each entry is `{"variant", "explains", "clauses"}`; `explains` counts the results that no earlier mistake explained.
    """
    by_name = {mistake.name: mistake for mistake in MISTAKES}
    variants = list(dict.fromkeys(mistake.variant for mistake in MISTAKES))
    left = [{by_name[name].variant for name in result.diagnosis} for result in results if result.diagnosis]
    summary: list[dict[str, object]] = []
    while left:
        counts = Counter(variant for explaining in left for variant in explaining)
        variant = min(counts, key=lambda name: (-counts[name], variants.index(name)))
        clauses = [clause for mistake in MISTAKES if mistake.variant == variant for clause in mistake.clauses]
        summary.append({"variant": variant, "explains": counts[variant], "clauses": list(dict.fromkeys(clauses))})
        left = [explaining for explaining in left if variant not in explaining]
    return summary
