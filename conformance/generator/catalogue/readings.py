"""Named alignments: "upper_left", and "lower_right" of the queries and keys in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from description import ALL_DTYPES

from .build import describe, inputs_of
from .options import integers
from .sizes import ONE_QUERY, PRIME, SQUARE, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description, Input

    from .sizes import Sizes

SMALL = ("float64", "float32", "float16")
"""Gradients that cancel are too inaccurate in bfloat16."""

READINGS = ("upper_left", "lower_right")
LENGTHS: dict[str, dict[str, tuple[int, int]]] = {
    "": {},
    "kv_lengths": {"kv_lengths": (6, 3)},
    "q_lengths": {"q_lengths": (3, 5)},
    "q_lengths+kv_lengths": {"q_lengths": (4, 2), "kv_lengths": (3, 7)},
}
"""Lengths in use of five queries and seven keys."""

POSITIONAL: dict[str, dict[str, Any]] = {"causal": {"causal": True}, "window": {"window": (2, 1)}}


def descriptions() -> Iterator[Description]:
    """Yield each name with each kind of lengths, then further sizes and functions."""
    for reading in READINGS:
        for label, lengths in LENGTHS.items():
            yield _case(f"causal/{reading}", label, PRIME, reading, lengths, POSITIONAL["causal"])
        for label in ("", "q_lengths+kv_lengths"):
            yield _case(f"window/{reading}", label, PRIME, reading, LENGTHS[label], POSITIONAL["window"])
        for function in ("attention_weights", "attention_vjp"):
            lengths = LENGTHS["q_lengths+kv_lengths"]
            yield _case(
                f"causal/{reading}", "q_lengths+kv_lengths", PRIME, reading, lengths, POSITIONAL["causal"], function
            )
        for size in (64, 128):
            lengths = {"kv_lengths": (4, 2)}
            yield _case(
                f"causal/{reading}", f"kv_lengths-{size}", head_size(size), reading, lengths, POSITIONAL["causal"]
            )
    yield _case("causal/upper_left", "one-query", ONE_QUERY, "upper_left", {}, {"causal": True})
    yield _case(
        "window/lower_right", "one-query", ONE_QUERY, "lower_right", {"kv_lengths": (7, 4)}, {"window": (2, None)}
    )
    lengths = {"q_lengths": (7, 4), "kv_lengths": (5, 7)}
    yield _case("causal/lower_right", "square", SQUARE, "lower_right", lengths, {"causal": True})


def _case(
    name: str,
    label: str,
    sizes: Sizes,
    reading: str,
    lengths: dict[str, tuple[int, int]],
    options: dict[str, Any],
    function: str = "attention",
) -> Description:
    inputs, _ = inputs_of(sizes, "generic", {}, 0, function)
    more: dict[str, Input] = {option: integers(values) for option, values in lengths.items()}
    in_use = " of what is in use" if lengths else ""
    return describe(
        f"reading/{name}/{label or 'whole'}",
        f"Positions from the {reading.replace('_', ' ')}{in_use}.",
        sizes,
        {**inputs, **more},
        {**options, "q_offset": reading},
        function=function,
        dtypes=SMALL if function == "attention_vjp" else ALL_DTYPES,
        clauses=("MHA-POS-1", "MHA-POS-2"),
        lse=True,
    )
