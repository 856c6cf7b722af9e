"""Numbers of the host as tensors."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from mha_spec.arrays import native

__all__ = ["in_graph", "on_device"]


def on_device(numbers: Any, device: torch.device | None = None) -> torch.Tensor:
    """Convert numbers, a sequence or an array of NumPy to a new tensor; a tensor is moved to the device."""
    if isinstance(numbers, numpy.ndarray):
        return torch.tensor(native(numbers), device=device)
    return torch.as_tensor(numbers, device=device)


def in_graph(value: Any, like: torch.Tensor) -> Any:
    """Move host data to the device of a tensor where a graph is compiled, in which an array is a tensor on the CPU.

    Options may be in a dictionary.
    """
    if not torch.compiler.is_compiling():
        return value
    if isinstance(value, dict):
        return {name: in_graph(option, like) for name, option in value.items()}
    return torch.as_tensor(value, device=like.device) if isinstance(value, numpy.ndarray) else value
