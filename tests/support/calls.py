"""A small call of attention, in which all sizes differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.numbers import numbers

if TYPE_CHECKING:
    import numpy

__all__ = ["BATCH", "HEADS", "KV_HEADS", "KV_LEN", "QK_DIM", "Q_LEN", "V_DIM", "arguments", "operand"]

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 5, 7, 11, 13


def operand(*shape: int, dtype: str = "float32") -> numpy.ndarray:
    """Draw standard normal numbers."""
    return numbers(*shape).astype(dtype)


def arguments(**changed: Any) -> dict[str, Any]:
    """Return query, key and value, with the changed and additional arguments."""
    operands = {
        "query": operand(BATCH, HEADS, Q_LEN, QK_DIM),
        "key": operand(BATCH, KV_HEADS, KV_LEN, QK_DIM),
        "value": operand(BATCH, KV_HEADS, KV_LEN, V_DIM),
    }
    return operands | changed
