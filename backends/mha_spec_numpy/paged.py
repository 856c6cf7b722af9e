"""Sequences in blocks that have a few queries each, as a dense call with a batch entry for each.

Such a call takes about as long as it reads its keys. So they are not copied first, and the other operations, which cost
some microseconds each, are not repeated for each sequence.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy

from mha_spec.arguments import Arguments

from .forward import SCORES
from .pages import Pages
from .plan import Plan
from .problem import Problem
from .tiling import Tile, blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mha_spec.varlen_arguments import VarlenArguments
    from mha_spec.varlen_reference import Call
    from mha_spec.varlen_sequences import PackedSequence

__all__ = ["Batch", "batches"]

ROWS = 64
"""The largest number of rows of a matrix: with more, gathering takes a small part of the time of a sequence."""


class Batch(NamedTuple):
    """Consecutive sequences with the same number of queries."""

    queries: range
    """The tokens of their queries."""
    sequences: list[PackedSequence]

    @property
    def offset(self) -> list[int]:
        """The position of query 0 of each sequence."""
        return [sequence.offset for sequence in self.sequences]

    @property
    def lengths(self) -> list[int]:
        """The number of keys of each sequence."""
        return [len(sequence.keys) for sequence in self.sequences]

    def pages_of(self, pool: numpy.ndarray, dtype: numpy.dtype) -> Pages:
        """Return the keys of the sequences, or their values."""
        tables = [numpy.asarray(sequence.blocks, numpy.intp) for sequence in self.sequences]
        return Pages(pool, tables, self.lengths, dtype)

    def entries_of(self, tokens: numpy.ndarray) -> numpy.ndarray:
        """View the tokens of the queries, (tokens, heads, size), as (batch, heads, q_len, size)."""
        count = len(self.sequences)
        return tokens.reshape(count, len(self.queries) // count, *tokens.shape[1:]).swapaxes(1, 2)

    def problem_of(self, call: Call) -> Problem:
        """Plan the attention of the sequences."""
        query = numpy.ascontiguousarray(self.entries_of(call.query[0].swapaxes(0, 1)))
        operands = query, call.key, call.value
        plan = Plan(Arguments(*operands, kv_lengths=self.lengths, sinks=call.sinks, **call.options))
        return Problem(plan, plan.a, plan.xp, *operands, call.sinks, slopes=call.slopes)


def batches(a: VarlenArguments, sequences: Sequence[PackedSequence]) -> Iterator[PackedSequence | Batch]:
    """Join consecutive sequences with the same few queries; sequences without queries are left out."""
    for length, group in groupby(sequences, key=lambda sequence: len(sequence.queries)):
        same = list(group)
        if 0 < length * (a.heads // a.kv_heads) <= ROWS:
            yield Batch(range(same[0].queries.start, same[-1].queries.stop), same)
        elif length:
            yield from same


def tiles_of(plan: Plan) -> list[Tile]:
    """Cut a batch into tiles with all rows of some entries, so that each block is gathered once."""
    a = plan.a
    # Entries of a tile share a range of keys, to which a left bound would add keys that an entry does not see.
    scores = a.heads * a.q_len * max(1, a.kv_len)
    count = max(1, SCORES // scores) if plan.visibility.left is None else 1
    kv_heads, group, queries = range(a.kv_heads), a.heads // a.kv_heads, range(a.q_len)
    return [Tile(entries, kv_heads, group, queries) for entries in blocks(range(a.batch), count)]
