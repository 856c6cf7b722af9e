"""The steps of the layer with a cache, by operations of torch that have gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .host import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    Integers = Tensor | Sequence[int]

__all__ = ["integers", "store", "store_pages", "store_wrapped", "unroll"]


def integers(numbers: Integers | int, like: Tensor) -> Tensor:
    """Return integers as a tensor of 64 bits on the device of `like`."""
    return on_device(numbers, like.device).to(torch.int64)


def store(buffer: Tensor, new: Tensor, start: Integers, stop: Integers) -> Tensor:
    """Return a buffer with new tokens at start[b] <= j < stop[b]; the function has gradients (MHA-CACHE-1)."""
    batch, heads, capacity, size = buffer.shape
    if 0 in (batch, capacity, new.shape[2]):
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
    if 0 in (batch, capacity, new.shape[2]):
        return buffer
    start, stop = (integers(ends, buffer)[:, None] for ends in (start, stop))
    length = min(capacity, new.shape[2])
    positions = stop - length + torch.arange(length, device=buffer.device)

    def expanded(indices: Tensor) -> Tensor:
        return indices[:, None, :, None].expand(batch, heads, length, size)

    slots = expanded(positions % capacity)
    tokens = new.gather(2, expanded((positions - start).clamp(min=0)))
    is_new = (positions >= start)[:, None, :, None]
    return buffer.scatter(2, slots, torch.where(is_new, tokens, buffer.gather(2, slots)))


def unroll(buffer: Tensor, lengths: Integers, new: Tensor | None) -> Tensor:
    """Return the tokens of each batch entry in their order, the new ones last (MHA-CACHE-13)."""
    batch, heads, capacity, size = buffer.shape
    tokens = buffer
    if capacity:
        slots = (integers(lengths, buffer)[:, None] + torch.arange(capacity, device=buffer.device)) % capacity
        tokens = buffer.gather(2, slots[:, None, :, None].expand(batch, heads, capacity, size))
    return tokens if new is None else torch.cat([tokens, new], dim=2)
