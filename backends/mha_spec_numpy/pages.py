"""Keys or values in blocks, gathered a few blocks at a time where they are used.

To gather all blocks of a sequence writes them to memory and reads them again. A few of them stay in a core's cache, so
that a product with them reads the memory once, as it reads keys that are not in blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Pages", "gathered", "memory_of"]

BYTES = 2**19
"""The memory of the blocks that are gathered at a time, in the softmax's type; a core's cache holds twice as much."""


class Pages:
    """Keys or values of several sequences, whose shape is that of a dense array: (batch, kv_heads, longest, size)."""

    def __init__(
        self,
        pool: numpy.ndarray,
        tables: Sequence[numpy.ndarray],
        lengths: Sequence[int],
        dtype: numpy.dtype,
        keys: range | None = None,
    ) -> None:
        """Read the keys of each sequence from the blocks of its table; those behind its length have no storage."""
        self._pool, self._tables, self._lengths, self._dtype = pool, tables, lengths, dtype
        self._keys = range(max(lengths)) if keys is None else keys
        self.shape = len(tables), pool.shape[2], len(self._keys), pool.shape[3]

    def __getitem__(self, index: tuple[Any, ...]) -> Pages:
        """Select sequences and keys; the other axes stay whole."""
        entries, _, keys, _ = index
        return Pages(self._pool, self._tables[entries], self._lengths[entries], self._dtype, self._keys[keys])

    def parts(self) -> Iterator[tuple[int, slice, numpy.ndarray]]:
        """Yield a few keys of a sequence at a time: its index, theirs, and (kv_heads, keys, size) until the next."""
        _, block_size, *row = self._pool.shape
        count = max(1, BYTES // (block_size * math.prod(row) * self._dtype.itemsize))
        memory = memory_of(self._pool, count, self._dtype)
        first = self._keys.start
        for entry, (table, length) in enumerate(zip(self._tables, self._lengths, strict=True)):
            stop = min(length, self._keys.stop)
            for start in range(first // block_size, -(-stop // block_size), count):
                tokens = gathered(self._pool, table[start : start + count], memory)
                origin = start * block_size
                keys = range(max(origin, first), min(origin + count * block_size, stop))
                inside = tokens[keys.start - origin : keys.stop - origin]
                yield entry, slice(keys.start - first, keys.stop - first), inside.swapaxes(0, 1)


def memory_of(
    pool: numpy.ndarray, count: int, dtype: numpy.dtype, new: Callable[..., numpy.ndarray] = numpy.empty
) -> list[numpy.ndarray]:
    """Return memory for some blocks in the type of the pool, and another for those in `dtype` if it differs."""
    return [new((count, *pool.shape[1:]), name) for name in dict.fromkeys((pool.dtype, dtype))]


def gathered(pool: numpy.ndarray, blocks: numpy.ndarray, memory: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Return the keys of some blocks as tokens, (keys, kv_heads, size), in the last `memory` (MHA-VARLEN-6)."""
    copy, *wide = (array[: len(blocks)] for array in memory)
    if pool.flags.c_contiguous:
        pool.take(blocks, axis=0, out=copy, mode="clip")
    else:
        copy[...] = pool[blocks]  # `take` would first copy the whole pool.
    for array in wide:
        array[...] = copy
        copy = array
    return copy.reshape(-1, *copy.shape[2:])
