"""A single key that some rows do not see: reductions over one element, which compilers remove."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import Input

from .build import describe, inputs_of
from .options import integers
from .sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

SIZES = {
    "prime": Sizes(2, 4, 2, 5, 1, 7, 3),
    "size-64": Sizes(2, 2, 1, 5, 1, 64, 64),
    "size-128": Sizes(2, 2, 1, 5, 1, 128, 128),
}
WITH_SINKS = ("mask", "kv_lengths")
"""Causes that are also asked with sinks."""

ONE_QUERY = Sizes(3, 4, 2, 1, 1, 7, 3)
ROWS = numpy.array([True, False, True, True, False, False, True, False, True, True])
"""True for rows of the two batch entries that see the key."""


def descriptions() -> Iterator[Description]:
    """Yield each constraint that hides the key: outputs with lse, weights and gradients, with and without sinks."""
    for cause, (inputs, options) in _causes().items():
        for spec in ({}, {"sinks": True})[: 2 if cause in WITH_SINKS else 1]:
            yield _case(cause, "prime", "attention", inputs, options, spec)
            yield _case(cause, "prime", "attention_vjp", inputs, options, {"grad_lse": True, **spec})
        yield _case(cause, "prime", "attention_weights", inputs, options, {})
    for label in ("size-64", "size-128"):
        for cause in ("mask", "kv_lengths"):
            yield _case(cause, label, "attention", *_causes()[cause], {})
    yield from _one_query()


def _causes() -> dict[str, tuple[dict[str, Input], dict[str, Any]]]:
    """Return the constraints by name, as inputs and options."""
    seen = ROWS.reshape(2, 1, 5, 1)
    ids = numpy.where(ROWS.reshape(2, 5), 4, -4)
    return {
        "mask": ({"mask": Input(seen, "bool")}, {}),
        "bias": ({"bias": Input(numpy.where(seen, 0.75, -numpy.inf))}, {}),
        "causal": ({"q_offset": integers((-2, -4))}, {"causal": True}),
        "window": ({"q_offset": integers((-1, 1))}, {"window": (2, 0)}),
        "kv_lengths": ({"kv_lengths": integers((1, 0))}, {}),
        "q_lengths": ({"q_lengths": integers((3, 0))}, {}),
        "segments": ({"q_segment_ids": integers(ids), "kv_segment_ids": integers(((4,), (4,)))}, {}),
    }


def _case(
    cause: str, label: str, function: str, more: dict[str, Input], options: dict[str, Any], spec: dict[str, Any]
) -> Description:
    inputs, _ = inputs_of(SIZES[label], "generic", spec, 0, function)
    suffix = "".join(f"+{name}" for name in spec)
    return describe(
        f"one-key/{cause}{suffix}/{label}",
        f"One key, which {cause} hides from some rows.",
        SIZES[label],
        {**inputs, **more},
        options,
        function=function,
        lse=True,
    )


def _one_query() -> Iterator[Description]:
    """Yield one query and one key per batch entry; the key of the middle entry is not in use."""
    for function, spec in (("attention", {}), ("attention_weights", {}), ("attention_vjp", {"grad_lse": True})):
        inputs, _ = inputs_of(ONE_QUERY, "generic", spec, 0, function)
        yield describe(
            "one-key/kv_lengths/one-query",
            "One query over one key, which one batch entry has not.",
            ONE_QUERY,
            {**inputs, "kv_lengths": integers((1, 0, 1))},
            function=function,
            lse=True,
        )
