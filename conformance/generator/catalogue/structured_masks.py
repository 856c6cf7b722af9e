"""Prefixes, chunks and padding on the left: each alone, each with each, and with the options that they meet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Input

from .build import describe, inputs_of
from .caches import case_of_cache
from .layer_build import vary_layer
from .layer_sizes import CROSS, WHOLE
from .options import integers
from .sizes import Sizes
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from description import Description

SMALL = Sizes(2, 2, 1, 5, 9, 5, 3)
GROUPED = SMALL._replace(heads=4, kv_heads=2)
STEP = SMALL._replace(q_len=1)

IN_EACH_DTYPE = ("causal+chunk/1", "prefix/1", "causal+kv_starts/1", "every-option")
"""The cases that are asked in all dtypes, because a target compiles for each signature in each dtype."""

WITHOUT_BFLOAT16 = ("float64", "float32", "float16")
"""Gradients that cancel are too inaccurate in bfloat16."""

PER_ENTRY = ("q_offset", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts")
"""The options of a spec that are arrays if they are pairs of numbers."""

CHUNKS: tuple[tuple[str, Sizes, dict[str, Any]], ...] = (
    ("chunk/1", SMALL, {"chunk": 3, "q_offset": (-2, 4)}),
    ("chunk/far", SMALL, {"chunk": 2**30, "q_offset": 2**30 - 3, "kv_starts": (2, 0)}),
    ("causal+chunk/1", SMALL, {"causal": True, "chunk": 4, "q_offset": 3}),
    ("causal+chunk/2", GROUPED, {"causal": True, "chunk": 5, "q_offset": (4, -3)}),
    ("chunk+window", SMALL, {"chunk": 5, "window": (2, 1), "q_offset": 2}),
    (
        "causal+chunk+lengths",
        GROUPED,
        {"causal": True, "chunk": 3, "q_lengths": (5, 4), "kv_lengths": (8, 6), "q_offset": "lower_right"},
    ),
    ("chunk/one-query", STEP, {"chunk": 4, "causal": True, "q_offset": "lower_right", "kv_lengths": (7, 6)}),
    ("chunk+kv_starts/1", SMALL, {"chunk": 3, "causal": True, "q_offset": 3, "kv_starts": (2, 4)}),
    ("chunk+kv_starts/2", GROUPED, {"chunk": 4, "q_offset": (0, -3), "kv_starts": (5, 1)}),
    ("chunk+kv_starts/one-query", STEP, {"chunk": 4, "causal": True, "q_offset": (8, 7), "kv_starts": (3, 2)}),
)
PREFIXES: tuple[tuple[str, Sizes, dict[str, Any]], ...] = (
    ("prefix/1", SMALL, {"q_offset": 0, "prefix_lengths": (4, 9)}),
    ("prefix/2", GROUPED, {"q_offset": (-3, 2), "prefix_lengths": (3, 7)}),
    ("prefix/one-query", STEP, {"q_offset": (2, 5), "prefix_lengths": (6, 9)}),
    ("prefix+window/1", SMALL, {"q_offset": 2, "prefix_lengths": (6, 8), "window": (2, None)}),
    ("prefix+window/2", GROUPED, {"q_offset": (0, 1), "prefix_lengths": (5, 8), "window": (1, 2)}),
    ("prefix+chunk/1", SMALL, {"q_offset": 1, "prefix_lengths": (6, 3), "chunk": 4}),
    ("prefix+chunk/2", GROUPED, {"q_offset": (2, -1), "prefix_lengths": (8, 5), "chunk": 3}),
    ("prefix+kv_starts/1", SMALL, {"q_offset": 1, "prefix_lengths": (6, 5), "kv_starts": (2, 3)}),
    ("prefix+kv_starts/2", GROUPED, {"q_offset": (0, -2), "prefix_lengths": (5, 4), "kv_starts": (1, 2)}),
    (
        "prefix+lengths",
        SMALL,
        {"q_offset": "upper_left", "prefix_lengths": (6, 8), "q_lengths": (5, 4), "kv_lengths": (8, 4)},
    ),
)
STARTS: tuple[tuple[str, Sizes, dict[str, Any]], ...] = (
    ("kv_starts/1", SMALL, {"kv_starts": (4, 9)}),
    ("kv_starts/one-query", STEP, {"kv_starts": (4, 1), "causal": True, "kv_lengths": (8, 9), "q_offset": (8, 3)}),
    ("causal+kv_starts/1", SMALL, {"causal": True, "kv_starts": (5, 2), "q_offset": 3}),
    ("causal+kv_starts/2", GROUPED, {"causal": True, "kv_starts": (3, 6), "q_offset": (4, 2)}),
    ("window+kv_starts", SMALL, {"window": (3, 2), "kv_starts": (4, 1), "q_offset": (2, 0)}),
    (
        "kv_starts+lengths",
        GROUPED,
        {"causal": True, "kv_starts": (3, 5), "kv_lengths": (8, 5), "q_offset": "lower_right"},
    ),
)
EVERY: dict[str, Any] = {
    "causal": True,
    "q_offset": (4, 3),
    "window": (5, 4),
    "chunk": 7,
    "prefix_lengths": (6, 8),
    "kv_starts": (1, 2),
    "q_lengths": (5, 4),
    "kv_lengths": (8, 9),
}
OTHERS: dict[str, Any] = {
    "mask": "b1qk",
    "bias": "1hqk",
    "segments": True,
    "scale": 0.4375,
    "softcap": 3.0,
    "sinks": True,
    "dropout": (0.125, "bhqk"),
}
OF_GRADIENTS = ("chunk+kv_starts/1", "prefix/2", "prefix+window/1")
"""The cases that are also asked of the gradients."""


def descriptions() -> Iterator[Description]:
    """Yield the options in attention, its weights and gradients, hidden NaN, and the layer."""
    prefixes = tuple((name, sizes, {"causal": True, **spec}) for name, sizes, spec in PREFIXES)
    cases = {name: (sizes, spec) for name, sizes, spec in (*CHUNKS, *prefixes, *STARTS)}
    for name, (sizes, spec) in cases.items():
        yield _case(name, sizes, spec)
    yield _case("chunk+kv_starts/1", *cases["chunk+kv_starts/1"], function="attention_weights")
    for name in OF_GRADIENTS:
        yield _case(name, *cases[name], function="attention_vjp")
    for function in ("attention", "attention_vjp"):
        yield _case("every-option", GROUPED, EVERY, OTHERS, 4, function=function)
    yield _case("segments+chunk", SMALL, {"causal": True, "chunk": 4, "q_offset": 3}, {"segments": True})
    yield _case("bias+prefix", SMALL, cases["prefix/1"][1], {"bias": "bh1k"}, 1)
    yield _with_hidden_nan("chunk+kv_starts/1", *cases["chunk+kv_starts/1"])
    yield from _of_the_layer()


def _case(
    name: str,
    sizes: Sizes,
    spec: Mapping[str, Any],
    others: Mapping[str, Any] | None = None,
    variant: int = 0,
    *,
    function: str = "attention",
    **more: Any,
) -> Description:
    inputs, options = inputs_of(sizes, "generic", others or {}, variant, function)
    arrays = {label: integers(x) for label, x in spec.items() if label in PER_ENTRY and isinstance(x, tuple)}
    plain = {label: x for label, x in spec.items() if label not in arrays}
    dtypes = ALL_DTYPES if name in IN_EACH_DTYPE else ("float32",)
    if function == "attention_vjp":
        dtypes = WITHOUT_BFLOAT16 if name in IN_EACH_DTYPE else ("float32",)
        inputs |= {"grad_lse": Input(bell(sizes.output[:3], 2.0**-3, "grad_lse"), "softmax")} if others else {}
    return describe(
        f"structure/{name}",
        f"{_phrase(spec, *(others or {}))}.",
        sizes,
        {**inputs, **arrays},
        {**plain, **options},
        function=function,
        dtypes=dtypes,
        lse=True,
        **more,
    )


def _phrase(spec: Mapping[str, Any], *others: str) -> str:
    """Name the structured options of a spec, and those that they meet."""
    words = {"prefix_lengths": "a prefix", "chunk": "chunks", "kv_starts": "padding on the left"}
    named = [phrase for name, phrase in words.items() if name in spec]
    met = [name for name in (*spec, *others) if name not in (*words, "q_offset")]
    return f"{' and '.join(named).capitalize()}{' with ' if met else ''}{', '.join(met)}"


def _with_hidden_nan(name: str, sizes: Sizes, spec: Mapping[str, Any]) -> Description:
    """Put NaN in the keys and values that no row of a batch entry sees."""
    case = _case(name, sizes, spec)
    starts = numpy.reshape(spec["kv_starts"], (-1, 1, 1, 1))
    index = numpy.arange(sizes.kv_len).reshape(1, 1, -1, 1)
    first = (spec["q_offset"] - starts) // spec["chunk"] * spec["chunk"] + starts
    last = spec["q_offset"] + sizes.q_len - 1
    hidden = (index < starts) | (index < first) | (index > last)
    poisoned = {
        label: Input(numpy.where(hidden, math.nan, case.inputs[label].values), "case") for label in ("key", "value")
    }
    return describe(
        f"structure/{name}/hidden-nan",
        f"{_phrase(spec)}: what no row sees is NaN, and reaches nothing.",
        sizes,
        {**case.inputs, **poisoned},
        case.options,
        clauses=("MHA-POISON-1",),
        features=("poison",),
        dtypes=("float32",),
        lse=True,
    )


def _of_the_layer() -> Iterator[Description]:
    """Yield tokens at once and behind a cache, in which starts and prefixes are indices of the slots."""
    causal = {"causal": True}
    only: dict[str, Any] = {"variants": (0,), "dtypes": ("float32",)}
    inputs = {"kv_starts": integers((2, 1)), "q_offset": integers((2, 1))}
    title = "Chunks and padding on the left reach the attention."
    yield from vary_layer(
        "structure/chunk+kv_starts", title, CROSS, (), causal, inputs=inputs, chunk=3, rotary={}, **only
    )
    inputs = {"prefix_lengths": integers((4, 2)), "q_offset": integers((0, 1))}
    title = "A prefix under a window reaches the attention."
    yield from vary_layer(
        "structure/prefix", title, CROSS, (), causal, inputs=inputs, window=(3, None), rotary={}, **only
    )
    starts = {"kv_starts": integers((1, 3))}
    for name, calls in (("at-once", None), ("one-by-one", [1] * 6)):
        title = f"Six tokens behind padding on the left, in chunks, {name.replace('-', ' ')}."
        more: dict[str, Any] = {"clauses": ("MHA-CACHE-2",), "rotary": {}, "chunk": 3, "inputs": starts}
        more |= {} if calls is None else {"chunks": calls}
        yield case_of_cache(f"structure/cache/{name}", title, WHOLE, 0, (0, 2), (), causal, **more)
    more = {"clauses": ("MHA-CACHE-2",), "rotary": {}, "chunks": [4, 1, 1], "window": (3, None)}
    more |= {"inputs": {"prefix_lengths": integers((3, 5)), "kv_starts": integers((1, 0))}}
    title = "A prefix arrives in one call, and tokens follow one at a time."
    yield case_of_cache("structure/cache/prefix", title, WHOLE, 1, (0, 2), (), causal, **more)
