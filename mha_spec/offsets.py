"""The position of query 0 where q_offset is the name of an alignment, or an array without axes (MHA-POS-1, -2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from .arguments import offset_of_reading
from .arrays import device_of, dtype_name, host_integers, library_of, namespace_of, native, storage_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .arrays import Array

__all__ = ["for_each_entry", "named_offset"]


def for_each_entry(offset: Any, count: int) -> Any:
    """Repeat an integer in an array without axes `count` times; host data becomes a number (MHA-POS-1).

    Every other offset is returned unchanged, right or wrong.
    """
    library = library_of(offset)
    if library is None or storage_of(offset) is not None:  # The shape of a nested tensor is not always known.
        return offset
    if len(offset.shape) != 0 or not dtype_name(offset).startswith(("int", "uint")):
        return offset
    return int(offset) if library == "numpy" else namespace_of(offset).broadcast_to(offset, (count,))


def named_offset(
    reading: str,
    q_lengths: Array | Sequence[int] | None,
    kv_lengths: Array | Sequence[int] | None,
    query: Array,
    key: Array,
) -> Array | int:
    """Compute the offset of a named alignment: an integer, or with lengths an integer for each batch entry.

    It is host data where the lengths are, else an array of the library of the query; lengths that cannot be read are
    clamped (MHA-LEN-3). Axis 2 of `query` and `key` counts queries and keys.
    """
    on_host = all(lengths is None or host_integers(lengths) is not None for lengths in (q_lengths, kv_lengths))
    clamp = _clamp_on_host if on_host else _clamp
    q_length, kv_length = clamp(q_lengths, query.shape[2], query), clamp(kv_lengths, key.shape[2], query)
    return offset_of_reading(reading, q_length, kv_length)


def _clamp_on_host(lengths: Array | Sequence[int] | None, size: int, _: Array) -> Array | int:
    return size if lengths is None else numpy.clip(numpy.asarray(lengths, dtype=numpy.int64), 0, size)


def _clamp(lengths: Array | Sequence[int] | None, size: int, like: Array) -> Array | int:
    if lengths is None:
        return size
    xp, device = namespace_of(like), device_of(like)
    integers = xp.arange(0, device=device).dtype
    if library_of(lengths) != library_of(like):
        lengths = xp.asarray(native(numpy.asarray(lengths)), dtype=integers, device=device)
    return xp.clip(xp.astype(lengths, integers, copy=False), 0, size)
