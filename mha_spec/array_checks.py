"""Checks of the library, storage, device, dtype and shape of an array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from .arrays import FLOATING, Array, dtype_name, library_of, lies_with, placement_of, storage_of
from .errors import refuse_type, refuse_value
from .scalars import TIMES, is_integer, plain, short_repr

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "check_alike",
    "check_floating",
    "check_integers",
    "check_library",
    "check_same_device",
    "check_same_dtype",
    "check_table",
    "differ",
    "fits",
    "is_mapping",
    "is_sequence",
    "python_values",
    "require_array",
    "shape_of",
]

FLOATING_NAMES = ", ".join(FLOATING)


def shape_of(array: Array) -> tuple[int, ...]:
    """Return the shape as a tuple."""
    return tuple(array.shape)


def require_array(label: str, value: object, clause: str, wanted: str = "an array") -> str:
    """Require a dense array of any library, and return the name of its library."""
    library = library_of(value)
    if library is None:
        refuse_type(clause, f"`{label}` must be {wanted}, received {type(value).__name__}.")
    storage = storage_of(value)
    if storage is not None:
        refuse_type(clause, f"`{label}` must be {wanted} that is stored densely, received layout={storage}.")
    return library


def check_library(library: str, value: object, label: str = "query") -> None:
    """Require an array of the library of a backend that the user called directly (MHA-ARG-4)."""
    if require_array(label, value, "MHA-ARG-4", f"an array of {library}") != library:
        refuse_type(
            "MHA-ARG-4",
            f"`{label}` must be an array of {library}, since its backend was called, received an array of "
            f"{library_of(value)}. Convert it, or call mha_spec, which chooses the backend by the type.",
        )


def check_alike(label: str, value: object, like: Array, other: str, clause: str, wanted: str = "an array") -> None:
    """Require an array of the library and on the device of another argument (MHA-ARG-4)."""
    if lies_with(value, like):
        return
    library = library_of(like)
    if require_array(label, value, clause, wanted) != library:
        refuse_type(
            "MHA-ARG-4",
            f"`{label}` must be an array of {library}, as `{other}` is, received an array of {library_of(value)}. "
            "Convert either first.",
        )
    check_same_device(label, value, other, like)


def check_same_device(label: str, array: Array, other: str, like: Array) -> None:
    """Refuse two arrays that are placed on different devices (MHA-ARG-4)."""
    expected, received = placement_of(like), placement_of(array)
    if expected != received and None not in (expected, received):
        refuse_value(
            "MHA-ARG-4", f"`{label}` must be on the device of `{other}`, device={expected}, received device={received}."
        )


def check_floating(label: str, array: Array, clause: str) -> str:
    """Require a floating array, and return the name of its dtype."""
    name = dtype_name(array)
    if name not in FLOATING:
        refuse_type(clause, f"`{label}` must have a dtype of {FLOATING_NAMES}, received dtype={name}.")
    return name


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Tell whether a value maps names to values."""
    return isinstance(value, (dict, Mapping))


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Tell whether a value is a list or a tuple."""
    return isinstance(value, (list, tuple))


def python_values(value: object) -> list[Any] | None:
    """Return the entries of a list, a tuple or a NumPy array as Python values, or None for another value.

    Dates and times are no numbers, though `tolist` of NumPy can turn them to integers (MHA-ARG-2).
    """
    array: Any = value
    entries: object = array.tolist() if library_of(value) == "numpy" and array.dtype.kind not in TIMES else value
    return [plain(entry) for entry in entries] if is_sequence(entries) else None


def check_integers(label: str, value: object, query: Array, shape: tuple[int, ...], axes: str, clause: str) -> None:
    """Require integers of a shape in a sequence, a NumPy array or an array of the query's library."""
    library = library_of(value)
    if library is None:
        if not is_sequence(value) or len(shape) != 1 or not all(is_integer(plain(entry)) for entry in value):
            _refuse_integers(label, f"{label}={short_repr(value)}", shape, axes, clause)
        received: tuple[int, ...] = (len(value),)
    else:
        if library != "numpy":
            check_alike(label, value, query, "query", clause)
        if not dtype_name(value).startswith(("int", "uint")):
            _refuse_integers(label, f"dtype={dtype_name(value)}", shape, axes, clause)
        received = shape_of(value)
    if not fits(received, shape):
        refuse_value(clause, f"`{label}` must have shape {axes}={shape}, received shape={received}.")


def check_table(label: str, table: Array, like: Array, batch: int | None) -> None:
    """Require a table of integers with a row for each batch entry; a number of None is not known (MHA-CACHE-9)."""
    require_array(label, table, "MHA-CACHE-9", "an array of integers (batch, max_blocks)")
    shape = shape_of(table)
    expected: Any = (batch, shape[1] if len(shape) == 2 else 0)
    check_integers(label, table, like, expected, "(batch, max_blocks)", "MHA-CACHE-9")


def differ(size: int | None, other: int | None) -> bool:
    """Tell whether two sizes differ; None, a size that is unknown in a trace, differs from none."""
    return size != other and size is not None and other is not None


def fits(shape: tuple[int | None, ...], expected: tuple[int | None, ...]) -> bool:
    """Tell whether a shape fits the expected shape; None, in either, fits every size."""
    if shape == expected:
        return True
    return len(shape) == len(expected) and not any(map(differ, shape, expected))


def check_same_dtype(label: str, array: Array, like: Array, other: str, clause: str) -> None:
    """Require the dtype of another array, by `clause`, and its library and device (MHA-ARG-4).

    The dtypes are compared by name, because dtypes of NumPy that differ in the order of bytes only are unequal.
    """
    check_alike(label, array, like, other, "MHA-ARG-4")
    if dtype_name(array) != dtype_name(like):
        refuse_type(
            clause,
            f"`{label}` must have the dtype of `{other}`, dtype={dtype_name(like)}, "
            f"received dtype={dtype_name(array)}. Convert either first: the layer never promotes.",
        )


def _refuse_integers(label: str, received: str, shape: tuple[int, ...], axes: str, clause: str) -> NoReturn:
    refuse_type(clause, f"`{label}` must hold integers of shape {axes}={shape}, received {received}.")
