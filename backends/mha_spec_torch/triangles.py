"""Masks that are causal: pairs that a caller made instead of passing `causal=True`."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["is_lower_triangle"]

KEPT = 1024
"""The largest size of a triangle that is kept for later calls; a larger one takes little of the time of its call."""
WORD = 8
"""The pairs that are compared at once: torch compares booleans one by one, and so it does with integers of 64 bits."""


def is_lower_triangle(visible: torch.Tensor) -> bool:
    """Tell whether pairs, (batch*, heads*, q_len, kv_len), are visible exactly if j <= i, for q_len = kv_len.

    Pairs that are not words in memory are not compared: the answer is then False.
    """
    q_len, kv_len = visible.shape[2:]
    if q_len != kv_len or kv_len % WORD or visible.storage_offset() % WORD or not visible.is_contiguous():
        return False
    if kv_len <= KEPT:
        triangle = _kept(kv_len)
    elif bool(visible[0, 0, 0, 1]):
        return False
    else:
        triangle = _lower_triangle(kv_len)
    words = visible.view(torch.int64)
    return torch.equal(words, triangle if triangle.shape == words.shape else triangle.expand_as(words))


def _lower_triangle(size: int) -> torch.Tensor:
    return torch.ones((1, 1, size, size), dtype=torch.bool, device="cpu").tril_().view(torch.int64)


_kept = lru_cache(maxsize=16)(_lower_triangle)
