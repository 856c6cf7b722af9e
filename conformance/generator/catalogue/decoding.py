"""Few queries over many keys, with lengths far apart within a batch: decoding, and prefill behind a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .build import describe
from .options import integers
from .sized_options import options_of_tiles, tensors_of_tiles
from .sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from description import Description

    Spec = Mapping[str, Any]


class Cache(NamedTuple):
    """The sizes of some cases, their dtypes, the lengths of each variant, and the names of their specs."""

    sizes: Sizes
    dtypes: tuple[str, ...]
    lengths: tuple[tuple[int, ...], ...]
    specs: tuple[str, ...]


POSITIONS = {"causal": True, "kv_lengths": True}
WINDOW = ((100, None), (90, None))
SPECS: dict[str, Spec] = {
    "kv_lengths": {"kv_lengths": True},
    "causal": POSITIONS,
    "window": {"kv_lengths": True, "window": WINDOW},
    "scale": {"kv_lengths": True, "scale": 0.1875},
    "causal+window": {**POSITIONS, "window": WINDOW},
    "causal+scale": {**POSITIONS, "scale": 0.1875},
    "causal+softcap": {**POSITIONS, "softcap": 3.0},
    "causal+sinks": {**POSITIONS, "sinks": True},
    "causal+window+softcap": {**POSITIONS, "window": WINDOW, "softcap": 3.0},
    "causal+window+sinks": {**POSITIONS, "window": WINDOW, "sinks": True},
    "mask": {"kv_lengths": True, "mask": "b11k"},
    "bias": {"kv_lengths": True, "bias": "1h1k"},
}
CACHED = tuple(name for name in SPECS if name not in ("mask", "bias"))
FEW = ("kv_lengths", "causal+window", "causal+sinks", "mask")

SHAPES: dict[str, Cache] = {
    "1-of-512": Cache(Sizes(3, 8, 2, 1, 512, 64, 64), ("float32",), ((512, 65, 1), (129, 511, 2)), tuple(SPECS)),
    "4-of-1000": Cache(Sizes(2, 8, 1, 4, 1000, 128, 128), ("bfloat16",), ((1000, 7), (130, 896)), tuple(SPECS)),
    "1-of-2048": Cache(Sizes(3, 16, 1, 1, 2048, 64, 64), ("float32",), ((2048, 3, 1025),), FEW),
    "8-of-8192": Cache(Sizes(1, 8, 1, 8, 8192, 64, 64), ("float32",), ((8191,),), FEW),
    "1-of-4096": Cache(Sizes(2, 32, 1, 1, 4096, 64, 64), ("float32",), ((4096, 66),), FEW),
    "33-of-300": Cache(Sizes(2, 8, 2, 33, 300, 64, 64), ("float32",), ((300, 34), (129, 257)), CACHED),
    "100-of-200": Cache(Sizes(2, 4, 4, 100, 200, 64, 64), ("bfloat16",), ((200, 129), (101, 192)), CACHED),
}
ROWS = 12
"""The number of sampled rows, if a row has 64 components."""


def descriptions() -> Iterator[Description]:
    """Yield the cases of each number of keys."""
    for label, cache in SHAPES.items():
        for name in cache.specs:
            for variant, lengths in enumerate(cache.lengths):
                yield _case(label, cache, name, variant, lengths)


def _case(label: str, cache: Cache, name: str, variant: int, lengths: tuple[int, ...]) -> Description:
    sizes, spec = cache.sizes, SPECS[name]
    more, options = options_of_tiles(sizes, {key: spec[key] for key in spec if key != "kv_lengths"}, variant)
    more |= {"kv_lengths": integers(lengths)}
    options |= {"q_offset": "lower_right"} if {"causal", "window"} & spec.keys() else {}
    queries = "One query" if sizes.q_len == 1 else f"{sizes.q_len} queries"
    return describe(
        f"decode/{label}/{name}/{variant + 1}",
        f"{queries} at the end of {' or '.join(map(str, lengths))} keys: {' and '.join(spec)}.",
        sizes,
        {**tensors_of_tiles(sizes, variant, "attention"), **more},
        options,
        tags=("structured", "decode") if sizes.q_len == 1 else ("structured",),
        dtypes=cache.dtypes,
        sampled_rows=ROWS * 64 // sizes.v_dim,
        edges=sizes.q_len > ROWS,
    )
