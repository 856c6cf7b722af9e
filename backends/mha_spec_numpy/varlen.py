"""Packed and paged attention: the attention of this backend for each sequence.

Keys and values in blocks are copied once, into the layout that the products need.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import varlen_reference
from mha_spec.arguments import Arguments
from mha_spec.varlen_reference import Varlen, VarlenSteps

from .backward import gradients
from .forward import attend
from .parallel import each
from .plan import Plan
from .problem import Problem
from .tiling import Assembly

if TYPE_CHECKING:
    from mha_spec.arrays import Array
    from mha_spec.varlen_reference import Call, VarlenGradients
    from mha_spec.varlen_sequences import PackedSequence

__all__ = ["varlen_attention", "varlen_attention_vjp"]


def attend_to_sequence(call: Call, _: VarlenSteps, *, return_lse: bool) -> tuple[Array, Any]:
    """Compute the output of a sequence and, if needed, its lse."""
    problem = problem_of(call)
    plan, rows = problem.plan, call.query.shape[:3]
    output = Assembly((*rows, call.value.shape[3]), problem.query)
    lse = Assembly(rows, problem.query) if return_lse else None
    each(partial(attend, problem, output, lse), plan.tiles, plan.a, tiny=plan.is_tiny)
    return output.whole(), None if lse is None else lse.whole()


def differentiate_sequence(call: Call, grad_output: Array, grad_lse: Array | None, _: VarlenSteps) -> VarlenGradients:
    """Compute the gradients of a sequence."""
    query, key, value, _bias, sinks = gradients(problem_of(call), grad_output, grad_lse)
    return query, key, value, sinks


def problem_of(call: Call) -> Problem:
    """Plan the attention of a sequence, whose arguments are checked."""
    plan = Plan(Arguments(*call[:3], sinks=call.sinks, **call.options))
    return Problem.of(plan, *call[:3], slopes=call.slopes)


def keys_of(x: Array, sequence: PackedSequence, steps: VarlenSteps) -> Array:
    """Return the keys in use of a sequence, or its values; blocks are copied once, with the heads first."""
    if sequence.blocks is None or not isinstance(x, numpy.ndarray):
        return varlen_reference.keys_of(x, sequence, steps)
    length, (block_size, kv_heads, size) = len(sequence.keys), x.shape[1:]
    joined = numpy.empty((kv_heads, length, size), x.dtype)
    for index, block in enumerate(sequence.blocks):
        place = joined[:, index * block_size : (index + 1) * block_size]
        place[...] = x[block, : place.shape[1]].swapaxes(0, 1)
    return joined[None]


_VARLEN = Varlen(VarlenSteps(keys_of=keys_of, attend=attend_to_sequence, differentiate=differentiate_sequence))

varlen_attention = _VARLEN.varlen_attention
varlen_attention_vjp = _VARLEN.varlen_attention_vjp
