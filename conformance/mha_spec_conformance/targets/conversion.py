"""Convert NumPy arrays to the library of the target and back, bit for bit, on a device and in a memory layout."""

from __future__ import annotations

import ml_dtypes
import numpy

from mha_spec.arrays import Array, dtype_name, library_of
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.suite.text import name_of

__all__ = [
    "LAYOUTS",
    "LIBRARIES",
    "ConversionError",
    "described",
    "holds_numbers",
    "lay_out",
    "layouts_of",
    "on_host",
    "same_bits",
    "some_rows",
    "to_library",
    "to_numpy",
]

LIBRARIES = ("numpy", "torch", "jax", "tensorflow")
"""The array libraries that a target may ask for."""

LAYOUTS = ("strided", "transposed", "tokens_first", "fortran", "expanded", "reversed", "read_only")
"""The memory layouts, other than the plain layout; only NumPy has the last two."""

_EXCHANGED = {"transposed": (-1, -2), "tokens_first": (1, 2)}
"""The axes that a layout exchanges in memory."""


class ConversionError(MhaSpecError, TypeError):
    """A value is not an array that the suite can read or write."""


def layouts_of(arrays: str) -> tuple[str, ...]:
    """Name the memory layouts, other than the plain layout, that arrays of a library can have."""
    return {"numpy": LAYOUTS, "torch": LAYOUTS[:-2]}.get(arrays, ())


def lay_out(array: numpy.ndarray, layout: str) -> numpy.ndarray:
    """Copy `array` into another memory layout.

    "strided" leaves gaps of garbage along the last axis, "transposed" and "tokens_first" exchange the last two axes or
    axes 1 and 2 in memory, "fortran" reverses the order of all axes, "expanded" gives stride 0 to each axis along which
    the array is constant, "reversed" has negative strides, and "read_only" cannot be written to.
    """
    if layout == "plain" or array.ndim == 0:
        return array.copy()
    if layout == "fortran":
        return array.copy(order="F")
    if layout == "expanded":
        return _expanded(array)
    if layout in _EXCHANGED:
        first, second = _EXCHANGED[layout] if array.ndim == 4 else (0, -1)
        return array.swapaxes(first, second).copy().swapaxes(first, second)
    if layout == "read_only":
        copy = array.copy()
        copy.flags.writeable = False
        return copy
    if layout == "reversed":
        return numpy.flip(numpy.flip(array).copy())
    wide = numpy.empty((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., 1::2] = _garbage(array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def _expanded(array: numpy.ndarray) -> numpy.ndarray:
    """Store an element of each axis along which the array is constant, and give that axis the stride 0."""
    stored = array.copy()
    for axis in range(array.ndim):
        first = stored[(slice(None),) * axis + (slice(0, 1),)]
        if first.size and same_bits(numpy.broadcast_to(first, stored.shape), stored):
            stored = first
    stored = stored.copy()
    strides = numpy.broadcast_to(stored, array.shape).strides
    return numpy.lib.stride_tricks.as_strided(stored, array.shape, strides)


def _garbage(dtype: numpy.dtype) -> object:
    if dtype.kind in "iu":
        return numpy.iinfo(dtype).max
    return True if dtype.kind == "b" else numpy.nan


def to_library(array: numpy.ndarray, arrays: str, device: str | None = None, layout: str = "plain") -> Array:
    """Convert `array` to the library `arrays`, with the same dtype and values, on `device`."""
    placed = lay_out(array, layout)
    return {"numpy": _numpy, "torch": _to_torch, "jax": _to_jax, "tensorflow": _to_tensorflow}[arrays](placed, device)


def _numpy(array: numpy.ndarray, device: str | None) -> numpy.ndarray:
    return array


def _to_torch(array: numpy.ndarray, device: str | None) -> Array:
    import torch

    bits = array.view(numpy.int16) if array.dtype == ml_dtypes.bfloat16 else array
    tensor = torch.from_numpy(bits)
    tensor = tensor.view(torch.bfloat16) if bits is not array else tensor
    return tensor if device is None else tensor.to(device)


def _to_jax(array: numpy.ndarray, device: str | None) -> Array:
    import jax

    # `jax.numpy.asarray` would compile a program for each shape and dtype.
    if device is None:
        return jax.device_put(array)
    platform, _, index = device.partition(":")
    return jax.device_put(array, jax.devices(platform)[int(index or 0)])


def _to_tensorflow(array: numpy.ndarray, device: str | None) -> Array:
    import tensorflow

    with tensorflow.device(device):
        return tensorflow.convert_to_tensor(array)


def to_numpy(value: Array) -> numpy.ndarray:
    """Convert an array of any known library to NumPy, with the same dtype and values.

    Raises:
        ConversionError: `value` is not an array.
    """
    library = library_of(value)
    if library == "numpy" and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _numbers(numpy.asarray(value))
    if library == "torch":
        return _from_torch(value)
    if library is None or not hasattr(value, "__array__"):
        raise ConversionError(f"{described(value)} is not an array")
    return _numbers(numpy.asarray(value))


def on_host(array: Array) -> bool:
    """Tell whether an array of a known library lies in the memory of the processor, where it is read without a copy."""
    library = library_of(array)
    if library == "torch":
        return array.device.type == "cpu"
    if library == "jax":
        return all(device.platform == "cpu" for device in array.devices())
    return library != "tensorflow" or ("GPU" not in array.device and "TPU" not in array.device)


def some_rows(array: Array, rows: numpy.ndarray, width: int) -> Array:
    """Take rows of an array of a known library, each of `width` elements; only these leave an accelerator."""
    if on_host(array):
        return to_numpy(array).reshape(-1, width)[rows]
    library = library_of(array)
    if library == "torch":
        import torch

        return array.detach().reshape(-1, width)[torch.from_numpy(rows).to(array.device)]
    if library == "tensorflow":
        import tensorflow

        return tensorflow.gather(tensorflow.reshape(array, (-1, width)), rows)
    return array.reshape(-1, width)[rows]


def holds_numbers(dtype: numpy.dtype) -> bool:
    """Tell whether an array of this dtype holds numbers or booleans."""
    # The kind of raw data, "V", is also that of the dtypes of ml-dtypes.
    return dtype.kind in "biufc" or (dtype.kind == "V" and not issubclass(dtype.type, numpy.void))


def _numbers(array: numpy.ndarray) -> numpy.ndarray:
    if not holds_numbers(array.dtype):
        raise ConversionError(f"an array of dtype={array.dtype} does not hold numbers")
    return array


def _from_torch(tensor: Array) -> numpy.ndarray:
    plain = tensor.detach().cpu().contiguous()
    if dtype_name(plain) != "bfloat16":
        return plain.numpy()
    import torch

    return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def described(value: object) -> str:
    """Describe what a call returned instead of arrays."""
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"an object of type {name_of(type(value))}"


def same_bits(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    """Tell whether two arrays hold the same bits, including NaN payloads and signs of zero."""
    # Methods of the arrays are called, because a target may replace functions of NumPy.
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
