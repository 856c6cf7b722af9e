"""The gradients of bias and sinks, which sum over several heads: they are compared in small problems, as a whole."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import numpy

from mha_spec.errors import ArgumentValueError
from mha_spec_conformance.fuzzing.expected import Rows, kinds_of
from mha_spec_conformance.judging.bounds import SPECIFICATION
from mha_spec_conformance.judging.bounds.backward import BackwardErrors, GradientEvaluation

from .results import Compared, Values, places_over, shares_of, values_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec_conformance.judging.bounds import Precision

    from .problem import Problem

__all__ = ["whole_sums"]

MOST_PAIRS = 2**21
"""The number of pairs of a problem whose sums over heads are compared."""

SUMS = ("grad_bias", "grad_sinks")


@numpy.errstate(all="ignore")
def whole_sums(problem: Problem, results: Mapping[str, numpy.ndarray], run: Precision) -> list[Compared]:
    """Compare the gradients of bias and sinks, if `results` has them.

    Raises:
        ArgumentValueError: The problem is too large.
    """
    names, a = [name for name in SUMS if name in results], problem.arguments
    if not names:
        return []
    pairs = a.batch * a.heads * a.q_len * a.kv_len
    if pairs > MOST_PAIRS:
        raise ArgumentValueError(
            f"`gradients` must be None for bias and sinks in a problem of more than {MOST_PAIRS} pairs, received "
            f"{pairs} pairs. Compare these gradients in a smaller problem."
        )
    arrays = {field.name: getattr(a, field.name) for field in fields(a) if hasattr(getattr(a, field.name), "dtype")}
    options = {
        field.name: getattr(a, field.name)
        for field in fields(a)
        if field.name not in (*arrays, "function") and getattr(a, field.name) is not None
    }
    arrays |= {"grad_output": problem.grad_output}
    arrays |= {} if problem.grad_lse is None else {"grad_lse": problem.grad_lse}
    evaluation = GradientEvaluation(arrays, options, SPECIFICATION)
    kinds = kinds_of("attention_vjp", Rows(arrays, options, problem.dtype, evaluation))
    errors = BackwardErrors(evaluation, run)
    return [_compared(name, results[name], evaluation, errors, kinds[name], run) for name in names]


def _compared(
    name: str,
    got: numpy.ndarray,
    evaluation: GradientEvaluation,
    errors: BackwardErrors,
    kinds: numpy.ndarray,
    run: Precision,
) -> Compared:
    """Compare a gradient; its rows are its first three axes, or for sinks the heads."""
    values = values_of(getattr(evaluation, name), kinds, getattr(errors, name)())
    size = values.expected.shape
    places = places_over(size[:3] if len(size) == 4 else (1, *size, 1))
    shape = (len(places), -1)
    values = Values(values.expected.reshape(shape), values.kinds.reshape(shape), values.allowance.reshape(shape))
    got = got.reshape(shape)
    return Compared(name, places, values, got, shares_of(name, got, values, run))
