"""Attention of a task by torch's flash kernel for the CPU, where it has exactly the same meaning.

This module adds what the kernel lacks: keys and values of different sizes, the lse of a row that sees no key (which the
kernel sets to 0), sinks, the gradient of lse, and sums of 16-bit gradients in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from . import leaks
from .masks import constraint_of
from .tasks import FEWEST_KEYS, NOTHING_HIDDEN, Constraint, converted, dense_rows

if TYPE_CHECKING:
    from .problem import Problem
    from .tasks import Operands, Task

__all__ = ["attend", "forward", "gradients", "may_have_lost_nan"]

# A call of this function takes 4 us less than one of the operator in `torch.ops.aten`; the backward has no function.
forward: Any = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(problem: Problem, task: Task, x: Operands, *, needs_lse: bool) -> tuple[torch.Tensor, Any] | None:
    """Compute output and, if needed, lse; None if the formula must compute them.

    The kernel lacks an option, a hidden NaN may have passed, or a visible NaN may be lost.
    """
    if not problem.suits_flash:
        return None
    query, key, value, _, sinks, _ = x
    if not problem.is_ready:
        query, key, value = map(dense_rows, _of_one_size(query, key, value))
    if sinks is not None:
        # A 16-bit output would be rounded twice: by the kernel, and as a product with the share of the keys.
        query, key, value = (converted(operand, problem.dtype) for operand in (query, key, value))
    causal, added = _constraint(problem, task, x)
    output, lse = forward(query, key, value, 0.0, causal, attn_mask=added, scale=problem.scale)
    if needs_lse or sinks is not None or (added is None and key.shape[2] < FEWEST_KEYS):
        lse = _with_empty_rows(problem, task, query, key, added, lse)
    if lse is None or ((causal or added is not None) and leaks.may_be_in_output(output, is_causal=causal)):
        return None
    if value is not x.value:
        output = output[..., : x.value.shape[3]]
    return (output, lse) if sinks is None else _with_sinks(sinks, output, lse, x.query.dtype)


def _with_empty_rows(
    problem: Problem,
    task: Task,
    query: torch.Tensor,
    key: torch.Tensor,
    added: torch.Tensor | None,
    lse: torch.Tensor,
) -> torch.Tensor | None:
    """Return lse with -inf for rows that see no key; None if a NaN may be lost.

    The kernel gives lse = 0 to a row that it takes for empty.
    """
    may_be_empty = added is not None and (added is not task.added or task.has_empty_rows)
    if not may_be_empty and key.shape[2] >= FEWEST_KEYS:
        return lse
    if added is None:
        return None if may_have_lost_nan(problem, query, key, lse) else lse
    return lse if _has_no_zero(lse) else torch.where(added.amax(-1) == -math.inf, -math.inf, lse)


def may_have_lost_nan(problem: Problem, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor) -> bool:
    """Return True if the kernel may have taken a row of NaN for an empty one, to which it gives an lse of 0."""
    return not (_has_no_zero(lse) or problem.finite(query, key))


def _has_no_zero(lse: torch.Tensor) -> bool:
    return int(torch.count_nonzero(lse)) == lse.numel()


def _with_sinks(
    sinks: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a logit without a value to each row (MHA-SINK-1), and round the output once."""
    sinks = sinks[..., 0].to(lse.dtype)
    # exp(lse - logaddexp(lse, sinks)) would lose a small weight of the sink to the rounding of a large lse.
    share = torch.where(lse == -math.inf, 0.0, torch.sigmoid(lse - sinks))
    return (output * share[..., None]).to(dtype), torch.logaddexp(lse, sinks)


def gradients(
    problem: Problem,
    task: Task,
    x: Operands,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Compute dQ, dK and dV of a task in the softmax's type; None if a non-finite value may have passed a hidden pair.

    If O and lse include the sink, the kernel's formula is that of attention with a sink.
    """
    causal, added = _constraint(problem, task, x)
    query, key, value = x[:3]
    is_padded = query.shape[3] != value.shape[3] or grad_lse is not None
    if is_padded or query.dtype != problem.dtype or grad_output.dtype != problem.dtype:
        operands = [converted(operand, problem.dtype) for operand in (query, key, value, output, grad_output)]
        query, key, value, output, grad_output = _of_one_size(*_with_grad_lse(operands, grad_lse))
    if not problem.is_ready:
        query, key, value, output = map(dense_rows, (query, key, value, output))
    lse = lse if added is None else torch.where(lse == -math.inf, 0.0, lse)
    # The kernel itself copies a grad_output that is not contiguous.
    grads = _backward(grad_output, query, key, value, output, lse, 0.0, causal, attn_mask=added, scale=problem.scale)
    if (causal or added is not None) and leaks.may_be_in_gradients(problem, grads):
        return None
    if is_padded:
        sizes = (operand.shape[3] for operand in x[:3])
        grads = tuple(gradient[..., :size] for gradient, size in zip(grads, sizes, strict=True))
    return grads


def _with_grad_lse(operands: list[torch.Tensor], grad_lse: torch.Tensor | None) -> list[torch.Tensor]:
    """Append a column, 1 in O and -grad_lse in dO, which makes the kernel's rowsum(dO O) equal to D of MHA-VJP-1."""
    if grad_lse is None:
        return operands
    *operands, output, grad_output = operands
    output = torch.cat([output, torch.ones_like(output[..., :1])], dim=-1)
    return [*operands, output, torch.cat([grad_output, -grad_lse.to(output.dtype)[..., None]], dim=-1)]


def _constraint(problem: Problem, task: Task, x: Operands) -> Constraint:
    """Return the kernel's arguments for hidden pairs.

    SDPA would convert a boolean mask in more steps. Pairs that are causal need no logits, and the kernel leaves out the
    blocks that they hide.
    """
    known = task.constraint(problem.scale) if x.mask is None and x.bias is None else None
    if known is not None:
        return known
    visible = problem.visible(task, x)
    if visible is None:
        return NOTHING_HIDDEN
    if x.bias is None:
        return constraint_of(visible, problem.dtype, may_be_causal=problem.scale > 0)
    return Constraint(is_causal=False, added=converted(torch.where(visible, x.bias, -math.inf), problem.dtype))


def _of_one_size(*operands: torch.Tensor) -> list[torch.Tensor]:
    """Append zeros to operands, so that they have the same size."""
    size = max(operand.shape[3] for operand in operands)
    return [operand if operand.shape[3] == size else _widened(operand, size) for operand in operands]


def _widened(array: torch.Tensor, size: int) -> torch.Tensor:
    # `pad` may keep a memory format whose rows are not contiguous.
    return dense_rows(pad(array, (0, size - array.shape[3])))
