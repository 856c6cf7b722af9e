"""The checks of options that compare positions and indices: windows, chunks, offsets, lengths, starts and prefixes.

As those of `mha_spec.checks`, they read the contents of host data alone (MHA-LEN-3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arguments import READINGS
from .array_checks import check_integers, is_sequence
from .arrays import Array, host_integers
from .errors import refuse_type, refuse_value
from .offsets import for_each_entry
from .scalars import is_less, is_size, plain, short_repr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .arguments import Arguments
    from .varlen_arguments import VarlenArguments

__all__ = [
    "LARGEST_POSITION",
    "check_alignment",
    "check_chunk",
    "check_common_offset",
    "check_entries",
    "check_lengths",
    "check_offset",
    "check_position",
    "check_prefix",
    "check_window",
    "chunk_size",
    "refuse_ambiguity",
    "window_bounds",
]

LARGEST_POSITION = 2**30
"""Offsets, lengths and windows are at most this in magnitude, so that int32 positions cannot overflow."""


def check_window(a: Arguments | VarlenArguments) -> None:
    """Require a pair (left, right) of numbers of positions, each None or 0..2^30 (MHA-ARG-3)."""
    if a.window is not None:
        a.window = window_bounds(a.window)


def window_bounds(window: object) -> tuple[int | None, int | None]:
    """Return the bounds of a window as Python integers or None; they are in their range (MHA-ARG-3)."""
    if not is_sequence(window) or len(window) != 2:
        refuse_type(
            "MHA-ARG-3",
            f"`window` must be a pair (left, right), received window={short_repr(window)}. "
            "A causal window of n keys is window=(n - 1, 0).",
        )
    return _bound("left", window[0]), _bound("right", window[1])


def _bound(side: str, bound: object) -> int | None:
    if bound is None:
        return None
    number = plain(bound)
    if not is_size(number):
        refuse_type("MHA-ARG-3", f"`window` must hold integers or None, received {side}={short_repr(bound)}.")
    if is_less(number, 0) or is_less(LARGEST_POSITION, number):
        refuse_value(
            "MHA-ARG-3",
            f"`window` must have 0<={side}<=2**30 or {side}=None for no bound, received {side}={short_repr(number)}.",
        )
    return number


def check_chunk(a: Arguments) -> None:
    """Require a Python integer in 1..2^30 (MHA-WINDOW-3)."""
    if a.chunk is not None:
        a.chunk = chunk_size(a.chunk)


def chunk_size(chunk: object) -> int:
    """Return the number of positions of a chunk as a Python integer, which is in its range (MHA-WINDOW-3)."""
    number = plain(chunk)
    if not is_size(number):
        refuse_type(
            "MHA-WINDOW-3",
            f"`chunk` must be an integer, the number of positions of each chunk, received chunk={short_repr(chunk)}.",
        )
    if is_less(number, 1) or is_less(LARGEST_POSITION, number):
        refuse_value(
            "MHA-WINDOW-3",
            f"`chunk` must be in 1<=chunk<=2**30, or chunk=None for no chunks, received chunk={short_repr(number)}.",
        )
    return number


def check_lengths(a: Arguments) -> None:
    """Require integer lengths and offsets for each batch entry, in their ranges if they are host data (MHA-LEN-3)."""
    if a.q_lengths is not None:
        check_entries("q_lengths", a.q_lengths, a.query, 0, a.q_len, "q_len")
    if a.kv_lengths is not None:
        check_entries("kv_lengths", a.kv_lengths, a.query, 0, a.kv_len, "kv_len")
    for label, value in (("kv_starts", a.kv_starts), ("prefix_lengths", a.prefix_lengths)):
        if value is not None:
            check_entries(label, value, a.query, 0, a.kv_len, "kv_len", "MHA-LEN-5")
    if a.q_offset is not None:
        a.q_offset = check_offset(a.q_offset, a.query)


def check_offset(offset: object, query: Array) -> Array | Sequence[int] | int | str | None:
    """Require an integer, an integer for each batch entry, or the name of an alignment (MHA-POS-1, MHA-POS-2).

    An integer in an array without axes is returned for each batch entry.
    """
    held = for_each_entry(plain(offset), query.shape[0])
    if not check_common_offset(held):
        check_entries("q_offset", held, query, -LARGEST_POSITION, LARGEST_POSITION, "2**30")
    return held


def check_common_offset(offset: object) -> bool:
    """Check an offset that all batch entries share; return False if it holds an integer for each (MHA-POS-2)."""
    if isinstance(offset, str):
        if offset not in READINGS:
            names = " or ".join(repr(reading) for reading in READINGS)
            refuse_value(
                "MHA-POS-2", f"`q_offset` must be integers or {names}, received q_offset={short_repr(offset)}."
            )
        return True
    if is_size(offset):
        check_position("q_offset", offset, -LARGEST_POSITION, LARGEST_POSITION, "2**30")
        return True
    return False


def check_prefix(a: Arguments) -> None:
    """Require causal with prefix_lengths, and a window that leaves room for its effect (MHA-CAUSAL-2)."""
    if a.prefix_lengths is None:
        return
    if not a.causal:
        refuse_value(
            "MHA-CAUSAL-2",
            "`prefix_lengths` must be given with causal=True, which then hides no key of the prefix, received "
            f"causal={a.causal}. Without causal every key is visible already.",
        )
    left, right = a.window or (None, None)
    if right == 0:
        refuse_value(
            "MHA-CAUSAL-2",
            "`prefix_lengths` must be given with a window whose right bound is not 0, which would hide the rest of the "
            f"prefix, received window={a.window}. causal=True with window=({left}, None) is the window of a prefix-LM.",
        )


def check_entries(
    label: str,
    value: object,
    query: Array,
    low: int,
    high: int | None,
    high_name: str,
    clause: str = "MHA-LEN-3",
) -> None:
    """Require an integer for each batch entry of `query`, within its range where it is host data (MHA-LEN-3).

    A limit of None stands for a size that is unknown in a trace, and is not checked.
    """
    if value is None:
        return
    check_integers(label, value, query, (query.shape[0],), "(batch,)", clause)
    for number in host_integers(value) or ():
        check_position(label, number, low, high, high_name, clause)


def check_position(
    label: str, number: int, low: int, high: int | None, high_name: str, clause: str = "MHA-LEN-3"
) -> None:
    """Require an integer in a range; a limit of None is unknown (MHA-LEN-3)."""
    if is_less(number, low) or (high is not None and is_less(high, number)):
        least = "-2**30" if low == -LARGEST_POSITION else low
        limits = f"{least}<={label}<=2**30" if high_name == "2**30" else f"{low}<={label}<={high_name}={high}"
        refuse_value(clause, f"`{label}` must be in {limits}, received {short_repr(number)}.")


def check_alignment(a: Arguments) -> None:
    """Require q_offset where a constraint compares positions and lengths differ (MHA-POS-2)."""
    if a.q_offset is None and a.positional:
        window = f"chunk={a.chunk}" if a.bounded_window is None else f"window={a.window}"
        refuse_ambiguity("causal=True" if a.causal else window, a.q_len, a.kv_len, a.kv_lengths)


def refuse_ambiguity(user: str, q_len: int, kv_len: int, kv_lengths: Array | Sequence[int] | None) -> None:
    """Refuse a missing offset unless the lengths are equal; `user` is the argument that needs positions (MHA-POS-2)."""
    if q_len == kv_len and kv_lengths is None:
        return
    readings = ['q_offset="upper_left" (0, as PyTorch and JAX)']
    if kv_lengths is None:
        lower_right = f"{kv_len - q_len}, kv_len - q_len, as FlashAttention and MLX"
    else:
        lower_right = "kv_lengths - q_len, or - q_lengths where they are given, as cuDNN and TransformerEngine"
        readings.append("q_offset=kv_lengths - q_len (as ONNX with a cache)")
    readings.insert(1, f'q_offset="lower_right" ({lower_right})')
    why = f"q_len={q_len} and kv_len={kv_len} differ" if q_len != kv_len else "kv_lengths are given"
    refuse_value(
        "MHA-POS-2",
        f"`q_offset` must be given with {user} where {why}: the diagonal is ambiguous. "
        f"Pass {' or '.join(readings)}; received q_offset=None.",
    )
