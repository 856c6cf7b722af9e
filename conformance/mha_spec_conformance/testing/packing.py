"""The layouts of the arrays that the assertions take: dense, packed tokens, and keys in pages.

The assertions compute with the dense arrays of the specification, so packed sequences are padded to the longest. The
padding is in no visible pair, and is not compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_conformance.targets.claims import DENSE_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DENSE", "Dense", "Sides", "Storage", "sides_of"]

DENSE = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3)}
"""The axes of (batch, heads, length, size) in each dense layout; an lse is (batch, heads, length) in both."""

LAYOUTS = (*DENSE, "thd", "paged")

REFUSED = DENSE_OPTIONS | {"q_lengths"}

KEY_SIDE = ("key", "value")


class Storage(Protocol):
    """Converts an array over (batch, heads, length) or (batch, heads, length, size) from a layout and to it."""

    def shape(self, dense: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the layout of an array that has a dense shape."""
        ...

    def fits(self, stored: numpy.ndarray, rank: int) -> bool:
        """Tell whether an array can be stored in the layout; `rank` is that of the dense array."""
        ...

    def dense(self, stored: numpy.ndarray) -> numpy.ndarray:
        """Return the dense array."""
        ...

    def stored(self, dense: numpy.ndarray) -> numpy.ndarray:
        """Return the array in the layout."""
        ...

    def length(self, entry: int) -> int | None:
        """Return the length of a sequence that is shorter than the dense array; None if all have its length."""
        ...


@dataclass(frozen=True)
class Dense:
    """All sequences have the same length."""

    axes: tuple[int, ...]

    def shape(self, dense: tuple[int, ...]) -> tuple[int, ...]:
        """Permute the axes."""
        return tuple(dense[axis] for axis in self.axes) if len(dense) == len(self.axes) else dense

    def fits(self, stored: numpy.ndarray, rank: int) -> bool:
        """Tell whether the array has the rank."""
        return stored.ndim == rank

    def dense(self, stored: numpy.ndarray) -> numpy.ndarray:
        """Permute the axes; the same permutation undoes it."""
        return stored.transpose(self.axes) if stored.ndim == len(self.axes) else stored

    def stored(self, dense: numpy.ndarray) -> numpy.ndarray:
        """Permute the axes."""
        return self.dense(dense)

    def length(self, entry: int) -> int | None:
        """Return None."""
        return None


@dataclass(frozen=True)
class Packed:
    """The tokens of sequences stand at places of the first axes, before the heads.

    Attributes:
        lead: The sizes of the axes before that of the heads: (tokens,) or (blocks, block_size).
        places: The place of each token, (batch, longest); where a sequence has ended, any place.
        lengths: The length of each sequence.
    """

    lead: tuple[int, ...]
    places: numpy.ndarray
    lengths: numpy.ndarray

    @property
    def used(self) -> numpy.ndarray:
        """True where a sequence has a token, (batch, longest)."""
        return numpy.arange(self.places.shape[1]) < self.lengths[:, None]

    def shape(self, dense: tuple[int, ...]) -> tuple[int, ...]:
        """Replace batch and length by the axes of the layout."""
        _, heads, _, *size = dense
        return (*self.lead, heads, *size)

    def fits(self, stored: numpy.ndarray, rank: int) -> bool:
        """Tell whether the array has the tokens of its side."""
        return stored.shape[: len(self.lead)] == self.lead and stored.ndim == len(self.lead) + rank - 2

    def dense(self, stored: numpy.ndarray) -> numpy.ndarray:
        """Return the sequences, padded with zeros."""
        tokens = stored.reshape(math.prod(self.lead), *stored.shape[len(self.lead) :])
        gathered = tokens[self.places]
        gathered[~self.used] = 0
        return gathered.swapaxes(1, 2)

    def stored(self, dense: numpy.ndarray) -> numpy.ndarray:
        """Return the tokens; those of no sequence are 0."""
        stored = numpy.zeros(self.shape(dense.shape), dense.dtype)
        tokens = stored.reshape(math.prod(self.lead), *stored.shape[len(self.lead) :])
        tokens[self.places[self.used]] = dense.swapaxes(1, 2)[self.used]
        return stored

    def length(self, entry: int) -> int | None:
        """Return the length of a sequence."""
        return int(self.lengths[entry])


@dataclass(frozen=True)
class Sides:
    """The storage of queries and of keys, and the lengths that the layout adds to the options."""

    queries: Storage
    keys: Storage
    lengths: Mapping[str, Any]

    @property
    def packs_queries(self) -> bool:
        """True if the queries of all sequences are concatenated."""
        return isinstance(self.queries, Packed)

    def of(self, name: str) -> Storage:
        """Return the storage of an array that has an axis of tokens."""
        return self.keys if name.removeprefix("grad_") in KEY_SIDE else self.queries


def sides_of(
    layout: str, operands: Mapping[str, numpy.ndarray], options: dict[str, object], function: str = "attention"
) -> Sides:
    """Return the storage of both sides, and take the arguments of the layout out of the options.

    Raises:
        ArgumentValueError: The layout does not exist, or an argument of it is wrong or has no place in it.
        ArgumentTypeError: An argument of the layout is missing or not an array of integers.
    """
    if layout in DENSE:
        return Sides(Dense(DENSE[layout]), Dense(DENSE[layout]), {})
    if layout not in LAYOUTS:
        raise ArgumentValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, received layout={layout!r}.")
    for name in options:
        if name in REFUSED or (name == "kv_lengths" and layout == "thd"):
            raise ArgumentValueError(f"`{name}` must be None with layout={layout!r}, which has no place for it.")
    if layout == "paged":
        return _of_pages(operands, options, shared=function == "attention")
    queries = _tokens("cu_seqlens_q", layout, operands["query"], options)
    keys = _tokens("cu_seqlens_kv", layout, operands["key"], options)
    _require_sequences("cu_seqlens_kv", len(keys.lengths), len(queries.lengths))
    return Sides(queries, keys, {"q_lengths": queries.lengths, "kv_lengths": keys.lengths})


def _of_pages(operands: Mapping[str, numpy.ndarray], options: dict[str, object], *, shared: bool) -> Sides:
    """Return the storage of keys in pages, and of queries that are packed if their bounds are passed, or else dense."""
    lengths = _integers("kv_lengths", "paged", options, rank=1)
    keys = _pages(_integers("block_table", "paged", options, rank=2), lengths, operands["key"], shared=shared)
    if "cu_seqlens_q" not in options:
        _require_sequences("kv_lengths", len(lengths), len(operands["query"]))
        return Sides(Dense(DENSE["bshd"]), keys, {"kv_lengths": lengths})
    queries = _tokens("cu_seqlens_q", "paged", operands["query"], options)
    _require_sequences("kv_lengths", len(lengths), len(queries.lengths))
    return Sides(queries, keys, {"q_lengths": queries.lengths, "kv_lengths": lengths})


def _tokens(name: str, layout: str, array: numpy.ndarray, options: dict[str, object]) -> Packed:
    """Return the storage of concatenated sequences, whose bounds are an argument."""
    bounds, tokens = _integers(name, layout, options, rank=1), array.shape[0] if array.ndim else 0
    lengths = numpy.diff(bounds)
    if not len(bounds) or bounds[0] != 0 or (lengths < 0).any() or bounds[-1] > tokens:
        raise ArgumentValueError(
            f"`{name}` must begin with 0, never fall, and end at or below the number of tokens, {tokens}, "
            f"received {name}={bounds.tolist()}."
        )
    places = bounds[:-1, None] + numpy.arange(lengths.max(initial=0))
    return Packed((tokens,), numpy.minimum(places, max(tokens - 1, 0)), lengths)


def _pages(table: numpy.ndarray, lengths: numpy.ndarray, key: numpy.ndarray, *, shared: bool) -> Packed:
    """Return the storage of keys in pages; entries of the table past the end of a sequence are not read."""
    if key.ndim != 4 or not key.shape[1]:
        raise ArgumentValueError(f"`key` must be (blocks, block_size, kv_heads, size), received shape={key.shape}.")
    blocks, size = key.shape[:2]
    _require_sequences("block_table", len(table), len(lengths))
    if (lengths < 0).any() or (lengths > table.shape[1] * size).any():
        raise ArgumentValueError(
            f"`kv_lengths` must be in 0<=length<={table.shape[1] * size}, the slots of a row of `block_table`, "
            f"received kv_lengths={lengths.tolist()}."
        )
    positions = numpy.arange(lengths.max(initial=0))
    read = positions < lengths[:, None]
    page = numpy.where(read, table[:, positions // size], 0)
    if (page < 0).any() or (page[read] >= blocks).any():
        raise ArgumentValueError(f"`block_table` must be in 0<=block<{blocks}, the number of blocks, where it is read.")
    places = page * size + positions % size
    if not shared and len(numpy.unique(places[read])) < read.sum():
        raise ArgumentValueError("`block_table` must not share a block: its gradient would sum over sequences.")
    return Packed((blocks, size), places, lengths)


def _integers(name: str, layout: str, options: dict[str, object], rank: int) -> numpy.ndarray:
    """Take an array of integers out of the options."""
    if options.get(name) is None:
        raise ArgumentTypeError(f"`{name}` must be given with layout={layout!r}.")
    try:
        array = numpy.asarray(options.pop(name))
    except ValueError as error:
        raise ArgumentTypeError(f"`{name}` must be an array of integers of rank {rank}: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim != rank:
        raise ArgumentTypeError(
            f"`{name}` must be an array of integers of rank {rank}, received dtype={array.dtype}, shape={array.shape}."
        )
    return array.astype(numpy.int64)


def _require_sequences(name: str, received: int, expected: int) -> None:
    if received != expected:
        raise ArgumentValueError(
            f"`{name}` must have {expected} sequences, as the other arguments, received {received}."
        )
