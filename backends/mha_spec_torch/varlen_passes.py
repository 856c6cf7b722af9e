"""The two passes of a packed or paged call, and its derivatives in differentiable operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mha_spec.arguments import Arguments

from . import decoding, flash_varlen, paths
from .function import needs_operations, unhooked
from .packing import dense, linear_bias, packed_again
from .problem import Problem
from .tasks import Operands, Span, converted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mha_spec.varlen_arguments import VarlenArguments

    from .packing import Packed, Part

    Differentiated = tuple[Tensor, Tensor, Tensor, Tensor | None]

__all__ = ["Results", "backward", "differentiable", "forward", "gradients", "operands_of", "recorded"]


class Results(NamedTuple):
    """The operands and the results of a call, which the backward reads."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    output: Tensor
    lse: Tensor


def operands_of(a: VarlenArguments) -> Differentiated:
    """Select the arguments that have gradients."""
    return a.query, a.key, a.value, a.sinks


def forward(
    packed: Packed, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *, needs_lse: bool
) -> tuple[Tensor, Any]:
    """Compute the output and, if needed, lse (heads, q_tokens) of all sequences."""
    if flash_varlen.takes(packed, query, key, value):
        return flash_varlen.attend(packed, query, key, value)
    rows = None if packed.paged is None else decoding.attend(packed, query, key, value, sinks, needs_lse=needs_lse)
    if rows is not None:
        return rows
    if packed.paged is None:
        output, lse = paths.forward(packed.problem, packed.operands(query, key, value, sinks), needs_lse=needs_lse)
    else:
        x = Operands(dense(query), key.detach(), value.detach(), None, sinks)
        output, lse = paths.forward(packed.paged, x, needs_lse=needs_lse)
    output = packed_again(output)
    if lse is None:
        return output, None
    lse = lse.transpose(0, 1).flatten(1)
    for tokens in packed.outside:
        lse[:, tokens] = -math.inf
    return output, lse


def backward(packed: Packed, x: Results, grad_output: Tensor, grad_lse: Tensor | None) -> Differentiated:
    """Compute the gradients, each in the dtype of its operand, of sums in the softmax's type (MHA-VARLEN-11)."""
    lse = x.lse
    if packed.outside and x.sinks is not None:
        lse, grad_lse = lse.clone(), None if grad_lse is None else grad_lse.clone()
        for tokens in packed.outside:
            lse[:, tokens] = math.inf  # A weight of the sink of 0.
            if grad_lse is not None:
                grad_lse[:, tokens] = 0.0
    cotangents = dense(grad_output), None if grad_lse is None else grad_lse[None]
    rows = paths.Rows(dense(x.output), lse[None], *cotangents)
    sums, of_sinks = paths.gradients(packed.problem, packed.operands(*x[:4]), rows, needs_bias=False)
    key, value = (packed.scatter(packed_again(part), like) for part, like in ((sums.key, x.key), (sums.value, x.value)))
    return (
        converted(packed_again(sums.query), x.query.dtype),
        converted(key, x.key.dtype),
        converted(value, x.value.dtype),
        None if x.sinks is None or of_sinks is None else converted(of_sinks, x.sinks.dtype),
    )


class _PackedAttention(torch.autograd.Function):
    """Output and lse of a packed or paged call."""

    @staticmethod
    def forward(ctx: Any, packed: Packed, *operands: Any) -> tuple[Tensor, Tensor]:
        """Keep the tensors that the backward reads; a missing cotangent stays None."""
        output, lse = forward(packed, *operands, needs_lse=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, output, lse)
        ctx.packed = packed
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Use the closed form; if the gradient must be differentiable too, use differentiable operations."""
        x, (grad_output, grad_lse) = Results(*ctx.saved_tensors), grad_outputs
        grad_output = torch.zeros_like(x.output) if grad_output is None else grad_output
        if needs_operations(grad_outputs):
            return None, *gradients(ctx.packed, x[:4], grad_output, grad_lse)
        return None, *backward(ctx.packed, x, grad_output, grad_lse)


def recorded(packed: Packed, *operands: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute output and lse, and record the call for autograd."""
    return _PackedAttention.apply(packed, *operands)


def differentiable(
    packed: Packed, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute output and lse by differentiable operations alone, sequence by sequence."""
    a, key, value = packed.a, packed.gather(key), packed.gather(value)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for part in packed.parts:
        output, lse = _of_sequence(packed, part, query[part.queries.slice], key, value, sinks)
        results[part.queries.start] = packed_again(output), lse[0]
    for tokens in packed.outside:
        rows = tokens.stop - tokens.start
        empty = query.new_full((a.heads, rows), -math.inf, dtype=packed.problem.dtype)
        results[tokens.start] = query.new_zeros((rows, a.heads, value.shape[2])), empty
    if not results:
        return query.new_zeros((0, a.heads, value.shape[2])), query.new_zeros((a.heads, 0), dtype=packed.problem.dtype)
    outputs, rows_of_lse = zip(*(results[start] for start in sorted(results)), strict=True)
    return torch.cat(outputs), torch.cat(rows_of_lse, 1)


def _of_sequence(
    packed: Packed, part: Part, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    a, keys = packed.a, part.keys
    options: dict[str, Any] = {"scale": a.scale, "softcap": a.softcap, "sinks": sinks}
    if a.positional:
        options |= {"causal": a.causal, "window": a.window, "q_offset": part.offset}
    if packed.slopes is not None:
        options["bias"] = linear_bias(packed.slopes, part.offset, Span(0, query.shape[0]), Span(0, keys.size))
    arguments = Arguments(dense(query), dense(key[keys.slice]), dense(value[keys.slice]), **options)
    return paths.differentiable(Problem.of(arguments, host=False), Operands.of(arguments))


@unhooked()
def gradients(
    packed: Packed, operands: Sequence[Tensor | None], grad_output: Tensor, grad_lse: Tensor | None
) -> Differentiated:
    """Return the gradients as a differentiable function of operands and cotangents, inside any transform."""
    present = [x for x in operands if x is not None]

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, *of_sinks = leaves
        return differentiable(packed, query, key, value, of_sinks[0] if of_sinks else None)

    results: Any = torch.func.vjp(call, *present)
    (output, lse), pull = results
    cotangents = grad_output.to(output.dtype), torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype)
    query, key, value, *of_sinks = pull(cotangents)
    return query, key, value, of_sinks[0] if of_sinks else None
