"""A prepared call: its options in the form that every path reads."""

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
    """The options of a call, without the operands that have gradients."""

    scale: float
    softcap: float | None
    dropout_rate: float
    dropout_mask: torch.Tensor | None
    draws: Draws | None
    """The random integers of dropout, unless it has a mask."""
    dtype: torch.dtype
    """The softmax's type (MHA-SOFTMAX-2)."""
    visibility: Visibility
    host: bool
    """True if tensors may be read: they are on the CPU and the call is not traced."""

    @classmethod
    def of(cls, a: Arguments, *, host: bool) -> Problem:
        """Prepare the options of a call."""
        dtype = torch.float64 if a.query.dtype == torch.float64 else torch.float32
        scale = steps.scale_of(a.scale, a.query.shape[3])
        visibility = Visibility(a, dtype, host=host)
        return cls(scale, a.softcap, a.dropout_rate, a.dropout_mask, draws_of(a), dtype, visibility, host)

    @property
    def drops(self) -> bool:
        """Tell whether the call has dropout, by a mask or by draws."""
        return self.dropout_mask is not None or self.draws is not None

    def keep(self, task: Task) -> torch.Tensor | None:
        """Return the factors by which dropout multiplies the weights of a task, or None (MHA-DROP-1, MHA-DROP-2)."""
        if self.draws is not None:
            kept = self.draws.kept(task, self.dropout_rate)
        elif self.dropout_mask is not None:
            kept = task.of_pairs(self.dropout_mask)
        else:
            return None
        return kept.to(self.dtype) / (1 - self.dropout_rate)

    def finite(self, *arrays: torch.Tensor) -> bool:
        """Return True if tensors may be read and have finite sums, so that all their elements are finite."""
        return self.host and all(math.isfinite(array.sum(dtype=self.dtype).item()) for array in arrays)


def readable(tensor: torch.Tensor) -> bool:
    """Tell whether to read a tensor that is not traced: reading from an accelerator would wait for it."""
    return tensor.is_cpu
