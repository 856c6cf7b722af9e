"""What torch.compile needs to know about functions of this package, which never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["not_traced"]

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def not_traced(function: _Function) -> _Function:
    """Let torch.compile call a function of classes and names instead of tracing it, and keep the result in the graph.

    It cannot trace a function that imports a module or reads the name of a class. The mark is that of
    `torch.compiler.assume_constant_result`.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
