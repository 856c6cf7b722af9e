"""Arguments that are Python values: numbers, integers, sizes and flags.

A scalar of NumPy counts as the Python value that it holds, except for dates and times, which are no numbers
(MHA-ARG-2). A symbolic number of PyTorch, which stands for a Python number that changes between the calls of a compiled
function, counts as that number. A symbolic size of JAX, which stands for the size of any call of an exported function,
counts as a size, an offset, and a bound of positions.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy

from .compiling import not_traced
from .errors import refuse_type, refuse_value

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "LARGEST_FLOAT",
    "PLAIN_TYPES",
    "SMALLEST_NORMAL",
    "TIMES",
    "are_equal_numbers",
    "as_float",
    "check_count",
    "check_flag",
    "check_integer",
    "check_number",
    "check_size",
    "is_integer",
    "is_less",
    "is_size",
    "plain",
    "short_repr",
    "undecided",
]

SMALLEST_NORMAL, LARGEST_FLOAT = sys.float_info.min, sys.float_info.max

LARGEST_SIZE = 2**31 - 1
"""The largest size of an axis, an int32."""

LARGEST_COUNT = 2**60 - 1
"""The most numbers of an array, whose bytes an int64 can count."""

LONGEST = 80
"""The most characters of a value that a message shows."""

PLAIN_TYPES = frozenset({type(None), bool, int, float, str})
"""The types of options in the key of a prepared call: their values never change, and are equal only if alike."""

TIMES = "mM"
"""The kinds of NumPy's timedelta64 and datetime64."""

_SYMBOLIC = {"SymInt": "int", "SymFloat": "float"}


def plain(value: Any) -> Any:
    """Return the Python value that a NumPy scalar holds, and any other value, also a date or time, unchanged.

    `item` of a time is a number in some units, and NumPy counts timedelta64 among its integers.
    """
    if not isinstance(value, numpy.generic):
        return value
    scalar = cast("Any", value)
    if scalar.dtype.kind in TIMES:
        return scalar
    held: object = scalar.item()
    return (
        float(cast("float", held)) if isinstance(held, numpy.floating) else held
    )  # item() of a longdouble is a longdouble.


@lru_cache(maxsize=1024)
@not_traced
def _kind_of(cls: type) -> str | None:
    """Return "int" or "float" for a class of numbers, and None for others; a bool is not a number."""
    if cls.__module__.partition(".")[0] == "torch":
        return _SYMBOLIC.get(cls.__name__)
    return next((kind.__name__ for kind in (int, float) if issubclass(cls, kind) and not issubclass(cls, bool)), None)


def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether a value is a Python integer."""
    return _kind_of(type(value)) == "int"


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a Python number."""
    return _kind_of(type(value)) is not None


@lru_cache(maxsize=1024)
@not_traced
def _is_symbolic_size(cls: type) -> bool:
    return (cls.__module__.partition(".")[0], cls.__name__) == ("jax", "_DimExpr")


def is_size(value: object) -> TypeGuard[int]:
    """Tell whether a value is a Python integer or a symbolic size of JAX."""
    return is_integer(value) or _is_symbolic_size(type(value))


def is_less(first: float, second: float) -> bool:
    """Tell whether a number is less than another; False where symbolic sizes of JAX leave it open."""
    try:
        return first < second
    except undecided():
        return False


def undecided() -> tuple[type[Exception], ...]:
    """Return the error of what depends on the values of symbolic sizes; none where JAX is not loaded."""
    jax: Any = sys.modules.get("jax")
    return () if jax is None else (jax.errors.InconclusiveDimensionOperation,)


def are_equal_numbers(first: object, second: object) -> bool:
    """Tell whether two values are Python or NumPy numbers with the same value."""
    numbers = plain(first), plain(second)
    return all(map(is_number, numbers)) and numbers[0] == numbers[1]


def check_flag(label: str, value: object, clause: str = "MHA-ARG-2") -> bool:
    """Require True or False, and return it as a Python bool (MHA-ARG-2)."""
    if value is True or value is False:
        return value
    held = plain(value)
    if not isinstance(held, bool):
        refuse_type(clause, f"`{label}` must be True or False, received {_named(label, value)}.")
    return held


def check_number(label: str, value: object, clause: str = "MHA-ARG-2", fix: str = "") -> float:
    """Require a number, and return it as a Python number, which may be an integer above every float (MHA-ARG-2).

    `fix` says what to do where a traced number is meant.
    """
    if type(value) is float:
        return value
    held = plain(value)
    if not is_number(held):
        hint = fix if is_size(held) or hasattr(held, "dtype") else ""
        refuse_type(clause, f"`{label}` must be a Python number, received {_named(label, value)}.{hint}")
    return held


def check_integer(label: str, value: object, least: int, clause: str, *, symbolic: bool = False) -> int:
    """Require an integer, or a symbolic size if `symbolic`, that is at least `least`; return an integer as Python's."""
    held = plain(value)
    if not (is_size(held) if symbolic else is_integer(held)):
        fix = ""
        if is_size(held):
            fix = " Export the function with a number."
        elif hasattr(held, "dtype"):
            fix = " Pass a Python integer, such as an entry of x.shape."
        refuse_type(clause, f"`{label}` must be an integer, received {_named(label, value)}.{fix}")
    if is_less(held, least):
        refuse_value(clause, f"`{label}` must be {label}>={least}, received {label}={short_repr(held)}.")
    return held


def check_size(label: str, value: object, least: int, clause: str, *, symbolic: bool = False) -> int:
    """Require an integer in least..2^31 - 1, the size of an axis, or a symbolic size if `symbolic`."""
    size: Any = check_integer(label, value, least, clause, symbolic=symbolic)
    if isinstance(size, int) and size > LARGEST_SIZE:  # A symbolic number is within 64 bits.
        refuse_value(clause, f"`{label}` must be {least}<={label}<2**31, received {label}={short_repr(size)}.")
    return size


def check_count(sizes: Mapping[str, Any], clause: str) -> None:
    """Require the sizes of an array that has fewer than 2^60 numbers."""
    if all(isinstance(size, int) for size in sizes.values()) and prod(sizes.values()) > LARGEST_COUNT:
        label, received = next(iter(sizes)), ", ".join(f"{name}={size}" for name, size in sizes.items())
        refuse_value(
            clause, f"`{label}` must be the size of an array with {' * '.join(sizes)}<2**60, received {received}."
        )


def as_float(value: float) -> float:
    """Convert a Python integer to a float; a symbolic number stays symbolic."""
    return float(value) if isinstance(value, int) else value


def short_repr(value: object) -> str:
    """Format a value for a message, on a line of bounded length."""
    try:
        spelled = repr(value)
    except Exception:  # An integer of more than 4300 digits, deeply nested lists, a faulty class.
        return f"a value of type {type(value).__name__} that cannot be shown"
    spelled = " ".join(spelled.split())
    return spelled if len(spelled) <= LONGEST else f"{spelled[: LONGEST - 3]}..."


def _named(label: str, value: object) -> str:
    return f"{label}={short_repr(value)} of type {type(value).__name__}"
