"""Positions at the ends of their range, 2^30: sums of an offset, an index and a bound that overflow int32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from description import ALL_DTYPES

from .build import describe, inputs_of
from .options import integers
from .sizes import ONE_QUERY, PRIME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .sizes import Sizes

FAR = 2**30
SMALL = ("float64", "float32", "float16")
"""Gradients that cancel are too inaccurate in bfloat16."""

QUESTIONS: dict[str, dict[str, Any]] = {
    "right": {"window": (None, FAR), "q_offset": (FAR, 1 - FAR)},
    "right-of-all": {"window": (None, FAR), "q_offset": (FAR - 3, -2 - FAR + 4)},
    "left": {"window": (FAR, None), "q_offset": (FAR, FAR - 2)},
    "both": {"window": (FAR, FAR), "q_offset": (FAR, -FAR)},
    "integer": {"window": (FAR, FAR), "q_offset": FAR},
    "integer-right": {"window": (None, FAR), "q_offset": FAR - 3},
    "negative-integer": {"window": (FAR, FAR), "q_offset": -FAR},
    "narrow": {"window": (2, FAR), "q_offset": (1, FAR)},
    "causal": {"causal": True, "q_offset": (FAR, -1)},
    "causal-in-a-window": {"causal": True, "window": (FAR, None), "q_offset": (FAR, 1 - FAR)},
}
"""Options by name, for which all pairs, some or none are visible."""


def descriptions() -> Iterator[Description]:
    """Yield bounds and offsets of 2^30, for all entries and for each, some with weights and gradients too."""
    for name, question in QUESTIONS.items():
        yield _case(name, PRIME, question, "attention", "")
    for name in ("both", "integer"):
        for function in ("attention_weights", "attention_vjp"):
            yield _case(name, PRIME, QUESTIONS[name], function, "")
    for name in ("right", "both"):
        yield _case(name, ONE_QUERY, QUESTIONS[name], "attention", "/one-query")


def _case(name: str, sizes: Sizes, question: dict[str, Any], function: str, label: str) -> Description:
    inputs, _ = inputs_of(sizes, "generic", {"grad_lse": True} if function == "attention_vjp" else {}, 0, function)
    options = dict(question)
    if isinstance(options["q_offset"], tuple):
        inputs["q_offset"] = integers(options.pop("q_offset"))
    return describe(
        f"boundary/{name}{label}",
        f"An offset or a bound of 2^30: {', '.join(f'{key}={value}' for key, value in question.items())}.",
        sizes,
        inputs,
        options,
        function=function,
        clauses=("MHA-POS-1",),
        tags=("structured", "boundary"),
        dtypes=SMALL if function == "attention_vjp" else ALL_DTYPES,
        lse=True,
    )
