"""Merging of many rows, and caches of more slots than a tile has, at whose edges chunks begin and end."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .caches import case_of_cache
from .layer_sizes import LayerSizes
from .merges import describe_merge
from .sized_options import made

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description, Input

SHAPE = (2, 3, 131, 64)
DTYPES = ("float32", "bfloat16")
RELATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "unlike": ("Two halves of unlike weight.", {}, {"mean": 0.5}),
    "swapped": ("The first half has the larger share.", {"mean": 1.0}, {}),
    "far-apart": ("The shares differ from block to block of rows.", {"unit": 0.125}, {"unit": 0.5}),
    "some-empty": ("One row in four of each half is empty.", {"hidden": 64}, {"hidden": 64}),
}
"""The halves: a title, and the changes of each lse."""

CHUNK = LayerSizes(2, 5, 5, 8, 8, 8, 4, 2, 8, 8, 8, 300)
LENGTHS = ((125, 254), (63, 128), (16, 295), (190, 1))
SPECS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal+window": {"causal": True, "window": (70, None)},
    "causal+softcap": {"causal": True, "softcap": 3.0},
    "causal+sinks": {"causal": True, "sinks": True},
    "mask": {"mask": "b11k"},
}


def descriptions() -> Iterator[Description]:
    """Yield merges, their gradients, and chunks of tokens behind many others."""
    for name, (title, *changes) in RELATIONS.items():
        halves: dict[str, Input] = {}
        for half, change in zip("ab", changes, strict=True):
            halves[f"output_{half}"] = made(SHAPE, {"kind": "bell", "unit": 2.0**-3, "mean": 1.0}, "output", half)
            lse = {"kind": "bell", "unit": 2.0**-3, **change}
            halves[f"lse_{half}"] = made(SHAPE[:-1], lse, "lse", half, dtype="softmax")
        yield _merge("merge_attention", name, title, halves)
        cotangents = {
            "grad_output": made(SHAPE, {"kind": "bell", "unit": 2.0**-5, "mean": 0.5}, "cotangent"),
            "grad_lse": made(SHAPE[:-1], {"kind": "bell", "unit": 2.0**-3}, "cotangent of lse", dtype="softmax"),
        }
        yield _merge("merge_attention_vjp", name, title, {**cotangents, **halves})
    yield from _chunks()


def _merge(function: str, name: str, title: str, inputs: dict[str, Input]) -> Description:
    clauses = ("MHA-MERGE-1" if function == "merge_attention" else "MHA-MERGE-7",)
    dtypes = DTYPES if function == "merge_attention" else DTYPES[:1]
    case = describe_merge(function, f"many-rows/{name}", title, clauses, inputs, dtypes)
    return dataclasses.replace(case, sampled_rows=16, edges=True, tags=("structured",))


def _chunks() -> Iterator[Description]:
    for name, spec in SPECS.items():
        for variant, lengths in enumerate(LENGTHS):
            title = f"Five tokens behind {lengths[0]} and {lengths[1]} others in a cache of 300: {' and '.join(spec)}."
            more: dict[str, Any] = {"outputs": ("output", "cache_lengths"), "dtypes": ("float32",)}
            more |= {"rotary": {}} if name == "causal" else {}
            more |= {"chunks": [2, 3]} if name == "causal+window" else {}
            yield case_of_cache(f"cache/many/{name}/{variant + 1}", title, CHUNK, variant, lengths, (), spec, **more)
