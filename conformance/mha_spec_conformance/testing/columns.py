"""The gradients of keys and values at some keys of a large problem.

They sum over all rows of a group of heads. A first pass over blocks of rows computes the maximum, lse and
D of each row, and their errors. A second pass evaluates all rows at the chosen keys alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.judging.bounds.backward import BackwardErrors, GradientEvaluation
from mha_spec_conformance.judging.bounds.forward import ForwardErrors
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE

from .part import Part
from .results import cotangents, evaluate_gradients, row_kinds, values_of

if TYPE_CHECKING:
    from mha_spec.steps import Steps
    from mha_spec_conformance.judging.bounds import Precision

    from .problem import Problem
    from .results import Values

__all__ = ["gradients_of_keys"]

BLOCK_PAIRS = 2**19
"""The number of pairs of a block of rows."""


@dataclass(frozen=True)
class RowSums:
    """Numbers of each row of a group of heads, (1, group, q_len, 1); `row_dot` is D = rowsum(P dP) - grad_lse."""

    maximum: numpy.ndarray
    lse: numpy.ndarray
    row_dot: numpy.ndarray
    lse_error: numpy.ndarray
    row_dot_error: numpy.ndarray
    lift: numpy.ndarray
    kinds: numpy.ndarray
    """The kinds of the query's gradient, which mark the rows that cannot be judged."""


@numpy.errstate(all="ignore")
def gradients_of_keys(
    problem: Problem, entry: int, kv_head: int, keys: numpy.ndarray, run: Precision
) -> tuple[Part, dict[str, Values]]:
    """Evaluate the gradients of a key/value head at some keys."""
    a = problem.arguments
    group = a.heads // a.kv_heads
    heads = range(kv_head * group, (kv_head + 1) * group)
    sums = _row_sums(problem, entry, heads, run)
    part = Part(a, entry, heads, numpy.arange(a.q_len), keys)
    evaluation = _Columns(part, problem, sums)
    errors = _ColumnErrors(evaluation, run, sums)
    kinds = _kinds(evaluation, sums)
    return part, {
        "grad_key": values_of(evaluation.grad_key[0, 0], kinds, errors.grad_key()[0, 0]),
        "grad_value": values_of(evaluation.grad_value[0, 0], kinds, errors.grad_value()[0, 0]),
    }


def _row_sums(problem: Problem, entry: int, heads: range, run: Precision) -> RowSums:
    """Evaluate the rows of a group of heads in blocks."""
    a = problem.arguments
    step = max(1, BLOCK_PAIRS // max(a.kv_len, 1))
    of_heads = [
        [
            _block(Part(a, entry, (head,), numpy.arange(start, min(start + step, a.q_len))), problem, run)
            for start in range(0, a.q_len, step)
        ]
        for head in heads
    ]
    fields = [[numpy.concatenate(x, axis=2) for x in zip(*blocks, strict=True)] for blocks in of_heads]
    return RowSums(*(numpy.concatenate(x, axis=1) for x in zip(*fields, strict=True)))


def _block(part: Part, problem: Problem, run: Precision) -> tuple[numpy.ndarray, ...]:
    evaluation = evaluate_gradients(part, problem)
    errors = BackwardErrors(evaluation, run)
    kinds = row_kinds("attention_vjp", part, problem, evaluation)["grad_query"]
    arrays = (
        evaluation.maximum,
        evaluation.trace.lse,
        evaluation.row_dot,
        errors.forward.lse,
        errors.row_dot,
        errors.forward.lift,
        kinds,
    )
    return tuple(numpy.broadcast_to(array, evaluation.trace.lse.shape) for array in arrays)


def _with_sums(steps: Steps, sums: RowSums) -> Steps:
    """Return steps that take the maximum, lse and D of each row from the first pass."""
    total = numpy.where(sums.lse == -numpy.inf, 0.0, numpy.exp(sums.lse - sums.maximum))
    return replace(
        steps,
        exponentials=lambda logits: (numpy.exp(logits - sums.maximum), sums.maximum),
        sum_exponentials=lambda exponentials: total,
        row_dot=lambda *arrays: sums.row_dot,
    )


class _Columns(GradientEvaluation):
    """All rows of a group of heads, evaluated at some keys."""

    def __init__(self, part: Part, problem: Problem, sums: RowSums) -> None:
        self.maximum = sums.maximum
        arrays = {**part.arrays, **cotangents(part, problem)}
        super().__init__(arrays, part.options, _with_sums(part.steps, sums), part.whole.kv_len)


class _ColumnErrors(BackwardErrors):
    """The errors of the gradients at some keys; those of a row are known."""

    def __init__(self, evaluation: GradientEvaluation, precision: Precision, sums: RowSums) -> None:
        super().__init__(evaluation, precision)
        self.forward = _ErrorsOfRows(evaluation, precision, sums)
        self.row_dot = sums.row_dot_error


class _ErrorsOfRows(ForwardErrors):
    """The errors of the logits at some keys; those of lse are known."""

    def __init__(self, evaluation: GradientEvaluation, precision: Precision, sums: RowSums) -> None:
        super().__init__(evaluation, precision)
        self.lse = sums.lse_error
        self.lift = sums.lift


def _kinds(evaluation: GradientEvaluation, sums: RowSums) -> numpy.ndarray:
    """Return the kinds of the gradients at each key, (keys, 1): a key that no row sees has the gradient 0."""
    visible, judged = evaluation.trace.visible, sums.kinds != ANY
    good, bad = ((visible & rows).any(axis=(0, 1, 2)) for rows in (judged, ~judged))
    return numpy.select([bad, good], [ANY, FINITE], EXACT)[:, None]
