"""rotary_embedding, alibi_slopes and alibi_bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Description, Input

from .options import integers
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SHAPE, ENTRIES, LARGE = (1, 2, 3, 6), (2, 1, 3, 6), (1, 1, 1, 64)
POSITIONS: dict[str, tuple[str, list[float]]] = {
    "first": ("the first positions", [0, 1, 2]),
    "next": ("the next positions", [3, 4, 5]),
    "offset": ("positions behind 100 others", [100, 101, 102]),
    "negative": ("negative positions", [-3, -1, 1]),
    "unordered": ("positions in no order", [7, 0, 31]),
    "equal": ("one position for all", [5, 5, 5]),
    "strides": ("every eighth position", [8, 16, 24]),
    "fractions": ("positions between whole numbers", [0.5, 1.25, 6.75]),
    "halves": ("positions half as far apart", [10.0, 10.5, 11.0]),
    "far": ("positions up to 4000", [999, 2047, 4000]),
    "million": ("positions past a million", [999_983, 1_000_003, 1_048_583]),
}
OPTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "halves": ("Halves", {}, ()),
    "interleaved": ("Neighbours", {"interleaved": True}, ("MHA-ROTARY-2",)),
    "base": ("Halves, base 500", {"base": 500.0}, ("MHA-ROTARY-1",)),
    "partial": ("Four of six components, in halves", {"rotary_dim": 4}, ("MHA-ROTARY-3",)),
    "partial-interleaved": (
        "Four of six components, neighbours, base 50",
        {"rotary_dim": 4, "interleaved": True, "base": 50.0},
        ("MHA-ROTARY-2", "MHA-ROTARY-3"),
    ),
}
FARTHEST = 2**30
"""The largest offset, at which the bias exceeds the range of float16."""

HEADS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 40)


def descriptions() -> Iterator[Description]:
    """Yield each rotation at each kind of positions, shared or per batch entry, then ALiBi."""
    for name, (title, options, clauses) in OPTIONS.items():
        for label, (words, positions) in POSITIONS.items():
            if label != "million":
                yield _rotated(f"{name}/{label}", f"{title}: {words}.", SHAPE, positions, options, clauses)
    for label in ("first", "next", "offset", "negative", "unordered", "strides", "fractions", "far"):
        words, positions = POSITIONS[label]
        lines = [positions, [place + 3 for place in positions[::-1]]]
        yield _rotated(f"entries/{label}", f"Each entry has its own: {words}.", ENTRIES, lines, {}, ())
    for name in ("halves", "interleaved"):
        title, options, clauses = OPTIONS[name]
        for label in ("first", "offset", "negative", "fractions", "far", "million"):
            words, positions = POSITIONS[label]
            yield _rotated(
                f"{name}/size-64/{label}",
                f"{title} of 64, the last of: {words}.",
                LARGE,
                positions[2:],
                options,
                clauses,
            )
    yield from _alibi()


def _rotated(
    name: str,
    title: str,
    shape: tuple[int, ...],
    positions: Sequence[object],
    options: dict[str, Any],
    clauses: tuple[str, ...],
) -> Description:
    places = numpy.asarray(positions)
    where = Input(places, "int32" if places.dtype.kind == "i" else "float32")
    inputs = {"x": Input(bell(shape, 2.0**-3, "rotated")), "positions": where}
    named = ("MHA-ROTARY-1", "MHA-ROTARY-4", *(["MHA-ROTARY-5"] if places.max() > 30 else []), *clauses)
    return _case("rotary_embedding", name, title, named, "rotary", inputs, options)


def _alibi() -> Iterator[Description]:
    for heads in HEADS:
        title, options = f"The slopes of {heads} heads.", {"heads": heads}
        yield _case("alibi_slopes", str(heads), title, ("MHA-ALIBI-1",), "alibi", {}, options, ("float32",))
    slopes = Input(numpy.array([0.5, 0.375, 0.0625]))
    for reading in ("upper_left", "lower_right"):
        options = {"q_len": 3, "kv_len": 5, "q_offset": reading}
        title = f"Three queries over five keys, from the {reading.replace('_', ' ')}."
        clauses = ("MHA-ALIBI-2", "MHA-POS-2")
        yield _case("alibi_bias", f"reading/{reading}", title, clauses, "alibi", {"slopes": slopes}, options)
    for number, offsets in enumerate(((0, 2), (-2, 3), (1, 4), (5, 0), (2, 2), (-1, 300), (FARTHEST, -FARTHEST))):
        inputs = {"slopes": slopes, "q_offset": integers(offsets)}
        title = f"Three queries over five keys, from position {offsets[0]} on and from {offsets[1]} on."
        options = {"q_len": 3, "kv_len": 5}
        clauses = ("MHA-ALIBI-2", "MHA-ALIBI-3")
        dtypes = ALL_DTYPES if max(offsets) < FARTHEST else ("float64", "float32", "bfloat16")
        yield _case("alibi_bias", str(number + 1), title, clauses, "alibi", inputs, options, dtypes)


def _case(
    function: str,
    name: str,
    title: str,
    clauses: tuple[str, ...],
    feature: str,
    inputs: Mapping[str, Input],
    options: Mapping[str, Any],
    dtypes: tuple[str, ...] = ALL_DTYPES,
) -> Description:
    return Description(
        id=f"{function}/{name}",
        title=title,
        function=function,
        clauses=tuple(dict.fromkeys(clauses)),
        features=(feature,),
        inputs=inputs,
        options=options,
        tags=("structured",),
        dtypes=dtypes,
    )
