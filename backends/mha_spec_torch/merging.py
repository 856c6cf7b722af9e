"""Merge two halves of a softmax, and compute the gradients in closed form.

Autodiff would subtract two sums over the components; the closed form sums differences, which loses fewer digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["merge", "merge_gradients"]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class _Merge(torch.autograd.Function):
    """Output and lse; the backward uses differentiable operations."""

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
        tangent_output_a, tangent_lse_a, tangent_output_b, tangent_lse_b = tangents
        _, share_a, share_b = _shares(lse_a, lse_b)
        moved = _part(lse_a, share_a, tangent_output_a) + _part(lse_b, share_b, tangent_output_b)
        both_filled = ((lse_a != -math.inf) & (lse_b != -math.inf))[..., None]
        shift = (share_a * share_b * (tangent_lse_a - tangent_lse_b))[..., None] * (output_a - output_b)
        output = moved + torch.where(both_filled, shift, 0.0)
        lse = _part(lse_a, share_a, tangent_lse_a) + _part(lse_b, share_b, tangent_lse_b)
        return output.to(halves[0].dtype), lse.to(halves[1].dtype)


def merge(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the outputs by share, and ln(exp lse_a + exp lse_b) (MHA-MERGE-1 to MHA-MERGE-6)."""
    return _Merge.apply(output_a, lse_a, output_b, lse_b)


def merge_gradients(
    grad_output: Tensor, grad_lse: Tensor | None, output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor
) -> Gradients:
    """Return the gradients of both halves, each in the dtype of its operand (MHA-MERGE-7)."""
    wide_a, wide_lse_a, wide_b, wide_lse_b = _widened(output_a, lse_a, output_b, lse_b)
    grad_output = grad_output.to(wide_a.dtype)
    _, share_a, share_b = _shares(wide_lse_a, wide_lse_b)
    both_filled = (wide_lse_a != -math.inf) & (wide_lse_b != -math.inf)
    difference = torch.where(both_filled[..., None], wide_a - wide_b, 0.0)
    through_shares = torch.where(both_filled, share_a * share_b * (grad_output * difference).sum(-1), 0.0)
    through_lse = torch.zeros_like(wide_lse_a) if grad_lse is None else grad_lse.to(wide_a.dtype)
    return (
        _part(wide_lse_a, share_a, grad_output).to(output_a.dtype),
        (_part(wide_lse_a, share_a, through_lse) + through_shares).to(lse_a.dtype),
        _part(wide_lse_b, share_b, grad_output).to(output_b.dtype),
        (_part(wide_lse_b, share_b, through_lse) - through_shares).to(lse_b.dtype),
    )


def _widened(*halves: Tensor) -> list[Tensor]:
    """Convert both halves to the type of the computation."""
    dtype = torch.float64 if torch.float64 in {half.dtype for half in halves} else torch.float32
    return [half.to(dtype) for half in halves]


def _whole(lse: Tensor) -> Tensor:
    """Return the share of a half if the other is empty: 1, or NaN where its lse is NaN (MHA-MERGE-3)."""
    return torch.where(lse.isnan(), math.nan, 1.0)


def _shares(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lse, and the share of each half: 0 if it is empty, 1 if the other is (MHA-MERGE-2, MHA-MERGE-3).

    No difference contains the lse of an empty half: its gradient would be NaN. An lse of +inf gives NaN (MHA-MERGE-5).
    """
    empty_a, empty_b = lse_a == -math.inf, lse_b == -math.inf
    either = empty_a | empty_b
    joined_a, joined_b = (torch.where(either, 0.0, lse) for lse in (lse_a, lse_b))
    joined = torch.logaddexp(joined_a, joined_b)
    joined = torch.where(joined == math.inf, math.nan, joined)
    share_a, share_b = (
        torch.where(empty, 0.0, torch.where(other_empty, _whole(lse), torch.exp(half - joined)))
        for lse, half, empty, other_empty in ((lse_a, joined_a, empty_a, empty_b), (lse_b, joined_b, empty_b, empty_a))
    )
    return torch.where(empty_b, lse_a, torch.where(empty_a, lse_b, joined)), share_a, share_b


def _part(half: Tensor, share: Tensor, rows: Any) -> Tensor:
    """Return share * rows, or 0 if the half is empty, whatever its rows hold (MHA-MERGE-2)."""
    if isinstance(rows, Tensor) and rows.ndim > share.ndim:
        half, share = half[..., None], share[..., None]
    return torch.where(half == -math.inf, 0.0, share * rows)
