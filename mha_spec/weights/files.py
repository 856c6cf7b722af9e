"""Safetensors files as dictionaries of NumPy arrays, bfloat16 included."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import Array, dtype_name, library_of, namespace_of
from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError

from .names import flat
from .operations import mapping_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

__all__ = ["read_safetensors", "write_safetensors"]


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
    """Read the arrays of a safetensors file by their names, bit for bit; bfloat16 is that of ml-dtypes.

    Args:
        path: The file.
        prefix: Only arrays whose names begin with it are read; the names keep it.

    Raises:
        ArgumentValueError: The file is missing, damaged or not a safetensors file.
        MhaSpecError: safetensors or ml-dtypes is not installed.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ArgumentValueError(f"`path` must be a safetensors file, received path={str(path)!r}: {error}") from error


def write_safetensors(
    path: str | PathLike[str], state: Mapping[str, Array], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays of any library by their names, bit for bit; names of nested dictionaries are joined by "/".

    Args:
        path: The file, which is replaced if it exists.
        state: The arrays by name.
        metadata: Text for the file's header; transformers wants {"format": "pt"}.

    Raises:
        ArgumentTypeError: A value is not an array.
        ArgumentValueError: The file cannot be written, or the format does not name a dtype.
        MhaSpecError: safetensors or ml-dtypes is not installed.
    """
    safetensors = _safetensors()
    arrays = {name: _on_host(name, array) for name, array in flat(mapping_of(state, "state"), "/").items()}
    try:
        safetensors.numpy.save_file(arrays, path, None if metadata is None else dict(metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise ArgumentValueError(f"`state` cannot be written, with path={str(path)!r}: {error}") from error


def _on_host(name: str, array: Array) -> numpy.ndarray:
    """Convert an array of any library to a contiguous NumPy array; torch converts every dtype but bfloat16."""
    library = library_of(array)
    if library is None:
        raise ArgumentTypeError(f"`state` must hold arrays, received {name}={type(array).__name__}.")
    if library != "torch":
        return numpy.asarray(array, order="C")
    plain = array.detach().cpu().contiguous()
    if dtype_name(plain) != "bfloat16":
        return plain.numpy()
    import ml_dtypes

    return plain.view(namespace_of(plain).int16).numpy().view(ml_dtypes.bfloat16)
