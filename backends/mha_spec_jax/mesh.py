"""The axes of a mesh in the types of arrays: those along which arrays are sharded, or differ inside `jax.shard_map`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

__all__ = ["alike", "as_first", "axes_of", "cotangents_of", "partitioned", "varying"]


def partitioned(call: Callable[..., Any], query: Array, *results: tuple[int, ...]) -> Callable[..., Any]:
    """Let XLA partition a call of arrays whose sharding is a part of their type, with results sharded as the query.

    Operations of JAX on such arrays, of a mesh with explicit axes, refuse most shardings of queries and keys.

    Args:
        call: The call, which returns a tuple of arrays.
        query: The query.
        results: For each array of the tuple, the axes of the query that its first axes are.
    """
    sharding = jax.typeof(query).sharding
    mesh = sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return call
    spec = (*sharding.spec, *(None,) * query.ndim)
    specs = tuple(NamedSharding(mesh, PartitionSpec(*(spec[axis] for axis in axes))) for axes in results)
    return jax.sharding.auto_axes(call, axes=explicit, out_sharding=specs)


def as_first(call: Callable[..., Array], axes: tuple[int, ...] = (0, 1, 2, 3)) -> Callable[..., Array]:
    """Let XLA partition a call whose result is sharded as its first argument, at these axes; see `partitioned`."""

    def partition(first: Array, *others: Any) -> Array:
        return partitioned(lambda *arrays: (call(*arrays),), first, axes)(first, *others)[0]

    return partition


def cotangents_of(results: tuple[Array, ...], arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return arrays with the axes of the results whose cotangents they are, which jax.vjp requires."""
    arrays = varying(axes_of(*results), arrays)
    wanted = [jax.typeof(result).sharding for result in results]
    return tuple(
        array if jax.typeof(array).sharding == sharding else jax.sharding.reshard(array, sharding)
        for array, sharding in zip(arrays, wanted, strict=True)
    )


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
