"""The two passes as a function of autograd with a custom backward, and derivatives of higher order."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from mha_spec.array_checks import check_library
from mha_spec.errors import refuse_type

from . import paths
from .paths import backward, differentiable
from .symbols import in_jit_trace
from .tasks import Operands

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .problem import Problem

__all__ = [
    "Attention",
    "any_needs_gradient",
    "attend",
    "check_tensor",
    "gradients",
    "needs_operations",
    "transformed",
    "unhooked",
]

_is_batched: Any = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]


def transformed() -> bool:
    """Tell whether a transform of torch.func or forward mode is active; both need differentiable operations."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_tensor(value: object, label: str = "query") -> None:
    """Require a tensor, and no transform within torch.jit.trace, which does not record its tensors (MHA-ARG-4)."""
    check_library("torch", value, label)
    if in_jit_trace() and transformed():
        refuse_type(
            "MHA-ARG-4",
            f"`{label}` must not be transformed by torch.func or by forward mode within torch.jit.trace, which cannot "
            "record the call. Leave out the transform, or compile the call with torch.compile.",
        )


def attend(problem: Problem, x: Operands, *, needs_lse: bool) -> tuple[torch.Tensor, Any]:
    """Compute output and, if needed, lse; autograd records the call if an operand needs a gradient."""
    if torch.is_grad_enabled() and any_needs_gradient(x):
        return Attention.apply(problem, *x)
    return paths.attend(problem, x, needs_lse=needs_lse)


def any_needs_gradient(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Tell whether a tensor that is present needs a gradient."""
    # A loop takes half of the time that `any` takes with a generator.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def needs_operations(grad_outputs: Sequence[Any]) -> bool:
    """Tell whether the gradient itself is differentiated or transformed, also by `is_grads_batched` of autograd."""
    if torch.is_grad_enabled() or transformed():
        return True
    # A loop takes half of the time that `any` takes with a generator.
    for gradient in grad_outputs:  # noqa: SIM110
        if gradient is not None and _is_batched(gradient):
            return True
    return False


class Attention(torch.autograd.Function):
    """Output and lse of a prepared call."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the tensors that the backward reads; a missing cotangent stays None."""
        x = Operands(*operands)
        output, lse = paths.attend(problem, x, needs_lse=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x, output, lse, *problem.tensors)
        ctx.problem = problem
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Use the closed form; if the gradient must be differentiable too, use differentiable operations."""
        saved = ctx.saved_tensors  # Once, because a checkpoint forbids to read them again.
        operands, (output, lse) = saved[:6], saved[6:8]
        x, (grad_output, grad_lse) = Operands(*operands), grad_outputs
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        if needs_operations(grad_outputs):
            results = gradients(ctx.problem, x, grad_output, grad_lse)
        else:
            needs_bias = ctx.needs_input_grad[4]
            results = backward(ctx.problem, x, output, lse, grad_output, grad_lse, needs_bias=needs_bias)
        return None, *results


@contextmanager
def unhooked() -> Iterator[None]:
    """Suspend the hooks of saved tensors, such as those of a checkpoint, with which torch.func.vjp raises an error."""
    autograd, hooks = torch._C._autograd, []  # pyright: ignore[reportAttributeAccessIssue]
    while autograd._top_saved_tensors_default_hooks(True) is not None:
        hooks.append(autograd._top_saved_tensors_default_hooks(True))
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


@unhooked()
def gradients(problem: Problem, x: Operands, grad_output: torch.Tensor, grad_lse: torch.Tensor | None) -> Operands:
    """Return the gradients as a differentiable function of operands and cotangents, inside any transform."""
    present, unread = [operand is not None for operand in x[:5]], problem.unread()

    def call(*operands: torch.Tensor) -> list[torch.Tensor]:
        operands_of_call = _filled(present, operands)._replace(mask=x.mask)
        output, lse = differentiable(unread, operands_of_call, needs_lse=grad_lse is not None)
        return [output] if grad_lse is None else [output, lse]

    operands = [operand for operand in x[:5] if operand is not None]
    results, pull = cast("Any", torch.func.vjp(call, *operands))
    cotangents = [grad_output] if grad_lse is None else [grad_output, grad_lse]
    return _filled(present, pull([grad.to(result.dtype) for grad, result in zip(cotangents, results, strict=True)]))


def _filled(present: Sequence[bool], operands: Iterable[torch.Tensor]) -> Operands:
    """Put None where an operand is not present."""
    following = iter(operands)
    return Operands(*(next(following) if is_present else None for is_present in present))  # pyright: ignore[reportArgumentType]
