"""Layers, tokens and gradients as tensors of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mha_spec_torch import MultiHeadAttention, calls, core, tasks, visibility
from support import layers
from support.numbers import numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy
    import pytest
    from torch import Tensor

__all__ = [
    "cut_into_tasks",
    "filled",
    "forget_calls",
    "heads",
    "operands",
    "sized",
    "tensor",
    "tokens",
    "with_gradients",
]


def tensor(array: numpy.ndarray, dtype: str | None = None) -> Tensor:
    """Convert an array to a tensor, of the same dtype or of another."""
    converted = torch.from_numpy(array)
    return converted if dtype is None else converted.to(getattr(torch, dtype))


def sized(dtype: str = "float64", **options: Any) -> MultiHeadAttention:
    """Make a layer whose sizes are all different, with numbers in every parameter."""
    layer = MultiHeadAttention(layers.EMBED, layers.HEADS, dtype=getattr(torch, dtype), **layers.SIZES | options)
    arrays = layers.parameters({name: tuple(param.shape) for name, param in layer.params.items()})
    layer.load_state_dict({name: tensor(array) for name, array in arrays.items()})
    return layer


def operands(q_len: int = 32, kv_len: int = 32, qk_dim: int = 8, v_dim: int = 8) -> list[Tensor]:
    """Draw query, key and value of a call of attention with 4 heads and 2 key/value heads, in float32."""
    shapes = (2, 4, q_len, qk_dim), (2, 2, kv_len, qk_dim), (2, 2, kv_len, v_dim)
    return [tensor(numbers(*shape, seed=place), "float32") for place, shape in enumerate(shapes)]


def forget_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare every call anew, and forget in the end what was prepared."""
    prepared: dict[Any, Any] = {}
    for module in (calls, core):
        monkeypatch.setattr(module, "PREPARED", prepared)


def cut_into_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into all its tasks and pieces."""
    forget_calls(monkeypatch)
    for name, value in {"COST_OF_CUT": 0, "COST_OF_TASK": -(2**40), "ROWS": (2, 3), "SHORTEST_RUN": 2}.items():
        monkeypatch.setattr(visibility, name, value)
    for name, value in {"SCORES": 64, "ROWS": 3}.items():
        monkeypatch.setattr(tasks, name, value)


def filled(module: Any) -> Any:
    """Fill every parameter of a module with normal numbers, and return the module."""
    torch.manual_seed(4)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tokens(length: int = layers.LENGTH, size: int = layers.EMBED, seed: int = 5, dtype: str = "float64") -> Tensor:
    """Draw tokens from the normal distribution."""
    return tensor(layers.tokens(length, size, seed), dtype)


def heads(length: int, seed: int = 5) -> list[Tensor]:
    """Draw keys and values for a cache."""
    return [tensor(array) for array in layers.heads(length, seed)]


def with_gradients(outputs: Sequence[Tensor], of: Iterable[Tensor]) -> list[Tensor]:
    """Return the outputs, and the gradients of a sum that weighs every element differently."""
    cotangents = [tensor(layers.uneven(output.shape)).to(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(of), cotangents)]
