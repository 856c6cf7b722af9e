"""The steps of the layer with a cache: in place in eager calls, else by operations of torch that have gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

from mha_spec import layer_steps, paged_steps
from mha_spec.arrays import host_integers, library_of
from mha_spec.cache import HighWater, KVCache
from mha_spec.pools import WrittenSlots

from .calls import cast
from .function import transformed
from .host import on_device
from .paths import autocasts
from .symbols import in_jit_trace, traced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.cache import PagedKVCache
    from mha_spec.layer_steps import LayerSteps

    Integers = Tensor | Sequence[int]

__all__ = [
    "append",
    "append_paged",
    "bounds",
    "empty",
    "integers",
    "new_lengths",
    "store",
    "store_pages",
    "store_wrapped",
    "unroll",
]

_BUFFERS, _BLOCKS = HighWater(), WrittenSlots()


def empty(shapes: Sequence[tuple[int, ...]], like: Tensor) -> KVCache:
    """Create buffers of zeros; under autocast they have its type."""
    dtype = cast(query=like.new_empty(0))["query"].dtype if autocasts(like.device.type) else like.dtype
    key, value = (torch.zeros(shape, dtype=dtype, device=like.device) for shape in shapes)
    batch = shapes[0][0]
    if not isinstance(batch, int):
        return KVCache(key, value, torch.zeros(batch, dtype=torch.int32, device=like.device))
    cache = KVCache(key, value, numpy.zeros(batch, dtype=numpy.int32))
    return _BUFFERS.register(cache) if _writable(key, value) else cache


def new_lengths(lengths: Integers, counts: Integers | None, length: Any, like: Tensor) -> Any:
    """Count the tokens after an append, in a tensor if a trace has their number in one (MHA-CACHE-5)."""
    if library_of(length) is not None:
        lengths = on_device(lengths, like.device)
    return layer_steps.new_lengths(lengths, counts, length, like)


def append(cache: KVCache, key: Tensor, value: Tensor | None, counts: Integers | None, steps: LayerSteps) -> KVCache:
    """Append tokens to a cache, in place if that changes no other cache (MHA-CACHE-1, MHA-CACHE-3)."""
    stop = steps.new_lengths(cache.lengths, counts, key.shape[2], key)
    if value is None or not isinstance(stop, numpy.ndarray) or not _writable(key, value, cache.key, cache.value):
        return layer_steps.append(cache, key, value, counts, steps)
    ranges = host_integers(cache.lengths) or [], stop.tolist()
    shared = _BUFFERS.claim(cache, *ranges)
    new = KVCache(cache.key, cache.value, stop) if shared else KVCache(cache.key.clone(), cache.value.clone(), stop)
    _write(new.key.data, key, *ranges)
    _write(new.value.data, value, *ranges)
    return new if shared else _BUFFERS.register(new)


def append_paged(
    cache: PagedKVCache, key: Tensor, value: Tensor, counts: Integers | None, steps: LayerSteps
) -> PagedKVCache:
    """Append tokens to blocks, in place if that changes no other cache (MHA-CACHE-9, MHA-CACHE-3)."""
    if not _writable(key, value, cache.key, cache.value):
        return paged_steps.append_paged(cache, key, value, counts, steps)
    stop = steps.new_lengths(cache.lengths, counts, key.shape[2], key)
    slots = steps.new_slots(cache, stop, key)
    inside = slots >= 0

    def write(*pools: Tensor) -> None:
        for pool, new in zip(pools, (key, value), strict=True):
            # Autograd may have saved the blocks, which `.data` does not tell it about.
            pool.data.flatten(0, 1)[slots[inside]] = new.transpose(1, 2)[inside]

    host = cache._replace(lengths=_on_host(cache.lengths), block_table=_on_host(cache.block_table))
    new = paged_steps.append_in_place(_BLOCKS, host, stop, slots.numpy(force=True), _contiguous, write)
    return new._replace(block_table=cache.block_table)


def _on_host(integers: Any) -> numpy.ndarray:
    """Return integers as an array of NumPy, also from an accelerator, as a packed call does when it runs."""
    return integers.numpy(force=True) if isinstance(integers, Tensor) else numpy.asarray(integers)


def _contiguous(pool: Tensor) -> Tensor:
    return pool.clone(memory_format=torch.contiguous_format)


def bounds(batch: int, length: int, like: Tensor) -> Integers:
    """Return the cumulative lengths of sequences of the same length; a tensor where a tracer left sizes open."""
    if not traced(like):
        return paged_steps.bounds(batch, length, like)
    return torch.arange(batch + 1, device=like.device) * length


def _write(buffer: Tensor, tokens: Tensor, start: list[int], stop: list[int]) -> None:
    """Write to a buffer; callers pass `.data`, because autograd may have saved the buffer."""
    ranges = set(zip(start, stop, strict=True))
    if len(ranges) == 1:
        ((first, last),) = ranges
        buffer[:, :, first:last] = tokens[:, :, : last - first]
        return
    for entry, (first, last) in enumerate(zip(start, stop, strict=True)):
        buffer[entry, :, first:last] = tokens[entry, :, : last - first]


def _writable(*tensors: Tensor) -> bool:
    """Tell whether tensors are plain, need no gradient, and may be written in place, which no trace would repeat."""
    inference = torch.is_inference_mode_enabled()
    for tensor in tensors:
        if type(tensor) is not torch.Tensor or tensor.requires_grad or tensor.is_inference() != inference:
            return False
    return not (transformed() or traced(tensors[0]))


def integers(numbers: Integers | int, like: Tensor) -> Tensor:
    """Return integers as a tensor of 64 bits on the device of `like`."""
    return on_device(numbers, like.device).to(torch.int64)


def store(buffer: Tensor, new: Tensor, start: Integers, stop: Integers) -> Tensor:
    """Return a buffer with new tokens at start[b] <= j < stop[b]; the function has gradients (MHA-CACHE-1)."""
    batch, heads, capacity, size = buffer.shape
    if in_jit_trace():  # A later call may have no token, and a tensor of none has none to gather.
        new = pad(new, (0, 0, 0, 1))
    elif 0 in (batch, capacity, new.shape[2]):
        return buffer
    slots = torch.arange(capacity, device=buffer.device)
    start, stop = (integers(ends, buffer)[:, None] for ends in (start, stop))
    source = (slots - start).clamp(0, new.shape[2] - 1)
    moved = new.gather(2, source[:, None, :, None].expand(batch, heads, capacity, size))
    return torch.where(((slots >= start) & (slots < stop))[:, None, :, None], moved, buffer)


def store_pages(pages: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """Return blocks with new tokens in their slots; those without a slot go to a row that is cut off (MHA-CACHE-9)."""
    flat, tokens = pages.flatten(0, 1), new.transpose(1, 2).flatten(0, 1)
    slots = torch.where(slots < 0, flat.shape[0], slots).flatten()
    stored = torch.cat([flat, flat.new_zeros((1, *flat.shape[1:]))]).index_copy(0, slots, tokens)
    return stored[:-1].view(pages.shape)


def store_wrapped(buffer: Tensor, new: Tensor, start: Integers, stop: Integers) -> Tensor:
    """Return a buffer with new tokens in the slots of the oldest; the last of each slot stays (MHA-CACHE-12).

    Only the last tokens that are real, at most one for each slot, are written. Where there are fewer, the slots of the
    others get what they hold.
    """
    batch, heads, capacity, size = buffer.shape
    if not in_jit_trace() and 0 in (batch, capacity, new.shape[2]):
        return buffer
    start, stop = (integers(ends, buffer)[:, None] for ends in (start, stop))
    length = _smaller(capacity, new.shape[2])
    positions = stop - length + torch.arange(length, device=buffer.device)

    def expanded(indices: Tensor) -> Tensor:
        return indices[:, None, :, None].expand(batch, heads, length, size)

    slots = expanded(positions % capacity)
    tokens = new.gather(2, expanded((positions - start).clamp(min=0)))
    is_new = (positions >= start)[:, None, :, None]
    return buffer.scatter(2, slots, torch.where(is_new, tokens, buffer.gather(2, slots)))


def _smaller(first: Any, second: Any) -> Any:
    """Return the smaller of two sizes; a trace, which has them in tensors, compares them again in every call."""
    return torch.minimum(first, second) if isinstance(first, torch.Tensor) else min(first, second)


def unroll(buffer: Tensor, lengths: Integers, new: Tensor | None) -> Tensor:
    """Return the tokens of each batch entry in their order, the new ones last (MHA-CACHE-13)."""
    batch, heads, capacity, size = buffer.shape
    tokens = buffer
    if capacity:
        slots = (integers(lengths, buffer)[:, None] + torch.arange(capacity, device=buffer.device)) % capacity
        tokens = buffer.gather(2, slots[:, None, :, None].expand(batch, heads, capacity, size))
    return tokens if new is None else torch.cat([tokens, new], dim=2)
