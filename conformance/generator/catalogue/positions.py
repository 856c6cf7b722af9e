"""Positions of the caller in the layer, and positions on several axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from description import ALL_DTYPES, Description, Input

from .caches import case_of_cache
from .layer_build import OUTPUT_AND_WEIGHTS, WEIGHTS, vary_layer
from .layer_sizes import CHUNK, NORMS, SELF, STEP, WHOLE
from .options import integers
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

CAUSAL = {"causal": True}
PATTERNS: dict[str, tuple[str, ArrayLike, dict[str, Any]]] = {
    "packed": (
        "Two sequences in each entry, whose positions begin at 0 again",
        [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        {"segments": True},
    ),
    "left-padding": ("Padding before the first token of an entry", [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]], CAUSAL),
    "shared": ("The positions of all entries, with gaps", [0, 3, 4, 9, 11], CAUSAL),
    "unordered": ("Positions in no order, which causal does not see", [[4, 0, 7, -2, 1], [1, 9, 3, 3, -5]], CAUSAL),
    "drafts": ("Drafts that branch, so that siblings have the same position", [[0, 1, 1, 2, 2], [5, 6, 6, 6, 7]], {}),
}
IMAGE = [
    [[0, 1, 1, 1, 2], [3, 3, 4, 4, 9]],
    [[0, 1, 4, 4, 2], [0, 5, 0, 5, 9]],
    [[0, 6, 1, 2, 2], [7, 8, 3, 8, 9]],
]
"""Time, height and width of five tokens: text, the patches of an image, text."""

SECTIONS = {"halves": {"sections": [1, 2, 1]}, "interleaved": {"sections": [2, 1, 1], "interleaved": True}}


def descriptions() -> Iterator[Description]:
    """Yield positions in the layer, behind a cache, and on three axes."""
    for number, (name, (title, positions, spec)) in enumerate(PATTERNS.items()):
        inputs = {"positions": integers(positions)}
        yield from vary_layer(
            f"positions/{name}", f"{title}.", SELF, (), spec, inputs=inputs, rotary={}, variants=(number % 4,)
        )
    yield from _others()
    yield from _caches()
    for name, options in SECTIONS.items():
        yield _rotated(f"{name}/image", IMAGE, options)
        yield _rotated(f"{name}/text", [[9, 2, 0, 31, 4], [1, 5, 6, 7, 8]], options)
    yield _rotated("partial", IMAGE, {"sections": [0, 1, 1], "rotary_dim": 4, "frequencies": [1.5, 0.375]})
    inputs = {"positions": integers(IMAGE)}
    for name, options in SECTIONS.items():
        title = "Time, height and width turn separate pairs of queries and keys."
        yield from vary_layer(
            f"positions/sections-{name}", title, SELF, (), CAUSAL, inputs=inputs, rotary=options, variants=(1,)
        )


def _others() -> Iterator[Description]:
    title = "Positions of packed tokens, after norms, with frequencies of the caller."
    options: dict[str, Any] = {"rotary": {"frequencies": [1.5, 0.5, 0.25, 0.0], "attention_factor": 1.25}}
    options["inputs"] = {"positions": integers([[0, 1, 2, 0, 1], [7, 8, 2, 2, 0]])}
    yield from vary_layer("positions/norm", title, SELF, NORMS, CAUSAL, variants=(0,), **options)
    title = "Weights of tokens with positions of the caller."
    yield from vary_layer("positions", title, SELF, (), CAUSAL, variants=(0,), function=WEIGHTS, **options)
    yield from vary_layer("positions", title, SELF, (), {}, variants=(1,), function=OUTPUT_AND_WEIGHTS, **options)
    title = "Lengths without an offset, which positions of the caller make unnecessary."
    more = {"kv_lengths": True, "q_lengths": True}
    yield from vary_layer("positions/lengths", title, SELF, ("b_o",), more, variants=(0,), **options)


def _caches() -> Iterator[Description]:
    outputs = ("output", "cache_key")
    more: dict[str, Any] = {"rotary": {}, "outputs": outputs, "inputs": {"positions": integers([[1], [9]])}}
    title = "A token behind padding: its position is not its slot."
    yield case_of_cache("cache/positions/step", title, STEP, 0, (3, 5), (), **more)
    more["inputs"] = {"positions": integers([[2, 3, 3], [4, 5, 5]])}
    title = "Three drafts behind a cache, two of them at the same position; causal counts slots."
    yield case_of_cache("cache/positions/drafts", title, CHUNK, 1, (2, 4), (), CAUSAL, **more)
    more = {"rotary": {"base": 100.0}, "chunks": [3, 1, 2], "clauses": ("MHA-CACHE-2",)}
    more["inputs"] = {"positions": integers([[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])}
    title = "Six tokens in three calls, the first of an entry is padding."
    yield case_of_cache("cache/positions/chunks", title, WHOLE, 2, (0, 0), (), CAUSAL, **more)


def _rotated(name: str, positions: ArrayLike, options: dict[str, Any]) -> Description:
    size = 6 if "rotary_dim" in options else 8
    where = integers(positions)
    held = {
        "MHA-ROTARY-2": "interleaved" in options,
        "MHA-ROTARY-3": "rotary_dim" in options,
        "MHA-ROTARY-7": "frequencies" in options,
    }
    axes = "positions on three axes" if where.values.ndim == 3 else "the same positions on three axes"
    return Description(
        id=f"rotary_embedding/sections/{name}",
        title=f"Pairs in sections of {', '.join(map(str, options['sections']))}: {axes}.",
        function="rotary_embedding",
        clauses=("MHA-ROTARY-1", "MHA-ROTARY-4", "MHA-ROTARY-17", *(clause for clause in held if held[clause])),
        features=("rotary",),
        inputs={"x": Input(bell((2, 2, 5, size), 2.0**-3, "rotated")), "positions": where},
        options=options,
        tags=("structured",),
        dtypes=ALL_DTYPES,
    )
