"""The two passes as a function of autograd with a custom backward, and derivatives of higher order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from .paths import backward, differentiable, forward
from .problem import Problem
from .tasks import Operands

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mha_spec.arguments import Arguments

__all__ = ["Attention", "gradients", "transformed"]


def transformed() -> bool:
    """Tell whether a transform of torch.func or forward mode is active; both need differentiable operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Attention(torch.autograd.Function):
    """Output and lse of a prepared call."""

    @staticmethod
    def forward(ctx: Any, a: Arguments, problem: Problem, *operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the tensors that the backward reads; a missing cotangent stays None."""
        x = Operands(*operands)
        output, lse = forward(problem, x, needs_lse=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x, output, lse)
        ctx.a, ctx.problem = a, problem
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Use the closed form; if the gradient must be differentiable too, use differentiable operations."""
        *operands, output, lse = ctx.saved_tensors
        x, (grad_output, grad_lse) = Operands(*operands), grad_outputs
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        if torch.is_grad_enabled():
            results = gradients(ctx.a, x, grad_output, grad_lse)
        else:
            needs_bias = ctx.needs_input_grad[5]
            results = backward(ctx.problem, x, output, lse, grad_output, grad_lse, needs_bias=needs_bias)
        needed = zip(results, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient if is_needed else None for gradient, is_needed in needed)


def gradients(a: Arguments, x: Operands, grad_output: torch.Tensor, grad_lse: torch.Tensor | None) -> Operands:
    """Return the gradients as a differentiable function of operands and cotangents, inside any transform."""
    present = [operand is not None for operand in x]

    def call(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return differentiable(Problem.of(a, host=False), _filled(present, operands))

    operands = [operand for operand in x if operand is not None]
    results: Any = torch.func.vjp(call, *operands)
    (output, lse), pull = results
    cotangents = grad_output.to(output.dtype), torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype)
    return _filled(present, pull(cotangents))


def _filled(present: Sequence[bool], operands: Iterable[torch.Tensor]) -> Operands:
    """Put None where an operand is not present."""
    following = iter(operands)
    return Operands(*(next(following) if is_present else None for is_present in present))  # pyright: ignore[reportArgumentType]
