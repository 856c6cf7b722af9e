"""The options of the cases of tiles: each option differs from tile to tile, and its ends lie inside tiles or at edges.

Large arrays are generated, so that the goldens store a seed. A case has one of four variants of each of its options.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy
from description import Input
from portable import generate

from .options import integers
from .tensors import seed_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .sizes import Sizes

    Spec = Mapping[str, Any]

__all__ = ["made", "options_of_tiles", "tensors_of_tiles"]

QUERY = {"kind": "bell", "unit": 2.0**-3, "mean": 1.5}
KEY = {"kind": "bell", "unit": 2.0**-4}
VALUE = {"kind": "bell", "unit": 2.0**-3, "mean": 1.0}
COTANGENT = {"kind": "bell", "unit": 2.0**-5, "mean": 0.5}
"""A score depends on the sum of a key over its components, because queries have a mean other than 0."""

LEVELS = (0, 64, 32, 128)
"""The lengths of the blocks of keys whose scores rise and fall, by variant; 0 has no blocks."""

MASKS: tuple[dict[str, Any], ...] = (
    {"kind": "bits", "share": 168},
    {"kind": "tiles", "tile": 64},
    {"kind": "tiles", "tile": 32},
    {"kind": "bits", "share": 64},
)
BIASES: tuple[dict[str, Any], ...] = (
    {"kind": "bell", "unit": 2.0**-3},
    {"kind": "bell", "unit": 2.0**-3, "hidden": 64},
    {"kind": "bell", "unit": 2.0**-2},
    {"kind": "bell", "unit": 2.0**-3, "hidden": 192},
)
KEPT: tuple[dict[str, Any], ...] = (
    {"kind": "bits", "share": 192},
    {"kind": "tiles", "tile": 64},
    {"kind": "bits", "share": 96},
    {"kind": "tiles", "tile": 32},
)
LENGTHS = ((-1, 65), (64, -3), (-62, 127), (-30, 1))
"""The lengths of two batch entries, by variant: numbers below 1 are counted from the end, others from the start."""


@lru_cache(maxsize=64)
def _values(shape: tuple[int, ...], members: tuple[tuple[str, Any], ...]) -> numpy.ndarray:
    values = generate(shape, **dict(members))
    values.flags.writeable = False
    return values


def made(shape: tuple[int, ...], generator: Mapping[str, Any], *names: object, dtype: str = "case") -> Input:
    """Return a generated input; equal inputs share their array."""
    how = {"seed": seed_of(*shape, *names), **generator}
    values = _values(shape, tuple(how.items()))
    return Input(values.astype(bool) if dtype == "bool" else values, dtype, how)


def tensors_of_tiles(sizes: Sizes, variant: int, function: str) -> dict[str, Input]:
    """Return query, key and value, and the cotangent of a gradient; maxima differ between the blocks of a variant."""
    levels = {"levels": LEVELS[variant]} if LEVELS[variant] else {}
    inputs = {
        "grad_output": made(sizes.output, COTANGENT, "cotangent"),
        "query": made(sizes.query, QUERY, "query"),
        "key": made(sizes.key, KEY | levels, "key"),
        "value": made(sizes.value, VALUE, "value"),
    }
    unused = {"attention": {"grad_output"}, "attention_weights": {"grad_output", "value"}}.get(function, set())
    return {name: item for name, item in inputs.items() if name not in unused}


def options_of_tiles(sizes: Sizes, spec: Spec, variant: int) -> tuple[dict[str, Input], dict[str, Any]]:
    """Return the array inputs and the plain options of a spec in a variant, 0 to 3.

    A pairwise option of the spec names its axes, a window of two variants is a pair of windows, and other options have
    their value or True.
    """
    inputs: dict[str, Input] = {}
    for name, make in _MAKERS.items():
        if name in spec:
            inputs.update(make(sizes, spec[name], variant))
    plain = {name: spec[name] for name in ("causal", "scale", "softcap") if name in spec}
    if "window" in spec:
        plain["window"] = spec["window"][variant % len(spec["window"])]
    if "offset" in spec:
        inputs["q_offset"] = _offset(sizes, spec["offset"], variant)
    if "reading" in spec:
        plain["q_offset"] = spec["reading"]
    if "dropout" in spec:
        plain["dropout_rate"] = 0.25
    return inputs, plain


def _pairwise(name: str, makers: tuple[dict[str, Any], ...], dtype: str) -> Callable[..., dict[str, Input]]:
    def make(sizes: Sizes, axes: str, variant: int) -> dict[str, Input]:
        return {name: made(sizes.pairwise(axes), makers[variant], name, variant, dtype=dtype)}

    return make


def _per_entry(sizes: Sizes, numbers: tuple[int, ...]) -> list[int]:
    return [numbers[entry % len(numbers)] for entry in range(sizes.batch)]


def _lengths(name: str, axis: str, turn: int) -> Callable[..., dict[str, Input]]:
    def make(sizes: Sizes, _: bool, variant: int) -> dict[str, Input]:
        full = getattr(sizes, axis)
        chosen = LENGTHS[(variant + turn) % len(LENGTHS)]
        lengths = [min(full, n) if n > 0 else max(full + n, 1) for n in chosen]
        return {name: integers(_per_entry(sizes, tuple(lengths)))}

    return make


def _segments(sizes: Sizes, _: bool, variant: int) -> dict[str, Input]:
    """Return segments that end between and at edges of tiles, in order or not, one of them far longer than the rest."""
    q_ids, kv_ids = (
        numpy.stack([_ids(numpy.arange(length), length, entry, variant) for entry in range(sizes.batch)])
        for length in (sizes.q_len, sizes.kv_len)
    )
    return {"q_segment_ids": integers(q_ids), "kv_segment_ids": integers(kv_ids)}


def _ids(index: numpy.ndarray, length: int, entry: int, variant: int) -> numpy.ndarray:
    if variant == 0:
        return index * (3 + entry) // length
    if variant == 1:
        return (index + entry) // 64
    if variant == 2:
        return (index // 40 + entry) % 2 - 2
    return (index >= 70 + entry).astype(int) + 3 * (index >= length - 9)


def _sinks(sizes: Sizes, _: bool, variant: int) -> dict[str, Input]:
    """Return sinks near the lse of a row of many keys; in one variant, some heads have none."""
    sinks = generate((sizes.heads,), seed_of(sizes.heads, "sinks of tiles", variant), "bell", 2.0**-4, mean=5.0)
    if variant == 1:
        sinks[1::3] = -numpy.inf
    return {"sinks": Input(sinks)}


def _offset(sizes: Sizes, reading: str, variant: int) -> Input:
    """Return the offsets of a reading, or of none: then diagonals begin inside tiles."""
    offsets = {
        "upper_left": 0,
        "lower_right": sizes.kv_len - sizes.q_len,
        "inside": numpy.asarray(_per_entry(sizes, ((65, 1), (-3, 70), (100, 63), (31, 130))[variant])),
    }
    return integers(numpy.broadcast_to(offsets[reading], (sizes.batch,)))


_MAKERS: dict[str, Callable[..., dict[str, Input]]] = {
    "mask": _pairwise("mask", MASKS, "bool"),
    "bias": _pairwise("bias", BIASES, "case"),
    "kv_lengths": _lengths("kv_lengths", "kv_len", 0),
    "q_lengths": _lengths("q_lengths", "q_len", 1),
    "segments": _segments,
    "sinks": _sinks,
    "dropout": _pairwise("dropout_mask", KEPT, "bool"),
}
