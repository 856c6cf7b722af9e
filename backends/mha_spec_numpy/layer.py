"""The layer for NumPy and every other library of the Python array API: the attention of this backend in its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec import layer_steps, paged_steps, window_steps
from mha_spec.arguments import decorate_method
from mha_spec.arrays import host_integers
from mha_spec.cache import HighWater, KVCache
from mha_spec.layer import Layer, alibi_bias, alibi_slopes, rotary_embedding
from mha_spec.layer_steps import LayerSteps
from mha_spec.pools import WrittenSlots

from .core import attention, attention_weights
from .varlen import varlen_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arrays import Array
    from mha_spec.cache import PagedKVCache

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "append_cache",
    "empty_cache",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "multi_head_attention_weights",
    "rotary_embedding",
]

_BUFFERS, _BLOCKS = HighWater(), WrittenSlots()


def empty(shapes: Sequence[tuple[int, ...]], like: Array) -> KVCache:
    """Make buffers of zeros; on NumPy, tokens are appended in place as long as no other cache would change."""
    cache = layer_steps.empty_cache(shapes, like)
    return _BUFFERS.register(cache) if isinstance(cache.key, numpy.ndarray) else cache


def append(
    cache: KVCache, key: Array, value: Array | None, counts: Array | Sequence[int] | None, steps: LayerSteps
) -> KVCache:
    """Append tokens to a cache, in place where that changes no other cache (MHA-CACHE-1, MHA-CACHE-3)."""
    if value is None or not isinstance(cache.key, numpy.ndarray):
        return layer_steps.append(cache, key, value, counts, steps)
    stop = steps.new_lengths(cache.lengths, counts, key.shape[2], key)
    ranges = host_integers(cache.lengths) or [], stop.tolist()
    shared = _BUFFERS.claim(cache, *ranges)
    new = KVCache(cache.key, cache.value, stop) if shared else KVCache(cache.key.copy(), cache.value.copy(), stop)
    for entry, (first, last) in enumerate(zip(*ranges, strict=True)):
        new.key[entry, :, first:last] = key[entry, :, : last - first]
        new.value[entry, :, first:last] = value[entry, :, : last - first]
    return new if shared else _BUFFERS.register(new)


def append_paged(
    cache: PagedKVCache, key: Array, value: Array, counts: Array | Sequence[int] | None, steps: LayerSteps
) -> PagedKVCache:
    """Append tokens to blocks, in place where that changes no other cache (MHA-CACHE-9, MHA-CACHE-3)."""
    if not isinstance(cache.key, numpy.ndarray):
        return paged_steps.append_paged(cache, key, value, counts, steps)
    stop = steps.new_lengths(cache.lengths, counts, key.shape[2], key)
    slots = steps.new_slots(cache, stop, key)
    entries, tokens = numpy.nonzero(slots >= 0)

    def write(*pools: Array) -> None:
        for pool, new in zip(pools, (key, value), strict=True):
            pool.reshape(-1, *pool.shape[2:])[slots[entries, tokens]] = new[entries, :, tokens]

    return paged_steps.append_in_place(_BLOCKS, cache, stop, slots, numpy.ndarray.copy, write)


def store_wrapped(buffer: Array, new: Array, start: Array | Sequence[int], stop: Array | Sequence[int]) -> Array:
    """Write new tokens to the slots of the oldest in a copy of a buffer (MHA-CACHE-12, MHA-CACHE-3)."""
    if not isinstance(buffer, numpy.ndarray):
        return window_steps.store_wrapped(buffer, new, start, stop)
    stored, capacity = buffer.copy(), buffer.shape[2]
    for entry, (first, last) in enumerate(zip(*map(host_integers, (start, stop)), strict=True)):
        kept = numpy.arange(max(first, last - capacity), last)
        stored[entry][:, kept % max(capacity, 1)] = new[entry][:, kept - first]
    return stored


def unroll(buffer: Array, lengths: Array | Sequence[int], new: Array | None) -> Array:
    """Put the tokens of each batch entry in their order, the new ones last (MHA-CACHE-13)."""
    if not isinstance(buffer, numpy.ndarray):
        return window_steps.unroll(buffer, lengths, new)
    batch, heads, capacity, size = buffer.shape
    tokens = numpy.empty((batch, heads, capacity + (0 if new is None else new.shape[2]), size), buffer.dtype)
    for entry, length in enumerate(host_integers(lengths) or ()):
        oldest = length % max(capacity, 1)
        tokens[entry, :, : capacity - oldest] = buffer[entry, :, oldest:]
        tokens[entry, :, capacity - oldest : capacity] = buffer[entry, :, :oldest]
    if new is not None:
        tokens[:, :, capacity:] = new
    return tokens


_LAYER = Layer(
    LayerSteps(
        attend=attention,
        weigh=attention_weights,
        empty_cache=empty,
        append=append,
        append_paged=append_paged,
        store_wrapped=store_wrapped,
        unroll=unroll,
        varlen=varlen_attention,
    )
)

_quiet = numpy.errstate(all="ignore")

multi_head_attention = decorate_method(_quiet, _LAYER.multi_head_attention)
multi_head_attention_and_weights = decorate_method(_quiet, _LAYER.multi_head_attention_and_weights)
multi_head_attention_weights = decorate_method(_quiet, _LAYER.multi_head_attention_weights)
empty_cache = _LAYER.empty_cache
append_cache = _LAYER.append_cache
