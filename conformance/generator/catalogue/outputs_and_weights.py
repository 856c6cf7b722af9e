"""multi_head_attention_and_weights: the output and the weights of one call, and the cache that it extends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layer_build import FLAVOURS, OUTPUT_AND_WEIGHTS, cached, describe_layer, vary_layer
from .layer_sizes import CHUNK, CROSS, NORMS, SELF, WHOLE, parameters, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .layer_sizes import LayerSizes

CLAUSES = ("MHA-LAYER-4",)
CACHE_LENGTHS = ((3, 5), (0, 4))


def descriptions() -> Iterator[Description]:
    """Yield plain calls, rotation and norm, dropout, tokens that see nothing, and calls with a cache."""
    more: dict[str, Any] = {"function": OUTPUT_AND_WEIGHTS, "variants": (0, 1), "clauses": CLAUSES}
    of_empty_tokens = {**more, "clauses": (*CLAUSES, "MHA-LAYER-5")}
    yield from vary_layer("plain", "The output and the weights of each head.", CROSS, ("b_q", "b_o"), **more)
    title = "Output and weights after norm and rotation."
    spec: dict[str, Any] = {"offset": True, "causal": True, "scale": 0.125}
    yield from vary_layer("norm+rotary", title, CROSS, NORMS, spec, rotary={}, **more)
    title = "Capped logits with sinks: a row of weights adds up to less than 1."
    spec = {"softcap": 2.0, "sinks": True, "mask": "b1qk", "bias": "1hqk"}
    yield from vary_layer("softcap+sinks+mask+bias", title, CROSS, ("b_k",), spec, **more)
    title = "Dropout: the weights are those before it, the output is the one after it."
    yield from vary_layer("dropout", title, SELF, (), {"dropout": (0.25, "bhqk")}, **more)
    title = "A token that sees nothing has weights of 0, and the output's bias."
    spec = {"q_lengths": True, "kv_lengths": True}
    yield from vary_layer("lengths", title, SELF, ("b_o",), spec, **of_empty_tokens)
    yield from _with_a_cache()


def _with_a_cache() -> Iterator[Description]:
    title = "Output, weights over the slots of the cache, and the extended cache."
    for variant, lengths in enumerate(CACHE_LENGTHS):
        yield _extending(f"cache/{variant + 1}", title, CHUNK, variant, lengths)
        title_of_chunks = "Output and weights of six tokens, four of them first and then two one by one."
        more: dict[str, Any] = {"chunks": [4, 1, 1], "clauses": (*CLAUSES, "MHA-CACHE-2")}
        yield _extending(f"cache/prefill-then-steps/{variant + 1}", title_of_chunks, WHOLE, variant, (0, 2), **more)


def _extending(
    name: str,
    title: str,
    sizes: LayerSizes,
    variant: int,
    lengths: tuple[int, ...],
    clauses: tuple[str, ...] = CLAUSES,
    **options: Any,
) -> Description:
    """Describe a causal, rotated call over a cache that holds this number of tokens per batch entry."""
    flavour = FLAVOURS[variant]
    inputs = {**tokens(sizes, flavour), **parameters(sizes, ("b_v",)), **cached(sizes, flavour, lengths)}
    options = {"causal": True, "rotary": {}, **options}
    return describe_layer(name, title, inputs, options, clauses=clauses, function=OUTPUT_AND_WEIGHTS)
