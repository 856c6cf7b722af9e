"""Calls of the layer that must raise an error that names the argument."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from description import Input

from .errors import refused
from .layer_build import LAYER, WEIGHTS, cached
from .layer_sizes import CROSS, ENCODED, STEP, parameters, tokens
from .options import integers
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from description import Description

    Change = Mapping[str, Input | None]


def descriptions() -> Iterator[Description]:
    """Yield errors in parameters, options, tokens and caches, and of rotary_embedding and ALiBi."""
    layer = {**tokens(CROSS, "one"), **parameters(CROSS)}
    for name, argument, kind, clause, change, options in _LAYER:
        yield _refused(LAYER, name, argument, kind, clause, _changed(layer, change), options)
    rate = {"dropout_rate": 0.5}
    weighed = _changed(layer, {"value": None, "w_v": None, "w_o": None})
    yield _refused(WEIGHTS, "dropout", "dropout_rate", "type", "MHA-DROP-3", weighed, rate)
    step = {**tokens(STEP, "one"), **parameters(STEP), **cached(STEP, "one", (3, 5))}
    for name, argument, kind, clause, change, options in _CACHE:
        yield _refused(LAYER, f"cache/{name}", argument, kind, clause, _changed(step, change), options)
    encoded = {**tokens(ENCODED, "one"), **parameters(ENCODED), **cached(ENCODED, "one", (8, 5))}
    more = {**encoded, "kv_lengths": integers((3, 2))}
    yield _refused(LAYER, "cache/lengths-of-nothing", "kv_lengths", "value", "MHA-CACHE-8", more, {})
    turned = {"x": _of(2, 3, 5, 7), "positions": integers(range(5))}
    for name, argument, kind, clause, change, options in _ROTARY:
        yield _refused("rotary_embedding", name, argument, kind, clause, _changed(turned, change), options)
    for name, argument, kind, clause, change, options in _ALIBI:
        yield _refused("alibi_bias", name, argument, kind, clause, _changed({"slopes": _of(3)}, change), options)


def _refused(
    function: str, name: str, argument: str, kind: str, clause: str, inputs: Change, options: Mapping[str, Any]
) -> Description:
    present = {label: item for label, item in inputs.items() if item is not None}
    title = "{}: refused, naming `{}`."
    return refused(f"{function}/error/{name}", argument, kind, clause, present, options, function, title=title)


def _changed(inputs: Mapping[str, Input], change: Change) -> Change:
    return {name: item for name, item in {**inputs, **change}.items() if item is not None}


def _of(*shape: int, dtype: str = "case") -> Input:
    return Input(bell(shape, 2.0**-3, "refused"), dtype)


def _turned(**rotary: Any) -> dict[str, Any]:
    return {"rotary": rotary, "q_offset": 0}


_LAYER: tuple[tuple[str, str, str, str, Change, dict[str, Any]], ...] = (
    ("parameter-missing", "w_o", "value", "MHA-PROJ-4", {"w_o": None}, {}),
    ("parameter-unknown", "w_g", "value", "MHA-PROJ-4", {"w_g": _of(7, 4, 6)}, {}),
    ("query-of-another-embed", "w_q", "value", "MHA-PROJ-4", {"w_q": _of(8, 4, 6)}, {}),
    ("key-of-another-size", "w_k", "value", "MHA-PROJ-4", {"w_k": _of(11, 2, 5)}, {}),
    ("value-of-other-heads", "w_v", "value", "MHA-PROJ-4", {"w_v": _of(13, 4, 5)}, {}),
    ("output-of-another-size", "w_o", "value", "MHA-PROJ-4", {"w_o": _of(4, 6, 9)}, {}),
    ("bias-without-heads", "b_q", "value", "MHA-PROJ-4", {"b_q": _of(6)}, {}),
    ("gain-of-all-heads", "q_norm", "value", "MHA-PROJ-4", {"q_norm": _of(4, 6)}, {}),
    ("parameter-of-another-dtype", "w_k", "type", "MHA-PROJ-4", {"w_k": _of(11, 2, 6, dtype="float16")}, {}),
    ("heads-no-multiple", "heads", "value", "MHA-HEAD-2", {"w_k": _of(11, 3, 6), "w_v": _of(13, 3, 5)}, {}),
    ("epsilon-negative", "norm_epsilon", "value", "MHA-NORM-1", {}, {"norm_epsilon": -1e-6}),
    ("epsilon-text", "norm_epsilon", "type", "MHA-NORM-1", {}, {"norm_epsilon": "small"}),
    ("rotary-true", "rotary", "type", "MHA-ROTARY-6", {}, {"rotary": True, "q_offset": 0}),
    ("rotary-option-unknown", "rotary", "type", "MHA-ROTARY-6", {}, {"rotary": {"theta": 500.0}, "q_offset": 0}),
    ("rotary-odd", "rotary_dim", "value", "MHA-ROTARY-6", {"w_q": _of(7, 4, 5), "w_k": _of(11, 2, 5)}, _turned()),
    ("frequencies-too-many", "frequencies", "value", "MHA-ROTARY-7", {}, _turned(frequencies=[1.0] * 4)),
    ("frequencies-and-base", "base", "value", "MHA-ROTARY-7", {}, _turned(frequencies=[1.0] * 3, base=500.0)),
    ("factor-zero", "attention_factor", "value", "MHA-ROTARY-8", {}, _turned(attention_factor=0.0)),
    ("sections-too-few", "sections", "value", "MHA-ROTARY-17", {}, _turned(sections=[1, 1])),
    (
        "positions-without-rotary",
        "positions",
        "value",
        "MHA-LAYER-7",
        {"key": _of(2, 3, 11), "value": _of(2, 3, 13), "positions": integers([0, 1, 2])},
        {},
    ),
    ("positions-of-fewer-keys", "positions", "value", "MHA-LAYER-7", {"positions": integers([0, 1, 2])}, _turned()),
    ("rotary-ambiguous", "q_offset", "value", "MHA-LAYER-6", {}, {"rotary": {}}),
    ("rotary-of-lengths", "q_offset", "value", "MHA-LAYER-6", {}, {"rotary": {}, "kv_lengths": (5, 3)}),
    ("query-with-heads", "query", "value", "MHA-LAYER-2", {"query": _of(2, 4, 3, 7)}, {}),
    ("key-of-another-batch", "key", "value", "MHA-LAYER-2", {"key": _of(1, 5, 11)}, {}),
    ("value-of-another-length", "value", "value", "MHA-LAYER-2", {"value": _of(2, 4, 13)}, {}),
    ("key-missing", "key", "value", "MHA-LAYER-3", {"key": None, "value": None}, {}),
    ("value-missing", "value", "value", "MHA-LAYER-3", {"value": None}, {}),
    ("unknown-keyword", "need_weights", "type", "MHA-ARG-1", {}, {"need_weights": True}),
)
_HOST = {"cache_lengths": None}
_CACHE: tuple[tuple[str, str, str, str, Change, dict[str, Any]], ...] = (
    ("overflow", "cache", "value", "MHA-CACHE-4", _HOST, {"cache_lengths": (3, 8)}),
    ("full", "cache", "value", "MHA-CACHE-4", _HOST, {"cache_lengths": (8, 8)}),
    ("lengths-beyond-capacity", "lengths", "value", "MHA-CACHE-7", _HOST, {"cache_lengths": (3, 9)}),
    ("lengths-of-wrong-count", "lengths", "value", "MHA-CACHE-7", _HOST, {"cache_lengths": (3, 5, 1)}),
    ("lengths-fractions", "lengths", "type", "MHA-CACHE-7", _HOST, {"cache_lengths": (3.0, 5.0)}),
    ("another-batch", "cache", "value", "MHA-CACHE-7", {"cache_key": _of(3, 2, 8, 6)}, {}),
    ("keys-of-another-size", "cache", "value", "MHA-CACHE-7", {"cache_key": _of(2, 2, 8, 5)}, {}),
    ("values-of-other-heads", "cache", "value", "MHA-CACHE-7", {"cache_value": _of(2, 4, 8, 3)}, {}),
    ("another-dtype", "cache", "type", "MHA-CACHE-7", {"cache_key": _of(2, 2, 8, 6, dtype="float16")}, {}),
    ("more-than-new", "kv_lengths", "value", "MHA-LEN-3", {}, {"kv_lengths": (1, 2)}),
)
_ROTARY: tuple[tuple[str, str, str, str, Change, dict[str, Any]], ...] = (
    ("odd-size", "rotary_dim", "value", "MHA-ROTARY-6", {}, {}),
    ("odd-part", "rotary_dim", "value", "MHA-ROTARY-6", {}, {"rotary_dim": 3}),
    ("part-beyond-size", "rotary_dim", "value", "MHA-ROTARY-6", {}, {"rotary_dim": 8}),
    ("no-part", "rotary_dim", "value", "MHA-ROTARY-6", {}, {"rotary_dim": 0}),
    ("base-zero", "base", "value", "MHA-ROTARY-6", {}, {"rotary_dim": 4, "base": 0.0}),
    ("base-infinite", "base", "value", "MHA-ROTARY-6", {}, {"rotary_dim": 4, "base": math.inf}),
    ("interleaved-number", "interleaved", "type", "MHA-ROTARY-6", {}, {"rotary_dim": 4, "interleaved": 1}),
    *(
        (f"frequencies-{name}", argument, kind, "MHA-ROTARY-7", {}, {"rotary_dim": 4, **options})
        for name, argument, kind, options in (
            ("too-few", "frequencies", "value", {"frequencies": [1.0]}),
            ("of-the-whole-size", "frequencies", "value", {"frequencies": [1.0, 0.5, 0.25]}),
            ("negative", "frequencies", "value", {"frequencies": [1.0, -0.5]}),
            ("single", "frequencies", "type", {"frequencies": 1.0}),
            ("and-base", "base", "value", {"frequencies": [1.0, 0.5], "base": 500.0}),
        )
    ),
    *(
        (f"factor-{name}", "attention_factor", kind, "MHA-ROTARY-8", {}, {"rotary_dim": 4, "attention_factor": factor})
        for name, kind, factor in (
            ("zero", "value", 0.0),
            ("negative", "value", -1.5),
            ("nan", "value", math.nan),
            ("text", "type", "yarn"),
        )
    ),
    *(
        (f"sections-{name}", "sections", kind, "MHA-ROTARY-17", {}, {"rotary_dim": 4, "sections": sections})
        for name, kind, sections in (
            ("of-components", "value", [2, 2]),
            ("negative", "value", [3, -1]),
            ("single", "type", 2),
        )
    ),
    (
        "positions-of-fewer-axes",
        "positions",
        "value",
        "MHA-ROTARY-17",
        {"positions": integers([[[0] * 5] * 2] * 2)},
        {"rotary_dim": 4, "sections": [1, 1, 0]},
    ),
    ("positions-too-few", "positions", "value", "MHA-ROTARY-6", {"positions": integers(range(4))}, {"rotary_dim": 4}),
    (
        "positions-of-heads",
        "positions",
        "value",
        "MHA-ROTARY-6",
        {"positions": integers([[0] * 5] * 3)},
        {"rotary_dim": 4},
    ),
)
_ALIBI: tuple[tuple[str, str, str, str, Change, dict[str, Any]], ...] = (
    ("ambiguous", "q_offset", "value", "MHA-POS-2", {}, {"q_len": 3, "kv_len": 5}),
    ("slopes-of-batch", "slopes", "value", "MHA-ALIBI-3", {"slopes": _of(2, 3)}, {"q_len": 3, "kv_len": 3}),
    ("no-heads", "slopes", "value", "MHA-ALIBI-3", {"slopes": None}, {"slopes": 0, "q_len": 3, "kv_len": 3}),
    ("half-a-head", "slopes", "type", "MHA-ALIBI-3", {"slopes": None}, {"slopes": 2.5, "q_len": 3, "kv_len": 3}),
)
