"""Edges of the layer: one token of memory, named alignments, positions past a million."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from description import Input

from .layer_build import FLAVOURS, WEIGHTS, cached, describe_layer, vary_layer
from .layer_sizes import CHUNK, CROSS, LARGE, parameters, tokens
from .options import integers
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

ONE_TOKEN = CROSS._replace(kv_len=1)
READINGS = ("upper_left", "lower_right")
FAR = 1_000_003


def descriptions() -> Iterator[Description]:
    """Yield memories of one token, then named alignments without and with a cache, then far positions."""
    yield from _one_token()
    for reading in READINGS:
        yield from _readings(reading)
        yield from _readings_with_a_cache(reading)
    inputs, options = {**tokens(LARGE, "one"), **parameters(LARGE)}, {"q_offset": FAR, "rotary": {}}
    yield describe_layer("far/1", "Queries past a million tokens.", inputs, options, dtypes=("float64",))


def _one_token() -> Iterator[Description]:
    title = "One token of memory, which one batch entry has not: its tokens get the output's bias."
    for variant, flavour in enumerate(FLAVOURS[:2]):
        inputs = {**tokens(ONE_TOKEN, flavour), **parameters(ONE_TOKEN, ("b_o",)), "kv_lengths": integers((1, 0))}
        inputs |= {"sinks": Input(bell((ONE_TOKEN.heads,), 2.0**-3, "one token"))} if variant else {}
        clauses = ("MHA-LAYER-5", "MHA-EMPTY-1")
        yield describe_layer(f"one-token/{variant + 1}", title, inputs, {}, clauses=clauses)


def _readings(reading: str) -> Iterator[Description]:
    """Yield named alignments with rotation and causal, over tokens of which some are padding."""
    title = f"Positions from the {reading.replace('_', ' ')} of what is in use, rotated and causal."
    more: dict[str, Any] = {"q_offset": reading, "rotary": {}, "clauses": ("MHA-POS-2", "MHA-ROTARY-4")}
    for lengths in ({}, {"q_lengths": (2, 3), "kv_lengths": (5, 2)}):
        label = "padded" if lengths else "whole"
        inputs = {**tokens(CROSS, "one"), **parameters(CROSS)}
        inputs |= {name: integers(values) for name, values in lengths.items()}
        options = {"causal": True, "q_offset": reading, "rotary": {}}
        yield describe_layer(f"reading/{reading}/{label}", title, inputs, options, clauses=more["clauses"])
    yield from vary_layer(
        f"reading/{reading}", title, CROSS, (), {"causal": True}, variants=(1,), function=WEIGHTS, **more
    )


def _readings_with_a_cache(reading: str) -> Iterator[Description]:
    """Yield named alignments with a cache, where some of three new tokens are padding."""
    title = f"Positions from the {reading.replace('_', ' ')} of what the new cache holds."
    for label, real in (("whole", None), ("ragged", (3, 1)))[: 1 if reading == "upper_left" else 2]:
        cache = cached(CHUNK, "two", (2, 4))
        inputs = {**tokens(CHUNK, "two"), **parameters(CHUNK), **cache}
        if real is not None:
            inputs |= {"kv_lengths": integers(real), "q_lengths": integers(real)}
        options = {"causal": True, "q_offset": reading, "rotary": {}}
        clauses = ("MHA-POS-2", "MHA-CACHE-6")
        yield describe_layer(
            f"cache/reading/{reading}/{label}", title, inputs, options, clauses=clauses, outputs=("output",)
        )
