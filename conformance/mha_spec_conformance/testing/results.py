"""The expected values, kinds and allowances of the compared rows, from the specification in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy

from mha_spec.arrays import softmax_dtype_name
from mha_spec_conformance.fuzzing.expected import Rows, kinds_of
from mha_spec_conformance.judging.bounds.backward import BackwardErrors, GradientEvaluation
from mha_spec_conformance.judging.bounds.evaluation import Evaluation
from mha_spec_conformance.judging.bounds.forward import ForwardErrors
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE, shares
from mha_spec_conformance.suite.cases import Expected

from .part import Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mha_spec_conformance.judging.bounds import Precision

    from .problem import Problem

__all__ = [
    "Compared",
    "Values",
    "compared",
    "cotangents",
    "evaluate_gradients",
    "forward",
    "gradient_of_query",
    "places_over",
    "row_kinds",
    "shares_of",
    "values_of",
]


@dataclass(frozen=True)
class Values:
    """An expected result at some rows: (rows, size), or (rows,) for lse."""

    expected: numpy.ndarray
    kinds: numpy.ndarray
    allowance: numpy.ndarray


@dataclass(frozen=True)
class Compared:
    """A result at the compared rows of all heads, and the share of its allowance that each element uses."""

    name: str
    places: numpy.ndarray
    """The batch entry, head and row of each compared row, (rows, 3)."""
    values: Values
    got: numpy.ndarray
    shares: numpy.ndarray

    @cached_property
    def wrong(self) -> numpy.ndarray:
        """True for the rows that have a wrong element."""
        return numpy.any(self.shares.reshape(len(self.places), -1) > 1, axis=1, keepdims=False)

    @property
    def worst(self) -> tuple[numpy.intp, ...]:
        """The index of the element that uses the largest share of its allowance."""
        return numpy.unravel_index(int(self.shares.argmax()), self.shares.shape)


def shares_of(name: str, got: numpy.ndarray, values: Values, run: Precision) -> numpy.ndarray:
    """Return the share of its allowance that each element of a received result uses."""
    wanted = Expected(values.expected, values.kinds, None, values.expected.shape)
    return shares(name, wanted, got, values.allowance, run)


def places_over(shape: tuple[int, ...]) -> numpy.ndarray:
    """Return the places of all rows of a result whose first three axes have these sizes, (rows, 3)."""
    return numpy.stack([index.ravel() for index in numpy.indices(shape)], axis=1)


def compared(name: str, result: numpy.ndarray, parts: Sequence[tuple[Part, Values]], run: Precision) -> Compared:
    """Compare a result, which has all rows, with the expected values at the rows of the parts."""
    places = numpy.concatenate([_places(part, name) for part, _ in parts])
    joined = (numpy.concatenate([getattr(v, field) for _, v in parts]) for field in ("expected", "kinds", "allowance"))
    values = Values(*joined)
    got = result[places[:, 0], places[:, 1], places[:, 2]]
    return Compared(name, places, values, got, shares_of(name, got, values, run))


def _places(part: Part, name: str) -> numpy.ndarray:
    of_keys = name in ("grad_key", "grad_value")
    rows, head = (part.kept_keys, part.kv_head) if of_keys else (part.rows, part.heads[0])
    return numpy.stack([numpy.full(len(rows), part.entry), numpy.full(len(rows), head), rows], axis=1)


@numpy.errstate(all="ignore")
def forward(part: Part, problem: Problem, run: Precision) -> dict[str, Values]:
    """Evaluate output and lse at the rows of a part."""
    evaluation = Evaluation(part.arrays, part.options, part.steps, part.whole.kv_len)
    errors = ForwardErrors(evaluation, run)
    kinds = row_kinds("attention", part, problem, evaluation)
    return {
        "output": values_of(evaluation.output[0, 0], kinds["output"][0, 0], errors.output[0, 0]),
        "lse": values_of(evaluation.trace.lse[0, 0, :, 0], kinds["lse"][0, 0], errors.lse[0, 0, :, 0]),
    }


@numpy.errstate(all="ignore")
def gradient_of_query(part: Part, problem: Problem, run: Precision) -> Values:
    """Evaluate the query's gradient at the rows of a part."""
    evaluation = evaluate_gradients(part, problem)
    kinds = row_kinds("attention_vjp", part, problem, evaluation)["grad_query"]
    errors = BackwardErrors(evaluation, run)
    return values_of(evaluation.grad_query[0, 0], kinds[0, 0], errors.grad_query()[0, 0])


def cotangents(part: Part, problem: Problem) -> dict[str, numpy.ndarray]:
    """Return the cotangents of the rows of a part by name."""
    pairs = {"grad_output": problem.grad_output, "grad_lse": problem.grad_lse}
    return {name: part.of_rows(array) for name, array in pairs.items() if array is not None}


def evaluate_gradients(part: Part, problem: Problem) -> GradientEvaluation:
    """Evaluate the gradients of a part in float64."""
    arrays = {**part.arrays, **cotangents(part, problem)}
    return GradientEvaluation(arrays, part.options, part.steps, part.whole.kv_len)


def values_of(expected: numpy.ndarray, kinds: numpy.ndarray, allowance: numpy.ndarray) -> Values:
    """Broadcast the kinds; an element whose allowance is not finite is not compared."""
    kinds = numpy.broadcast_to(kinds, expected.shape)
    unbounded = (kinds == FINITE) & ~numpy.isfinite(allowance)
    return Values(expected, numpy.where(unbounded, ANY, kinds).astype(numpy.uint8), allowance)


def row_kinds(function: str, part: Part, problem: Problem, evaluation: Evaluation) -> dict[str, numpy.ndarray]:
    """Return the kinds of the results at the rows of a part.

    A row is not compared if a non-finite operand that other rows use is hidden from it, which is a SHOULD
    (MHA-POISON-2).
    """
    bad = problem.bad_keys[part.entry, part.kv_head]
    arrays = {**part.arrays, **cotangents(part, problem)}
    if not bad.any() and _is_plain(evaluation, arrays, problem.dtype):
        return _plain_kinds(evaluation)
    if len(part.kept_keys) < part.whole.kv_len and (bad & problem.used_keys(part.entry)).any():
        every = Part(part.whole, part.entry, part.heads, part.rows, numpy.arange(part.whole.kv_len))
        arrays, part = {**every.arrays, **cotangents(every, problem)}, every
        evaluation = Evaluation(every.arrays, every.options, every.steps)
    rows = Rows(arrays, part.options, problem.dtype, evaluation)
    kinds = kinds_of(function, rows)
    used = problem.used_keys(part.entry)[part.kept_keys][None, None]
    reached = rows.reached_by_hidden(numpy.broadcast_to(used, (1, 1, used.shape[-1]))).any(axis=-1)
    return {
        name: numpy.where(reached if name == "lse" else reached[..., None], ANY, kind)
        for name, kind in kinds.items()
        if name in ("output", "lse", "grad_query")
    }


def _is_plain(evaluation: Evaluation, arrays: Mapping[str, numpy.ndarray], dtype: str) -> bool:
    """Tell whether all operands are finite, and no score comes near the largest number of the softmax's type."""
    largest = float(numpy.finfo(softmax_dtype_name(dtype)).max) / 4
    operands = (array for array in arrays.values() if array.dtype.kind not in "biu")
    if not all(numpy.isfinite(array).all() for array in operands):
        return False
    reach, scale = float(evaluation.reach.max(initial=0.0)), abs(evaluation.trace.scale)
    return max(reach, reach / scale if scale else 0.0, float(abs(evaluation.logits).max(initial=0.0))) <= largest


def _plain_kinds(evaluation: Evaluation) -> dict[str, numpy.ndarray]:
    """Return the kinds for finite operands: a row that sees no key has exact results, except for the lse of a sink."""
    kinds = numpy.where(evaluation.rows, FINITE, EXACT)
    sinks = evaluation.arguments.sinks
    has_sink = numpy.zeros((1, 1, 1)) if sinks is None else (sinks != -numpy.inf)[None, :, None]
    return {"output": kinds, "lse": numpy.where(has_sink, FINITE, kinds[..., 0]), "grad_query": kinds}
