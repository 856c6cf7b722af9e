"""Numbers of the host as tensors."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from mha_spec.arrays import native

__all__ = ["on_device"]


def on_device(numbers: Any, device: torch.device | None = None) -> torch.Tensor:
    """Convert numbers, a sequence or an array of NumPy to a new tensor; a tensor is moved to the device."""
    if isinstance(numbers, numpy.ndarray):
        return torch.tensor(native(numbers), device=device)
    return torch.as_tensor(numbers, device=device)
