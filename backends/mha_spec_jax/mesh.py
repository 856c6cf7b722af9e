"""The axes of a mesh along which arrays differ inside `jax.shard_map`, which JAX tracks in the types of arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jax import Array

__all__ = ["alike", "axes_of", "varying"]


def alike(tree: Any) -> Any:
    """Mark arrays as different along every axis along which one of them is, because the state of a loop has one type.

    The gradient of an array that is the same on all ranks is then the sum over the ranks.
    """
    axes = axes_of(*jax.tree.leaves(tree))
    return varying(axes, tree) if axes else tree


def varying(axes: frozenset[str], tree: Any) -> Any:
    """Mark arrays as different on each rank of the axes; the gradient of an array of all ranks is then their sum."""
    return jax.tree.map(lambda array: _varying(axes, jnp.asarray(array)), tree)


def _varying(axes: frozenset[str], array: Array) -> Array:
    """Mark an array; the axes of `vmap`, along which nothing is marked, are not axes of the mesh."""
    missing = tuple(sorted((axes - axes_of(array)) & {*jax.sharding.get_abstract_mesh().manual_axes}))
    if not missing:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, missing, to="varying")
    earlier: Any = lax
    return earlier.pvary(array, missing)


def axes_of(*arrays: Array) -> frozenset[str]:
    """Name the axes of the mesh along which arrays differ, as far as `shard_map` tracks them (check_vma)."""
    types = [jax.typeof(array) for array in arrays]
    kinds = [getattr(kind, "manual_axis_type", kind) for kind in types]
    return frozenset().union(*(getattr(kind, "varying", getattr(kind, "vma", ())) for kind in kinds))
