"""What is known of an array without importing its library."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy

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
    "segment_ids",
    "softmax_dtype_name",
]

Array: TypeAlias = Any
"""An array of any library that speaks the Python array API."""

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""The dtypes that query, key and value may have."""

_LIBRARY_OF_PACKAGE = {"jaxlib": "jax"}
_NAMESPACE_OF_CLASS: dict[type, Any] = {}
_NAME_OF_DTYPE: dict[tuple[type, object], str] = {}


@lru_cache(maxsize=1024)
def _library_of_class(cls: type) -> str | None:
    """Name the array library of a class or of a user's subclass: the package of its first base that has a dtype.

    A masked array of NumPy is none: what it hides would be seen.
    """
    if issubclass(cls, numpy.ndarray) and any(base.__module__.startswith("numpy.ma") for base in cls.__mro__):
        return None
    for base in reversed(cls.__mro__):
        if hasattr(base, "dtype") or hasattr(base, "aval"):
            package = base.__module__.partition(".")[0]
            return _LIBRARY_OF_PACKAGE.get(package, package)
    return None


def library_of(value: object) -> str | None:
    """Name the library of an array ("numpy", "torch", "jax", "tensorflow", ...), or give None for what is no array."""
    return _library_of_class(type(value))


def namespace_of(array: object) -> Any:
    """Give the Python array API namespace of `array`, wrapped by array-api-compat where its library needs it."""
    found = _NAMESPACE_OF_CLASS.get(type(array))
    if found is None:
        from array_api_compat import array_namespace

        found = _NAMESPACE_OF_CLASS[type(array)] = array_namespace(array)
    return found


def device_of(array: Array) -> Any:
    """Give the device of `array`; None, the default one, for an array that is traced and has none yet."""
    return getattr(array, "device", None) or None


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
    if isinstance(value, (list, tuple, numpy.integer)):
        value = numpy.asarray(value)
    if not isinstance(value, numpy.ndarray):
        return None
    return cast("list[int]", (value if value.ndim == 1 else value.reshape(-1)).tolist())


def segment_ids(q_ids: Array, kv_ids: Array, like: Array) -> tuple[Array, Array]:
    """Give both arrays of segment ids in the library of `like`, and where that is not NumPy in its type and device.

    There ids of NumPy are numbered afresh, so that none is cut where that type is narrower than theirs.
    """
    if library_of(like) == "numpy":
        return q_ids, kv_ids
    xp = namespace_of(like)
    if library_of(q_ids) == library_of(kv_ids) == "numpy":
        ids = numpy.concatenate([q_ids.reshape(-1), kv_ids.reshape(-1)])
        numbers = numpy.unique(ids, return_inverse=True)[1]
        q_ids, kv_ids = numbers[: q_ids.size].reshape(q_ids.shape), numbers[q_ids.size :].reshape(kv_ids.shape)
    q_ids, kv_ids = (xp.astype(xp.asarray(ids, device=device_of(like)), like.dtype) for ids in (q_ids, kv_ids))
    return q_ids, kv_ids
