"""The checks of caches, which every backend shares; they read the contents of host data only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy

from .arguments import options_of
from .array_checks import check_integers, check_same_dtype, fits, require_array, shape_of
from .arrays import host_integers, library_of
from .cache import KVCache, PagedKVCache
from .errors import refuse_type, refuse_value
from .paged_steps import OPTIONS
from .pools import slots_of_positions
from .position_checks import check_entries
from .scalars import short_repr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .arrays import Array

    Size = int | None
    """A size, or None if a trace does not know it."""

__all__ = ["check_buffers", "check_paged_options", "check_room"]

REFUSED = tuple(name for name in options_of("multi_head_attention") if name not in (*OPTIONS, "kv_lengths"))
"""The options that paged attention does not have."""


def check_paged_options(function: str, options: Mapping[str, Any], *, weighs: bool) -> None:
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


def check_buffers(cache: object, like: Array, other: str, sizes: tuple[Size, Size], last: tuple[Size, Size]) -> None:
    """Require buffers like another array, with (batch, kv_heads) and (qk_dim, v_dim) (MHA-CACHE-7, MHA-CACHE-9)."""
    batch, kv_heads = sizes
    if isinstance(cache, PagedKVCache):
        clause, axes = "MHA-CACHE-9", {"blocks": None, "block_size": None, "kv_heads": kv_heads}
    elif isinstance(cache, KVCache):
        clause, axes = "MHA-CACHE-7", {"batch": batch, "kv_heads": kv_heads, "capacity": None}
    else:
        refuse_type(
            "MHA-CACHE-7", f"`cache` must be a KVCache, received {type(cache).__name__}. Make it with KVCache.empty."
        )
    for name, buffer, size in zip(("key", "value"), (cache.key, cache.value), last, strict=True):
        all_axes = {**axes, "qk_dim" if name == "key" else "v_dim": size}
        received = _check_buffer(f"cache.{name}", buffer, like, other, all_axes, clause)
        axes = {
            axis: number if known is None else known
            for (axis, known), number in zip(axes.items(), received[:3], strict=True)
        }
    if isinstance(cache, PagedKVCache):
        _check_table(cache, like, batch)
    if cache.lengths is None:
        refuse_type(clause, "`cache.lengths` must hold an integer for each batch entry, received None.")
    check_entries("cache.lengths", cache.lengths, like, 0, _capacity(cache), "capacity")


def _check_buffer(
    label: str, buffer: Array, like: Array, other: str, axes: Mapping[str, Size], clause: str
) -> tuple[Size, ...]:
    """Require the library, dtype and device of `like`, and the sizes that are known; return the shape."""
    require_array(label, buffer, clause)
    check_same_dtype(label, buffer, like, other, clause)
    received = shape_of(buffer)
    if not fits(received, tuple(axes.values())):
        expected = ", ".join(axis if size is None else str(size) for axis, size in axes.items())
        refuse_value(clause, f"`{label}` must have shape ({', '.join(axes)})=({expected}), received shape={received}.")
    return received


def _check_table(cache: PagedKVCache, like: Array, batch: Size) -> None:
    """Require slots in each block, and a row of integers for each batch entry (MHA-CACHE-9)."""
    if cache.block_size == 0:
        refuse_value("MHA-CACHE-9", f"`cache.key` must have block_size>=1, received shape={shape_of(cache.key)}.")
    require_array("cache.block_table", cache.block_table, "MHA-CACHE-9", "an array of integers (batch, max_blocks)")
    shape = shape_of(cache.block_table)
    expected: Any = (batch, shape[1] if len(shape) == 2 else 0)
    check_integers("cache.block_table", cache.block_table, like, expected, "(batch, max_blocks)", "MHA-CACHE-9")


def _capacity(cache: KVCache | PagedKVCache) -> Size:
    """Return the most tokens of a batch entry; None if a trace does not know it."""
    if isinstance(cache, KVCache):
        return cache.capacity
    sizes: Any = cache.block_size, shape_of(cache.block_table)[1]
    size, columns = sizes
    return None if size is None or columns is None else size * columns


def check_room(cache: KVCache | PagedKVCache, length: Size, counts: Array | Sequence[int] | None) -> None:
    """Require a free slot for every new token, where lengths and table are host data (MHA-CACHE-4, MHA-CACHE-11)."""
    before, capacity = host_integers(cache.lengths), _capacity(cache)
    if counts is not None:
        more = host_integers(counts)
    else:
        more = None if before is None or length is None else [length] * len(before)
    if before is None or more is None or capacity is None:
        return
    after = [old + new for old, new in zip(before, more, strict=True)]
    is_paged = isinstance(cache, PagedKVCache)
    if max(after, default=0) > capacity:
        name = "max_blocks * block_size" if is_paged else "capacity"
        fix = "Append columns to block_table." if is_paged else "Make the cache with a larger capacity."
        refuse_value(
            "MHA-CACHE-4",
            f"`cache` must have room for the new tokens, {name}={capacity}, received lengths={before} and {more} more. "
            f"Nothing was stored. {fix}",
        )
    sizes: Any = shape_of(cache.key)[:2]
    if is_paged and library_of(cache.block_table) == "numpy" and None not in sizes:
        _check_slots(cache, before, after)


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
