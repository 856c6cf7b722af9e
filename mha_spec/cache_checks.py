"""The checks of caches, which every backend shares; they read the contents of host data only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy

from . import paged_steps, window_steps
from .arguments import options_of
from .array_checks import check_same_dtype, check_table, fits, require_array, shape_of
from .arrays import host_integers, library_of
from .cache import AnyCache, KVCache, PagedKVCache, WindowKVCache
from .errors import refuse_type, refuse_value
from .pools import slots_of_positions
from .position_checks import LARGEST_POSITION, check_entries, check_offset, chunk_size, window_bounds
from .scalars import is_integer, is_less, short_repr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .arrays import Array

    Size = int | None
    """A size, or None if a trace does not know it."""

__all__ = [
    "ROOM",
    "bounds_of",
    "check_buffers",
    "check_options_of_cache",
    "check_room",
    "check_span",
    "span_of",
]

KINDS = {
    PagedKVCache: ("MHA-CACHE-10", paged_steps.OPTIONS),
    WindowKVCache: ("MHA-CACHE-13", window_steps.OPTIONS),
}
"""The caches whose attention has fewer options, each with its clause and its options."""

ROOM = {
    KVCache: ("capacity", "Make the cache with a larger capacity."),
    PagedKVCache: ("max_blocks * block_size", "Append columns to block_table."),
}
"""The caches that can be full, each with the number of its slots and what makes more of them."""


def check_options_of_cache(cache: object, function: str, options: Mapping[str, Any], *, weighs: bool) -> None:
    """Refuse what attention with this cache does not have, by name (MHA-CACHE-10, MHA-CACHE-13)."""
    limited = next((kind for kind in KINDS if isinstance(cache, kind)), None)
    if limited is None:
        return
    kind, (clause, accepted) = limited.__name__, KINDS[limited]
    if weighs or function == "multi_head_attention_and_weights":
        refuse_value(
            clause, f"`cache` must be a KVCache in {function}, received a {kind}, with which there are no weights."
        )
    for name in options_of("multi_head_attention"):
        value = options.get(name)
        if name in (*accepted, "kv_lengths") or value is None or (name == "dropout_rate" and value == 0):
            continue
        refuse_value(
            clause,
            f"`{name}` must be None with a {kind}, received {name}={short_repr(value)}. "
            f"A {kind} has {', '.join(accepted)}; a KVCache has all options.",
        )
    if isinstance(options.get("q_offset"), str):
        refuse_value(
            clause,
            f"`q_offset` must be None or integers with a {kind}, received q_offset={short_repr(options['q_offset'])}. "
            "None is the number of tokens before the call.",
        )


def bounds_of(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the left bound of the window and the chunk of a call, each None where it has none."""
    chunk, window = options.get("chunk"), options.get("window")
    return None if window is None else window_bounds(window)[0], None if chunk is None else chunk_size(chunk)


def span_of(left: int | None, chunk: int | None) -> tuple[str, str, int | None]:
    """Return the option that limits how many keys a query sees, the formula of their number, and the number."""
    if chunk is not None:
        return "chunk", "chunk", chunk
    return "window", "left + 1", None if left is None else left + 1


def check_span(cache: WindowKVCache, options: Mapping[str, Any], query: Array) -> None:
    """Require a chunk or a window that the slots have room for, and queries whose keys they hold (MHA-CACHE-14)."""
    bounds, capacity = bounds_of(options), _slots(cache)
    name, formula, size = span_of(*bounds)
    if size is None or (capacity is not None and is_less(capacity, size)):
        refuse_value(
            "MHA-CACHE-14",
            f"`{name}` must fit a WindowKVCache, which holds the last tokens, "
            f"{formula}<=capacity={capacity}, "
            f"received {name}={short_repr(options.get(name))}. A KVCache holds all tokens.",
        )
    for label in ("kv_starts", "prefix_lengths"):
        check_entries(label, options.get(label), query, 0, LARGEST_POSITION, "2**30", "MHA-LEN-5")
    offset = check_offset(options.get("q_offset"), query)
    if offset is not None and capacity is not None:
        _check_held(cache, capacity, offset, options.get("kv_starts"), bounds)


def _check_held(
    cache: WindowKVCache, capacity: int, offset: Any, starts: Any, bounds: tuple[int | None, int | None]
) -> None:
    """Require slots that hold the keys of query 0, where offsets and lengths are host data (MHA-CACHE-14)."""
    (left, chunk), lengths, offsets = bounds, host_integers(cache.lengths), host_integers(offset)
    known_starts = [0] if starts is None else host_integers(starts)
    if lengths is None or offsets is None or known_starts is None:
        return
    shape = (len(lengths),)
    entries = (numpy.broadcast_to(numbers, shape).tolist() for numbers in (lengths, offsets, known_starts))
    for entry, (length, position, start) in enumerate(zip(*entries, strict=True)):
        of_window = start if left is None else position - left
        of_chunk = start if chunk is None else start + (position - start) // chunk * chunk
        first = max(of_window, of_chunk, start)
        if is_less(first, length - capacity):
            refuse_value(
                "MHA-CACHE-14",
                f"`q_offset` must be a position whose keys a WindowKVCache holds, which are those from "
                f"{length - capacity} on, received q_offset={position} in batch entry {entry}, which sees key {first}.",
            )


def check_buffers(cache: object, like: Array, other: str, sizes: tuple[Size, Size], last: tuple[Size, Size]) -> None:
    """Require buffers like another array, with (batch, kv_heads) and (qk_dim, v_dim) (MHA-CACHE-7, MHA-CACHE-9)."""
    batch, kv_heads = sizes
    if isinstance(cache, PagedKVCache):
        clause, axes = "MHA-CACHE-9", {"blocks": None, "block_size": None, "kv_heads": kv_heads}
    elif isinstance(cache, (KVCache, WindowKVCache)):
        clause = "MHA-CACHE-12" if isinstance(cache, WindowKVCache) else "MHA-CACHE-7"
        axes = {"batch": batch, "kv_heads": kv_heads, "capacity": None}
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
        if cache.block_size == 0:
            refuse_value("MHA-CACHE-9", f"`cache.key` must have block_size>=1, received shape={shape_of(cache.key)}.")
        check_table("cache.block_table", cache.block_table, like, batch)
    if cache.lengths is None:
        refuse_type(clause, "`cache.lengths` must hold an integer for each batch entry, received None.")
    limit = (LARGEST_POSITION, "2**30") if isinstance(cache, WindowKVCache) else (_room(cache), "capacity")
    check_entries("cache.lengths", cache.lengths, like, 0, *limit)


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


def _slots(cache: KVCache | WindowKVCache) -> Size:
    """Return the number of slots of a batch entry; None if a trace does not know it."""
    slots: Any = shape_of(cache.key)[2]
    return slots


def _room(cache: KVCache | PagedKVCache) -> Size:
    """Return the most tokens of a batch entry; None if a trace does not know it."""
    if isinstance(cache, KVCache):
        return _slots(cache)
    sizes: Any = cache.block_size, shape_of(cache.block_table)[1]
    size, columns = sizes
    return None if size is None or columns is None else size * columns


def check_room(cache: AnyCache, length: Size, counts: Array | Sequence[int] | None) -> None:
    """Require a free slot for every new token, where lengths and table are host data (MHA-CACHE-4, MHA-CACHE-11)."""
    if isinstance(cache, WindowKVCache):
        return
    before, capacity = host_integers(cache.lengths), _room(cache)
    if counts is not None:
        more = host_integers(counts)
    else:
        more = None if before is None or length is None else [length] * len(before)
    if before is None or more is None or capacity is None:
        return
    after = [old + new for old, new in zip(before, more, strict=True)]
    is_paged = isinstance(cache, PagedKVCache)
    if any(is_less(capacity, total) for total in after):
        name, fix = ROOM[PagedKVCache if is_paged else KVCache]
        refuse_value(
            "MHA-CACHE-4",
            f"`cache` must have room for the new tokens, {name}={capacity}, "
            f"received lengths={short_repr(before)} and {short_repr(more)} more. Nothing was stored. {fix}",
        )
    sizes: Any = shape_of(cache.key)[:2]
    if is_paged and library_of(cache.block_table) == "numpy" and all(map(is_integer, (*sizes, *after))):
        _check_slots(cache, before, after)


def _check_slots(cache: PagedKVCache, before: list[int], after: list[int]) -> None:
    """Require blocks that exist, and new tokens in slots that hold no token (MHA-CACHE-9, MHA-CACHE-11)."""
    table: Any = cache.block_table
    sizes: Any = tuple(map(int, shape_of(cache.key)[:2]))  # A trace of torch.jit has them in tensors.
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
