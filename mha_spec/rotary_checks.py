"""The options of rotary embedding, and their checks (MHA-ROTARY-6, MHA-ROTARY-7, MHA-ROTARY-8)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .array_checks import is_mapping, python_values, require_array
from .arrays import FLOATING, dtype_name, library_of, softmax_range
from .errors import refuse_type, refuse_value
from .scalars import (
    LARGEST_FLOAT,
    SMALLEST_NORMAL,
    as_float,
    check_flag,
    check_number,
    is_integer,
    is_number,
    plain,
    short_repr,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .arrays import Array

__all__ = ["Rotary", "check_rotary", "check_rotary_dim"]


class Rotary(NamedTuple):
    """The options of rotary_embedding."""

    base: float = 10000.0
    interleaved: bool = False
    rotary_dim: int | None = None
    """The number of components that turn, from the first on; None turns all."""
    frequencies: tuple[float, ...] | Array | None = None
    """The frequency of each pair, numbers or an array that is not read; None computes them from the base."""
    attention_factor: float = 1.0
    """The factor of cosines and sines."""
    sections: tuple[int, ...] | None = None
    """The number of pairs that turn by the positions on each axis; None is a single axis."""

    def non_defaults(self) -> dict[str, Any]:
        """Return the options that differ from the defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}


def check_rotary(rotary: Mapping[str, Any], size: int, like: Array | None = None) -> Rotary:
    """Return the options of rotary_embedding with defaults, for vectors of `size` components (MHA-ROTARY-6).

    Without vectors `like`, the options are settings, which are compared and hashed and hold no array.
    """
    if not is_mapping(rotary):
        refuse_type(
            "MHA-ROTARY-6",
            "`rotary` must be a mapping of the options of rotary_embedding, {} for the defaults, "
            f"received {short_repr(rotary)} of type {type(rotary).__name__}. None means no rotation.",
        )
    for name in rotary:
        if name not in Rotary._fields:
            refuse_type(
                "MHA-ROTARY-6",
                f"`rotary` must hold options of rotary_embedding, {', '.join(Rotary._fields)}, "
                f"received {short_repr(name)}.",
            )
    options = Rotary(**rotary)
    base = check_number("base", options.base, "MHA-ROTARY-6")
    interleaved = check_flag("interleaved", options.interleaved, "MHA-ROTARY-6")
    if not 0 < base <= LARGEST_FLOAT:
        refuse_value("MHA-ROTARY-6", f"`base` must be finite and base>0, received base={short_repr(base)}.")
    rotary_dim = check_rotary_dim(options.rotary_dim, size)
    frequencies = _check_frequencies(options.frequencies, base, size if rotary_dim is None else rotary_dim, like)
    sections = _check_sections(options.sections, size if rotary_dim is None else rotary_dim)
    return Rotary(base, interleaved, rotary_dim, frequencies, _check_factor(options.attention_factor, like), sections)


def check_rotary_dim(rotary_dim: object, size: int) -> int | None:
    """Return the number of components that turn in vectors of `size`, or None for all (MHA-ROTARY-6)."""
    rotary_dim = plain(rotary_dim)
    if rotary_dim is None:
        if size % 2:
            refuse_value(
                "MHA-ROTARY-6",
                f"`rotary_dim` must be given for vectors of an odd size, received size={size}, rotary_dim=None: "
                f"components turn in pairs. rotary_dim={size - 1} leaves the last component unchanged.",
            )
        return None
    if not is_integer(rotary_dim):
        refuse_type(
            "MHA-ROTARY-6", f"`rotary_dim` must be an integer or None, received rotary_dim={short_repr(rotary_dim)}."
        )
    if rotary_dim % 2 or not 2 <= rotary_dim <= size:
        refuse_value(
            "MHA-ROTARY-6",
            f"`rotary_dim` must be even and 2<=rotary_dim<=size={size}, received rotary_dim={short_repr(rotary_dim)}.",
        )
    return rotary_dim


def _check_frequencies(
    frequencies: Any, base: float, rotary_dim: int, like: Array | None
) -> tuple[float, ...] | Array | None:
    """Return the frequency of each pair, on the host a finite number of at least 0 (MHA-ROTARY-7)."""
    if frequencies is None:
        return None
    if base != Rotary._field_defaults["base"]:
        refuse_value(
            "MHA-ROTARY-7",
            f"`base` must be left out where `frequencies` are given, received base={short_repr(base)}: "
            "frequencies replace the base.",
        )
    if like is not None and library_of(frequencies) not in (None, "numpy"):
        _check_unread(frequencies, rotary_dim, like)
        return frequencies
    shape = None if library_of(frequencies) is None else cast("tuple[int, ...]", frequencies.shape)
    numbers = _numbers(frequencies) if shape is None or len(shape) == 1 else ()
    if len(numbers) != rotary_dim // 2:
        fix = f" rotary_dim={2 * len(numbers)} turns that many components." if numbers else ""
        refuse_value(
            "MHA-ROTARY-7",
            f"`frequencies` must have shape (rotary_dim/2,)=({rotary_dim // 2},), "
            f"received shape={(len(numbers),) if shape is None else shape}.{fix}",
        )
    if not all(0 <= number < math.inf for number in numbers):
        refuse_value("MHA-ROTARY-7", f"`frequencies` must be finite and >=0, received {short_repr(frequencies)}.")
    return numbers


def _check_unread(frequencies: Array, rotary_dim: int, like: Array) -> None:
    """Require a floating array of the library of the vectors, of a known shape; its numbers are not read."""
    library = library_of(like)
    if require_array("frequencies", frequencies, "MHA-ROTARY-7") != library:
        refuse_type(
            "MHA-ARG-4",
            f"`frequencies` must be numbers on the host or an array of {library}, as the vectors that turn are, "
            f"received an array of {library_of(frequencies)}.",
        )
    kind = dtype_name(frequencies)
    if kind not in FLOATING:
        refuse_type("MHA-ROTARY-7", f"`frequencies` must have a floating dtype, received dtype={kind}.")
    shape = None if getattr(frequencies.shape, "rank", 1) is None else tuple(frequencies.shape)
    if shape != (rotary_dim // 2,):
        refuse_value(
            "MHA-ROTARY-7",
            f"`frequencies` must have shape (rotary_dim/2,)=({rotary_dim // 2},), "
            f"received shape={'<unknown>' if shape is None else shape}.",
        )


def _numbers(frequencies: object) -> tuple[float, ...]:
    """Convert a sequence of numbers or a NumPy array of rank 1 to Python floats."""
    numbers = python_values(frequencies)
    if numbers is None or not all(map(is_number, numbers)):
        refuse_type(
            "MHA-ROTARY-7",
            "`frequencies` must be None, a sequence of numbers or an array (rotary_dim/2,), in settings of a layer a "
            f"NumPy array, received {short_repr(frequencies)} of type {type(frequencies).__name__}.",
        )
    return tuple(float(number) if abs(number) <= LARGEST_FLOAT else math.inf for number in numbers)


def _check_factor(factor: object, like: Array | None) -> float:
    """Return a factor above 0, a normal number of the softmax's type beside the vectors that turn (MHA-ROTARY-8)."""
    number = check_number("attention_factor", factor, "MHA-ROTARY-8")
    smallest, largest = (SMALLEST_NORMAL, LARGEST_FLOAT) if like is None else softmax_range(like)
    if not smallest <= number <= largest:
        refuse_value(
            "MHA-ROTARY-8",
            "`attention_factor` must be finite and attention_factor>0, "
            f"{smallest:.2g}<=attention_factor<={largest:.2g}, the normal numbers of the softmax's type, "
            f"received attention_factor={short_repr(number)}.",
        )
    return as_float(number)


def _check_sections(sections: object, rotary_dim: int) -> tuple[int, ...] | None:
    """Return the number of pairs of each axis of positions, together all pairs that turn (MHA-ROTARY-17)."""
    if sections is None:
        return None
    counts = python_values(sections)
    if counts is None or not all(map(is_integer, counts)):
        refuse_type(
            "MHA-ROTARY-17",
            f"`sections` must be None or a sequence of integers, received sections={short_repr(sections)}.",
        )
    if min(counts, default=-1) < 0 or sum(counts) != rotary_dim // 2:
        refuse_value(
            "MHA-ROTARY-17",
            f"`sections` must be integers >= 0 whose sum is rotary_dim/2={rotary_dim // 2}, the number of pairs, "
            f"received sections={short_repr(counts)}.",
        )
    return tuple(counts)
