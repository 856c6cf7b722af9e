"""The two passes inside autograd: one function with its own backward, and what lies beyond the first derivative."""

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
    """Whether a transform of torch.func or forward mode is at work, which need differentiable operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Attention(torch.autograd.Function):
    """Output and lse of a prepared call."""

    @staticmethod
    def forward(ctx: Any, a: Arguments, problem: Problem, *operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what the backward reads; a gradient that nobody gave stays None."""
        x = Operands(*operands)
        output, lse = forward(problem, x, needs_lse=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x, output, lse)
        ctx.a, ctx.problem = a, problem
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """The closed form; where its own gradient may be asked, that of differentiable operations."""
        *operands, output, lse = ctx.saved_tensors
        x, (grad_output, grad_lse) = Operands(*operands), grad_outputs
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        if torch.is_grad_enabled():
            found = gradients(ctx.a, x, grad_output, grad_lse)
        else:
            found = backward(ctx.problem, x, output, lse, grad_output, grad_lse, of_bias=ctx.needs_input_grad[5])
        return (
            None,
            None,
            *(one if needed else None for one, needed in zip(found, ctx.needs_input_grad[2:], strict=True)),
        )


def gradients(a: Arguments, x: Operands, grad_output: torch.Tensor, grad_lse: torch.Tensor | None) -> Operands:
    """The gradients as a differentiable function of the operands and of the cotangents, inside any transform."""
    present = [operand is not None for operand in x]

    def call(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return differentiable(Problem.of(a, host=False), _filled(present, operands))

    given = [operand for operand in x if operand is not None]
    pulled: Any = torch.func.vjp(call, *given)
    (output, lse), pull = pulled
    cotangents = grad_output.to(output.dtype), torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype)
    return _filled(present, pull(cotangents))


def _filled(present: Sequence[bool], operands: Iterable[torch.Tensor]) -> Operands:
    """Operands of which some are None."""
    following = iter(operands)
    return Operands(*(next(following) if is_there else None for is_there in present))  # pyright: ignore[reportArgumentType]
