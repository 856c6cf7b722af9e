"""The modules of every library, and the conversion of nested arrays of NumPy to it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import jax
import numpy

from mha_spec import KVCache, PagedKVCache, WindowKVCache
from mha_spec_conformance.targets.conversion import to_library

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["MODULES", "converted", "of_library", "with_float64"]

MODULES = {
    "mha_spec.reference": "numpy",
    "mha_spec_numpy": "numpy",
    "mha_spec_torch": "torch",
    "mha_spec_jax": "jax",
    "mha_spec_tensorflow": "tensorflow",
}
"""The modules that have the functions, each with the library of its arrays."""


def converted(tree: Any, library: str, dtype: str) -> Any:
    """Convert nested arrays of NumPy to a library, and floats to this dtype."""
    if isinstance(tree, dict):
        return {name: converted(branch, library, dtype) for name, branch in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [converted(branch, library, dtype) for branch in tree]
    return to_library(tree.astype(dtype) if numpy.issubdtype(tree.dtype, numpy.floating) else tree, library)


def of_library(tree: Any, library: str) -> Any:
    """Convert the arrays of a call, also those of its parameters and of its cache; leave everything else unchanged."""
    if isinstance(tree, dict):
        return {name: of_library(branch, library) for name, branch in tree.items()}
    if isinstance(tree, (KVCache, PagedKVCache, WindowKVCache)):
        return type(tree)(*(of_library(array, library) for array in tree))
    return to_library(tree, library) if isinstance(tree, numpy.ndarray) else tree


def with_float64(library: str) -> AbstractContextManager[object]:
    """Enable float64 where a library has it only on request."""
    return jax.enable_x64(True) if library == "jax" else nullcontext()
