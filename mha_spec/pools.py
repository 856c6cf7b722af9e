"""The slots of the blocks of paged caches, where table and lengths are on the host."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import finalize

import numpy

if TYPE_CHECKING:
    from .cache import PagedKVCache

__all__ = ["WrittenSlots", "slots_of_positions"]


def slots_of_positions(table: Any, sizes: tuple[int, int], first: Any, last: Any) -> numpy.ndarray:
    """Return the slots of the positions first[b] <= p < last[b] of all batch entries; `sizes` is (blocks, block_size).

    Positions whose entry of the table names no block have no slot.
    """
    (blocks, size), (first, last) = sizes, (numpy.asarray(first), numpy.asarray(last))
    columns = -(-int(last.max(initial=0)) // size)
    numbers = numpy.asarray(table)[:, :columns].astype(numpy.int64)[:, :, None]
    positions = numpy.arange(int(numbers.shape[1]) * size).reshape(-1, size)
    inside = (positions >= first[:, None, None]) & (positions < last[:, None, None])
    inside &= (numbers >= 0) & (numbers < blocks)
    return (numbers * size + numpy.arange(size))[inside]


class WrittenSlots:
    """The slots of blocks that hold tokens, with which an eager backend appends tokens without copying the blocks.

    Several caches may share the blocks; each reads its tokens only. A slot may be written in place if it holds no token
    that a cache appended. Blocks that are not known come from elsewhere, and are copied first; so are blocks with a
    token in the slot of a new one, such as a token of a request that ended. In the copy, other slots are free.
    """

    def __init__(self) -> None:
        self._written: dict[tuple[int, int], numpy.ndarray] = {}
        self._lock = Lock()

    def claim(self, cache: PagedKVCache, tokens: numpy.ndarray, new: numpy.ndarray) -> bool:
        """Mark the slots of the tokens of a cache and of new ones; return False if a new one may hold a token."""
        with self._lock:
            written = self._written.get((id(cache.key), id(cache.value)))
            if written is None or written[new].any():
                return False
            written[tokens] = written[new] = True
            return True

    def register(self, cache: PagedKVCache, tokens: numpy.ndarray, new: numpy.ndarray) -> PagedKVCache:
        """Mark these slots alone of new blocks, which no other cache shares."""
        pair, (blocks, size) = (id(cache.key), id(cache.value)), cache.key.shape[:2]
        self._written[pair] = written = numpy.zeros(blocks * size, dtype=bool)
        written[tokens] = written[new] = True
        for pool in (cache.key, cache.value):
            finalize(pool, self._written.pop, pair, None)
        return cache
