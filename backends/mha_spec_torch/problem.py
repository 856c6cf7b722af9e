"""One call, prepared: its options in the form in which every path reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mha_spec import steps

from .dropout import draws_of
from .visibility import Visibility

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

    from .dropout import Draws
    from .tasks import Task

__all__ = ["Problem", "readable"]


@dataclass(frozen=True, slots=True)
class Problem:
    """The options of one call, without the operands that have gradients."""

    scale: float
    softcap: float | None
    dropout_rate: float
    dropout_mask: torch.Tensor | None
    draws: Draws | None
    """What random dropout is mixed of."""
    dtype: torch.dtype
    """The softmax's type (MHA-SOFTMAX-2)."""
    visibility: Visibility
    host: bool
    """Whether tensors may be read: they lie on the CPU and nothing traces the call."""

    @classmethod
    def of(cls, a: Arguments, *, host: bool) -> Problem:
        """Read the options of a call."""
        dtype = torch.float64 if a.query.dtype == torch.float64 else torch.float32
        scale = steps.scale_of(a.scale, a.query.shape[3])
        visibility = Visibility(a, dtype, host=host)
        return cls(scale, a.softcap, a.dropout_rate, a.dropout_mask, draws_of(a), dtype, visibility, host)

    @property
    def drops(self) -> bool:
        """Whether there is dropout, by a mask or by draws."""
        return self.dropout_mask is not None or self.draws is not None

    def keep(self, task: Task) -> torch.Tensor | None:
        """By what dropout multiplies the weights of a task; None without dropout (MHA-DROP-1, MHA-DROP-2)."""
        if self.draws is not None:
            kept = self.draws.kept(task, self.dropout_rate)
        elif self.dropout_mask is not None:
            kept = task.of_pairs(self.dropout_mask)
        else:
            return None
        return kept.to(self.dtype) / (1 - self.dropout_rate)

    def finite(self, *arrays: torch.Tensor) -> bool:
        """Whether all are known to hold finite numbers alone: their sums tell, where they may be read."""
        return self.host and all(math.isfinite(array.sum(dtype=self.dtype).item()) for array in arrays)


def readable(tensor: torch.Tensor) -> bool:
    """Whether the contents of a tensor that nothing traces may be read: reading an accelerator would stop it."""
    return tensor.is_cpu
