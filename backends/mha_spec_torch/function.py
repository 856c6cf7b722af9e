"""The two passes as a function of autograd with a custom backward, and derivatives of higher order."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from . import leaks, native
from .paths import attend, backward, differentiable
from .tasks import NOTHING_HIDDEN, Operands

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .problem import Problem

__all__ = [
    "Attention",
    "attend_directly",
    "gradients",
    "is_checkpointed",
    "needs_operations",
    "transformed",
    "unhooked",
]

_is_batched: Any = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]


def transformed() -> bool:
    """Tell whether a transform of torch.func or forward mode is active; both need differentiable operations."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def attend_directly(problem: Problem, x: Operands) -> torch.Tensor | None:
    """Compute the output by a call of the kernel alone, with torch's gradient; None if the kernel's is not right.

    `Attention` has the same gradient, but a function in Python takes longer than a small kernel. A hook adds what
    torch's gradient lacks.
    """
    output: Any = native.attend_directly(problem, x.query, x.key, x.value)
    if output is not None and output.requires_grad:
        output.grad_fn.register_hook(partial(_corrected, problem))
    return output


def is_checkpointed() -> bool:
    """Tell whether saved tensors have hooks; a checkpoint forbids to read them once more, as `_corrected` does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]


def _corrected(problem: Problem, grad_inputs: Sequence[Any], grad_outputs: Sequence[Any]) -> tuple[Any, ...] | None:
    """Replace torch's gradients if they must be differentiable too, or if a NaN has passed a hidden pair."""
    if grad_outputs[0] is None:
        return None
    is_differentiated = needs_operations(grad_outputs)
    if not is_differentiated and not _may_leak(problem, grad_inputs):
        return None
    node: Any = torch._C._current_autograd_node()
    x = Operands(node._saved_query, node._saved_key, node._saved_value, None, None)
    if is_differentiated:
        results = gradients(problem, x, grad_outputs[0], None)
    else:
        rows = node._saved_output, node._saved_logsumexp, grad_outputs[0], None
        results = backward(problem.without_kernel(), x, *rows, needs_bias=False)
    return tuple(None if old is None else new for old, new in zip(grad_inputs, results[:3], strict=True))


def _may_leak(problem: Problem, grad_inputs: Sequence[Any]) -> bool:
    is_causal, added = problem.direct or NOTHING_HIDDEN
    hides = is_causal or added is not None
    return hides and leaks.may_be_in_gradients(problem, grad_inputs, is_causal=is_causal)


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
        output, lse = attend(problem, x, needs_lse=True)
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

    def call(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return differentiable(unread, _filled(present, operands)._replace(mask=x.mask))

    operands = [operand for operand in x[:5] if operand is not None]
    results: Any = torch.func.vjp(call, *operands)
    (output, lse), pull = results
    cotangents = grad_output.to(output.dtype), torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype)
    return _filled(present, pull(cotangents))


def _filled(present: Sequence[bool], operands: Iterable[torch.Tensor]) -> Operands:
    """Put None where an operand is not present."""
    following = iter(operands)
    return Operands(*(next(following) if is_present else None for is_present in present))  # pyright: ignore[reportArgumentType]
