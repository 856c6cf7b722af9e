"""Cases of the layer from sizes, parameters and a spec of options, with the clauses and features that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Description, Input

from .layer_sizes import BIASES, JOINT_NORMS, NORMS, parameters, tokens
from .options import integers, options_of
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .layer_sizes import LayerSizes

__all__ = ["FLAVOURS", "LAYER", "OUTPUT_AND_WEIGHTS", "WEIGHTS", "cached", "describe_layer", "vary_layer"]

LAYER, WEIGHTS = "multi_head_attention", "multi_head_attention_weights"
OUTPUT_AND_WEIGHTS = "multi_head_attention_and_weights"
FLAVOURS = ("one", "two", "three", "four")
"""Names of different random data."""

OF_VALUES = ("value", "w_v", "w_o", "b_v", "b_o")
"""Inputs that the weights do not depend on."""

_OPTION_FEATURES = {"q_offset": "offset", "q_segment_ids": "segments", "dropout_mask": "dropout"}
_OPTION_NAMES = (
    *("mask", "bias", "causal", "q_offset", "window", "q_lengths", "kv_lengths", "q_segment_ids"),
    *("scale", "softcap", "sinks", "dropout_mask", "chunk", "prefix_lengths", "kv_starts"),
)


def vary_layer(
    name: str,
    title: str,
    sizes: LayerSizes,
    optional: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    *,
    variants: Sequence[int] = (0, 1, 2, 3),
    clauses: Sequence[str] = (),
    function: str = LAYER,
    dtypes: tuple[str, ...] = ALL_DTYPES,
    inputs: Mapping[str, Input] | None = None,
    **options: Any,
) -> Iterator[Description]:
    """Yield one case per variant: other data, and other contents of the options in `spec`."""
    for variant in variants:
        more, plain = options_of(sizes.attention, spec or {}, variant)
        flavour = FLAVOURS[variant]
        arrays = {**tokens(sizes, flavour), **parameters(sizes, tuple(optional)), **more, **(inputs or {})}
        every = {**plain, **options}
        label = f"{name}/{variant + 1}"
        yield describe_layer(label, title, arrays, every, clauses=clauses, function=function, dtypes=dtypes)


def cached(
    sizes: LayerSizes, flavour: str, lengths: Sequence[int], *, garbage: float | None = None
) -> dict[str, Input]:
    """Return a cache with this number of tokens per batch entry, followed by other data or `garbage`."""
    buffers: dict[str, Input] = {}
    for name, shape, centre in zip(("cache_key", "cache_value"), sizes.caches, (0.0, 1.25), strict=True):
        array = bell(shape, 2.0**-4, name, flavour) + centre
        if garbage is not None:
            array[:, :, :] = numpy.where(
                numpy.arange(shape[2])[:, None] >= numpy.reshape(lengths, (-1, 1, 1, 1)), garbage, array
            )
        buffers[name] = Input(array)
    return {**buffers, "cache_lengths": integers(lengths)}


def describe_layer(
    name: str,
    title: str,
    inputs: Mapping[str, Input],
    options: Mapping[str, Any],
    *,
    clauses: Sequence[str] = (),
    function: str = LAYER,
    outputs: Sequence[str] = (),
    tags: Sequence[str] = ("structured",),
    dtypes: tuple[str, ...] = ALL_DTYPES,
) -> Description:
    """Describe one case; clauses and features that follow from its inputs and options are added."""
    if function == WEIGHTS:
        inputs = {label: item for label, item in inputs.items() if label not in OF_VALUES}
    return Description(
        id=f"{function}/{name}",
        title=title,
        function=function,
        clauses=tuple(dict.fromkeys([*clauses, *_clauses(inputs, options)])),
        features=tuple(_features(inputs, options, function)),
        inputs=inputs,
        options=options,
        tags=tuple(tags),
        dtypes=dtypes,
        lse=False,
        outputs=tuple(outputs),
    )


def _features(inputs: Mapping[str, Input], options: Mapping[str, Any], function: str) -> list[str]:
    features = ["projection", *(["weights"] if function in (WEIGHTS, OUTPUT_AND_WEIGHTS) else [])]
    for feature, holds in {
        "cross": "key" in inputs and inputs["key"].values.shape[2] != inputs["query"].values.shape[2],
        "groups": inputs["w_q"].values.shape[1] != inputs["w_k"].values.shape[1],
        "rotary": "rotary" in options,
        "positions": "positions" in inputs,
        "norm": any(name in inputs for name in NORMS) or "norm_epsilon" in options,
        "joint_norm": any(name in inputs for name in JOINT_NORMS),
        "cache": "cache_lengths" in inputs,
        "paged_cache": "cache_block_table" in inputs,
        "window_cache": "window_cache" in options,
    }.items():
        features += [feature] if holds else []
    names = [name for name in _OPTION_NAMES if name in inputs or name in options]
    return [*features, *(_OPTION_FEATURES.get(name, name) for name in names)]


def _clauses(inputs: Mapping[str, Input], options: Mapping[str, Any]) -> list[str]:
    rotary, has_cache = options.get("rotary"), "cache_lengths" in inputs
    paged, wraps = "cache_block_table" in inputs, "window_cache" in options
    cached_keys = has_cache and not paged and not wraps
    held = {
        "MHA-PROJ-1": True,
        "MHA-PROJ-2": any(name in inputs for name in BIASES[:3]),
        "MHA-PROJ-3": "b_o" in inputs,
        "MHA-NORM-1": any(name in inputs for name in NORMS),
        "MHA-NORM-2": any(name in inputs for name in NORMS) and rotary is not None,
        "MHA-NORM-3": any(name in inputs for name in JOINT_NORMS),
        "MHA-ROTARY-1": rotary is not None,
        "MHA-ROTARY-2": rotary is not None and "interleaved" in rotary,
        "MHA-ROTARY-3": rotary is not None and "rotary_dim" in rotary,
        "MHA-ROTARY-4": rotary is not None,
        "MHA-ROTARY-7": rotary is not None and "frequencies" in rotary,
        "MHA-ROTARY-8": rotary is not None and "attention_factor" in rotary,
        "MHA-ROTARY-17": rotary is not None and "sections" in rotary,
        "MHA-LAYER-7": "positions" in inputs,
        "MHA-CACHE-1": cached_keys and "key" in inputs,
        "MHA-CACHE-2": "chunks" in options,
        "MHA-CACHE-5": has_cache and "kv_lengths" in inputs,
        "MHA-CACHE-6": cached_keys,
        "MHA-CACHE-8": "key" not in inputs,
        "MHA-CACHE-9": paged and "key" in inputs,
        "MHA-CACHE-10": paged,
        "MHA-CACHE-12": wraps and "key" in inputs,
        "MHA-CACHE-13": wraps,
        "MHA-LAYER-3": inputs["query"].values.shape[2] != inputs["w_k"].values.shape[0],
    }
    return [clause for clause, holds in held.items() if holds]
