"""The sequences of a packed or paged call: read from its integers, and clamped where those were not checked."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy

from .arguments import offset_of_reading
from .arrays import host_integers
from .scalars import is_integer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .varlen_arguments import VarlenArguments

__all__ = ["PackedSequence", "integers_of", "sequences_of"]


class PackedSequence(NamedTuple):
    """A sequence of a packed or paged call."""

    queries: range
    """The tokens of its queries."""
    keys: range
    """The tokens of its keys in use; in a call with a block table, range(number of keys)."""
    offset: int
    """The position of its query 0 (MHA-VARLEN-5)."""
    blocks: Sequence[int] | numpy.ndarray | None = None
    """The blocks of its keys, in order; None in a call without a block table (MHA-VARLEN-6)."""

    @property
    def block_numbers(self) -> list[int]:
        """Its blocks as numbers of Python."""
        return [] if self.blocks is None else [int(block) for block in self.blocks]


def sequences_of(a: VarlenArguments) -> list[PackedSequence]:
    """Read the sequences of a call; integers that no check has read are clamped (MHA-VARLEN-2, MHA-VARLEN-4).

    Cumulative lengths are clamped to the tokens and by a running maximum, lengths to those of the sequence and of its
    row of the table, and the blocks of the table to those that exist.
    """
    queries = _ranges(a.cu_seqlens_q, a.q_tokens)
    keys = _keys(a, len(queries))
    offsets = _offsets(a, queries, keys)
    table = [None] * len(queries) if a.block_table is None else _blocks(a, keys)
    return list(map(PackedSequence, queries, keys, offsets, table))


def integers_of(value: Any) -> list[int]:
    """Read integers of any library: a sequence, or an array of any number of axes, in the order of its elements."""
    numbers = host_integers(value)
    if numbers is not None:
        return numbers
    if hasattr(value, "tolist"):
        return value.reshape(-1).tolist()
    return [int(value[index]) for index in range(value.shape[0])]


def _ranges(bounds: Any, tokens: int | None) -> list[range]:
    """Return the tokens of each sequence, within the tokens that exist; a limit of None is unbounded."""
    numbers = (max(number, 0) if tokens is None else min(max(number, 0), tokens) for number in integers_of(bounds))
    return [range(start, stop) for start, stop in pairwise(accumulate(numbers, max))]


def _keys(a: VarlenArguments, sequences: int) -> list[range]:
    limit = a.capacity
    if a.cu_seqlens_kv is None:
        keys = [range(limit)] * sequences
    else:
        keys = _ranges(a.cu_seqlens_kv, None if a.is_paged else limit)
    if a.is_paged:
        keys = [range(min(len(tokens), limit)) for tokens in keys]
    if a.seqused_kv is None:
        return keys
    used = integers_of(a.seqused_kv)
    return [tokens[: max(length, 0)] for tokens, length in zip(keys, used, strict=True)]


def _offsets(a: VarlenArguments, queries: list[range], keys: list[range]) -> list[int]:
    offset = a.q_offset
    if offset is None:
        return [0] * len(queries)
    if isinstance(offset, str):
        lengths = zip(map(len, queries), map(len, keys), strict=True)
        return [offset_of_reading(offset, q_length, kv_length) for q_length, kv_length in lengths]
    return [offset] * len(queries) if is_integer(offset) else integers_of(offset)


def _blocks(a: VarlenArguments, keys: list[range]) -> list[numpy.ndarray]:
    """Return the blocks of each sequence, without those of the entries that its keys do not need (MHA-VARLEN-7)."""
    blocks, block_size = a.key.shape[:2]
    table = _table_of(a.block_table).clip(0, max(blocks - 1, 0))
    counts = (-(-len(tokens) // block_size) for tokens in keys)
    return [row[:count] for row, count in zip(table, counts, strict=True)]


def _table_of(table: Any) -> numpy.ndarray:
    """Read a table of integers of any library."""
    if isinstance(table, numpy.ndarray):
        return cast("numpy.ndarray", table)
    rows, columns = table.shape
    numbers = (
        table.tolist()
        if hasattr(table, "tolist")
        else [[int(table[row, column]) for column in range(columns)] for row in range(rows)]
    )
    return numpy.array(numbers, numpy.int64).reshape(rows, columns)
