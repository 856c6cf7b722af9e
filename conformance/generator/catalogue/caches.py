"""The layer with a cache: tokens one at a time, in chunks and at once, of different lengths, and with stale entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from description import ALL_DTYPES

from .layer_build import FLAVOURS, LAYER, WEIGHTS, cached, describe_layer
from .layer_sizes import CHUNK, ENCODED, LARGE_CHUNK, NORMS, STEP, WHOLE, parameters, tokens
from .options import integers, options_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from description import Description, Input

    from .layer_sizes import LayerSizes

__all__ = ["case_of_cache", "descriptions"]

STEP_LENGTHS = ((3, 5), (0, 1), (7, 7), (6, 2))
CHUNK_LENGTHS = ((2, 4), (0, 0), (5, 5), (1, 3))
FILLED_LENGTHS = ((2, 4), (3, 2), (5, 5), (1, 3))
WHOLE_LENGTHS = ((0, 0), (0, 2), (2, 1))
CHUNKS: dict[str, list[int] | None] = {
    "at-once": None,
    "one-by-one": [1] * 6,
    "prefill-then-steps": [4, 1, 1],
    "drafts": [2, 3, 1],
}
"""The splits of six tokens into calls; with drafts, each cache is also continued with other tokens."""

CAUSAL = {"causal": True}
LAW = ("MHA-CACHE-2",)


def descriptions() -> Iterator[Description]:
    """Yield steps, chunks, chunks of different lengths, encoder keys, constraints, sequences, and a full buffer."""
    yield from _steps()
    yield from _constraints()
    yield from _weights()
    yield from _law()


def case_of_cache(
    name: str,
    title: str,
    sizes: LayerSizes,
    variant: int,
    lengths: Sequence[int],
    optional: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, Input] | None = None,
    garbage: float | None = None,
    clauses: Sequence[str] = (),
    outputs: Sequence[str] = ("output",),
    function: str = LAYER,
    dtypes: tuple[str, ...] = ALL_DTYPES,
    **options: Any,
) -> Description:
    """Describe a call behind this number of tokens per batch entry."""
    flavour = FLAVOURS[variant]
    more, plain = options_of(sizes.attention, spec or {}, variant)
    cache = cached(sizes, flavour, lengths, garbage=garbage)
    every = {**tokens(sizes, flavour), **parameters(sizes, tuple(optional)), **more, **cache, **(inputs or {})}
    return describe_layer(
        name,
        title,
        every,
        {**plain, **options},
        clauses=clauses,
        outputs=outputs,
        function=function,
        dtypes=dtypes,
    )


def _steps() -> Iterator[Description]:
    everything = ("output", "cache_key", "cache_value", "cache_lengths")
    for variant, lengths in enumerate(STEP_LENGTHS):
        title = f"One token behind {lengths[0]} and {lengths[1]} others, rotated at its position."
        more: dict[str, Any] = {"outputs": everything[: 4 if variant < 1 else 1], "rotary": {}}
        yield case_of_cache(f"cache/step/{variant + 1}", title, STEP, variant, lengths, **more)
        if variant != 2:
            title = "What lies behind the tokens of a cache is NaN, and reaches nothing."
            more = {"garbage": math.nan, "clauses": ("MHA-POISON-1",), "rotary": {}}
            yield case_of_cache(f"cache/stale/{variant + 1}", title, STEP, variant, lengths, **more)
    for variant, lengths in enumerate(CHUNK_LENGTHS):
        title = f"Three tokens behind {lengths[0]} and {lengths[1]} others, causal."
        more = {"outputs": everything[: 4 if variant < 1 else 1], "rotary": {"interleaved": True}}
        yield case_of_cache(f"cache/chunk/{variant + 1}", title, CHUNK, variant, lengths, (), CAUSAL, **more)
    for variant, real in enumerate(((3, 1), (2, 3), (0, 2), (1, 2))):
        title = f"Of three new tokens {real[0]} and {real[1]} are real: the others are not stored."
        ragged = {"kv_lengths": integers(real), "q_lengths": integers(real)}
        more = {"outputs": everything[: 4 if variant < 1 else 1], "rotary": {}, "inputs": ragged}
        yield case_of_cache(
            f"cache/ragged/{variant + 1}", title, CHUNK, variant, CHUNK_LENGTHS[variant], (), CAUSAL, **more
        )


def _constraints() -> Iterator[Description]:
    for variant, lengths in enumerate(((8, 5), (3, 1), (4, 8), (1, 7))):
        title = "Keys of an encoder lie in the cache; nothing is added."
        more: dict[str, Any] = {"outputs": ("output", "cache_lengths")}
        yield case_of_cache(f"cache/encoder/{variant + 1}", title, ENCODED, variant, lengths, ("b_q", "b_o"), **more)
    for variant, lengths in enumerate(FILLED_LENGTHS):
        spec = {"mask": "b1qk", "bias": "1hqk"}
        title = "Mask and bias speak of the whole buffer."
        yield case_of_cache(f"cache/mask+bias/{variant + 1}", title, CHUNK, variant, lengths, (), spec)
    for variant, lengths in enumerate(FILLED_LENGTHS):
        title = "The queries sit where q_offset says, the new keys behind the old ones."
        more = {"inputs": {"q_offset": integers((3, 2))}, "rotary": {"base": 100.0}}
        yield case_of_cache(f"cache/offset/{variant + 1}", title, CHUNK, variant, lengths, (), CAUSAL, **more)
    for variant, length in enumerate((0, 1, 2)):
        title = "Heads of size 64 over a cache."
        yield case_of_cache(
            f"cache/size-64/{variant + 1}", title, LARGE_CHUNK, variant, (length,), (), CAUSAL, rotary={}
        )


def _weights() -> Iterator[Description]:
    for variant, lengths in enumerate(CHUNK_LENGTHS[:3]):
        title = "The weights over the slots of a cache, 0 where there is no token."
        more: dict[str, Any] = {"outputs": (), "function": WEIGHTS, "clauses": ("MHA-LAYER-4",), "rotary": {}}
        yield case_of_cache(f"cache/{variant + 1}", title, CHUNK, variant, lengths, ("b_k",), CAUSAL, **more)


def _law() -> Iterator[Description]:
    for variant, lengths in enumerate(WHOLE_LENGTHS):
        for name, chunks in CHUNKS.items():
            title = f"Six tokens, normalised and rotated, {name.replace('-', ' ')}."
            more: dict[str, Any] = {"rotary": {}, "clauses": LAW}
            more |= {} if chunks is None else {"chunks": chunks}
            more |= {"drafts": True, "clauses": ("MHA-CACHE-3",)} if name == "drafts" else {}
            optional = ("b_q", "b_k", *NORMS)
            yield case_of_cache(f"cache/{name}/{variant + 1}", title, WHOLE, variant, lengths, optional, CAUSAL, **more)
        for name in ("at-once", "one-by-one"):
            title = f"Six tokens under a window, soft cap and sinks, {name.replace('-', ' ')}."
            spec = {"window": (2, 0), "softcap": 3.0, "sinks": True}
            more = {"clauses": LAW} | ({} if CHUNKS[name] is None else {"chunks": CHUNKS[name]})
            yield case_of_cache(
                f"cache/window/{name}/{variant + 1}", title, WHOLE, variant, lengths, ("b_k",), spec, **more
            )
