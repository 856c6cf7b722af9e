"""The checks of a paged cache, which every backend shares; they read the contents of host data only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy

from .arguments import options_of
from .array_checks import check_alike, check_integers, require_array, shape_of
from .arrays import dtype_name, host_integers, library_of
from .errors import refuse_type, refuse_value
from .paged_steps import OPTIONS
from .pools import slots_of_positions
from .position_checks import check_entries
from .scalars import short_repr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .arrays import Array
    from .cache import PagedKVCache

__all__ = ["check_buffers", "check_options", "check_room"]

REFUSED = tuple(name for name in options_of("multi_head_attention") if name not in (*OPTIONS, "kv_lengths"))
"""The options that paged attention does not have."""


def check_options(function: str, options: Mapping[str, Any], *, weighs: bool) -> None:
    """Refuse what paged attention does not have, by name (MHA-CACHE-10)."""
    if weighs or function == "multi_head_attention_and_weights":
        refuse_value(
            "MHA-CACHE-10",
            f"`cache` must be a KVCache in {function}, received a PagedKVCache. Paged attention returns no weights.",
        )
    for name in REFUSED:
        value = options.get(name)
        if value is not None and not (name == "dropout_rate" and value == 0):
            refuse_value(
                "MHA-CACHE-10",
                f"`{name}` must be None with a PagedKVCache, received {name}={short_repr(value)}. "
                "Paged attention has causal, window, q_offset, scale, softcap and sinks; a KVCache has all options.",
            )
    if isinstance(options.get("q_offset"), str):
        refuse_value(
            "MHA-CACHE-10",
            "`q_offset` must be None or integers with a PagedKVCache, "
            f"received q_offset={short_repr(options['q_offset'])}. None is the number of tokens before the call.",
        )


def check_buffers(cache: PagedKVCache, like: Array, other: str, sizes: tuple[Any, Any, Any], v_dim: int | None) -> None:
    """Require blocks of the library, dtype and device of `like`, and of (batch, kv_heads, qk_dim) (MHA-CACHE-9)."""
    batch, kv_heads, qk_dim = sizes
    blocks: tuple[Any, ...] = (None, None)
    for name, buffer, last in (("key", cache.key, qk_dim), ("value", cache.value, v_dim)):
        label = f"cache.{name}"
        require_array(label, buffer, "MHA-CACHE-9")
        check_alike(label, buffer, like, other, "MHA-ARG-4")
        if buffer.dtype != like.dtype:
            refuse_type(
                "MHA-CACHE-9",
                f"`{label}` must have the dtype of `{other}`, dtype={dtype_name(like)}, "
                f"received dtype={dtype_name(buffer)}. Convert either first: the layer never promotes.",
            )
        received, expected = shape_of(buffer), (*blocks, kv_heads, last)
        if not _fits(received, expected):
            axes = ("blocks", "block_size", "kv_heads", "qk_dim" if name == "key" else "v_dim")
            fitting = ", ".join(str(axis if size is None else size) for axis, size in zip(axes, expected, strict=True))
            refuse_value(
                "MHA-CACHE-9", f"`{label}` must have shape ({', '.join(axes)})=({fitting}), received shape={received}."
            )
        blocks = received[:2]
    if blocks[1] == 0:
        refuse_value("MHA-CACHE-9", f"`cache.key` must have block_size>=1, received shape={shape_of(cache.key)}.")
    _check_table(cache, like, batch)
    check_entries("cache.lengths", cache.lengths, like, 0, _capacity(cache), "capacity")


def _fits(received: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Tell whether a shape has the expected sizes, in which None is any size, as in a trace."""
    if len(received) != len(expected):
        return False
    return all(None in pair or pair[0] == pair[1] for pair in zip(received, expected, strict=True))


def _check_table(cache: PagedKVCache, like: Array, batch: int | None) -> None:
    """Require a row of integers for each batch entry, and lengths."""
    require_array("cache.block_table", cache.block_table, "MHA-CACHE-9", "an array of integers (batch, max_blocks)")
    shape = shape_of(cache.block_table)
    expected: Any = (batch, shape[1] if len(shape) == 2 else 0)
    check_integers("cache.block_table", cache.block_table, like, expected, "(batch, max_blocks)", "MHA-CACHE-9")
    if cache.lengths is None:
        refuse_type("MHA-CACHE-9", "`cache.lengths` must hold an integer for each batch entry, received None.")


def _capacity(cache: PagedKVCache) -> int | None:
    """Return the most tokens of a batch entry; None if a trace does not know it."""
    sizes: Any = shape_of(cache.key)[1], shape_of(cache.block_table)[1]
    size, columns = sizes
    return None if size is None or columns is None else size * columns


def check_room(cache: PagedKVCache, length: int | None, counts: Array | Sequence[int] | None) -> None:
    """Require a free slot for every new token, where lengths and table are host data (MHA-CACHE-4, MHA-CACHE-11)."""
    before = host_integers(cache.lengths)
    more = _counts(before, length, counts)
    capacity = _capacity(cache)
    if before is None or more is None or capacity is None:
        return
    after = [old + new for old, new in zip(before, more, strict=True)]
    if max(after, default=0) > capacity:
        refuse_value(
            "MHA-CACHE-4",
            f"`cache` must have room for the new tokens, max_blocks * block_size={capacity}, received lengths={before} "
            f"and {more} more. Nothing was stored. Append columns to block_table.",
        )
    sizes: Any = shape_of(cache.key)[:2]
    if library_of(cache.block_table) == "numpy" and None not in sizes:
        _check_slots(cache, before, after)


def _counts(before: list[int] | None, length: int | None, counts: Array | Sequence[int] | None) -> list[int] | None:
    if counts is not None:
        return host_integers(counts)
    return None if before is None or length is None else [length] * len(before)


def _check_slots(cache: PagedKVCache, before: list[int], after: list[int]) -> None:
    """Require blocks that exist, and new tokens in slots that hold no token (MHA-CACHE-9, MHA-CACHE-11)."""
    table: Any = cache.block_table
    sizes: Any = shape_of(cache.key)[:2]
    _check_blocks(numpy.asarray(table), sizes, after)
    held = numpy.zeros(sizes[0] * sizes[1], dtype=bool)
    held[slots_of_positions(table, sizes, numpy.zeros(len(before), int), before)] = True
    new = slots_of_positions(table, sizes, before, after)
    if held[new].any() or len(numpy.unique(new)) < len(new):
        _refuse_slot(held, new, before, after, sizes[1])


def _check_blocks(table: numpy.ndarray, sizes: tuple[int, int], after: list[int]) -> None:
    """Require a block that exists in each entry of the table that a token needs (MHA-CACHE-9)."""
    blocks, size = sizes
    needed = numpy.arange(int(table.shape[1])) * size < numpy.reshape(after, (-1, 1))
    for entry, column in numpy.argwhere(needed & ((table < 0) | (table >= blocks)))[:1].tolist():
        refuse_value(
            "MHA-CACHE-9",
            f"`cache.block_table` must name blocks that exist, 0<=block_table[{entry}, {column}]<blocks={blocks}, "
            f"received {int(table[entry, column])}. Nothing was stored. "
            f"Only entries behind its {after[entry]} tokens are not used.",
        )


def _refuse_slot(held: numpy.ndarray, new: numpy.ndarray, before: list[int], after: list[int], size: int) -> NoReturn:
    """Refuse the first new token whose slot holds another token, or is that of an earlier new token (MHA-CACHE-11)."""
    tokens = [(entry, token) for entry, ends in enumerate(zip(before, after, strict=True)) for token in range(*ends)]
    earlier = numpy.ones(len(new), dtype=bool)
    earlier[numpy.unique(new, return_index=True)[1]] = False
    place = int(numpy.argmax(held[new] | earlier))
    (entry, token), slot = tokens[place], int(new[place])
    refuse_value(
        "MHA-CACHE-11",
        f"`cache.block_table` must give token {token} of batch entry {entry} a slot that holds no token, "
        f"received slot {slot % size} of block {slot // size}, which another token has. "
        "Nothing was stored. Copy a shared block before a token is appended to it.",
    )
