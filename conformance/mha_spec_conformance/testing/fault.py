"""Describe a wrong result as the report does: where it is wrong, by how much, the clause, and what it looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.judging.compare import EXACT, FINITE, NAN
from mha_spec_conformance.suite.spec import clauses

from .likeness import Likeness, likeness
from .places import where
from .problem import rows_of_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec_conformance.judging.bounds import Precision

    from .problem import Problem
    from .results import Compared

__all__ = ["describe", "describe_as"]

CLAUSES = {
    "output": "MHA-SOFTMAX-1",
    "lse": "MHA-LSE-1",
    "grad_query": "MHA-VJP-2",
    "grad_key": "MHA-VJP-2",
    "grad_value": "MHA-VJP-3",
    "grad_bias": "MHA-VJP-5",
    "grad_sinks": "MHA-VJP-6",
}
"""The clause that defines a result."""


def describe(comparisons: Sequence[Compared], problem: Problem, run: Precision) -> str:
    """Describe the wrong results of attention or attention_vjp in lines."""
    like = likeness(comparisons, problem, run)
    return describe_as(comparisons, like, hidden=bool(problem.bad_keys.any()))


def describe_as(comparisons: Sequence[Compared], like: Likeness, *, hidden: bool = False) -> str:
    """Describe wrong results in lines; `hidden` tells that a key or value is not finite."""
    wrong = [comparison for comparison in comparisons if comparison.wrong.any()]
    lines = [_headline(comparison) for comparison in wrong]
    first = max(wrong, key=lambda comparison: float(comparison.shares.max()))
    by_id = clauses()
    lines += [f"{clause}: {by_id[clause].sentence}" for clause in _clauses(first, like, hidden=hidden)]
    lines.append(f"Result: {_worst(first)}.")
    lines += [f"{sentence}." for sentence in like.sentences]
    return "\n  ".join(lines)


def _headline(comparison: Compared) -> str:
    row = rows_of_result(comparison.name)
    number, total = int(comparison.wrong.sum()), len(comparison.places)
    counted = f"{number} of {total} compared {row}{'s' * (total != 1)}"
    return f"`{comparison.name}` is wrong in {counted}: {where(comparison, row)}"


def _clauses(comparison: Compared, like: Likeness, *, hidden: bool) -> tuple[str, ...]:
    """Name the clauses that are broken: those of the mistake, or those of the kind of the worst element."""
    if like.clauses:
        return like.clauses
    kind, got = int(comparison.values.kinds[comparison.worst]), float(comparison.got[comparison.worst])
    if kind == EXACT:
        return {"lse": ("MHA-EMPTY-2",), "output": ("MHA-EMPTY-1",)}.get(comparison.name, ("MHA-EMPTY-3",))
    if kind == NAN:
        return ("MHA-NAN-1",)
    if not numpy.isfinite(got) and hidden:
        return ("MHA-POISON-1",)
    return (CLAUSES[comparison.name],)


def _worst(comparison: Compared) -> str:
    """Write the worst element."""
    at = comparison.worst
    index = [*comparison.places[at[0]].tolist(), *(int(i) for i in at[1:])]
    expected, got, share = (float(x[at]) for x in (comparison.values.expected, comparison.got, comparison.shares))
    kind, allowed = int(comparison.values.kinds[at]), float(comparison.values.allowance[at])
    name = f"{comparison.name}[{', '.join(map(str, index))}]"
    if kind == FINITE and numpy.isfinite(share):
        return f"{name} = {got:.9g}, expected {expected:.9g}, allowance {allowed:.2g}, {share:.3g} times the allowance"
    wanted = f"{expected:.9g}" if kind in (FINITE, EXACT) else "NaN" if kind == NAN else "NaN or infinite"
    return f"{name} = {got:.9g}, must be {'exactly ' * (kind == EXACT)}{wanted}"
