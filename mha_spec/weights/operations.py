"""The operations on arrays that converting weights needs, for every array library."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mha_spec.array_checks import is_mapping
from mha_spec.arrays import Array, library_of, namespace_of
from mha_spec.errors import ArgumentTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Operations", "mapping_of", "operations_of", "shape_of"]


@dataclass(frozen=True)
class Operations:
    """Reshaping, transposing and joining for an array library."""

    reshape: Callable[..., Array]
    transpose: Callable[..., Array]
    join: Callable[..., Array]


def mapping_of(value: object, argument: str) -> Mapping[str, Array]:
    """Require a mapping, and return it."""
    if not is_mapping(value):
        raise ArgumentTypeError(f"`{argument}` must be a mapping of names to arrays, received {type(value).__name__}.")
    return value


def operations_of(arrays: Mapping[str, object], argument: str) -> Operations:
    """Return the operations of the library of all `arrays`.

    Raises:
        ArgumentTypeError: `arrays` is not a mapping of arrays of the same library.
    """
    first, library = "", None
    for name, array in mapping_of(arrays, argument).items():
        if library_of(array) is None:
            raise ArgumentTypeError(f"`{argument}` must hold arrays, received {name}={type(array).__name__}.")
        first, library = first or name, library or library_of(array)
        if library_of(array) != library:
            raise ArgumentTypeError(
                f"`{argument}` must hold arrays of the same library, received {first} of {library} and {name} of "
                f"{library_of(array)}."
            )
    if library == "tensorflow":  # It has no array API namespace; it is loaded, since a tensor exists.
        tensorflow = sys.modules["tensorflow"]
        return Operations(tensorflow.reshape, tensorflow.transpose, tensorflow.concat)
    try:
        xp = namespace_of(arrays[first])
    except TypeError as error:
        raise ArgumentTypeError(
            f"`{argument}` must hold arrays of a library of the Python array API or of TensorFlow, received {first} of "
            f"{library}. Give the array that it holds."
        ) from error
    return Operations(xp.reshape, xp.permute_dims, xp.concat)


def shape_of(array: Array) -> tuple[int, ...]:
    """Return the shape of an array of any library as integers."""
    return tuple(int(size) for size in array.shape)
