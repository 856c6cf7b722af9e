"""Facts about an array that need no import of its library."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy

from .compiling import not_traced
from .errors import refuse_type
from .scalars import plain, undecided

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FLOATING",
    "Array",
    "device_of",
    "dtype_name",
    "host_integers",
    "library_of",
    "library_of_class",
    "lies_with",
    "namespace_of",
    "native",
    "placement_of",
    "segment_ids",
    "softmax_dtype_name",
    "softmax_range",
    "storage_of",
]

Array: TypeAlias = Any
"""An array of any library that speaks the Python array API."""

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""The dtypes that query, key and value may have."""

_LIBRARY_OF_PACKAGE = {"jaxlib": "jax"}
_OF_NO_ELEMENTS = ("todense", "dense_shape", "row_splits", "cls_to_become")
"""Attributes of classes that do not hold an element for every index: sparse, ragged, and not yet initialised."""
_MASKED = ("numpy.ma", "torch.masked")
"""Modules of arrays with hidden elements."""
_RANGE = {name: (float(numpy.finfo(name).tiny), float(numpy.finfo(name).max)) for name in ("float32", "float64")}
_NAMESPACE_OF_CLASS: dict[type, Any] = {}
_NAME_OF_DTYPE: dict[tuple[type, object], str] = {}


@lru_cache(maxsize=1024)
@not_traced
def library_of_class(cls: type) -> str | None:
    """Name the array library of a class or of a user's subclass: the package of its first base that has a dtype.

    The result is None for descriptions of arrays, which do not compute, for arrays that do not hold an element for
    every index, and for masked arrays, since attention would see the elements that they hide.
    """
    if any(_module_of(base).startswith(_MASKED) for base in cls.__mro__):
        return None
    if not hasattr(cls, "__mul__") or any(hasattr(cls, name) for name in _OF_NO_ELEMENTS):
        return None
    for base in reversed(cls.__mro__):
        if hasattr(base, "dtype") or hasattr(base, "aval"):
            package = _module_of(base).partition(".")[0]
            return _LIBRARY_OF_PACKAGE.get(package, package)
    return None


def _module_of(cls: type) -> str:
    """Name the module of a class; the array classes of ctypes have none."""
    return str(getattr(cls, "__module__", ""))


def library_of(value: object) -> str | None:
    """Name the library of an array ("numpy", "torch", "jax", ...); None for a value that is not an array."""
    return library_of_class(type(value))


def storage_of(array: Array) -> str | None:
    """Name the storage of a PyTorch tensor that is not dense, which its class does not show; None for all others."""
    if library_of(array) != "torch":
        return None
    return "nested" if array.is_nested else _name_of_layout(array.layout)


@lru_cache(maxsize=64)
def _name_of_layout(layout: object) -> str | None:
    name = str(layout).removeprefix("torch.")
    return None if name == "strided" else name


def namespace_of(array: object) -> Any:
    """Return the Python array API namespace of `array`, wrapped by array-api-compat where its library needs it.

    Raises:
        ArgumentTypeError: The library of `array` has no namespace.
    """
    namespace = _NAMESPACE_OF_CLASS.get(type(array))
    if namespace is None:
        from array_api_compat import array_namespace

        try:
            namespace = array_namespace(array)
        except TypeError:
            refuse_type(
                "MHA-ARG-4",
                f"Arrays must be of a library of the Python array API or of a library that has a backend, "
                f"received {type(array).__name__} of {library_of(array)}.",
            )
        _NAMESPACE_OF_CLASS[type(array)] = namespace
    return namespace


def device_of(array: Array) -> Any:
    """Return the device for new arrays that are combined with `array`; None, the default, for a traced array.

    New arrays of jax need no device: an uncommitted array moves to the devices of the arrays that it is combined with.
    """
    return None if library_of(array) == "jax" else getattr(array, "device", None) or None


def placement_of(array: Array) -> Any:
    """Return the device of an array, which all arrays of a call must share; None for an array that can be moved.

    For jax it is the tuple of all devices over which the array is spread; jax moves an array that is traced or not
    committed to a device.
    """
    if library_of(array) != "jax":
        return getattr(array, "device", None) or None
    sharding = getattr(array, "sharding", None)
    return _devices_of(sharding, array.shape) if sharding is not None and array.committed else None


@lru_cache(maxsize=1024)
def _devices_of(sharding: Any, shape: tuple[int, ...]) -> tuple[object, ...]:
    return tuple(sharding.devices_indices_map(shape))


def lies_with(array: Array, like: Array) -> bool:
    """Tell quickly whether an array has the class, storage and device of `like`, which is dense."""
    if type(array) is not type(like):
        return False
    library = library_of(like)
    if library == "torch":
        return array.device == like.device and array.layout == like.layout and not array.is_nested
    return library == "numpy" or (library is not None and placement_of(array) == placement_of(like))


def dtype_name(array: Array) -> str:
    """Name the dtype of an array of any library: "float32", "bfloat16", "bool", "int64".

    `isdtype` of the array API does not serve: it raises for the bfloat16 of ml-dtypes.
    """
    return _name_of_dtype(array.dtype)


@not_traced
def _name_of_dtype(dtype: object) -> str:
    """Name a dtype; a trace could not hash those of TensorFlow, which earlier calls may have left in the table."""
    name = _NAME_OF_DTYPE.get((type(dtype), dtype))
    if name is None:
        attribute = getattr(dtype, "name", None)
        name = attribute if isinstance(attribute, str) else str(dtype).rpartition(".")[2]
        _NAME_OF_DTYPE[type(dtype), dtype] = name
    return name


def softmax_dtype_name(name: str) -> str:
    """Name the type in which scores, softmax and log-sum-exp are held (MHA-SOFTMAX-2)."""
    return "float64" if name == "float64" else "float32"


def softmax_range(like: Array) -> tuple[float, float]:
    """Return the smallest normal and the largest number of the softmax's type beside an array (MHA-SOFTMAX-2)."""
    return _RANGE[softmax_dtype_name(dtype_name(like))]


def host_integers(value: Array | Sequence[int] | int) -> list[int] | None:
    """Read integers on the host: a number, a sequence or a NumPy array; None for arrays that must not be read.

    A symbolic size of JAX, alone or in a sequence, cannot be read either.
    """
    if isinstance(value, int):
        return [value]
    if isinstance(value, (list, tuple)):
        try:
            return [int(entry) for entry in cast("Sequence[int]", value)]
        except undecided():
            return None
    if not isinstance(value, numpy.ndarray):
        held = plain(value)
        return [held] if isinstance(held, int) else None
    return cast("list[int]", (value if value.ndim == 1 else value.reshape(-1)).tolist())


def native(array: numpy.ndarray) -> numpy.ndarray:
    """Copy an array of NumPy with the order of bytes and of elements that every library takes."""
    return numpy.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def segment_ids(q_ids: Array, kv_ids: Array, like: Array) -> list[tuple[Array, Array]]:
    """Return pairs of arrays (queries, keys): two ids are equal by value exactly where every pair is equal.

    The arrays have the library and the device of `like`. Ids of NumPy, which compares all of its types by value, are
    renumbered for another library. Other ids of different types are split into two digits, which any library compares.
    """
    libraries = library_of(q_ids), library_of(kv_ids)
    if libraries == ("numpy", "numpy"):
        return [(q_ids, kv_ids)] if library_of(like) == "numpy" else [_numbered(q_ids, kv_ids, like)]
    if libraries[0] == libraries[1] and q_ids.dtype == kv_ids.dtype:
        return [(q_ids, kv_ids)]
    return list(zip(_digits(q_ids, like), _digits(kv_ids, like), strict=True))


def _numbered(q_ids: numpy.ndarray, kv_ids: numpy.ndarray, like: Array) -> tuple[Array, Array]:
    """Renumber ids of NumPy from 0 on, in the library of `like`."""
    held = numpy.result_type(q_ids, kv_ids)
    exact = held if held.kind in "iu" else numpy.dtype(object)  # Of int64 and uint64 NumPy makes float64.
    ids = numpy.concatenate([q_ids.reshape(-1).astype(exact), kv_ids.reshape(-1).astype(exact)])
    numbers = numpy.unique(ids, return_inverse=True)[1].astype(numpy.int32)
    q_numbers, kv_numbers = numpy.split(numbers, [q_ids.size])
    return _moved(q_numbers.reshape(q_ids.shape), like), _moved(kv_numbers.reshape(kv_ids.shape), like)


def _digits(ids: Array, like: Array) -> tuple[Array, Array]:
    """Split ids into a signed low and a high digit, whose base is the range of the default integers of `like`."""
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
