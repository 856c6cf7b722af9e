"""The layer for NumPy and every other library of the Python array API: the attention of this backend in its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec import layer_steps, paged_steps
from mha_spec.arguments import decorate_method
from mha_spec.arrays import host_integers
from mha_spec.cache import HighWater, KVCache
from mha_spec.layer import Layer, alibi_bias, alibi_slopes, rotary_embedding
from mha_spec.layer_steps import LayerSteps

from .core import attention, attention_weights
from .varlen import varlen_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arrays import Array

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

_BUFFERS = HighWater()


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


def store_pages(pages: Array, new: Array, slots: Array) -> Array:
    """Write new tokens to their slots in a copy of the blocks (MHA-CACHE-9)."""
    if not isinstance(pages, numpy.ndarray):
        return paged_steps.store_pages(pages, new, slots)
    stored = pages.copy()
    entries, tokens = numpy.nonzero(slots >= 0)
    stored.reshape(-1, *pages.shape[2:])[slots[entries, tokens]] = new[entries, :, tokens]
    return stored


_LAYER = Layer(
    LayerSteps(
        attend=attention,
        weigh=attention_weights,
        empty_cache=empty,
        append=append,
        store_pages=store_pages,
        varlen=varlen_attention,
    )
)

_quiet = numpy.errstate(all="ignore")

multi_head_attention = decorate_method(_quiet, _LAYER.multi_head_attention)
multi_head_attention_and_weights = decorate_method(_quiet, _LAYER.multi_head_attention_and_weights)
multi_head_attention_weights = decorate_method(_quiet, _LAYER.multi_head_attention_weights)
empty_cache = _LAYER.empty_cache
append_cache = _LAYER.append_cache
