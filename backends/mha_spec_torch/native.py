"""Attention of a task by torch's flash kernel for the CPU, where it has exactly the same meaning.

This module adds what the kernel lacks: keys and values of different sizes, the lse of a row that sees no key (which the
kernel sets to 0), sinks, the gradient of lse, and sums of 16-bit gradients in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from .problem import Problem
    from .tasks import Operands, Task

__all__ = ["attend", "dense_rows", "gradients", "keeps_nan"]

FEWEST_KEYS = 16
"""With fewer keys, the kernel returns 0 for a query of NaN (MHA-NAN-1)."""
LARGEST_SCORE = 1e38
VISIBLE, HIDDEN = torch.tensor(0.0, device="cpu"), torch.tensor(-math.inf, device="cpu")


def keeps_nan(query: torch.Tensor, key: torch.Tensor, scale: float) -> bool:
    """Tell whether the kernel gives NaN wherever a score is NaN: it has enough keys, or no score can be NaN.

    No score is larger than the norm of all queries times the norm of all keys.
    """
    if key.shape[2] >= FEWEST_KEYS:
        return True
    norms = torch.linalg.vector_norm(query).item() * torch.linalg.vector_norm(key).item()
    return norms * max(1.0, abs(scale)) < LARGEST_SCORE


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Copy an operand unless each row is contiguous and no two rows overlap.

    The kernels assume both of query, key, value and output without a check; they respect all other strides.
    """
    stride, size = x.stride(), x.shape[3]
    return (
        x
        if stride[3] == 1 and (stride[2] >= size or x.shape[2] == 1)
        else x.clone(memory_format=torch.contiguous_format)
    )


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(problem: Problem, task: Task, x: Operands, *, needs_lse: bool) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Compute output and lse, and tell if pairs are hidden; without `needs_lse`, the lse of an empty row is 0."""
    causal, visible, mask = _constraints(problem, task, x)
    # With sinks, a 16-bit output would be rounded twice: by the kernel, and as a product with the share of the keys.
    operands = _of_one_size(x if x.sinks is None else x.to(problem.dtype))
    output, lse = _forward(*operands, 0.0, causal, attn_mask=mask, scale=problem.scale)
    output = output[..., : x.value.shape[3]]
    if visible is not None and needs_lse:
        lse = torch.where(_any_key(visible), lse, -math.inf)
    if x.sinks is not None:
        sinks = x.sinks[..., 0].to(lse.dtype)
        # exp(lse - logaddexp(lse, sinks)) would lose a small weight of the sink to the rounding of a large lse.
        share = torch.where(lse == -math.inf, 0.0, torch.sigmoid(lse - sinks))
        output = output * share[..., None]
        lse = torch.logaddexp(lse, sinks)
    return output, lse, causal or mask is not None


def gradients(
    problem: Problem,
    task: Task,
    x: Operands,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Compute dQ, dK and dV of a task in the softmax's type, and tell whether it hides pairs.

    If O and lse include the sink, the kernel's formula is that of attention with a sink. An additional column, 1 in O
    and -grad_lse in dO, makes the kernel's rowsum(dO O) equal to D of MHA-VJP-1.
    """
    causal, visible, mask = _constraints(problem, task, x)
    query, key, value = (operand.to(problem.dtype) for operand in x[:3])
    output, grad_output = output.to(problem.dtype), grad_output.to(problem.dtype)
    size = max(query.shape[3], value.shape[3] + (grad_lse is not None))
    if grad_lse is not None:
        output = torch.cat([output, torch.ones_like(lse, dtype=output.dtype)[..., None]], dim=-1)
        grad_output = torch.cat([grad_output, -grad_lse.to(problem.dtype)[..., None]], dim=-1)
    wide = [_widened(array, size) for array in (grad_output, query, key, value, output)]
    lse = lse if visible is None else torch.where(lse == -math.inf, 0.0, lse)
    grad_query, grad_key, grad_value = _backward(*wide, lse, 0.0, causal, attn_mask=mask, scale=problem.scale)
    qk_dim, v_dim = query.shape[3], value.shape[3]
    return grad_query[..., :qk_dim], grad_key[..., :qk_dim], grad_value[..., :v_dim], causal or mask is not None


def _constraints(problem: Problem, task: Task, x: Operands) -> tuple[bool, torch.Tensor | None, torch.Tensor | None]:
    """Return the kernel's arguments for hidden pairs, is_causal or a float mask, and which pairs are visible.

    The kernel multiplies the -inf of is_causal by the scale, so that the scale must be positive.
    """
    if problem.scale > 0 and problem.visibility.diagonal(task, x.bias):
        return True, None, None
    visible = problem.visibility.visible(task, x.bias)
    if visible is None:
        return False, None, None
    return False, visible, torch.where(visible, VISIBLE if x.bias is None else x.bias, HIDDEN).to(problem.dtype)


def _any_key(visible: torch.Tensor) -> torch.Tensor:
    """Tell which rows see a key; the maximum over bytes is many times faster than `any`."""
    return visible.contiguous().view(torch.uint8).amax(-1).to(torch.bool)


def _of_one_size(x: Operands) -> list[torch.Tensor]:
    """Append zeros to query, key and value, so that keys and values have the same size."""
    size = max(x.query.shape[3], x.value.shape[3])
    return [_widened(operand, size) for operand in x[:3]]


def _widened(array: torch.Tensor, size: int) -> torch.Tensor:
    # `pad` may keep a memory format whose rows are not contiguous.
    return dense_rows(array if array.shape[3] == size else pad(array, (0, size - array.shape[3])))
