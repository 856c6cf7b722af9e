"""The first cases, which distinguish a wrong target file from a wrong attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import Input

from .build import describe, inputs_of
from .sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

SMOKE = Sizes(2, 3, 3, 5, 7, 11, 11)
TAGS = ("smoke", "generic")


def descriptions() -> Iterator[Description]:
    """Yield cases of the basic conventions: one result in the query's dtype, heads before positions, True = visible."""
    inputs, _ = inputs_of(SMOKE, "generic", {}, 0)
    yield describe(
        "smoke/plain",
        "Plain attention gives one array of the query's dtype, no tuple.",
        SMOKE,
        inputs,
        clauses=("MHA-SHAPE-1", "MHA-DTYPE-1", "MHA-SOFTMAX-1", "MHA-PURE-1"),
        tags=TAGS,
        lse=False,
    )
    inputs, _ = inputs_of(SMOKE, "coded", {}, 0)
    yield describe(
        "smoke/head-layout",
        "Heads come before positions: 3 heads, 5 queries, 7 keys, values that tell which.",
        SMOKE,
        inputs,
        clauses=("MHA-SHAPE-1",),
        tags=("smoke", "structured"),
        lse=False,
    )
    inputs, _ = inputs_of(SMOKE, "generic", {}, 0)
    row, key = numpy.indices((SMOKE.q_len, SMOKE.kv_len))
    inputs["mask"] = Input((key <= row)[None, None], "bool")
    yield describe(
        "smoke/mask-polarity",
        "True = may attend: a mask whose inverse gives another, also finite, answer.",
        SMOKE,
        inputs,
        clauses=("MHA-MASK-1",),
        tags=TAGS,
        lse=False,
    )
    inputs, _ = inputs_of(SMOKE, "random", {}, 0)
    yield describe(
        "smoke/lse",
        "With the log-sum-exp, of shape (batch, heads, q_len), natural.",
        SMOKE,
        inputs,
        features=("lse",),
        clauses=("MHA-LSE-1", "MHA-LSE-2"),
        tags=TAGS,
        lse=True,
    )
