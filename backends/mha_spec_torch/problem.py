"""One call, prepared: its options in the form in which every path reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mha_spec import steps
from mha_spec.arrays import dtype_name, softmax_dtype_name

from .visibility import Visibility

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

    from .tasks import Task

__all__ = ["Problem", "readable"]


@dataclass(frozen=True, slots=True)
class Problem:
    """The options of one call, without the operands that have gradients."""

    scale: float
    softcap: float | None
    dropout_rate: float
    dropout_mask: torch.Tensor | None
    dtype: torch.dtype
    """The softmax's type (MHA-SOFTMAX-2)."""
    visibility: Visibility
    host: bool
    """Whether tensors may be read: they lie on the CPU and nothing traces the call."""

    @classmethod
    def of(cls, a: Arguments, *, host: bool) -> Problem:
        """Read the options of a call."""
        dtype = getattr(torch, softmax_dtype_name(dtype_name(a.query)))
        scale = steps.scale_of(a.scale, a.query.shape[3])
        return cls(scale, a.softcap, a.dropout_rate, a.dropout_mask, dtype, Visibility(a, host=host), host)

    def keep(self, task: Task) -> torch.Tensor | None:
        """By what dropout multiplies the weights of a task; None without dropout (MHA-DROP-1, MHA-DROP-2)."""
        if self.dropout_mask is None:
            return None
        return task.of_pairs(self.dropout_mask).to(self.dtype) / (1 - self.dropout_rate)

    def finite(self, *arrays: torch.Tensor) -> bool:
        """Whether all are known to hold finite numbers alone: their sums tell, where they may be read."""
        return self.host and all(bool(torch.isfinite(array.sum(dtype=self.dtype))) for array in arrays)


def readable(tensor: torch.Tensor) -> bool:
    """Whether the contents of a tensor that nothing traces may be read: reading an accelerator would stop it."""
    return tensor.is_cpu
