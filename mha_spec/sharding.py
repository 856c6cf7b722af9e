"""Attention over several devices: the tokens that each rank holds, and the checks of a call on the shards.

A rank is a device of the group that shares a sequence. `mha_spec_jax.ring_attention` and its siblings compute on these
shards, forward and backward (MHA-SHARD-3, MHA-SHARD-4); this module needs no framework, and every backend places tokens
by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from .arguments import Arguments
from .checks import check
from .errors import refuse_type, refuse_value
from .scalars import is_integer, plain, short_repr

__all__ = [
    "LAYOUTS",
    "Piece",
    "ShardedArguments",
    "check_heads_over",
    "check_layout",
    "check_sharded",
    "count_before",
    "pieces",
    "shard_order",
]

LAYOUTS = ("contiguous", "striped", "zigzag")
"""The layouts of a sequence over ranks (MHA-SHARD-1)."""


class Piece(NamedTuple):
    """Consecutive rows of a shard, which hold evenly spaced tokens: row i is the token first + stride * i."""

    first: Any
    """An integer, or an array of a framework if the rank is an array."""
    stride: int
    size: int
    """The number of rows."""


def pieces(layout: str, rank: Any, ranks: int, length: int) -> tuple[Piece, ...]:
    """Return the pieces of a shard of `length` rows, in the order of its rows (MHA-SHARD-1).

    A striped or a contiguous shard is a single piece; a zigzag shard is two. `rank` may be a traced integer.
    """
    if layout == "striped":
        return (Piece(rank, ranks, length),)
    if layout == "zigzag":
        half = length // 2
        return Piece(rank * half, 1, half), Piece((2 * ranks - 1 - rank) * half, 1, half)
    return (Piece(rank * length, 1, length),)


def shard_order(layout: str, ranks: int, length: int) -> numpy.ndarray:
    """Return the tokens of all shards, rank by rank (MHA-SHARD-1).

    `x[..., shard_order(...), :]` cut into `ranks` equal parts gives the shards of a sequence of `length` tokens, and
    `numpy.argsort` of the order puts the tokens of joined shards back into place.

    Raises:
        ArgumentValueError: The layout is unknown, or the tokens cannot be dealt out evenly.
        ArgumentTypeError: `ranks` or `length` is not an integer.
    """
    ranks, length = plain(ranks), plain(length)
    for name, size, least in (("ranks", ranks, 1), ("length", length, 0)):
        if not is_integer(size):
            refuse_type("MHA-SHARD-1", f"`{name}` must be an integer, received {name}={short_repr(size)}.")
        if size < least:
            refuse_value("MHA-SHARD-1", f"`{name}` must be at least {least}, received {name}={size}.")
    if length % ranks:
        refuse_value(
            "MHA-SHARD-1",
            f"`length` must be a multiple of ranks={ranks}, received length={length}. Pad the sequence, and pass its "
            "length as q_lengths and kv_lengths.",
        )
    check_layout(layout, {"length": length // ranks})
    shards = (pieces(layout, rank, ranks, length // ranks) for rank in range(ranks))
    tokens = [piece.first + piece.stride * numpy.arange(piece.size) for shard in shards for piece in shard]
    return numpy.concatenate(tokens)


def count_before(number: Any, piece: Piece) -> Any:
    """Return the number of rows of a piece whose tokens are before `number`, not clamped to the rows that exist.

    It is the length of a piece in a sequence of that length; at 0 or below it, no row of the piece is seen, and the
    piece is an empty half (MHA-SHARD-5).
    """
    return -((piece.first - number) // piece.stride)


def check_layout(layout: object, lengths: dict[str, int]) -> None:
    """Require the name of a layout, and an even number of rows for zigzag, which deals out two chunks (MHA-SHARD-1)."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        names = ", ".join(map(repr, LAYOUTS))
        refuse_value("MHA-SHARD-1", f"`layout` must be one of {names}, received layout={short_repr(layout)}.")
    for name, length in lengths.items():
        if layout == "zigzag" and length % 2:
            refuse_value(
                "MHA-SHARD-1",
                f"`layout` must not be 'zigzag' where a rank holds an odd number of tokens, received {name}={length} "
                "on each rank. Pad the sequence to a multiple of twice the number of ranks.",
            )


@dataclass(slots=True)
class ShardedArguments(Arguments):
    """The arguments of a call on shards: three tensors of a rank, and options of the whole sequence (MHA-SHARD-2)."""

    q_ranks: int = 1
    """The number of ranks that share the queries; 1 where every rank holds all of them (MHA-SHARD-7)."""
    kv_ranks: int = 1
    """The number of ranks that share the keys."""

    @property
    def q_len(self) -> int:
        """Number of queries of the whole sequence."""
        return self.q_ranks * self.query.shape[2]

    @property
    def kv_len(self) -> int:
        """Number of keys of the whole sequence."""
        return self.kv_ranks * self.key.shape[2]


def check_sharded(a: ShardedArguments, layout: str) -> ShardedArguments:
    """Check the arguments of a call on shards; lengths and offsets are those of the whole sequence (MHA-SHARD-2)."""
    check(a)
    lengths = {"q_len": a.query.shape[2]} if a.q_ranks > 1 else {}
    lengths |= {"kv_len": a.key.shape[2]} if a.kv_ranks > 1 else {}
    check_layout(layout, lengths)
    return a


def check_heads_over(a: ShardedArguments, ranks: int) -> None:
    """Require heads and kv_heads that can be dealt out to the ranks (MHA-SHARD-6)."""
    for name, label, heads in (("query", "heads", a.heads), ("key", "kv_heads", a.kv_heads)):
        if heads % ranks:
            refuse_value(
                "MHA-SHARD-6",
                f"`{name}` must have {label} that are a multiple of the number of ranks, {ranks}, received "
                f"{label}={heads}. Use ring attention, which leaves every head on its rank.",
            )
