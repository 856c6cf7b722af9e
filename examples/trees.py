"""Nested parameters: a function of every array, and the arrays of every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy

__all__ = ["BACKENDS", "each", "leaves"]


def each(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to every array of nested parameters."""
    if isinstance(tree, dict):
        return {name: each(branch, function) for name, branch in tree.items()}
    return type(tree)(each(branch, function) for branch in tree) if isinstance(tree, (list, tuple)) else function(tree)


def leaves(tree: Any) -> list[Any]:
    """List every array of nested parameters."""
    arrays: list[Any] = []
    each(tree, arrays.append)
    return arrays


def _on_numpy(array: numpy.ndarray) -> Any:
    return array


def _on_torch(array: numpy.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _on_jax(array: numpy.ndarray) -> Any:
    import jax.numpy

    return jax.numpy.asarray(array)


def _on_tensorflow(array: numpy.ndarray) -> Any:
    import tensorflow

    return tensorflow.convert_to_tensor(array)


BACKENDS = {"torch": _on_torch, "numpy": _on_numpy, "jax": _on_jax, "tensorflow": _on_tensorflow}
"""For each backend, the conversion of a NumPy array to its library."""
