"""The steps of the layer with a paged cache, as `mha_spec.layer_steps`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from .arrays import device_of, host_integers, library_of, namespace_of
from .cache import PagedKVCache
from .pools import slots_of_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .arrays import Array
    from .pools import WrittenSlots

__all__ = [
    "OPTIONS",
    "append_in_place",
    "append_paged",
    "attend_paged",
    "bounds",
    "integers",
    "new_slots",
    "store_pages",
]

OPTIONS = ("causal", "window", "q_offset", "scale", "softcap", "sinks")
"""The options of the layer that paged attention has (MHA-CACHE-10)."""


def append_paged(
    cache: PagedKVCache, key: Array, value: Array, counts: Array | Sequence[int] | None, steps: Any
) -> PagedKVCache:
    """Append new tokens to each batch entry, in the blocks that the table names (MHA-CACHE-9)."""
    stop = steps.new_lengths(cache.lengths, counts, key.shape[2], key)
    slots = steps.new_slots(cache, stop, key)
    new_key, new_value = (
        steps.store_pages(pages, new, slots) for pages, new in ((cache.key, key), (cache.value, value))
    )
    return PagedKVCache(new_key, new_value, stop, cache.block_table)


def append_in_place(
    written: WrittenSlots,
    cache: PagedKVCache,
    stop: Array | Sequence[int],
    slots: numpy.ndarray,
    copy: Callable[[Array], Array],
    write: Callable[[Array, Array], None],
) -> PagedKVCache:
    """Append new tokens where no other cache reads their slots, else in a copy of the blocks (MHA-CACHE-3).

    `slots` are those of the new tokens, with -1 where a token has none; `write` writes the tokens to key and value.
    """
    lengths = numpy.asarray(cache.lengths)
    tokens = slots_of_positions(cache.block_table, cache.key.shape[:2], numpy.zeros_like(lengths), lengths)
    new = slots[slots >= 0]
    shared = written.claim(cache, tokens, new)
    key, value = (pool if shared else copy(pool) for pool in (cache.key, cache.value))
    write(key, value)
    result = PagedKVCache(key, value, stop, cache.block_table)
    return result if shared else written.register(result, tokens, new)


def new_slots(cache: PagedKVCache, stop: Array | Sequence[int], new: Array) -> Array:
    """Return the slot of each new token among those of all blocks, (batch, length); -1 stores it nowhere.

    A token has no slot at or behind `stop`, beyond the table, or where the table names no block (MHA-CACHE-4,
    MHA-CACHE-11).
    """
    xp, device = namespace_of(new), device_of(new)
    (blocks, size), (batch, columns), length = cache.key.shape[:2], cache.block_table.shape, new.shape[2]
    if library_of(length) is None and 0 in (blocks, batch, columns, length):  # A trace may have it in an array.
        return xp.full((batch, length), -1, device=device)
    start, end, table = (integers(numbers, new) for numbers in (cache.lengths, stop, cache.block_table))
    positions: Array = start[:, None] + xp.arange(length, dtype=start.dtype, device=device)
    inside: Array = (positions >= 0) & (positions < end[:, None]) & (positions < columns * size)
    positions = xp.clip(positions, 0, columns * size - 1)
    entries = xp.arange(batch, dtype=start.dtype, device=device)[:, None] * columns + positions // size
    numbers = xp.reshape(xp.take(xp.reshape(table, (-1,)), xp.reshape(entries, (-1,)), axis=0), (batch, length))
    inside = inside & (numbers >= 0) & (numbers < blocks)
    return xp.where(inside, xp.astype(xp.clip(numbers, 0, blocks - 1), positions.dtype) * size + positions % size, -1)


def integers(numbers: Array | Sequence[int], like: Array) -> Array:
    """Return integers as an array of the library of `like`, of the type of its indices."""
    xp, device = namespace_of(like), device_of(like)
    index = xp.arange(0, device=device).dtype
    if host_integers(numbers) is not None:  # In 32 bits, which every library has.
        host = numpy.clip(numpy.asarray(numbers).astype(numpy.float64), -(2**31), 2**31 - 1).astype(numpy.int32)
        return xp.astype(xp.asarray(host, device=device), index)
    return xp.astype(xp.asarray(numbers), index)


def store_pages(pages: Array, new: Array, slots: Array) -> Array:
    """Write new tokens, (batch, kv_heads, length, size), to their slots; no other slot changes (MHA-CACHE-9)."""
    xp, (blocks, block_size, heads, size) = namespace_of(pages), pages.shape
    if 0 in (blocks, *slots.shape):
        return pages
    tokens = xp.reshape(xp.permute_dims(new, (0, 2, 1, 3)), (-1, heads, size))
    all_slots = xp.arange(blocks * block_size, dtype=slots.dtype, device=device_of(pages))
    hits = xp.reshape(slots, (-1, 1)) == all_slots
    moved = xp.take(tokens, xp.argmax(xp.astype(hits, slots.dtype), axis=0), axis=0)
    flat = xp.reshape(pages, (-1, heads, size))
    return xp.reshape(xp.where(xp.any(hits, axis=0)[:, None, None], moved, flat), pages.shape)


def attend_paged(query: Array, cache: PagedKVCache, options: dict[str, Any], varlen: Any, steps: Any) -> Array:
    """Attend to the tokens of a paged cache by a packed call, a sequence for each batch entry (MHA-CACHE-10)."""
    xp, (batch, heads, length, size) = namespace_of(query), query.shape
    tokens = xp.reshape(xp.permute_dims(query, (0, 2, 1, 3)), (batch * length, heads, size))
    output = varlen(
        tokens,
        cache.key,
        cache.value,
        steps.bounds(batch, length, query),
        None,
        block_table=cache.block_table,
        seqused_kv=cache.lengths,
        **{name: options[name] for name in OPTIONS if name in options},
    )
    return xp.permute_dims(xp.reshape(output, (batch, length, heads, output.shape[2])), (0, 2, 1, 3))


def bounds(batch: int, length: int, _: Array) -> Array:
    """Return the cumulative lengths of sequences of the same length."""
    return numpy.arange(batch + 1, dtype=numpy.int32) * length
