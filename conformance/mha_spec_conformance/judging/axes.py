"""Name the axes of the outputs."""

from __future__ import annotations

from mha_spec.varlen_arguments import VARLEN_FUNCTIONS

__all__ = ["axes_of"]

AXES = {
    "lse": ("batch entry", "head", "row"),
    "grad_lse": ("batch entry", "head", "row"),
    "weights": ("batch entry", "head", "row", "key"),
    "bias": ("batch entry", "head", "row", "key"),
    "grad_bias": ("batch entry", "head", "row", "key"),
    "grad_key": ("batch entry", "kv head", "key", "component"),
    "grad_value": ("batch entry", "kv head", "key", "component"),
    "cache_key": ("batch entry", "kv head", "key", "component"),
    "cache_value": ("batch entry", "kv head", "key", "component"),
    "cache_lengths": ("batch entry",),
    "grad_sinks": ("head",),
    "slopes": ("head",),
}
"""The axes of each output; those of other outputs follow from the number of axes."""

_OF_KEYS = {3: ("token", "kv head", "component"), 4: ("block", "slot", "kv head", "component")}
PACKED = {
    "output": {3: ("token", "head", "component")},
    "grad_query": {3: ("token", "head", "component")},
    "lse": {2: ("head", "token")},
    "grad_key": _OF_KEYS,
    "grad_value": _OF_KEYS,
}
"""The axes of each output of a packed or paged call, by the number of axes."""

BY_RANK = {4: ("batch entry", "head", "row", "component"), 3: ("batch entry", "row", "component")}


def axes_of(output: str, rank: int, function: str = "attention") -> tuple[str, ...]:
    """Name the axes of an output of a function."""
    if function in VARLEN_FUNCTIONS and output in PACKED:
        return PACKED[output].get(rank, tuple(f"axis {axis}" for axis in range(rank)))
    name = output.removesuffix("_a").removesuffix("_b")
    axes = AXES.get(name, BY_RANK.get(rank, ()))
    return axes if len(axes) == rank else tuple(f"axis {axis}" for axis in range(rank))
