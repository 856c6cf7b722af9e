"""Two halves of one softmax, in operations whose gradients are right for empty halves as well."""

from __future__ import annotations

import math

import torch

__all__ = ["merge"]


def merge(
    output_a: torch.Tensor, lse_a: torch.Tensor, output_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse = ln(exp lse_a + exp lse_b); each output by its share, an empty half not at all (MHA-MERGE-1 to -3)."""
    nothing = (lse_a == -math.inf) & (lse_b == -math.inf)
    lse = torch.logaddexp(torch.where(nothing, 0.0, lse_a), lse_b)
    parts = [_part(output.to(lse.dtype), half, lse) for output, half in ((output_a, lse_a), (output_b, lse_b))]
    return (parts[0] + parts[1]).to(output_a.dtype), torch.where(nothing, -math.inf, lse)


def _part(output: torch.Tensor, half: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    empty = (half == -math.inf)[..., None]
    return torch.exp(half - lse)[..., None] * torch.where(empty, 0.0, output)
