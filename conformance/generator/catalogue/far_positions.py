"""Positions at which counters, tables and number formats end: rotations, windows and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import ALL_DTYPES, Description, Input

from .build import describe
from .options import integers
from .sized_options import tensors_of_tiles
from .sizes import Sizes
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator

POSITIONS = (2049, 4096, 32_769, 2**20, 2**24 + 1, 2**30)
"""Behind tables of 2,048 positions, at the end of those of 4,096, past 16 bits and past the integers of float32."""

EXACT_IN_FLOAT32 = 2**20
"""The last of these positions at which angles of float32 are accurate enough to be tested."""

SIZES = Sizes(1, 2, 1, 5, 33, 16, 16)
REACH = 10
"""The distance of the window's end from the first query, in keys."""


def descriptions() -> Iterator[Description]:
    """Yield rotations of halves and of neighbours, and windows on either side, at each position."""
    for position in POSITIONS:
        for name in ("halves", "interleaved"):
            yield _rotation(name, position)
        for function in ("attention", "attention_vjp"):
            yield _window("left", position, function)
            yield _window("right", position, function)


def _rotation(name: str, position: int) -> Description:
    places = numpy.array([position, position + 3, position + 34])
    if position == POSITIONS[-1]:
        places = places[::-1] - 34
    inputs = {"x": Input(bell((1, 2, 3, 64), 2.0**-3, "rotated")), "positions": integers(places)}
    return Description(
        id=f"rotary_embedding/far/{name}/{position}",
        title=f"{'Neighbours' if name == 'interleaved' else 'Halves'} of 64, rotated near position {position}.",
        function="rotary_embedding",
        clauses=("MHA-ROTARY-1", "MHA-ROTARY-4", "MHA-ROTARY-5", *(["MHA-ROTARY-2"] if name == "interleaved" else [])),
        features=("rotary",),
        inputs=inputs,
        options={"interleaved": True} if name == "interleaved" else {},
        tags=("structured",),
        dtypes=ALL_DTYPES[:2] if position <= EXACT_IN_FLOAT32 else ALL_DTYPES[:1],
    )


def _window(side: str, position: int, function: str) -> Description:
    """Return a window whose one end lies among the keys, seen from queries that are far behind or before all keys."""
    offset, distance = (position, position - REACH) if side == "left" else (REACH - position, position)
    window = (distance, None) if side == "left" else (None, distance)
    return describe(
        f"far/window-{side}/{position}",
        f"Queries at position {offset}, and a window of {distance} to the {side}.",
        SIZES,
        {**tensors_of_tiles(SIZES, 0, function), "q_offset": integers([offset])},
        {"window": window},
        function=function,
        dtypes=("float32",),
        sampled_rows=6,
    )
