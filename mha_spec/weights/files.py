"""Safetensors files as dictionaries of NumPy arrays, bfloat16 included."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.array_checks import is_mapping
from mha_spec.arrays import Array, dtype_name, library_of, namespace_of
from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec.scalars import short_repr

from .names import flat
from .operations import mapping_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

__all__ = ["read_safetensors", "write_safetensors"]

METADATA = "__metadata__"
FLOAT8 = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
"""The names of ml-dtypes for the types of the format that NumPy lacks."""
NOT_OF_TORCH = ("bfloat16", *FLOAT8.values())
"""The dtypes that torch does not convert to NumPy."""


def _safetensors() -> Any:
    """Import safetensors; it needs ml-dtypes to find the dtype bfloat16 by name."""
    try:
        for name in ("ml_dtypes", "safetensors.numpy"):
            import_module(name)
    except ModuleNotFoundError as error:
        raise MhaSpecError(
            f"safetensors files need {error.name}, which is not installed: pip install 'mha-spec[weights]'"
        ) from error
    return import_module("safetensors")


def read_safetensors(path: str | PathLike[str], *, prefix: str = "") -> dict[str, Array]:
    """Read the arrays of a safetensors file by their names, bit for bit; bfloat16 and float8 are those of ml-dtypes.

    Args:
        path: The file.
        prefix: Only arrays whose names begin with it are read; the names keep it.

    Raises:
        ArgumentTypeError: The path is not a path.
        ArgumentValueError: The file is missing, damaged or not a safetensors file, or NumPy cannot hold an array of it.
        MhaSpecError: safetensors or ml-dtypes is not installed.
    """
    safetensors = _safetensors()
    file = _path(path)
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
            dtypes = {name: FLOAT8.get(opened.get_slice(name).get_dtype()) for name in names}
            return {
                name: _representable(name, partial(opened.get_tensor, name) if dtype is None else _float8(file, name))
                for name, dtype in dtypes.items()
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise ArgumentValueError(f"`path` must be a safetensors file, received path={str(path)!r}: {error}") from error


def _representable(name: str, read: Callable[[], numpy.ndarray]) -> numpy.ndarray:
    """Read an array; the error of a shape or a dtype that NumPy does not support names the array."""
    try:
        return read()
    except (AttributeError, MemoryError, OverflowError, TypeError, ValueError) as error:
        raise ArgumentValueError(f"`path` holds {name!r}, which NumPy cannot represent: {error}") from error


def _float8(file: Path, name: str) -> Callable[[], numpy.ndarray]:
    """Return a reader of an array of float8; the reader of safetensors fails, because NumPy lacks these types."""

    def read() -> numpy.ndarray:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            entry = json.loads(opened.read(size))[name]
            start, stop = entry["data_offsets"]
            opened.seek(8 + size + start)
            data = opened.read(stop - start)
        dtype = getattr(import_module("ml_dtypes"), FLOAT8[entry["dtype"]])
        return numpy.frombuffer(data, dtype).reshape(entry["shape"])

    return read


def write_safetensors(
    path: str | PathLike[str], state: Mapping[str, Array], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of any library by their names, bit for bit; names of nested dictionaries are joined by "/".

    Args:
        path: The file, which is replaced if it exists.
        state: The arrays by name.
        metadata: Text for the file's header; transformers wants {"format": "pt"}.

    Raises:
        ArgumentTypeError: A value is not an array, the metadata are not text, or the path is not a path.
        ArgumentValueError: The file cannot be written, it exists and is not a regular file, two arrays have the same
            name, a name is that of the metadata, or the format does not name a dtype.
        MhaSpecError: safetensors or ml-dtypes is not installed.
    """
    safetensors = _safetensors()
    file, text = _path(path), _text(metadata)
    if file.exists() and not file.is_file():
        raise ArgumentValueError(f"`path` must be a regular file or a new name, received path={str(path)!r}.")
    arrays = {name: _on_host(name, array) for name, array in flat(mapping_of(state, "state"), "/").items()}
    if METADATA in arrays:
        raise ArgumentValueError(f"`state` must not hold an array of the name {METADATA}: it is that of the header.")
    try:
        specifications = {name: _specification(safetensors, array) for name, array in arrays.items()}
        safetensors.serialize_file(specifications, file, metadata=text)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ArgumentValueError(f"`state` cannot be written, with path={str(path)!r}: {error}") from error


def _specification(safetensors: Any, array: numpy.ndarray) -> Any:
    """Describe an array to the writer, which reads its memory; safetensors' function fails for float8."""
    pointer, size = array.ctypes.data, array.nbytes
    return safetensors.TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=pointer, data_len=size)


def _path(path: object) -> Path:
    """Require a path."""
    try:
        return Path(path)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise ArgumentTypeError(f"`path` must be a path, received {type(path).__name__}.") from error


def _text(metadata: object) -> dict[str, str] | None:
    """Require a mapping of strings to strings, or None."""
    if metadata is None:
        return None
    if not is_mapping(metadata):
        raise ArgumentTypeError(f"`metadata` must be a mapping of strings to strings, received {short_repr(metadata)}.")
    entries: Mapping[Any, Any] = metadata
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ArgumentTypeError(
                f"`metadata` must map strings to strings, received {short_repr(name)}: {short_repr(value)}."
            )
    return dict(entries)


def _on_host(name: str, array: Array) -> numpy.ndarray:
    """Convert an array of any library to a contiguous NumPy array, of a dtype of ml-dtypes where NumPy has none."""
    library = library_of(array)
    if library is None:
        raise ArgumentTypeError(f"`state` must hold arrays, received {name}={type(array).__name__}.")
    if library != "torch":
        host = numpy.asarray(array, order="C")
        return host if host.dtype.byteorder != ">" else host.astype(host.dtype.newbyteorder("<"))
    plain, name_of_dtype = array.detach().cpu().contiguous(), dtype_name(array)
    if name_of_dtype not in NOT_OF_TORCH:
        return plain.numpy()
    bits = namespace_of(plain).int16 if name_of_dtype == "bfloat16" else namespace_of(plain).uint8
    return plain.view(bits).numpy().view(getattr(import_module("ml_dtypes"), name_of_dtype))
