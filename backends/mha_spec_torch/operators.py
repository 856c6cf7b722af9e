"""The passes as operators: a graph holds each as a single node, so that no branch on a size or number is traced.

Whatever may change between two calls of a graph is an argument: tensors, the bounds of a window, and numbers. Numbers
are scalars, because a `float` would fix a value that a tracer left open. Lengths, offsets and ids are tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mha_spec.arguments import Arguments
from mha_spec.checks import check_numbers
from mha_spec.position_checks import check_alignment, check_chunk, check_window

from .dropout import Draws, draws_of
from .host import on_device
from .paths import backward, differentiable, forward, weigh_backward
from .paths import weigh as weigh_by_formula
from .problem import Problem, readable
from .tasks import Operands, softmax_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "DECOMPOSITIONS",
    "attend",
    "filled",
    "gradients",
    "keep",
    "kept",
    "needed",
    "register",
    "tensor_of",
    "weigh",
]

SCHEMA = ", ".join(
    [
        "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? q_offset",
        "Tensor? prefix_lengths, Tensor? q_lengths, Tensor? kv_lengths, Tensor? kv_starts",
        "Tensor? q_segment_ids, Tensor? kv_segment_ids, Tensor? dropout_mask",
        "Tensor? row_draws, Tensor? key_draws",
        "bool causal, SymInt? left, SymInt? right, SymInt? chunk, Scalar? scale, Scalar? softcap, Scalar dropout_rate",
    ]
)
OPERANDS = 5
"""The number of arguments that have gradients; the mask and the options follow."""
HOST_INTEGERS = (
    *("q_offset", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"),
    *("q_segment_ids", "kv_segment_ids"),
)
"""The options that may be host data, which become tensors."""
NAMES = tuple(argument.split()[1] for argument in SCHEMA.split(", "))

_library = torch.library.Library("mha_spec_torch", "DEF")


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """Output and lse of a call, as a single operator."""
    return _operator("attend")(*_spelled(a))


def weigh(a: Arguments) -> Tensor:
    """The weights of a call, as a single operator."""
    return _operator("weigh")(*_spelled(a))


def _operator(name: str) -> Callable[..., Any]:
    """Return an operator, or its formula for an ONNX model, whose standard operators have no such node."""
    operator = getattr(torch.ops.mha_spec_torch, name).default
    return DECOMPOSITIONS[operator] if torch.onnx.is_in_onnx_export() else operator


def gradients(a: Arguments, grad_output: Tensor, grad_lse: Tensor | None) -> Operands:
    """The gradients of a call, as two operators."""
    spelled = _spelled(a)
    output, lse = torch.ops.mha_spec_torch.attend(*spelled)
    results = torch.ops.mha_spec_torch.gradients(grad_output, grad_lse, output, lse, a.bias is not None, *spelled)
    query, key, value, bias, sinks = results
    return Operands(query, key, value, None if a.bias is None else bias, None if a.sinks is None else sinks)


def _spelled(a: Arguments) -> list[Any]:
    """The arguments of a call in the order of the schema."""
    left, right = a.bounded_window or (None, None)
    rows, keys = draws_of(a) or (None, None)
    spelled: dict[str, Any] = {"left": left, "right": right, "row_draws": rows, "key_draws": keys}
    spelled["value"] = a.key[..., :0] if a.value is None else a.value
    for name in HOST_INTEGERS:
        spelled[name] = tensor_of(getattr(a, name), a.batch, a.query.device)
    return [spelled[name] if name in spelled else getattr(a, name) for name in NAMES]


def tensor_of(value: Any, count: int, device: torch.device) -> Tensor | None:
    """Convert integers to a tensor, and repeat a single one `count` times."""
    if value is None:
        return None
    if isinstance(value, Tensor):  # torch.jit.trace turns sizes into tensors without axes
        return value if value.ndim else value.expand(count)
    if isinstance(value, (int, torch.SymInt)):
        return torch.full((count,), cast("int", value), dtype=torch.int64, device=device)
    return on_device(value, device)


def _called(spelled: Sequence[Any], *, host: bool = True) -> tuple[Problem, Operands]:
    """Prepare an operator's arguments, and check the numbers that were open when it was traced."""
    options = dict(zip(NAMES, spelled, strict=True))
    left, right, rows, keys = (options.pop(name) for name in ("left", "right", "row_draws", "key_draws"))
    window = None if left is None and right is None else (left, right)
    a = Arguments(**options, window=window, dropout_key=None if rows is None else Draws(rows, keys))
    check_numbers(a)
    check_window(a)
    check_chunk(a)
    check_alignment(a)
    return Problem.of(a, host=host and readable(a.query)), Operands(*spelled[: OPERANDS + 1])


def _attend(*spelled: Any) -> tuple[Tensor, Tensor]:
    problem, x = _called(spelled)
    output, lse = forward(problem, x, needs_lse=True)
    return output.contiguous(), lse.contiguous()


def _attend_shapes(*spelled: Any) -> tuple[Tensor, Tensor]:
    query, value = spelled[0], spelled[2]
    lse = query.new_empty(query.shape[:3], dtype=softmax_dtype(query))
    return query.new_empty((*query.shape[:3], value.shape[3])), lse


def _gradients(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, of_bias: bool, *spelled: Any
) -> tuple[Tensor, ...]:
    problem, x = _called(spelled)
    return filled(x.query, backward(problem, x, output, lse, grad_output, grad_lse, needs_bias=of_bias)[:OPERANDS])


def _weigh(*spelled: Any) -> Tensor:
    return weigh_by_formula(*_called(spelled)).contiguous()


def _weigh_shape(*spelled: Any) -> Tensor:
    query, key = spelled[:2]
    return query.new_empty((*query.shape[:3], key.shape[2]))


def _weigh_gradients(grad_weights: Tensor, *spelled: Any) -> tuple[Tensor, ...]:
    problem, x = _called(spelled)
    return filled(x.query, weigh_backward(problem, x, grad_weights)[:OPERANDS])


def filled(query: Tensor, results: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Replace a gradient of None by an empty tensor, because an operator cannot return None."""
    return tuple(query.new_empty(0) if result is None else result.contiguous() for result in results)


def _gradient_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    spelled = arguments[-len(NAMES) :]
    query, operands = spelled[0], spelled[:OPERANDS]
    return tuple(query.new_empty(0) if operand is None else operand.new_empty(operand.shape) for operand in operands)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor] | Tensor) -> None:
    """Save the results of a forward and its arguments for the backward."""
    tensors = [isinstance(argument, Tensor) for argument in inputs]
    results = (output,) if isinstance(output, Tensor) else output
    saved = (argument for argument, is_tensor in zip(inputs, tensors, strict=True) if is_tensor)
    ctx.save_for_backward(*results, *saved)
    ctx.spelled = [None if is_tensor else argument for argument, is_tensor in zip(inputs, tensors, strict=True)]
    ctx.tensors = tensors
    ctx.set_materialize_grads(False)


def kept(ctx: Any, results: int) -> tuple[Sequence[Tensor], list[Any]]:
    """Return the results of the forward, and its arguments."""
    tensors = iter(ctx.saved_tensors[results:])
    arguments = zip(ctx.spelled, ctx.tensors, strict=True)
    return ctx.saved_tensors[:results], [next(tensors) if is_tensor else other for other, is_tensor in arguments]


def _through_attend(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    (output, lse), spelled = kept(ctx, 2)
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    of_bias = ctx.needs_input_grad[3]
    return needed(ctx, torch.ops.mha_spec_torch.gradients(grad_output, grad_lse, output, lse, of_bias, *spelled))


def _through_weigh(ctx: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    return needed(ctx, torch.ops.mha_spec_torch.weigh_gradients(grad_weights, *kept(ctx, 1)[1]))


def needed(ctx: Any, results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Keep the gradients that autograd needs; every option has None."""
    operands = (result if ctx.needs_input_grad[index] else None for index, result in enumerate(results))
    return *operands, *[None] * (len(ctx.needs_input_grad) - len(results))


def register(name: str, signature: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Define an operator; `shapes` returns empty results of its shapes."""
    _library.define(f"{name}{signature}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mha_spec_torch::{name}", shapes, lib=_library)


FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
COTANGENTS = "Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor lse, bool of_bias"
register("attend", f"({SCHEMA}) -> (Tensor, Tensor)", _attend, _attend_shapes)
register("gradients", f"({COTANGENTS}, {SCHEMA}) -> {FIVE}", _gradients, _gradient_shapes)
register("weigh", f"({SCHEMA}) -> Tensor", _weigh, _weigh_shape)
register("weigh_gradients", f"(Tensor grad_weights, {SCHEMA}) -> {FIVE}", _weigh_gradients, _gradient_shapes)
for _name, _through in (("attend", _through_attend), ("weigh", _through_weigh)):
    torch.library.register_autograd(f"mha_spec_torch::{_name}", _through, setup_context=keep, lib=_library)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.mha_spec_torch.attend.default: lambda *spelled: differentiable(
        *_called(spelled, host=False), is_differentiated=False
    ),
    torch.ops.mha_spec_torch.weigh.default: lambda *spelled: weigh_by_formula(*_called(spelled, host=False)),
}
"""The formulas of the operators in operators of torch, for `ExportedProgram.run_decompositions`.

They are not in torch's table of decompositions: inductor raises an error for an operator of that table
that it does not decompose, but only if the variable `CI` is set.
"""
