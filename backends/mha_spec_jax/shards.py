"""Attention of a rank's queries over the keys of another rank, as calls on a single device.

A shard is one or two pieces of evenly spaced tokens, so the pairs of two pieces are those of a call whose window,
offset and lengths are shifted. Where the host knows the offset, each shift has a separate program, which plans its
blocks as every call does; few shifts differ, because most pairs of pieces are wholly hidden or wholly visible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import and_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy
from jax import lax

from mha_spec.arguments import Arguments
from mha_spec.sharding import Piece, count_before, pieces

from .problem import Constraints, Operands, Problem, problem_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

__all__ = [
    "Call",
    "Form",
    "Keys",
    "Numbers",
    "Pair",
    "Queries",
    "Span",
    "cut",
    "rotate",
    "spans",
    "visit",
]

Tree = TypeVar("Tree")

MOST_PROGRAMS = 8
"""The most shifts of a pair of pieces that are compiled apart; more of them share a program that takes the shift."""


@dataclass(frozen=True)
class Form:
    """The constants of a call over several devices."""

    axis: str
    axes: frozenset[str]
    """The axes of the mesh along which some array of the call differs."""
    ranks: int
    layout: str
    causal: bool
    window: tuple[int | None, int | None] | None
    chunk: int | None
    offset: int | None
    """The position of query 0 of the sequence; None if it is an array, or if prefixes change what it shows."""
    scale: float | None
    softcap: float | None

    @property
    def pieces(self) -> int:
        """The number of pieces of a shard."""
        return 2 if self.layout == "zigzag" else 1


class Numbers(NamedTuple):
    """Options of the whole sequence as arrays of int32, the same on every rank (MHA-SHARD-2)."""

    q_offset: Array | None
    q_lengths: Array | None
    kv_lengths: Array | None
    kv_starts: Array | None
    prefix_lengths: Array | None


class Queries(NamedTuple):
    """The queries of a shard or a piece, in the softmax's type, and the digits of their segment ids."""

    query: Array
    ids: tuple[Array, ...]


class Keys(NamedTuple):
    """Keys and values of a shard or a piece, in the dtype of the call, and the digits of their segment ids."""

    key: Array
    value: Array
    ids: tuple[Array, ...]


class Span(NamedTuple):
    """The distances j - i of the rows of two pieces that a window shows, all inclusive."""

    low: int
    high: int


class Call(NamedTuple):
    """A pair of pieces as a call on a single device."""

    problem: Problem
    x: Operands
    constraints: Constraints


def cut(form: Form, tree: Tree, index: int) -> Tree:
    """Cut a piece out of arrays of a shard, whose tokens lie on axis 2, or on the last of fewer axes."""
    if form.pieces == 1:
        return tree
    return jax.tree.map(lambda array: jnp.split(array, form.pieces, min(array.ndim - 1, 2))[index], tree)


def rotate(form: Form, tree: Any) -> Any:
    """Send arrays to the next rank, and receive those of the rank before."""
    following = [(rank, (rank + 1) % form.ranks) for rank in range(form.ranks)]
    return jax.tree.map(lambda array: lax.ppermute(array, form.axis, following), tree)


def visit(
    form: Form,
    numbers: Numbers,
    queries: Queries,
    keys: Keys,
    ranks: tuple[Array, Array],
    body: Callable[[Any, Any, int, Callable[[], Call]], tuple[Any, Any]],
    of_queries: tuple[Any, ...],
    of_keys: tuple[Any, ...],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Run `body(of_query, of_key, a, call)` for every piece `a` of the queries and `b` of the keys that see each other.

    It returns the new results of the two pieces, of which `of_queries` and `of_keys` have those of each piece. `ranks`
    are the rank that holds the queries and the rank whose keys they are. A wholly hidden pair of pieces costs nothing:
    the results pass through a branch, and only those of the pair, because XLA copies what passes. Pieces are cut in
    the branch, so that none is kept beside its shard.
    """
    if 0 in (queries.query.size, keys.key.size):
        return of_queries, of_keys
    q_length, kv_length = queries.query.shape[2], keys.key.shape[2]
    rank, source = ranks
    q_pieces = pieces(form.layout, rank, form.ranks, q_length)
    kv_pieces = pieces(form.layout, source, form.ranks, kv_length)
    results = [*of_queries], [*of_keys]

    def pair(a: int, b: int) -> Pair:
        return Pair(form, numbers, q_pieces[a], kv_pieces[b], cut(form, queries, a), cut(form, keys, b))

    for a, b in numpy.ndindex(len(q_pieces), len(kv_pieces)):
        table, programs = spans(form, (q_length, kv_length), a, b)

        def run(of_pair: tuple[Any, Any], span: Span | None, a: int = a, b: int = b) -> tuple[Any, Any]:
            return body(*of_pair, a, lambda: pair(a, b).call(span))

        branches = [lambda of_pair: of_pair, *(partial(run, span=span) for span in programs)]
        seen, of_pair = pair(a, b).may_be_visible(), (results[0][a], results[1][b])
        if programs:
            # XLA drops a branch that is always taken, and then holds the arrays of several pairs at the same time.
            seen = source >= 0 if seen is None else seen
            index = jnp.where(seen, jnp.asarray(table)[rank, source], 0)
            of_pair = lax.switch(index, branches, of_pair)
        results[0][a], results[1][b] = of_pair
    return (*results[0],), (*results[1],)


def spans(form: Form, lengths: tuple[int, int], a: int, b: int) -> tuple[numpy.ndarray, list[Span | None]]:
    """Return the program of piece `a` of each rank's queries and `b` of each rank's keys, and the spans of programs.

    In the table, (ranks, ranks), 0 stands for a wholly hidden pair and n for the program n - 1. Without an offset on
    the host there is a single program, whose span is None.
    """
    table = numpy.zeros((form.ranks, form.ranks), numpy.int32)
    programs: list[Span | None] = []
    if form.offset is None:
        return table + 1, [None]
    for rank, source in numpy.ndindex(table.shape):
        q_piece = pieces(form.layout, int(rank), form.ranks, lengths[0])[a]
        kv_piece = pieces(form.layout, int(source), form.ranks, lengths[1])[b]
        span = Span(*_bounds(form, q_piece, kv_piece, form.offset, max, min))
        if span.low <= span.high:
            programs += [] if span in programs else [span]
            table[rank, source] = 1 + programs.index(span)
    return (table, programs) if len(programs) <= MOST_PROGRAMS else (numpy.minimum(table, 1), [None])


def _bounds(form: Form, q_piece: Piece, kv_piece: Piece, offset: Any, most: Any, least: Any) -> tuple[Any, Any]:
    """Return the least and the greatest distance j - i of rows that the window shows; they hide all if crossed."""
    left, right = form.window or (None, None)
    if form.causal:
        right = 0
    shift, stride = offset + q_piece.first - kv_piece.first, q_piece.stride
    low, high = 1 - q_piece.size, kv_piece.size - 1
    low = low if left is None else most(low, -((left - shift) // stride))
    return low, high if right is None else least(high, (shift + right) // stride)


class Pair(NamedTuple):
    """A piece of the queries and a piece of the keys."""

    form: Form
    numbers: Numbers
    q_piece: Piece
    kv_piece: Piece
    queries: Queries
    keys: Keys

    def call(self, span: Span | None) -> Call:
        """Describe the pair as a call on a single device, whose window is a span, or is shifted by an array."""
        form, query = self.form, self.queries.query
        key, value = (array.astype(query.dtype) for array in (self.keys.key, self.keys.value))
        numbers = {
            "q_lengths": (self.numbers.q_lengths, self.q_piece),
            "kv_lengths": (self.numbers.kv_lengths, self.kv_piece),
            "kv_starts": (self.numbers.kv_starts, self.kv_piece),
            "prefix_lengths": (self.numbers.prefix_lengths, self.kv_piece),
        }
        options: dict[str, Any] = {
            name: count_before(number, piece) for name, (number, piece) in numbers.items() if number is not None
        }
        options |= self._shifted() if span is None else {"window": self._window(span)}
        a = Arguments(query, key, value, scale=form.scale, softcap=form.softcap, **options)
        problem, x, constraints = problem_of(a)
        if span is None:
            problem = replace(problem, strides=(self.q_piece.stride, self.kv_piece.stride))
        q_ids, kv_ids = self._digits()
        constraints = constraints._replace(q_segment_ids=q_ids, kv_segment_ids=kv_ids)
        return Call(replace(problem, excludes=problem.excludes or bool(q_ids)), x, constraints)

    def _shifted(self) -> dict[str, Any]:
        """Return the options of a window whose shift is an array."""
        if not self.form.causal and self.form.window is None:
            return {}
        return {"causal": self.form.causal, "window": self.form.window, "q_offset": self._shift()}

    def _shift(self) -> Array:
        """Return the position of the first query less that of the first key, for each entry or for all."""
        return jnp.asarray(self._offset() + self.q_piece.first - self.kv_piece.first, jnp.int32)

    def _offset(self) -> Array | int:
        return (self.form.offset or 0) + (0 if self.numbers.q_offset is None else self.numbers.q_offset)

    def _window(self, span: Span) -> tuple[int | None, int | None] | None:
        low = None if span.low == 1 - self.q_piece.size else -span.low
        high = None if span.high == self.kv_piece.size - 1 else span.high
        return None if (low, high) == (None, None) else (low, high)

    def _digits(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return the digits of segment ids, and the numbers of chunks, which hide pairs as ids do (MHA-WINDOW-3)."""
        if self.form.chunk is None:
            return self.queries.ids, self.keys.ids
        origin = 0 if self.numbers.kv_starts is None else self.numbers.kv_starts[:, None]
        offset = jnp.asarray(self._offset()).reshape(-1, 1)
        q_chunks = (_tokens(self.q_piece) + offset - origin) // self.form.chunk
        kv_chunks = jnp.atleast_2d((_tokens(self.kv_piece) - origin) // self.form.chunk)
        return (*self.queries.ids, q_chunks), (*self.keys.ids, kv_chunks)

    def may_be_visible(self) -> Array | None:
        """Tell whether lengths, segments and an offset in an array leave a pair visible; None without any of these."""
        numbers, tests = self.numbers, []
        if numbers.q_lengths is not None:
            tests.append(numbers.q_lengths > self.q_piece.first)
        if numbers.kv_lengths is not None:
            tests.append(numbers.kv_lengths > self.kv_piece.first)
        if numbers.kv_starts is not None:
            tests.append(numbers.kv_starts <= self.kv_piece.first + self.kv_piece.stride * (self.kv_piece.size - 1))
        if self.form.offset is None and self._shifted() and numbers.prefix_lengths is None:
            offset = 0 if numbers.q_offset is None else numbers.q_offset
            low, high = _bounds(self.form, self.q_piece, self.kv_piece, offset, jnp.maximum, jnp.minimum)
            tests.append(jnp.asarray(low <= high))
        if min(self.q_piece.size, self.kv_piece.size) > 0:
            tests += [_overlap(*ids) for ids in zip(*self._digits(), strict=True)]
        return jnp.any(reduce(and_, tests)) if tests else None


def _tokens(piece: Piece) -> Array:
    return (piece.first + piece.stride * jnp.arange(piece.size, dtype=jnp.int32))[None]


def _overlap(q_ids: Array, kv_ids: Array) -> Array:
    """Tell for each entry whether the ranges of the ids of queries and of keys have a number in common."""
    return (q_ids.max(1) >= kv_ids.min(1)) & (kv_ids.max(1) >= q_ids.min(1))
