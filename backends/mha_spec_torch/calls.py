"""Check the arguments of a call and prepare it; equal eager calls are prepared once.

Two calls are equal if they have the same signature: the shapes, dtypes and devices of all arrays, and the values of all
other options, lengths and offsets included. Neither the checks nor the preparation look at anything else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _is_tracing, _len_torch_dispatch_stack

from mha_spec.arguments import Arguments
from mha_spec.checks import check, refuse_unknown
from mha_spec.scalars import PLAIN_TYPES
from mha_spec.varlen_checks import varlen_arguments

from .distributed import refuse_distributed
from .function import check_tensor, transformed
from .paths import autocasts
from .problem import Problem, readable
from .symbols import TENSORS, all_equal, checked, entries, example, is_open, traced, unwrapped
from .visibility import with_integers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.arguments import WeightOptions
    from mha_spec.varlen_arguments import VarlenArguments

    from .tasks import Operands

__all__ = ["PREPARED", "arguments_of", "cast", "prepared", "problem_of", "signature_of", "varlen_arguments_of"]

ARRAYS = frozenset({"mask", "bias", "sinks"})
"""The options of which neither the checks nor the preparation read an element."""
INTEGERS = frozenset({"q_offset", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"})
"""The options whose arrays are read, if they are not on an accelerator."""
INTEGRAL = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})

Signature = tuple[object, ...]

PREPARED: dict[Signature | None, Problem] = {}
MOST_PREPARED, MOST_TASKS = 256, 64


def signature_of(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Signature | None:
    """Return the signature of an eager call of attention; None if an argument has no description here."""
    # A tracer, a transform, autocast or a dispatch mode affects the call.
    if _is_tracing() or transformed() or _is_any_autocast_enabled() or _len_torch_dispatch_stack():
        return None
    if not (type(query) in TENSORS and type(key) in TENSORS and type(value) in TENSORS):
        return None
    try:
        # A loop over the tensors takes 3 us longer, 1 % of a small call.
        signature: list[object] = [
            *(query.shape, query.dtype, query.is_cpu or query.device, query.is_contiguous() or query.stride()),
            *(key.shape, key.dtype, key.is_cpu or key.device, key.is_contiguous() or key.stride()),
            *(value.shape, value.dtype, value.is_cpu or value.device, value.is_contiguous() or value.stride()),
            *(query.layout, key.layout, value.layout),
        ]
        for name, option in options.items():
            kind = type(option)
            if kind in PLAIN_TYPES:
                signature += name, kind, option
            elif kind in TENSORS and name in ARRAYS:
                signature += name, option.shape, option.dtype, option.is_cpu or option.device, option.layout
            elif not _described_in(signature, name, option):
                return None
    except RuntimeError:  # A nested tensor has no shape, and some sparse ones have no strides.
        return None
    return tuple(signature)


def prepared(signature: Signature | None, problem: Problem, x: Operands) -> Problem:
    """Prepare a call for its path, and keep it, without its mask, for later calls with the same signature.

    The path must not depend on whether an equal call was kept: a checkpoint repeats a call and compares what it saved.
    """
    if signature is None or problem.drops:
        return problem
    if problem.host:
        if len(problem.visibility.tasks) > MOST_TASKS:
            return problem.described(x)
        problem.visibility.compare()
    problem = problem.described(x)
    if len(PREPARED) >= MOST_PREPARED:
        PREPARED.clear()
    PREPARED[signature] = problem
    return problem


def _described_in(signature: list[object], name: str, option: Any) -> bool:
    """Append a sequence or an array of integers by value; return False if the option is neither."""
    kind = type(option)
    if kind is list or kind is tuple:
        kinds = tuple(map(type, option))
        signature.append((name, kind, kinds, tuple(option)))
        return PLAIN_TYPES.issuperset(kinds)
    if name not in INTEGERS or not _is_read(option) or option.ndim > 1:
        return False
    signature.append((name, kind, option.dtype, option.ndim, tuple(option.reshape(-1).tolist())))
    return True


def _is_read(option: object) -> bool:
    """Tell whether an option is an array of integers that may be read before anything has checked it."""
    if type(option) is numpy.ndarray:
        return option.dtype.kind in "iu"
    return type(option) is Tensor and readable(option) and option.layout is torch.strided and option.dtype in INTEGRAL


def problem_of(a: Arguments) -> Problem:
    """Prepare a call that is checked; a tensor is read if it is on the CPU and has contents."""
    return Problem.of(a, host=readable(a.query) and not traced(a.query) and not transformed())


def arguments_of(function: str, query: Tensor, key: Tensor, value: Tensor | None, options: WeightOptions) -> Arguments:
    """Check the arguments of a call, and replace a named offset by its integers."""
    refuse_unknown(options, function)
    check_tensor(query)
    a = Arguments(query, key, value, function=function, **options)
    if autocasts(query.device.type):
        a = replace(a, **cast(query=query, key=key, value=value))
    if not traced(query):
        return with_integers(check(a))
    return with_integers(checked(_with_tensors(a)))


def varlen_arguments_of(function: str, options: Mapping[str, Any], *tensors: Any) -> VarlenArguments:
    """Check the arguments of a packed call, `tensors` being the first five; symbols are checked by examples."""
    query, key, value, *bounds = tensors
    check_tensor(query)
    refuse_distributed(function, query, key, value)
    if autocasts(query.device.type):
        query, key, value = cast(query=query, key=key, value=value).values()
    if not traced(unwrapped(query)):
        return varlen_arguments(function, dict(options), query, key, value, *bounds)
    # A sequence that holds a symbol becomes a tensor, because tensors are never read here.
    is_shared = all_equal(*bounds)
    bounds = [entries(value, query.device) if is_open(value) else value for value in bounds]
    bounds = [bounds[0], bounds[0]] if is_shared else bounds
    opened = {name: value for name, value in options.items() if is_open(value)}
    for name in opened.keys() & {"seqused_kv", "q_offset"}:
        opened[name] = entries(opened[name], query.device)
    a = varlen_arguments(function, {**options, **example(opened)}, query, key, value, *bounds)
    return replace(a, **opened)


def _with_tensors(a: Arguments) -> Arguments:
    """Replace each sequence that holds a symbol by a tensor, because tensors are never read here."""
    options = {name: getattr(a, name) for name in INTEGERS}
    tensors = {name: entries(value, a.query.device) for name, value in options.items() if is_open(value)}
    return replace(a, **tensors) if tensors else a


def cast(**tensors: Any) -> dict[str, Any]:
    """Cast query, key and value to the type of autocast, which leaves float64 unchanged."""
    dtype = torch.get_autocast_dtype(tensors["query"].device.type)
    return {
        name: tensor.to(dtype) if isinstance(tensor, Tensor) and _is_cast(tensor) else tensor
        for name, tensor in tensors.items()
    }


def _is_cast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64
