"""What every check of an array asks: its library, its storage, its device, its dtype and its shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from .arrays import FLOATING, Array, dtype_name, library_of, placement_of, storage_of
from .errors import refuse_type, refuse_value
from .scalars import is_integer, plain, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_alike",
    "check_floating",
    "check_integers",
    "check_library",
    "check_same_device",
    "is_sequence",
    "require_array",
    "shape_of",
]

FLOATING_NAMES = ", ".join(FLOATING)


def shape_of(array: Array) -> tuple[int, ...]:
    """Give the shape as a tuple."""
    return tuple(array.shape)


def require_array(label: str, value: object, clause: str, wanted: str = "an array") -> str:
    """Give the library of an argument that must be an array of any library, stored densely."""
    library = library_of(value)
    if library is None:
        refuse_type(clause, f"`{label}` must be {wanted}, received {type(value).__name__}.")
    storage = storage_of(value)
    if storage is not None:
        refuse_type(clause, f"`{label}` must be {wanted} that is stored densely, received layout={storage}.")
    return library


def check_library(library: str, value: object, label: str = "query") -> None:
    """Raise unless an argument is an array of the library of the backend that was called by name (MHA-ARG-4)."""
    if require_array(label, value, "MHA-ARG-4", f"an array of {library}") != library:
        refuse_type(
            "MHA-ARG-4",
            f"`{label}` must be an array of {library}, whose backend was called, received an array of "
            f"{library_of(value)}. Convert it, or call mha_spec, which chooses the backend by the type.",
        )


def check_alike(label: str, value: object, like: Array, other: str, clause: str, wanted: str = "an array") -> None:
    """Raise unless an argument is an array of the library and on the device of another one (MHA-ARG-4)."""
    library = library_of(like)
    if require_array(label, value, clause, wanted) != library:
        refuse_type(
            "MHA-ARG-4",
            f"`{label}` must be an array of {library}, as `{other}` is, received an array of {library_of(value)}. "
            "Convert one of them first.",
        )
    check_same_device(label, value, other, like)


def check_same_device(label: str, array: Array, other: str, like: Array) -> None:
    """Raise where both arrays have a device, and not the same (MHA-ARG-4)."""
    expected, received = placement_of(like), placement_of(array)
    if expected != received and None not in (expected, received):
        refuse_value(
            "MHA-ARG-4", f"`{label}` must be on the device of `{other}`, device={expected}, received device={received}."
        )


def check_floating(label: str, array: Array, clause: str) -> str:
    """Give the dtype of an array that must be floating."""
    name = dtype_name(array)
    if name not in FLOATING:
        refuse_type(clause, f"`{label}` must have a dtype of {FLOATING_NAMES}, received dtype={name}.")
    return name


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a sequence of Python."""
    return isinstance(value, (list, tuple))


def check_integers(label: str, value: object, query: Array, shape: tuple[int, ...], axes: str, clause: str) -> None:
    """Raise unless a value holds integers of a shape: a sequence, an array of NumPy, or one of the query's library."""
    wanted = f"integers of shape {axes}={shape}"
    if is_sequence(value) and len(shape) == 1 and all(is_integer(plain(entry)) for entry in value):
        received = (len(value),)
    elif library_of(value) is None:
        refuse_type(clause, f"`{label}` must hold {wanted}, received {label}={shown(value)}.")
    else:
        if library_of(value) != "numpy":
            check_alike(label, value, query, "query", clause)
        if not dtype_name(value).startswith(("int", "uint")):
            refuse_type(clause, f"`{label}` must hold {wanted}, received dtype={dtype_name(value)}.")
        received = shape_of(value)
    if received != shape:
        refuse_value(clause, f"`{label}` must have shape {axes}={shape}, received shape={received}.")
