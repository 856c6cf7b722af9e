"""Traced tensors, and symbols: the numbers and sizes that a tracer leaves open, such as `torch.SymInt`.

A comparison of a symbol, used as a Python bool, would fix its value for the whole graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _get_dispatch_mode, _len_torch_dispatch_stack, _TorchDispatchModeKey
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mha_spec.checks import check

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = [
    "TENSORS",
    "all_equal",
    "checked",
    "entries",
    "example",
    "example_of_size",
    "in_jit_trace",
    "is_open",
    "is_open_tensor",
    "surely",
    "traced",
    "unwrapped",
]

TENSORS = (torch.Tensor, torch.nn.Parameter)
"""The classes of tensors that hold their contents; a subclass may trace or change the call."""
TRACERS = (_TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FAKE)
"""The modes that record operators, or compute nothing but shapes."""
SYMBOLS = (torch.SymInt, torch.SymFloat)
NUMBERS = ("q_offset", "window", "chunk", "scale", "softcap", "dropout_rate")
"""The options that are Python numbers, or hold Python numbers."""


def is_open(value: object) -> bool:
    """Tell whether a value is a symbol, or a sequence or mapping that holds a symbol."""
    if isinstance(value, dict):
        return any(map(is_open, value.values()))
    return isinstance(value, SYMBOLS) or (isinstance(value, (list, tuple)) and any(map(is_open, value)))


def example(value: Any) -> Any:
    """Replace each symbol by its number while tracing, or by a number that passes every check; add no guard."""
    if isinstance(value, dict):
        return {name: example(element) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(example, value))
    if not isinstance(value, SYMBOLS):
        return value
    if value.node.has_hint():
        return value.node.hint
    return 0 if isinstance(value, torch.SymInt) else 0.5


def example_of_size(size: Any) -> Any:
    """Return the number in a size of a tensor that torch.jit.trace records, and any other value unchanged."""
    is_size = in_jit_trace() and isinstance(size, torch.Tensor) and size.ndim == 0 and size.dtype == torch.int64
    return int(size) if is_size else size


def checked(a: Arguments) -> Arguments:
    """Check a call with examples for its symbols, and return it with the symbols."""
    symbols = {name: getattr(a, name) for name in NUMBERS if is_open(getattr(a, name))}
    if not symbols:
        return check(a)
    return replace(check(replace(a, **example(symbols))), **symbols)


def entries(value: Any, device: torch.device) -> Any:
    """Convert a sequence of integers and symbols to a tensor, and leave a single integer unchanged."""
    if not isinstance(value, (list, tuple)):
        return value
    return torch.stack([torch.scalar_tensor(number, dtype=torch.int64, device=device) for number in value])


def all_equal(first: object, second: object) -> bool:
    """Tell whether two sequences of integers are known to be equal for all values of their symbols."""
    if not (isinstance(first, (list, tuple)) and isinstance(second, (list, tuple))) or len(first) != len(second):
        return False
    return all(surely(a == b) for a, b in zip(first, second, strict=True))


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor within the wrappers of the transforms of torch.func."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def traced(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is traced, or has no contents."""
    return is_open_tensor(tensor) or _is_recorded()


def is_open_tensor(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has no contents, or may have others in a later call of a graph."""
    return type(tensor) not in TENSORS or tensor.is_meta or in_jit_trace()


def in_jit_trace() -> bool:
    """Tell whether torch.jit.trace records the call; sizes are then tensors."""
    return torch._C._get_tracing_state() is not None


def _is_recorded() -> bool:
    """Tell whether a mode is active that also takes plain tensors, as make_fx and FakeTensorMode do."""
    return _len_torch_dispatch_stack() > 0 and any(_get_dispatch_mode(mode) is not None for mode in TRACERS)


def surely(condition: bool | torch.SymBool) -> bool:
    """Return True if a comparison is known to hold for all values of its symbols."""
    return statically_known_true(condition) if isinstance(condition, torch.SymBool) else condition is True
