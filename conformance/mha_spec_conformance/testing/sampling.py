"""Choose the rows of a large problem that are compared: at the edges of tiles and constraints, and at random.

Kernels compute tiles of 16 to 256 rows, and most faults lie where a tile, a length or a segment begins or ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.scalars import is_integer, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .problem import Problem

__all__ = ["Sampler", "checked_rows"]

TILES = (64, 128, 32, 256, 16)
"""The sizes of tiles whose edges are compared."""

FEWEST = 8
"""The number of rows that are compared in each head, if the head is compared at all."""

MOST_MARKS = 16
"""The number of rows at the edges of constraints that are compared in a batch entry."""


def checked_rows(rows: Sequence[int] | None, length: int) -> numpy.ndarray | None:
    """Return the rows that the caller chose, sorted.

    Raises:
        ArgumentTypeError: The rows are not integers.
        ArgumentValueError: A row does not exist.
    """
    if rows is None:
        return None
    numbers = [plain(row) for row in rows]
    if not all(is_integer(number) for number in numbers):
        raise ArgumentTypeError(f"`rows` must be a sequence of integers or None, received rows={rows!r}.")
    if not all(0 <= number < length for number in numbers):
        raise ArgumentValueError(f"`rows` must be in 0<=row<q_len={length}, received rows={rows!r}.")
    return numpy.unique(numpy.asarray(numbers, numpy.int64))


@dataclass
class Sampler:
    """Draws the rows of each head; the same seed draws the same rows.

    Attributes:
        length: The number of rows of the longest head.
        budget: The number of rows that are compared in all heads together.
        seed: The seed of the random rows.
    """

    length: int
    budget: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = numpy.random.default_rng(self.seed)

    def heads(self, batch: int, heads: int) -> list[tuple[int, int]]:
        """Choose batch entries and heads: all, or as many as the budget allows, every entry and every head among them.

        With few rows for each, the entries and heads are drawn so that each of both appears.
        """
        every = [(entry, head) for entry in range(batch) for head in range(heads)]
        number = max(batch, heads, self.budget // FEWEST)
        if number >= len(every):
            return every
        entries, columns = self.random.permutation(batch), self.random.permutation(heads)
        turns = ((i % batch, (i + i // numpy.lcm(batch, heads)) % heads) for i in range(number))
        return sorted({(int(entries[b]), int(columns[h])) for b, h in turns})

    def rows(self, heads: int, turn: int, marks: Sequence[int] = (), length: int | None = None) -> numpy.ndarray:
        """Choose the rows of the head number `turn` of so many heads; half lie at edges, half are random.

        A head may have fewer rows than the longest, `length`.
        """
        length, number = self.length if length is None else length, max(FEWEST, self.budget // max(heads, 1))
        if number >= length:
            return numpy.arange(length)
        edges = [mark for mark in dict.fromkeys([*marks, *self._edges(turn, length)]) if 0 <= mark < length]
        drawn = self.random.integers(0, length, number // 2)
        return numpy.unique(numpy.asarray([*edges[: number - number // 2], *drawn], numpy.int64))

    def _edges(self, turn: int, length: int) -> list[int]:
        """Return rows on both sides of edges of tiles; heads begin at other edges, so that together they have all."""
        last = length - 1
        first = [0, last, 1]
        near = [edge + side for tile in TILES for edge in (tile, last // tile * tile) for side in (-1, 0)]
        shift = turn * 4 % len(near)
        tiles = self.random.permutation(last // TILES[-1] + 1) * TILES[-1]
        return [*first, *near[shift:], *near[:shift], *(int(edge) + side for edge in tiles for side in (-1, 0))]


def _ends_of_keys(problem: Problem, entry: int) -> list[int]:
    """Return the keys of a batch entry at which its padding, its prefix or one of its first chunks ends."""
    a = problem.arguments
    ends = [int(numpy.asarray(x)[entry]) for x in (a.kv_starts, a.prefix_lengths) if x is not None]
    if a.chunk is not None:
        start = 0 if a.kv_starts is None else int(numpy.asarray(a.kv_starts)[entry])
        ends += [start + chunk * a.chunk for chunk in (1, 2)]
    return ends


def marks_of(problem: Problem, entry: int) -> list[int]:
    """Return the rows of a batch entry at which a constraint begins or ends."""
    a, marks = problem.arguments, list[int]()
    if a.q_lengths is not None:
        length = int(numpy.asarray(a.q_lengths)[entry])
        marks += [length - 1, length]
    if a.positional:
        first = -problem.offset(entry)
        marks += [first - 1, first, first + a.kv_len - 1]
        marks += [first + end + side for end in _ends_of_keys(problem, entry) for side in (-1, 0)]
    if a.q_segment_ids is not None:
        ids = numpy.asarray(a.q_segment_ids)[entry]
        marks += [row for edge in numpy.flatnonzero(ids[1:] != ids[:-1]) for row in (int(edge), int(edge) + 1)]
    return marks[:MOST_MARKS]
