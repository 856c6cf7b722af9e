"""The passes of packed and paged attention as operators: a graph holds each as a single node.

Bounds, lengths and blocks are tensors, which an operator reads when it runs, so that a graph holds for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mha_spec.checks import check_score_numbers
from mha_spec.position_checks import check_window
from mha_spec.varlen_arguments import VarlenArguments

from .operators import filled, keep, kept, needed, register, tensor_of
from .packing import Packed
from .tasks import softmax_dtype
from .varlen_passes import Results, backward, forward, operands_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .varlen_passes import Differentiated

__all__ = ["attend", "gradients"]

SCHEMA = ", ".join(
    [
        "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor cu_seqlens_q, Tensor? cu_seqlens_kv",
        "Tensor? block_table, Tensor? seqused_kv, Tensor? q_offset, Tensor? alibi_slopes",
        "str? reading, bool causal, SymInt? left, SymInt? right, Scalar? scale, Scalar? softcap",
    ]
)
OPERANDS = 4
"""The number of arguments that have gradients."""
NAMES = tuple(argument.split()[1] for argument in SCHEMA.split(", "))


def attend(a: VarlenArguments) -> tuple[Tensor, Tensor]:
    """Output and lse of a call, as a single operator."""
    return torch.ops.mha_spec_torch.varlen_attend(*_spelled(a))


def gradients(a: VarlenArguments, grad_output: Tensor, grad_lse: Tensor | None) -> Differentiated:
    """The gradients of a call, as two operators."""
    spelled = _spelled(a)
    output, lse = torch.ops.mha_spec_torch.varlen_attend(*spelled)
    results = torch.ops.mha_spec_torch.varlen_gradients(grad_output, grad_lse, output, lse, *spelled)
    query, key, value, sinks = results
    return query, key, value, None if a.sinks is None else sinks


def _spelled(a: VarlenArguments) -> list[Any]:
    """The arguments of a call in the order of the schema."""
    left, right = a.window or (None, None)
    reading = a.q_offset if isinstance(a.q_offset, str) else None
    offset = None if reading is not None else tensor_of(a.q_offset, a.sequences, a.query.device)
    spelled: dict[str, Any] = {"left": left, "right": right, "reading": reading, "q_offset": offset}
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "block_table", "seqused_kv"):
        spelled[name] = tensor_of(getattr(a, name), a.sequences, a.query.device)
    return [spelled[name] if name in spelled else getattr(a, name) for name in NAMES]


def _called(spelled: Sequence[Any]) -> tuple[Packed, Differentiated]:
    """Read an operator's arguments, and check the numbers that were open when it was traced."""
    options = dict(zip(NAMES, spelled, strict=True))
    left, right, reading = (options.pop(name) for name in ("left", "right", "reading"))
    options["q_offset"] = options["q_offset"] if reading is None else reading
    a = VarlenArguments(**options, window=None if left is None and right is None else (left, right))
    check_score_numbers(a)
    check_window(a)
    return Packed.of(a), operands_of(a)


def _attend(*spelled: Any) -> tuple[Tensor, Tensor]:
    packed, operands = _called(spelled)
    output, lse = forward(packed, *operands, needs_lse=True)
    return output.contiguous(), lse.contiguous()


def _attend_shapes(*spelled: Any) -> tuple[Tensor, Tensor]:
    query, value = spelled[0], spelled[2]
    tokens, heads = query.shape[:2]
    lse = query.new_empty((heads, tokens), dtype=softmax_dtype(query))
    return query.new_empty((tokens, heads, value.shape[-1])), lse


def _gradients(
    grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, *spelled: Any
) -> tuple[Tensor, ...]:
    packed, operands = _called(spelled)
    return filled(operands[0], backward(packed, Results(*operands, output, lse), grad_output, grad_lse))


def _gradient_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    operands = arguments[-len(NAMES) :][:OPERANDS]
    return tuple(operands[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in operands)


def _through_attend(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    (output, lse), spelled = kept(ctx, 2)
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    return needed(ctx, torch.ops.mha_spec_torch.varlen_gradients(grad_output, grad_lse, output, lse, *spelled))


COTANGENTS = "Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor lse"
register("varlen_attend", f"({SCHEMA}) -> (Tensor, Tensor)", _attend, _attend_shapes)
FOUR = "(Tensor, Tensor, Tensor, Tensor)"
register("varlen_gradients", f"({COTANGENTS}, {SCHEMA}) -> {FOUR}", _gradients, _gradient_shapes)
torch.library.register_autograd("mha_spec_torch::varlen_attend", _through_attend, setup_context=keep)
