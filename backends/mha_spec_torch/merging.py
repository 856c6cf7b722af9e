"""Two halves of one softmax, and the gradients of merging them in closed form.

Autodiff of the formula would subtract two sums over the components where the closed form sums a difference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["merge", "merge_gradients"]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class _Merge(torch.autograd.Function):
    """Output and lse; the backward is made of differentiable operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        wide = _widened(output_a, lse_a, output_b, lse_b)
        lse, share_a, share_b = _shares(wide[1], wide[3])
        parts = _part(wide[1], share_a, wide[0]) + _part(wide[3], share_b, wide[2])
        return parts.to(output_a.dtype), lse.to(lse_a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Gradients:
        return merge_gradients(grad_outputs[0], grad_outputs[1], *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, Tensor]:
        halves = ctx.saved_tensors
        output_a, lse_a, output_b, lse_b = _widened(*halves)
        tangents = (0.0 if tangent is None else tangent for tangent in grad_inputs)
        of_output_a, of_lse_a, of_output_b, of_lse_b = tangents
        _, share_a, share_b = _shares(lse_a, lse_b)
        moved = _part(lse_a, share_a, of_output_a) + _part(lse_b, share_b, of_output_b)
        both = ((lse_a != -math.inf) & (lse_b != -math.inf))[..., None]
        shift = (share_a * share_b * (of_lse_a - of_lse_b))[..., None] * (output_a - output_b)
        output = moved + torch.where(both, shift, 0.0)
        lse = _part(lse_a, share_a, of_lse_a) + _part(lse_b, share_b, of_lse_b)
        return output.to(halves[0].dtype), lse.to(halves[1].dtype)


def merge(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """lse = ln(exp lse_a + exp lse_b); each output by its share, an empty half not at all (MHA-MERGE-1 to -6)."""
    return _Merge.apply(output_a, lse_a, output_b, lse_b)


def merge_gradients(
    grad_output: Tensor, grad_lse: Tensor | None, output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor
) -> Gradients:
    """The gradients of both halves, each of its operand's dtype (MHA-MERGE-7)."""
    wide_a, wide_lse_a, wide_b, wide_lse_b = _widened(output_a, lse_a, output_b, lse_b)
    grad_output = grad_output.to(wide_a.dtype)
    _, share_a, share_b = _shares(wide_lse_a, wide_lse_b)
    both = (wide_lse_a != -math.inf) & (wide_lse_b != -math.inf)
    apart = torch.where(both[..., None], wide_a - wide_b, 0.0)
    through_shares = torch.where(both, share_a * share_b * (grad_output * apart).sum(-1), 0.0)
    through_lse = torch.zeros_like(wide_lse_a) if grad_lse is None else grad_lse.to(wide_a.dtype)
    return (
        _part(wide_lse_a, share_a, grad_output).to(output_a.dtype),
        (_part(wide_lse_a, share_a, through_lse) + through_shares).to(lse_a.dtype),
        _part(wide_lse_b, share_b, grad_output).to(output_b.dtype),
        (_part(wide_lse_b, share_b, through_lse) - through_shares).to(lse_b.dtype),
    )


def _widened(*halves: Tensor) -> list[Tensor]:
    """Both halves in the type in which they are merged."""
    dtype = torch.float64 if torch.float64 in {half.dtype for half in halves} else torch.float32
    return [half.to(dtype) for half in halves]


def _shares(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lse, and the share of each half: 0 where it is empty, 1 where the other is (MHA-MERGE-2, MHA-MERGE-3).

    The lse of an empty half takes no part in a difference, whose gradient would be NaN; +inf makes NaN (MHA-MERGE-5).
    """
    empty_a, empty_b = lse_a == -math.inf, lse_b == -math.inf
    either = empty_a | empty_b
    joined_a, joined_b = (torch.where(either, 0.0, lse) for lse in (lse_a, lse_b))
    joined = torch.logaddexp(joined_a, joined_b)
    joined = torch.where(joined == math.inf, math.nan, joined)
    share_a, share_b = (
        torch.where(empty, 0.0, torch.where(other_empty, 1.0, torch.exp(half - joined)))
        for half, empty, other_empty in ((joined_a, empty_a, empty_b), (joined_b, empty_b, empty_a))
    )
    return torch.where(empty_b, lse_a, torch.where(empty_a, lse_b, joined)), share_a, share_b


def _part(half: Tensor, share: Tensor, rows: Any) -> Tensor:
    """share * rows, and 0 where the half is empty, whatever its rows hold (MHA-MERGE-2)."""
    if isinstance(rows, Tensor) and rows.ndim > share.ndim:
        half, share = half[..., None], share[..., None]
    return torch.where(half == -math.inf, 0.0, share * rows)
