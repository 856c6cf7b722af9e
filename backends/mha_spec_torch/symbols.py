"""Tensors that a tracer passes, and the numbers and sizes that it left open, `torch.SymInt` and its like.

A comparison of one of them, used as a Python bool, would fix it for the whole graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mha_spec.checks import check

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = ["checked", "entries", "example", "is_open", "surely", "traced"]

SYMBOLS = (torch.SymInt, torch.SymFloat)
NUMBERS = ("q_offset", "window", "scale", "softcap", "dropout_rate")
"""The options that are Python numbers, or hold some."""


def is_open(value: object) -> bool:
    """Whether a value is a symbol, or a sequence or mapping that holds one."""
    if isinstance(value, dict):
        return any(map(is_open, value.values()))
    return isinstance(value, SYMBOLS) or (isinstance(value, (list, tuple)) and any(map(is_open, value)))


def example(value: Any) -> Any:
    """The number at which a symbol was traced, one that every check accepts where there is none; no guard is made."""
    if isinstance(value, dict):
        return {name: example(element) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(example, value))
    if not isinstance(value, SYMBOLS):
        return value
    if value.node.has_hint():
        return value.node.hint
    return 0 if isinstance(value, torch.SymInt) else 0.5


def checked(a: Arguments) -> Arguments:
    """Check a call by the examples of its open numbers, which stay open."""
    still_open = {name: getattr(a, name) for name in NUMBERS if is_open(getattr(a, name))}
    if not still_open:
        return check(a)
    return replace(check(replace(a, **example(still_open))), **still_open)


def entries(value: Any, device: torch.device) -> Any:
    """A sequence of integers, some of them open, as a tensor; a single integer stays one."""
    if not isinstance(value, (list, tuple)):
        return value
    return torch.stack([torch.scalar_tensor(number, dtype=torch.int64, device=device) for number in value])


def traced(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for one that is not there yet, or has no contents at all."""
    of_torch = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return not of_torch or tensor.is_meta or torch._C._get_tracing_state() is not None


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison is known to hold, whatever the symbols in it stand for."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)
