"""Small models of transformers with random weights, and their evaluation in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

__all__ = ["InFloat64", "in_dtype_of", "randomized"]


class InFloat64(TorchFunctionMode):
    """Replaces float32 by float64 in every call.

    transformers computes softmax and norms in float32, even in a float64 model. The number by which its masks hide keys
    then becomes -inf, and a padded query NaN.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def wide(argument: object) -> object:
            return torch.float64 if argument is torch.float32 else argument

        return func(*map(wide, args), **{name: wide(argument) for name, argument in (kwargs or {}).items()})


def in_dtype_of(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Evaluate a model wholly in its own dtype, float64 or float32."""
    return InFloat64() if next(model.parameters()).dtype == torch.float64 else nullcontext()


def randomized(model: Any) -> Any:
    """Convert a model to float64, and add normal numbers to every parameter."""
    double = model.double().eval()
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return double
