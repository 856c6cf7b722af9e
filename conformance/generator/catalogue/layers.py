"""multi_head_attention without a cache, and the weights of its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .layer_build import WEIGHTS, vary_layer
from .layer_sizes import CROSS, CUBE, LARGE, NORMS, SELF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

CAUSAL = {"causal": True}


def descriptions() -> Iterator[Description]:
    """Yield projections, rotation and norm, options of attention, and the weights of each head."""
    yield from _projections()
    yield from _rotations()
    yield from _options()
    yield from _weights()


def _projections() -> Iterator[Description]:
    order = ("MHA-LAYER-1", "MHA-PROJ-3")
    yield from vary_layer("self", "Self-attention: project, attend, project out.", SELF, clauses=order)
    yield from vary_layer("biases", "Self-attention with biases.", SELF, ("b_q", "b_v", "b_o"), clauses=order)
    cross = (*order, "MHA-LAYER-2")
    yield from vary_layer("cross", "Attention to tokens of other sizes.", CROSS, clauses=cross)


def _rotations() -> Iterator[Description]:
    yield from vary_layer("rotary", "Rotated halves, causal.", SELF, (), CAUSAL, rotary={})
    yield from vary_layer("interleaved", "Rotated neighbours.", SELF, rotary={"interleaved": True})
    partial = {"base": 50.0, "rotary_dim": 4}
    yield from vary_layer("partial", "Half of each head is rotated, base 50.", SELF, rotary=partial)
    title = "Every size is 3 but that of a head, which is one pair."
    yield from vary_layer("cube", title, CUBE, rotary={})
    spec = {"offset": True, "causal": True}
    yield from vary_layer("offset", "Queries sit at an offset, keys do not.", CROSS, ("b_k",), spec, rotary={})
    yield from vary_layer("size-64", "Heads of size 64.", LARGE, (), CAUSAL, rotary={}, variants=(0, 1, 2))
    optional = ("b_q", "b_k", *NORMS)
    order = ("MHA-LAYER-1",)
    yield from vary_layer("norm", "Normalised after the bias.", SELF, optional, clauses=order)
    title = "Normalised with an epsilon that counts, then rotated."
    more = {"rotary": {"base": 500.0}, "norm_epsilon": 0.25}
    yield from vary_layer("norm+rotary", title, CROSS, NORMS, {"offset": 4}, clauses=order, **more)


def _options() -> Iterator[Description]:
    spec = {"mask": "b1qk", "bias": "1hqk"}
    yield from vary_layer("mask+bias", "A mask and a bias reach the attention.", CROSS, (), spec)
    title = "Scale, soft cap and sinks, which see the bias of the keys."
    spec = {"softcap": 2.0, "sinks": True, "scale": 0.75}
    yield from vary_layer("scale+softcap+sinks", title, CROSS, ("b_k",), spec)
    title = "Dropout and lengths: what sees nothing gives the output's bias."
    spec = {"dropout": (0.25, "bhqk"), "q_lengths": True, "kv_lengths": True}
    yield from vary_layer("dropout+lengths", title, SELF, ("b_o",), spec, clauses=("MHA-LAYER-5",))
    title = "Positions do not restart at a segment."
    yield from vary_layer(
        "window+segments", title, SELF, (), {"window": (1, 1), "segments": True}, rotary={}, variants=(0, 2, 3)
    )


def _weights() -> Iterator[Description]:
    three = {"function": WEIGHTS, "variants": (0, 1, 2), "clauses": ("MHA-LAYER-4",)}
    yield from vary_layer("plain", "The weights of each head.", CROSS, ("b_q",), **three)
    title = "Weights after norm and rotation."
    spec = {"offset": True, "causal": True, "scale": 0.125}
    yield from vary_layer("norm+rotary", title, CROSS, NORMS, spec, rotary={}, **three)
