"""What is known of an array without importing its library."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy

from .errors import refuse_type

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FLOATING",
    "Array",
    "device_of",
    "dtype_name",
    "host_integers",
    "library_of",
    "namespace_of",
    "placement_of",
    "segment_ids",
    "softmax_dtype_name",
]

Array: TypeAlias = Any
"""An array of any library that speaks the Python array API."""

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""The dtypes that query, key and value may have."""

_LIBRARY_OF_PACKAGE = {"jaxlib": "jax"}
_OF_SPARSE_AND_RAGGED = ("todense", "dense_shape", "row_splits")
"""Attributes of classes that do not hold an element for every index."""
_NAMESPACE_OF_CLASS: dict[type, Any] = {}
_NAME_OF_DTYPE: dict[tuple[type, object], str] = {}


@lru_cache(maxsize=1024)
def _library_of_class(cls: type) -> str | None:
    """Name the array library of a class or of a user's subclass: the package of its first base that has a dtype.

    Descriptions of arrays, which cannot be computed with, and arrays that do not hold an element for every index have
    none; nor has a masked array of NumPy: what it hides would be seen.
    """
    if any(base.__module__.startswith("numpy.ma") for base in cls.__mro__):
        return None
    if not hasattr(cls, "__mul__") or any(hasattr(cls, name) for name in _OF_SPARSE_AND_RAGGED):
        return None
    for base in reversed(cls.__mro__):
        if hasattr(base, "dtype") or hasattr(base, "aval"):
            package = base.__module__.partition(".")[0]
            return _LIBRARY_OF_PACKAGE.get(package, package)
    return None


def library_of(value: object) -> str | None:
    """Name the library of an array ("numpy", "torch", "jax", "tensorflow", ...), or give None for what is no array."""
    return _library_of_class(type(value))


def storage_of(array: Array) -> str | None:
    """Say how an array of PyTorch is stored where that is not densely, which its class does not tell; else None."""
    if library_of(array) != "torch":
        return None
    return "nested" if array.is_nested else _name_of_layout(array.layout)


@lru_cache(maxsize=64)
def _name_of_layout(layout: object) -> str | None:
    name = str(layout).removeprefix("torch.")
    return None if name == "strided" else name


def namespace_of(array: object) -> Any:
    """Give the Python array API namespace of `array`, wrapped by array-api-compat where its library needs it.

    Raises:
        ArgumentTypeError: Its library has none.
    """
    namespace = _NAMESPACE_OF_CLASS.get(type(array))
    if namespace is None:
        from array_api_compat import array_namespace

        try:
            namespace = array_namespace(array)
        except TypeError:
            refuse_type(
                "MHA-ARG-4",
                f"Arrays must be of a library of the Python array API or one with a backend of its own, "
                f"received {type(array).__name__} of {library_of(array)}.",
            )
        _NAMESPACE_OF_CLASS[type(array)] = namespace
    return namespace


def device_of(array: Array) -> Any:
    """Give the device on which arrays beside `array` are made; None, the default one, for a traced array.

    Arrays of jax that are made without a device follow those that they meet, whichever devices these are spread over.
    """
    return None if library_of(array) == "jax" else getattr(array, "device", None) or None


def placement_of(array: Array) -> Any:
    """Give what arrays of one call must have in common, their device; None for an array that goes with every other.

    For jax it is all its devices in their order, over which arrays may be spread in different ways; an array that is
    traced, or not committed to a device, goes with every other.
    """
    if library_of(array) != "jax":
        return getattr(array, "device", None) or None
    sharding = getattr(array, "sharding", None)
    return tuple(sharding.devices_indices_map(array.shape)) if sharding is not None and array.committed else None


def dtype_name(array: Array) -> str:
    """Spell the dtype of an array of any library in one way: "float32", "bfloat16", "bool", "int64".

    `isdtype` of the array API cannot be asked: it raises on the bfloat16 of ml-dtypes.
    """
    dtype: object = array.dtype
    found = _NAME_OF_DTYPE.get((type(dtype), dtype))
    if found is None:
        name = getattr(dtype, "name", None)
        found = _NAME_OF_DTYPE[type(dtype), dtype] = name if isinstance(name, str) else str(dtype).rpartition(".")[2]
    return found


def softmax_dtype_name(name: str) -> str:
    """Name the type in which scores, softmax and log-sum-exp are held (MHA-SOFTMAX-2)."""
    return "float64" if name == "float64" else "float32"


def host_integers(value: Array | Sequence[int] | int) -> list[int] | None:
    """Read integers on the host (a number, a sequence, a NumPy array); None for arrays that must not be read."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, (list, tuple)):
        return [int(entry) for entry in cast("Sequence[int]", value)]
    if isinstance(value, numpy.integer):
        return [int(cast("int", value))]
    if not isinstance(value, numpy.ndarray):
        return None
    return cast("list[int]", (value if value.ndim == 1 else value.reshape(-1)).tolist())


def segment_ids(q_ids: Array, kv_ids: Array, like: Array) -> list[tuple[Array, Array]]:
    """Give pairs of arrays, for queries and for keys, that agree, all of them, exactly where ids are equal by value.

    They are of the library of `like` and on its device. NumPy compares any two of its types by value, so its ids are
    numbered afresh for another library; ids of two other types become two digits, since no type may hold both.
    """
    libraries = library_of(q_ids), library_of(kv_ids)
    if libraries == ("numpy", "numpy"):
        return [(q_ids, kv_ids)] if library_of(like) == "numpy" else [_numbered(q_ids, kv_ids, like)]
    if libraries[0] == libraries[1] and q_ids.dtype == kv_ids.dtype:
        return [(q_ids, kv_ids)]
    return list(zip(_digits(q_ids, like), _digits(kv_ids, like), strict=True))


def _numbered(q_ids: numpy.ndarray, kv_ids: numpy.ndarray, like: Array) -> tuple[Array, Array]:
    """Give ids of NumPy as small numbers in the library of `like`."""
    held = numpy.result_type(q_ids, kv_ids)
    exact = held if held.kind in "iu" else numpy.dtype(object)  # Of int64 and uint64 NumPy makes float64.
    ids = numpy.concatenate([q_ids.reshape(-1).astype(exact), kv_ids.reshape(-1).astype(exact)])
    numbers = numpy.unique(ids, return_inverse=True)[1].astype(numpy.int32)
    q_numbers, kv_numbers = numpy.split(numbers, [q_ids.size])
    return _moved(q_numbers.reshape(q_ids.shape), like), _moved(kv_numbers.reshape(kv_ids.shape), like)


def _digits(ids: Array, like: Array) -> tuple[Array, Array]:
    """Give the low and the high digit of ids to the base of the default integers of `like`; the low one has a sign."""
    xp = namespace_of(like)
    integers = xp.arange(0, device=device_of(like)).dtype
    if not isinstance(ids, numpy.ndarray):
        low = xp.astype(ids, integers, copy=False)
        return low, xp.astype((low < 0) & dtype_name(ids).startswith("uint"), integers)
    host = numpy.dtype(dtype_name(xp.arange(0)))
    low = cast("Any", ids.astype(host))
    high = (ids.astype(object) - low.astype(object)) // 2 ** (8 * host.itemsize)
    bounded = numpy.clip(high, -1, 2)  # An array of the library has no high digit but 0 and 1.
    return _moved(low, like), _moved(bounded.astype(host), like)


def _moved(array: numpy.ndarray, like: Array) -> Array:
    return namespace_of(like).asarray(array, device=device_of(like))
