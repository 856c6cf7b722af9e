"""The steps of the layer with a window cache, as `mha_spec.layer_steps`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from .arrays import device_of, host_integers, library_of, namespace_of
from .cache import WindowKVCache
from .paged_steps import integers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .arrays import Array

__all__ = ["OPTIONS", "append_window", "capacity_of", "operands", "start_of_keys", "store_wrapped", "unroll"]

OPTIONS = (
    "causal",
    "window",
    "chunk",
    "prefix_lengths",
    "q_lengths",
    "kv_lengths",
    "kv_starts",
    "q_offset",
    "scale",
    "softcap",
    "sinks",
)
"""The options of the layer that attention with a window cache has (MHA-CACHE-13)."""


def append_window(
    cache: WindowKVCache, key: Array, value: Array, counts: Array | Sequence[int] | None, steps: Any
) -> WindowKVCache:
    """Append new tokens to each batch entry, in the slots of its oldest tokens (MHA-CACHE-12)."""
    stop = steps.new_lengths(cache.lengths, counts, key.shape[2], key)
    new_key, new_value = (
        steps.store_wrapped(buffer, new, cache.lengths, stop)
        for buffer, new in ((cache.key, key), (cache.value, value))
    )
    return WindowKVCache(new_key, new_value, stop)


def store_wrapped(buffer: Array, new: Array, start: Array | Sequence[int], stop: Array | Sequence[int]) -> Array:
    """Write new token p - start[b] to slot p mod capacity, for start[b] <= p < stop[b]; the last of a slot stays."""
    xp, device = namespace_of(buffer), device_of(buffer)
    batch, _, capacity, _ = buffer.shape
    if 0 in (batch, capacity, new.shape[2]):
        return buffer
    first, end = (integers(ends, buffer)[:, None] for ends in (start, stop))
    slots: Array = xp.arange(capacity, dtype=end.dtype, device=device)
    last = end - 1 - (end - 1 - slots) % capacity - first  # The last new token of each slot; negative if it has none.
    taken = xp.clip(last, 0, new.shape[2] - 1)
    moved = xp.stack([xp.take(new[b, ...], taken[b, ...], axis=1) for b in range(batch)])
    return xp.where((last >= 0)[:, None, :, None], moved, buffer)


def unroll(buffer: Array, lengths: Array | Sequence[int], new: Array | None) -> Array:
    """Put the tokens of each batch entry in their order: the last `capacity` of the cache, then the new ones."""
    xp, (batch, _, capacity, _) = namespace_of(buffer), buffer.shape
    tokens = buffer
    if 0 not in (batch, capacity):
        slots = integers(lengths, buffer)[:, None]
        slots = (slots + xp.arange(capacity, dtype=slots.dtype, device=device_of(buffer))) % capacity
        tokens = xp.stack([xp.take(buffer[b, ...], slots[b, ...], axis=1) for b in range(batch)])
    return tokens if new is None else xp.concat([tokens, new], axis=2)


def operands(
    query: Array,
    caches: tuple[WindowKVCache, WindowKVCache],
    tokens: tuple[Array | None, Array | None],
    options: dict[str, Any],
    steps: Any,
) -> tuple[Array, Array, dict[str, Any]]:
    """Return keys, values and options, with which attention sees all tokens (MHA-CACHE-13).

    Args:
        query: The queries.
        caches: The old cache and the new one.
        tokens: The new keys and values, or None for both.
        options: The options of the call, of which those of indices count from the first token.
        steps: The steps of the layer.
    """
    old, new = caches
    options = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    if _sees_every_slot(query, tokens[0], old.key.shape[2], options):
        return new.key, new.value, _without_positions(new, options)
    key, value = (steps.unroll(buffer, old.lengths, x) for buffer, x in zip((old.key, old.value), tokens, strict=True))
    return key, value, _from_first_slot(old, new.lengths, key, options, steps)


ORDERED = ("chunk", "prefix_lengths", "kv_lengths", "kv_starts", "q_offset")
"""The options for which the order of the keys of a single query matters."""


def _sees_every_slot(query: Array, key: Array | None, capacity: int, options: dict[str, Any]) -> bool:
    """Tell whether the query is a new token that sees what the new cache holds, as a step of decoding does."""
    left, _ = options.get("window") or (None, None)
    # A size in an array differs between the calls of a trace.
    is_step = key is not None and library_of(key.shape[2]) is None and query.shape[2] == key.shape[2] == 1
    return is_step and left is not None and left + 1 == capacity and not any(name in options for name in ORDERED)


def _without_positions(new: WindowKVCache, options: dict[str, Any]) -> dict[str, Any]:
    """Drop the options that hide no token of the new cache; slots without a token are hidden."""
    options = {name: option for name, option in options.items() if name not in ("causal", "window")}
    lengths, capacity = host_integers(new.lengths), new.key.shape[2]
    if lengths is None:
        return options | {"kv_lengths": new.lengths}  # A length that is not read acts as at most the capacity.
    if min(lengths, default=0) < capacity:
        options["kv_lengths"] = numpy.minimum(numpy.asarray(lengths), capacity)
    return options


def _from_first_slot(
    cache: WindowKVCache, stop: Array | Sequence[int], key: Array, options: dict[str, Any], steps: Any
) -> dict[str, Any]:
    """Count indices and positions from that of the first key, the last `capacity` tokens before the call.

    Where the first positions are negative, the slots have no tokens, and are hidden by kv_starts. Indices that are not
    read need no limits, because attention clamps them (MHA-LEN-5).
    """
    capacity, offset = steps.capacity_of(cache.key), options.get("q_offset")
    present = [options[name] for name in ("kv_starts", "prefix_lengths", "q_offset") if name in options]
    on_host = isinstance(capacity, int) and all(
        host_integers(numbers) is not None for numbers in (cache.lengths, stop, *present)
    )

    def integers_of(numbers: Any) -> Any:
        return numpy.asarray(numbers, dtype=numpy.int64) if on_host else steps.integers(numbers, key)

    def limited(numbers: Any) -> Any:
        return numpy.clip(numbers, 0, key.shape[2]) if on_host else numbers

    lengths = integers_of(cache.lengths)
    first = lengths - capacity
    starts = steps.start_of_keys(integers_of(options.get("kv_starts", 0)) - first, options.get("chunk"))
    options["kv_starts"] = limited(starts)
    if offset is not None:
        options["q_offset"] = integers_of(offset) - first
    else:  # A size that a trace does not know is in an array.
        options["q_offset"] = capacity if isinstance(capacity, int) else lengths * 0 + capacity
    if "prefix_lengths" in options:
        options["prefix_lengths"] = limited(integers_of(options["prefix_lengths"]) - first)
    if "kv_lengths" in options:
        options["kv_lengths"] = integers_of(stop) - first
    return options


def capacity_of(buffer: Array) -> int:
    """Return the number of slots of each batch entry."""
    return buffer.shape[2]


def start_of_keys(starts: Array, chunk: int | None) -> Array:
    """Return the first visible key; chunks are counted from it, so that a chunk starts there (MHA-WINDOW-3).

    Before the first key there is no index. The incomplete chunk behind it is hidden, which no query can see: it is
    before the chunk of the first new token, which the capacity has room for (MHA-CACHE-14).
    """
    if chunk is None:
        return starts
    return namespace_of(starts).where(starts < 0, starts % chunk, starts)
