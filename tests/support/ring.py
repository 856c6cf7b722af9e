"""The operands of calls over four processes, and the messages of their errors."""

from __future__ import annotations

from typing import Any

import torch

from .numbers import numbers

__all__ = ["BATCH", "HEADS", "KV_HEADS", "SIZE", "V_SIZE", "message", "tensors"]

BATCH, HEADS, KV_HEADS, SIZE, V_SIZE = 2, 8, 4, 5, 3


def tensors(q_len: int, kv_len: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Return query, key, value and sinks."""
    shapes = (BATCH, HEADS, q_len, SIZE), (BATCH, KV_HEADS, kv_len, SIZE), (BATCH, KV_HEADS, kv_len, V_SIZE), (HEADS,)
    return [torch.from_numpy(numbers(*shape, seed=seed)).to(dtype) for seed, shape in enumerate(shapes)]


def message(error: type[Exception], call: Any, *arguments: Any, **options: Any) -> str:
    """Return the message of an error, which must have this class."""
    try:
        call(*arguments, **options)
    except error as raised:
        return str(raised)
    return "no error"
