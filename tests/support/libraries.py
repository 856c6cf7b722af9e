"""Nested arrays of NumPy as those of every library."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import jax
import numpy

from mha_spec_conformance.targets.conversion import to_library

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["converted", "with_float64"]


def converted(tree: Any, library: str, dtype: str) -> Any:
    """Nested arrays of NumPy as those of a library, floats in this dtype."""
    if isinstance(tree, dict):
        return {name: converted(one, library, dtype) for name, one in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [converted(one, library, dtype) for one in tree]
    return to_library(tree.astype(dtype) if numpy.issubdtype(tree.dtype, numpy.floating) else tree, library)


def with_float64(library: str) -> AbstractContextManager[object]:
    """Where float64 is asked for, if it must be."""
    return jax.enable_x64(True) if library == "jax" else nullcontext()
