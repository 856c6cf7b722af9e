"""Write arrays to safetensors files and read them: the files of questions and answers (docs/protocol.md)."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
from safetensors import SafetensorError, deserialize

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["FileError", "can_hold", "content", "read", "write"]

HEADER_BYTES = 2**20
"""The size that the header of a file may have, in addition to its arrays."""

NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
"""The dtypes of files by the names of NumPy."""

DTYPES = {
    name: numpy.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else numpy.dtype(kind) for kind, name in NAMES.items()
}


class FileError(Exception):
    """A file cannot be read as safetensors; the message begins with a verb."""


def can_hold(array: numpy.ndarray, most_bytes: int) -> bool:
    """Tell whether a file can hold the array."""
    return array.dtype.name in NAMES and array.nbytes <= most_bytes


def write(path: Path, arrays: Mapping[str, numpy.ndarray]) -> None:
    """Write arrays to a file.

    The writer of the safetensors package is not used, because it does not support bfloat16 of ml-dtypes, and its
    arguments differ between versions.
    """
    header: dict[str, object] = {}
    parts: list[bytes] = []
    start = 0
    for name, array in arrays.items():
        parts.append(_little_endian(array).tobytes())
        stop = start + len(parts[-1])
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join((len(text).to_bytes(8, "little"), text, *parts)))
    path.chmod(0o600)  # a target may change the mask of its process


def _little_endian(array: numpy.ndarray) -> numpy.ndarray:
    return array if array.dtype.isbuiltin != 0 else array.astype(array.dtype.newbyteorder("<"))


def read(path: Path, most_bytes: int) -> dict[str, numpy.ndarray]:
    """Read all arrays of a file; the arrays are writable.

    Raises:
        FileError: The file does not exist, is not safetensors, is larger than `most_bytes`, or has another dtype.
    """
    try:
        return {name: _array(name, entry) for name, entry in deserialize(content(path, most_bytes + HEADER_BYTES))}
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError, OverflowError) as error:
        raise FileError(f"is not safetensors: {error}") from error


def content(path: Path, most_bytes: int) -> bytes:
    """Read the bytes of a file; refuse a pipe or a device, because reading it might not end.

    Raises:
        FileError: It is not a file, or is larger than `most_bytes`.
        OSError: It cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise FileError("is not a file")
        if state.st_size > most_bytes:
            raise FileError(f"has {state.st_size} bytes, more than the {most_bytes} that are allowed")
        return file.read(state.st_size)


def _array(name: str, entry: Mapping[str, Any]) -> numpy.ndarray:
    dtype, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if dtype not in DTYPES:
        raise FileError(f"has the array {name!r} with the dtype {dtype}, which the protocol does not have")
    return numpy.frombuffer(bytearray(data), DTYPES[dtype]).reshape(shape)
