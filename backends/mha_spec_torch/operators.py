"""The two passes as operators, so that a compiled graph holds each as one node and no branch of theirs breaks it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mha_spec.arguments import Arguments

from .dropout import Draws, draws_of
from .paths import backward, forward
from .problem import Problem, readable
from .tasks import Operands

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["attend", "gradients"]

SCHEMA = ", ".join(
    [
        "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? q_offset",
        "Tensor? q_lengths, Tensor? kv_lengths, Tensor? q_segment_ids, Tensor? kv_segment_ids, Tensor? dropout_mask",
        "Tensor? row_draws, Tensor? key_draws",
        "bool causal, SymInt? left, SymInt? right, float? scale, float? softcap, float dropout_rate",
    ]
)
OPERANDS = 5
"""How many arguments have gradients; the options follow."""
NAMES = tuple(argument.split()[1] for argument in SCHEMA.split(", "))

_library = torch.library.Library("mha_spec_torch", "DEF")
_library.define(f"attend({SCHEMA}) -> (Tensor, Tensor)")
_library.define(
    f"gradients(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor lse, bool of_bias, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """Output and lse of a call, as one operator."""
    return torch.ops.mha_spec_torch.attend(*_spelled(a))


def gradients(a: Arguments, grad_output: Tensor, grad_lse: Tensor | None) -> Operands:
    """The gradients of a call, as two operators."""
    spelled = _spelled(a)
    output, lse = torch.ops.mha_spec_torch.attend(*spelled)
    found = torch.ops.mha_spec_torch.gradients(grad_output, grad_lse, output, lse, a.bias is not None, *spelled)
    query, key, value, bias, sinks = found
    return Operands(query, key, value, None if a.bias is None else bias, None if a.sinks is None else sinks)


def _spelled(a: Arguments) -> list[Any]:
    """The arguments of a call as the schema has them."""
    left, right = a.bounded_window or (None, None)
    rows, keys = draws_of(a) or (None, None)
    spelled: dict[str, Any] = {"left": left, "right": right, "row_draws": rows, "key_draws": keys}
    for name in ("q_offset", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids"):
        spelled[name] = _tensor(getattr(a, name), a)
    return [spelled[name] if name in spelled else getattr(a, name) for name in NAMES]


def _tensor(value: Tensor | Sequence[int] | int | None, a: Arguments) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, int):
        return torch.full((a.batch,), value, device=a.query.device)
    return torch.as_tensor(value, device=a.query.device)


def _called(*spelled: Any) -> tuple[Problem, Operands]:
    """The problem of an operator's arguments, which are there to be read when it runs."""
    options = dict(zip(NAMES, spelled, strict=True))
    left, right, rows, keys = (options.pop(name) for name in ("left", "right", "row_draws", "key_draws"))
    window = None if left is None and right is None else (left, right)
    a = Arguments(**options, window=window, dropout_key=None if rows is None else Draws(rows, keys))
    return Problem.of(a, host=readable(a.query)), Operands(*spelled[:OPERANDS])


def _attend(*spelled: Any) -> tuple[Tensor, Tensor]:
    problem, x = _called(*spelled)
    output, lse = forward(problem, x, needs_lse=True)
    return output.contiguous(), lse.contiguous()


def _attend_shapes(*spelled: Any) -> tuple[Tensor, Tensor]:
    query, value = spelled[0], spelled[2]
    of_softmax = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:3], value.shape[3])), query.new_empty(query.shape[:3], dtype=of_softmax)


def _gradients(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, of_bias: bool, *spelled: Any
) -> tuple[Tensor, ...]:
    problem, x = _called(*spelled)
    found = backward(problem, x, output, lse, grad_output, grad_lse, of_bias=of_bias)
    return tuple(x.query.new_empty(0) if one is None else one.contiguous() for one in found)


def _gradient_shapes(
    _1: Tensor, _2: Tensor | None, _3: Tensor, _4: Tensor, _5: bool, *spelled: Any
) -> tuple[Tensor, ...]:
    return tuple(spelled[0].new_empty(0) if one is None else one.new_empty(one.shape) for one in spelled[:OPERANDS])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [isinstance(one, Tensor) for one in inputs]
    ctx.save_for_backward(*(one for one, is_tensor in zip(inputs, tensors, strict=True) if is_tensor), *output)
    ctx.spelled = [None if is_tensor else one for one, is_tensor in zip(inputs, tensors, strict=True)]
    ctx.tensors = tensors
    ctx.set_materialize_grads(False)


def _through(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, output, lse = ctx.saved_tensors
    given = iter(saved)
    spelled = [next(given) if is_tensor else one for one, is_tensor in zip(ctx.spelled, ctx.tensors, strict=True)]
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    found = torch.ops.mha_spec_torch.gradients(grad_output, grad_lse, output, lse, ctx.needs_input_grad[3], *spelled)
    needed = (one if ctx.needs_input_grad[index] else None for index, one in enumerate(found))
    return *needed, *(None for _ in spelled[OPERANDS:])


for _name, _run, _shapes in (("attend", _attend, _attend_shapes), ("gradients", _gradients, _gradient_shapes)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mha_spec_torch::{_name}", _shapes, lib=_library)
torch.library.register_autograd("mha_spec_torch::attend", _through, setup_context=_keep, lib=_library)
