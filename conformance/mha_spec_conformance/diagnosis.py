"""Which known mistake a wrong result amounts to.

A mistake is named where the result equals what the mistaken reference gives, within the allowance of that, and where the
case tells the two references apart. Several names mean that the case cannot tell the mistakes from each other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy

from mha_spec.reference import Reference

from .accuracy import SPECIFICATION, bounds, precision
from .cases import Expected
from .compare import ANY, EXACT, FINITE, NAN, NON_FINITE, judge
from .evaluation import as_float64
from .mistakes import MISTAKES, Mistake
from .precision import unit_roundoff
from .question import OPERANDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mha_spec.steps import Steps

    from .accuracy import Bounds, Precision
    from .cases import Case
    from .compare import Judgement

__all__ = ["Diagnosis", "answer", "can_show", "explain", "summarise"]

RESULTS = {
    "attention": ("output", "lse"),
    "attention_weights": ("weights",),
    "attention_vjp": ("grad_query", "grad_key", "grad_value", "grad_bias", "grad_sinks"),
    "merge_attention": ("output", "lse"),
}
"""What each function of the reference gives, in order."""

CLEARLY_OTHER = 0.25
"""Results that differ by this share of the largest number in them need no closer look."""

SIMILAR = 4.0
"""Two precisions are alike whose errors differ by no more than this factor."""


def answer(
    steps: Steps, function: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, object]
) -> dict[str, numpy.ndarray]:
    """What the reference over these steps gives, by output name."""
    operands = [arrays[name] for name in OPERANDS[function]]
    keywords = {name: array for name, array in arrays.items() if name not in OPERANDS[function]}
    asked = {"return_lse": True} if function == "attention" else {}
    given = getattr(Reference(steps), function)(*operands, **keywords, **options, **asked)
    results = given if isinstance(given, tuple) else (given,)
    return {name: array for name, array in zip(RESULTS[function], results, strict=True) if array is not None}


def can_show(mistake: Mistake, case: Case) -> bool:
    """Whether the case asks for what the mistake is about."""
    given = {*case.options, *case.input_names}
    return case.function in mistake.functions and given.issuperset(mistake.needs)


class _Predictions:
    """What every mistake makes of one case; most of it is shared by the dtypes of the case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.options = {name: tuple(value) if isinstance(value, list) else value for name, value in case.options.items()}
        self.outputs: dict[tuple[str, str], dict[str, numpy.ndarray] | None] = {}
        self.bounds: dict[tuple[str, str], Bounds] = {}

    def of(self, mistake: Mistake, dtype: str) -> dict[str, numpy.ndarray] | None:
        """The results of the mistaken reference; None where it raises."""
        key = mistake.name, dtype if mistake.native else "float64"
        if key not in self.outputs:
            self.outputs[key] = self._answer(mistake, key[1])
        return self.outputs[key]

    def _answer(self, mistake: Mistake, dtype: str) -> dict[str, numpy.ndarray] | None:
        arrays = self.case.inputs(dtype if mistake.native else self.case.dtypes[0])
        arrays = arrays if mistake.native else {name: as_float64(array) for name, array in arrays.items()}
        try:
            with numpy.errstate(all="ignore"):
                return answer(mistake.steps, self.case.function, arrays, self.options)
        except (ArithmeticError, IndexError, TypeError, ValueError):
            return None

    def allowances(self, steps: Steps, name: str, dtype: str, standard: Precision) -> dict[str, numpy.ndarray] | None:
        """The allowances of the specification or of a mistake; None where the mistake cannot be evaluated."""
        key = name, dtype
        if key not in self.bounds:
            try:
                self.bounds[key] = bounds(self.case.function, self.case.inputs(dtype), self.options, steps)
            except (ArithmeticError, IndexError, TypeError, ValueError):
                return None
        return self.bounds[key].allowances(standard)


@lru_cache(maxsize=2)
def _predictions(case: _ById) -> _Predictions:
    return _Predictions(case.case)


class _ById:
    """A case that can be a key: cases hold arrays and dicts."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.case is other.case

    def __hash__(self) -> int:
        return hash(self.case.id)


class Diagnosis:
    """The mistakes of one target: those that explained a failure before are tried first on the next."""

    def __init__(self, mistakes: Sequence[Mistake] = MISTAKES) -> None:
        """Know these mistakes, and none as explaining anything yet."""
        self.mistakes = mistakes
        self.suspects: Counter[str] = Counter()

    def explain(
        self, case: Case, dtype: str, outputs: Mapping[str, numpy.ndarray], wanted: Sequence[str], profile: str = "standard"
    ) -> list[Mistake]:
        """The mistakes whose results these are; see `explain`."""
        compared = _Comparison(_predictions(_ById(case)), dtype, outputs, wanted, profile)
        relevant = [mistake for mistake in self.mistakes if can_show(mistake, case)]
        suspected = [mistake for mistake in relevant if mistake.name in self.suspects]
        others = [mistake for mistake in relevant if mistake.name not in self.suspects]
        for group in (suspected, others):
            if found := [mistake for mistake in group if not _of_precision(mistake) and compared.explains(mistake)]:
                break
        else:
            found = compared.precisions([mistake for mistake in relevant if _of_precision(mistake)])
        self.suspects.update(mistake.name for mistake in found)
        return sorted(found, key=lambda mistake: mistake.convention is None)


def _of_precision(mistake: Mistake) -> bool:
    return mistake.convention is not None and mistake.convention[0] == "precision"


class _Comparison:
    """One wrong result beside what was expected and what mistakes give."""

    def __init__(self, predictions: _Predictions, dtype: str, outputs: Mapping[str, numpy.ndarray], wanted: Sequence[str], profile: str) -> None:
        self.predictions = predictions
        self.case = predictions.case
        self.dtype = dtype
        self.outputs = outputs
        self.golden = {name: self.case.expected[name] for name in wanted}
        self.standard = precision(dtype, profile)
        self.allowed = predictions.allowances(SPECIFICATION, "", dtype, self.standard) or {}

    def explains(self, mistake: Mistake) -> bool:
        """Whether the mistake gives this result, and something else than the specification."""
        given = self.predictions.of(mistake, self.dtype)
        if given is None or not self._alike(given):
            return False
        if self._judge(self.golden, given, self.allowed).passed:
            return False
        allowed = self.predictions.allowances(mistake.steps, mistake.name, self.dtype, self.standard)
        if allowed is None:
            return False
        expected = {name: self._expected(golden, given[name], mistake) for name, golden in self.golden.items()}
        allowed = {name: self._allowed(name, array, 2 if mistake.native else 1) for name, array in allowed.items() if name in self.golden}
        if mistake.convention is not None and mistake.convention[0] == "nonfinite":
            expected, allowed = self._either(expected, allowed)
        return self._judge(expected, self.outputs, allowed).passed

    def precisions(self, mistakes: Iterable[Mistake]) -> list[Mistake]:
        """The precisions whose errors are about as large as these, where there is nothing but errors of rounding."""
        coarser = unit_roundoff("bfloat16") / self.standard.u_a
        loose = {name: coarser * array for name, array in self.allowed.items()}
        if not self._judge(self.golden, self.outputs, loose).passed:
            return []
        used = self._judge(self.golden, self.outputs, self.allowed).allowance_used
        return [mistake for mistake in mistakes if 1 / SIMILAR <= used / self._used_by(mistake) <= SIMILAR]

    def _used_by(self, mistake: Mistake) -> float:
        given = self.predictions.of(mistake, self.dtype)
        used = 0.0 if given is None else self._judge(self.golden, given, self.allowed).allowance_used
        return used if used > 1 else numpy.inf

    def _alike(self, given: Mapping[str, numpy.ndarray]) -> bool:
        """Whether shapes and orders of magnitude are those of the result: a quick look."""
        for name in self.golden:
            if name not in given or given[name].shape != self.outputs[name].shape:
                return False
            a, b = given[name].astype(numpy.float64), self.outputs[name].astype(numpy.float64)
            both = numpy.isfinite(a) & numpy.isfinite(b)
            a, b = a[both], b[both]
            if a.size and not abs(a - b).max() <= CLEARLY_OTHER * max(abs(a).max(), abs(b).max()):
                return False
        return True

    def _allowed(self, name: str, allowed: numpy.ndarray, errors: int) -> numpy.ndarray:
        """The mistake's allowance; where it has none, the specification's, and the largest where that has none either."""
        finite = [array[numpy.isfinite(array)].max(initial=0.0) for array in (allowed, self.allowed[name])]
        instead = numpy.where(numpy.isfinite(self.allowed[name]), self.allowed[name], max(finite))
        return errors * numpy.where(numpy.isfinite(allowed), allowed, instead)

    def _judge(self, expected: Mapping[str, Expected], outputs: Mapping[str, numpy.ndarray], allowed: Mapping[str, numpy.ndarray]) -> Judgement:
        return judge(self.case, expected, outputs, allowed, self.standard)

    def _expected(self, golden: Expected, given: numpy.ndarray, mistake: Mistake) -> Expected:
        """The results of a mistake as what must come, at the places that the golden compares."""
        values = _picked(given.astype(numpy.float64), golden)
        kinds = numpy.where(numpy.isnan(values), NAN, numpy.where(numpy.isinf(values), EXACT, FINITE))
        if golden.kinds is not None:
            kept = golden.kinds.reshape(values.shape)
            kinds = numpy.where((kept == ANY) | ((kept == NON_FINITE) & (kinds != FINITE)), kept, kinds)
        if mistake.convention is not None and mistake.convention[0] == "fully_masked_row":
            kinds = numpy.where(golden.values.reshape(values.shape) == -numpy.inf, ANY, kinds)
        return replace(golden, values=values, kinds=kinds.astype(numpy.uint8))

    def _either(self, expected: Mapping[str, Expected], allowed: Mapping[str, numpy.ndarray]) -> tuple[dict[str, Expected], dict[str, numpy.ndarray]]:
        """Take the golden where the result is finite exactly as the golden is: how far a NaN reaches depends on the tiles."""
        merged, allowances = dict(expected), dict(allowed)
        for name, golden in self.golden.items():
            got = _picked(self.outputs[name], golden)
            true = golden.values.reshape(got.shape)
            right = (numpy.isfinite(got) & numpy.isfinite(true)) | (got == true) | (numpy.isnan(got) & numpy.isnan(true))
            values = numpy.where(right, true, expected[name].values)
            kept = numpy.zeros(got.shape, numpy.uint8) if golden.kinds is None else golden.kinds.reshape(got.shape)
            merged[name] = replace(golden, values=values, kinds=numpy.where(right, kept, expected[name].kinds))
            allowances[name] = numpy.fmax(allowed[name], self.allowed[name])
        return merged, allowances


def _picked(output: numpy.ndarray, golden: Expected) -> numpy.ndarray:
    """The places that the golden holds."""
    if golden.rows is None:
        return output
    return output.reshape(-1, golden.values.size // max(len(golden.rows), 1))[golden.rows]


_DEFAULT = Diagnosis()


def explain(
    case: Case, dtype: str, arrays: Mapping[str, numpy.ndarray], outputs: Mapping[str, numpy.ndarray], wanted: Sequence[str]
) -> list[Mistake]:
    """The known mistakes whose results these are, conventions first.

    Args:
        case: The case that failed.
        dtype: Of the run.
        arrays: What the target was given.
        outputs: What it gave, by output name.
        wanted: The outputs that are compared.
    """
    return _DEFAULT.explain(case, dtype, outputs, wanted)


def summarise(results: Iterable[object]) -> list[dict[str, object]]:
    """Few mistakes that explain together what can be explained, the one that explains most first.

    Each is `{"variant", "explains", "clauses"}`, where `explains` counts the results that no mistake before explained.
    """
    left = [set(result.diagnosis) for result in results if result.diagnosis]
    order = {mistake.name: (number, mistake) for number, mistake in enumerate(MISTAKES)}
    found: list[dict[str, object]] = []
    while left:
        counts = Counter(name for names in left for name in names if name in order)
        if not counts:
            break
        name = min(counts, key=lambda one: (-counts[one], order[one][0]))
        mistake = order[name][1]
        found.append({"variant": mistake.variant, "explains": counts[name], "clauses": list(mistake.clauses)})
        left = [names for names in left if name not in names]
    return found
