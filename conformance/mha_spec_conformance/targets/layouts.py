"""The layouts of attention: store dense NumPy arrays as a target takes them, and read its results back.

Without a layout, arrays are (batch, heads, length, size), and an lse is (batch, heads, length). The clauses
MHA-LAYOUT-1 to -5 state the meaning of each layout, and what must not be read in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LAYOUTS", "LSE_LAYOUTS", "NEEDED", "PACKED", "TAIL", "Dense", "Pages", "Storage", "Tokens"]

LAYOUTS = ("bhsd", "bshd", "thd", "paged")
"""Dense with the heads or with the tokens first; packed tokens; packed or dense queries with keys in pages."""

PACKED = ("thd", "paged")
"""The layouts in which the lengths of sequences may differ, so that dense options, such as a mask, have no place."""

NEEDED = {
    "bhsd": (),
    "bshd": (),
    "thd": ("cu_seqlens_q", "cu_seqlens_kv"),
    "paged": ("block_table", "kv_lengths"),
}
"""The arguments that attention must take in each layout."""

LSE_LAYOUTS = ("tokens_first", "heads_first")
"""The layouts of an lse, if queries are not stored heads first: that of the output less its last axis, or with the
heads before the tokens."""

TAIL = 3
"""The number of tokens in a poisoned tail."""

UNUSED_PAGES = 3
"""The number of poisoned pages that belong to no sequence."""


class Storage(Protocol):
    """Stores arrays of a side, queries or keys, in a layout."""

    @property
    def heads_axis(self) -> int:
        """The axis of the heads in a stored array."""
        ...

    def store(self, array: numpy.ndarray) -> numpy.ndarray:
        """Store a dense array, (batch, heads, length) or (batch, heads, length, size)."""
        ...

    def shape(self, dense: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a stored array from that of the dense array."""
        ...

    def read(self, stored: numpy.ndarray, dense: numpy.ndarray) -> None:
        """Write what a stored array holds into a dense array, whose other elements keep their values."""
        ...


@dataclass(frozen=True)
class Dense:
    """All sequences have the same length; the tokens stand before the heads or after them."""

    tokens_first: bool

    @property
    def heads_axis(self) -> int:
        """The axis of the heads."""
        return 2 if self.tokens_first else 1

    def store(self, array: numpy.ndarray) -> numpy.ndarray:
        """Exchange heads and tokens."""
        return numpy.ascontiguousarray(array.swapaxes(1, 2)) if self.tokens_first else array

    def shape(self, dense: Sequence[int]) -> tuple[int, ...]:
        """Return the shape after the exchange."""
        batch, heads, length, *size = dense
        return (batch, length, heads, *size) if self.tokens_first else tuple(dense)

    def read(self, stored: numpy.ndarray, dense: numpy.ndarray) -> None:
        """Exchange heads and tokens again."""
        dense[...] = stored.swapaxes(1, 2) if self.tokens_first else stored


@dataclass(frozen=True)
class Tokens:
    """Sequences are concatenated, (tokens, heads, size), perhaps before a poisoned tail.

    `empty_at` is the place of a further sequence without tokens, or None.
    """

    lengths: tuple[int, ...]
    tail: int = 0
    empty_at: int | None = None

    @property
    def heads_axis(self) -> int:
        """The axis of the heads."""
        return 1

    @property
    def bounds(self) -> numpy.ndarray:
        """The first token of each sequence, and the end of the last: `cu_seqlens`."""
        ends = numpy.cumsum((0, *self.lengths), dtype=numpy.int32)
        return ends if self.empty_at is None else numpy.insert(ends, self.empty_at, ends[self.empty_at])

    def _places(self) -> Iterator[tuple[int, int, slice]]:
        """Return the batch entry, the length and the tokens of each sequence that is not empty."""
        start = 0
        for entry, length in enumerate(self.lengths):
            if length:
                yield entry, length, slice(start, start + length)
            start += length

    def store(self, array: numpy.ndarray) -> numpy.ndarray:
        """Concatenate the sequences, and poison the tail."""
        stored = numpy.full(self.shape(array.shape), numpy.nan, array.dtype)
        for entry, length, tokens in self._places():
            stored[tokens] = array[entry, :, :length].swapaxes(0, 1)
        return stored

    def shape(self, dense: Sequence[int]) -> tuple[int, ...]:
        """Return the number of tokens with the tail, and all axes but that of the batch."""
        _, heads, _, *size = dense
        return (sum(self.lengths) + self.tail, heads, *size)

    def read(self, stored: numpy.ndarray, dense: numpy.ndarray) -> None:
        """Write the tokens of each sequence."""
        for entry, length, tokens in self._places():
            dense[entry, :, :length] = stored[tokens].swapaxes(0, 1)


@dataclass(frozen=True)
class Pages:
    """Keys and values stand in pages of `block_size` tokens, (blocks, block_size, kv_heads, size), in any order.

    Page n of sequence b is block `table[b, n]`. Pages with the same contents in all `operands` are shared; without
    operands, no page is. All other storage is poisoned: the ends of last pages, the pages of no sequence, and the
    pages that the table names past the end of a sequence. `empty_at` is the place of a further sequence without keys.
    """

    lengths: tuple[int, ...]
    block_size: int
    seed: int
    operands: tuple[numpy.ndarray, ...] = ()
    empty_at: int | None = None

    @property
    def heads_axis(self) -> int:
        """The axis of the heads."""
        return 2

    def _spans(self) -> Iterator[tuple[int, int, slice]]:
        """Return the sequence, the number and the keys of each page."""
        for entry, length in enumerate(self.lengths):
            for number, start in enumerate(range(0, length, self.block_size)):
                yield entry, number, slice(start, min(start + self.block_size, length))

    @cached_property
    def _allocation(self) -> tuple[numpy.ndarray, int]:
        """Return the table of the sequences that are not added, and the number of blocks."""
        numbers: dict[object, int] = {}
        places: dict[tuple[int, int], int] = {}
        for entry, number, keys in self._spans():
            content = tuple(array[entry, :, keys].tobytes() for array in self.operands) or (entry, number)
            places[entry, number] = numbers.setdefault((keys.stop - keys.start, content), len(numbers))
        blocks = len(numbers) + UNUSED_PAGES
        order = numpy.random.default_rng(self.seed).permutation(blocks).astype(numpy.int32)
        columns = 1 + max((math.ceil(length / self.block_size) for length in self.lengths), default=0)
        table = numpy.full((len(self.lengths), columns), order[-1], numpy.int32)
        for place, number in places.items():
            table[place] = order[number]
        return table, blocks

    @property
    def table(self) -> numpy.ndarray:
        """The block of each page of each sequence, int32."""
        table, _ = self._allocation
        return table if self.empty_at is None else numpy.insert(table, self.empty_at, table[0, -1], axis=0)

    def store(self, array: numpy.ndarray) -> numpy.ndarray:
        """Fill the pages of each sequence, and poison the rest."""
        stored = numpy.full(self.shape(array.shape), numpy.nan, array.dtype)
        for entry, number, keys in self._spans():
            stored[self._allocation[0][entry, number], : keys.stop - keys.start] = array[entry, :, keys].swapaxes(0, 1)
        return stored

    def shape(self, dense: Sequence[int]) -> tuple[int, ...]:
        """Return the number of blocks, their slots, and all axes but those of batch and length."""
        _, heads, _, *size = dense
        return (self._allocation[1], self.block_size, heads, *size)

    def read(self, stored: numpy.ndarray, dense: numpy.ndarray) -> None:
        """Write the keys that the pages of each sequence hold."""
        for entry, number, keys in self._spans():
            block = stored[self._allocation[0][entry, number], : keys.stop - keys.start]
            dense[entry, :, keys] = block.swapaxes(0, 1)
