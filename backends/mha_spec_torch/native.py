"""Attention of one task by the CPU's flash kernel, where that has exactly the asked meaning.

What is absorbed here: sizes of key and value that differ, a log-sum-exp of 0 for a row that sees nothing, sinks and the
gradient of lse, which the kernel does not know, and a backward that sums 16-bit gradients in 16 bit.
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
"""With fewer keys the kernel gives 0 for a query of NaN (MHA-NAN-1)."""
LARGEST_SCORE = 1e38
VISIBLE, HIDDEN = torch.tensor(0.0, device="cpu"), torch.tensor(-math.inf, device="cpu")


def keeps_nan(query: torch.Tensor, key: torch.Tensor, scale: float) -> bool:
    """Tell whether the kernel gives NaN wherever a score is NaN: it has enough keys, or no score can be NaN.

    No score is larger than the norms of all queries and of all keys, multiplied.
    """
    if key.shape[2] >= FEWEST_KEYS:
        return True
    norms = torch.linalg.vector_norm(query).item() * torch.linalg.vector_norm(key).item()
    return norms * max(1.0, abs(scale)) < LARGEST_SCORE


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """An operand as the kernels of the CPU read it: each row without gaps, and no two rows in one place.

    They check neither, for query, key, value and output; every other stride, and all of a mask, they heed.
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
    """Output and lse of a task, and whether it hides pairs; a row that sees nothing has lse 0 without `needs_lse`."""
    causal, visible, mask = _constraints(problem, task, x)
    output, lse = _forward(*_of_one_size(x), 0.0, causal, attn_mask=mask, scale=problem.scale)
    output = output[..., : x.value.shape[3]]
    if visible is not None and needs_lse:
        lse = torch.where(_any_key(visible), lse, -math.inf)
    if x.sinks is not None:
        sinks = x.sinks[..., 0].to(lse.dtype)
        total = torch.logaddexp(lse, sinks)
        output = (output * torch.exp(lse - torch.where(total == -math.inf, 0.0, total))[..., None]).to(output.dtype)
        lse = total
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
    """dQ, dK and dV of a task in the softmax's type, and whether it hides pairs.

    With o and lse that include the sink, the kernel's formula is that of attention with a sink. A column of 1 in O and
    of -grad_lse in dO makes its rowsum(dO O) the D of MHA-VJP-1.
    """
    causal, visible, mask = _constraints(problem, task, x)
    query, key, value = (one.to(problem.dtype) for one in x[:3])
    output, grad_output = output.to(problem.dtype), grad_output.to(problem.dtype)
    size = max(query.shape[3], value.shape[3] + (grad_lse is not None))
    if grad_lse is not None:
        output = torch.cat([output, torch.ones_like(lse, dtype=output.dtype)[..., None]], dim=-1)
        grad_output = torch.cat([grad_output, -grad_lse.to(problem.dtype)[..., None]], dim=-1)
    wide = [_widened(one, size) for one in (grad_output, query, key, value, output)]
    lse = lse if visible is None else torch.where(lse == -math.inf, 0.0, lse)
    of_query, of_key, of_value = _backward(*wide, lse, 0.0, causal, attn_mask=mask, scale=problem.scale)
    qk_dim, v_dim = query.shape[3], value.shape[3]
    return of_query[..., :qk_dim], of_key[..., :qk_dim], of_value[..., :v_dim], causal or mask is not None


def _constraints(problem: Problem, task: Task, x: Operands) -> tuple[bool, torch.Tensor | None, torch.Tensor | None]:
    """How the kernel is told what is hidden: is_causal, or a float mask; and which pairs are visible.

    The kernel multiplies the -inf of is_causal by the scale, which must be positive for that.
    """
    if problem.scale > 0 and problem.visibility.diagonal(task, x.bias):
        return True, None, None
    visible = problem.visibility.visible(task, x.bias)
    if visible is None:
        return False, None, None
    return False, visible, torch.where(visible, VISIBLE if x.bias is None else x.bias, HIDDEN).to(problem.dtype)


def _any_key(visible: torch.Tensor) -> torch.Tensor:
    """Which rows see a key; the maximum of bytes is found many times faster than `any`."""
    return visible.contiguous().view(torch.uint8).amax(-1).to(torch.bool)


def _of_one_size(x: Operands) -> list[torch.Tensor]:
    """Query, key and value with zeros appended, so that keys and values have one size."""
    size = max(x.query.shape[3], x.value.shape[3])
    return [_widened(one, size) for one in x[:3]]


def _widened(array: torch.Tensor, size: int) -> torch.Tensor:
    return dense_rows(array) if array.shape[3] == size else pad(array, (0, size - array.shape[3]))
