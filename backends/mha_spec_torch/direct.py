"""Calls that the flash kernel for the CPU takes as they are, by as few functions of Python as possible.

After a kernel, the caches of the processor hold little but its numbers, so that the call of a function in Python takes
up to 2 us, 1 % of a small kernel.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import leaks, native
from .function import attend as attend_by_tasks
from .function import gradients, needs_operations
from .masks import constraint_of
from .paths import backward
from .tasks import Operands

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .problem import Direct, Problem
    from .tasks import Constraint

__all__ = ["attend"]

_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]


def attend(
    problem: Problem,
    direct: Direct,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
) -> torch.Tensor:
    """Compute the output by the kernel, with torch's gradient of it, unless another path has to.

    `function.Attention` has the same gradient, but takes longer. A hook adds what torch's gradient lacks. It reads the
    saved tensors once more, which a checkpoint forbids; a checkpoint sets hooks for saved tensors.
    """
    if _top_hooks(True) is None:
        constraint = direct.constraint or constraint_of(mask, problem.dtype, may_be_causal=problem.scale > 0)
        causal, added = constraint
        output, lse = native.forward(query, key, value, 0.0, causal, attn_mask=added, scale=problem.scale)
        is_lost = direct.has_few_keys and added is None and native.may_have_lost_nan(problem, query, key, lse)
        if not is_lost and not ((causal or added is not None) and leaks.may_be_in_output(output, is_causal=causal)):
            if output.requires_grad:
                output.grad_fn.register_hook(partial(_corrected, problem, direct, constraint))
            return output
        problem = problem.without_kernel()
    return attend_by_tasks(problem, Operands(query, key, value, None, None, mask), needs_lse=False)[0]


def _corrected(
    problem: Problem, direct: Direct, constraint: Constraint, grad_inputs: Sequence[Any], grad_outputs: Sequence[Any]
) -> tuple[Any, ...] | None:
    """Replace torch's gradients if they must be differentiable too, or if a NaN has passed a hidden pair."""
    if grad_outputs[0] is None:
        return None
    causal, added = constraint
    is_differentiated = needs_operations(grad_outputs)
    if not is_differentiated and not (
        (causal or added is not None) and leaks.may_be_in_gradients(problem, grad_inputs)
    ):
        return None
    node: Any = torch._C._current_autograd_node()
    query, key = node._saved_query, node._saved_key
    mask = _mask_of(constraint, query, key) if direct.constraint is None else None
    x = Operands(query, key, node._saved_value, None, None, mask)
    if is_differentiated:
        results = gradients(problem, x, grad_outputs[0], None)
    else:
        rows = node._saved_output, node._saved_logsumexp, grad_outputs[0], None
        results = backward(problem.without_kernel(), x, *rows, needs_bias=False)
    return tuple(None if old is None else new for old, new in zip(grad_inputs, results[:3], strict=True))


def _mask_of(constraint: Constraint, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Make the mask of a call anew, because the caller may have changed it since."""
    if constraint.added is not None:
        return constraint.added == 0
    return torch.ones((1, 1, query.shape[2], key.shape[2]), dtype=torch.bool).tril()
