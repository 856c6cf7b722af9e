"""Data that use the full mantissa of each dtype, so that every step rounds: the cases that measure accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import Input
from portable import generate

from .build import describe
from .options import options_of
from .sizes import Sizes
from .tensors import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

LONG = Sizes(1, 2, 1, 19, 307, 64, 64)
BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
QUESTIONS: tuple[tuple[str, str, dict[str, Any], tuple[float, ...]], ...] = (
    ("attention", "plain", {}, (1.5, 4.0, 8.0)),
    ("attention", "softcap+sinks", {"softcap": 3.0, "sinks": True}, (2.0, 6.0)),
    ("attention_vjp", "plain", {}, (1.5, 4.0)),
    ("attention_vjp", "softcap+sinks", {"softcap": 3.0, "sinks": True}, (2.0,)),
)


def descriptions() -> Iterator[Description]:
    """Yield logits of growing spread in each dtype, forward and backward, over 307 keys."""
    for dtype in BITS:
        for function, name, spec, spreads in QUESTIONS:
            for spread in spreads:
                inputs, options = _inputs(dtype, function, spec, spread)
                yield describe(
                    f"rounding/{name}/{dtype}-spread-{spread:g}",
                    f"Full-mantissa {dtype} data, 307 keys, logits of deviation about {spread / 1.5:.2g}.",
                    LONG,
                    inputs,
                    options,
                    function=function,
                    clauses=("MHA-ACC-1", "MHA-ACC-2", "MHA-SOFTMAX-2"),
                    tags=_tags(dtype, function),
                    dtypes=(dtype,),
                    lse=True,
                    sampled_rows=24 if function == "attention" else 12,
                )


def _tags(dtype: str, function: str) -> tuple[str, ...]:
    """Tag gradients in 16 bits, where sums over 307 keys cancel to less than eight allowances."""
    return ("generic", "cancellation") if function == "attention_vjp" and BITS[dtype] < 24 else ("generic",)


def _inputs(dtype: str, function: str, spec: dict[str, Any], spread: float) -> tuple[dict[str, Input], dict[str, Any]]:
    shapes = {"grad_output": LONG.output} if function == "attention_vjp" else {}
    shapes |= {"query": LONG.query, "key": LONG.key, "value": LONG.value}
    more, options = options_of(LONG, spec, 0)
    reach = {"query": 2.0 ** round(numpy.log2(2 * spread)), "key": 2.0, "value": 4.0, "grad_output": 2.0}
    return {**{name: _full(name, shape, dtype, reach[name]) for name, shape in shapes.items()}, **more}, options


def _full(name: str, shape: tuple[int, ...], dtype: str, reach: float) -> Input:
    """Return uniform numbers of magnitude below `reach` that all use the last bit of `dtype`."""
    bits = BITS[dtype]
    generator = {"seed": seed_of(name, *shape, dtype, reach), "kind": "full", "unit": reach * 2.0**-bits, "bits": bits}
    return Input(generate(shape, **generator), "case", generator)
