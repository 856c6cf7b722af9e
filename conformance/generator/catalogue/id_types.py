"""Segment ids of two integer types, which are equal only if their values are, not after a conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import ALL_DTYPES, Input

from .build import describe, inputs_of
from .sizes import PRIME, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .sizes import Sizes

PAIRS: dict[str, tuple[str, tuple[int, ...], str, tuple[int, ...]]] = {
    "uint32-int32": ("uint32", (2**32 - 1, 5, 0), "int32", (-1, 5, 0)),
    "int32-uint32": ("int32", (-1, 2**31 - 1, 7), "uint32", (2**32 - 1, 2**31 - 1, 7)),
    "int64-int32": ("int64", (2**32 + 5, 5, -3), "int32", (5, -3, 5)),
    "int64-int64": ("int64", (2**32 + 5, 5, 2**40), "int64", (5, 2**32 + 5, 0)),
    "uint8-int8": ("uint8", (255, 1, 128), "int8", (-1, 1, -128)),
    "uint64-int64": ("uint64", (2**63 - 1, 2**32, 3), "int64", (-1, 3, 2**32)),
    "int16-uint16": ("int16", (-2, 3, 2), "uint16", (65534, 3, 2)),
}
"""The types of the ids of queries and keys, and the ids that alternate."""


def descriptions() -> Iterator[Description]:
    """Yield ids that a conversion to the narrower or to the signed type would make equal."""
    for name in PAIRS:
        yield _case(name, "prime", PRIME, "attention")
    for function in ("attention_weights", "attention_vjp"):
        yield _case("uint32-int32", "prime", PRIME, function)
    for size in (64, 128):
        yield _case("uint32-int32", f"size-{size}", head_size(size), "attention")


def _case(name: str, label: str, sizes: Sizes, function: str) -> Description:
    q_type, q_ids, kv_type, kv_ids = PAIRS[name]
    inputs, _ = inputs_of(sizes, "generic", {}, 0, function)
    for option, length, ids, dtype in (
        ("q_segment_ids", sizes.q_len, q_ids, q_type),
        ("kv_segment_ids", sizes.kv_len, kv_ids, kv_type),
    ):
        entries = [numpy.resize(numpy.roll(ids, entry), length) for entry in range(sizes.batch)]
        inputs[option] = Input(numpy.array(entries, dtype=numpy.int64), dtype)
    return describe(
        f"segments/types/{name}/{label}",
        f"Ids of queries in {q_type}, of keys in {kv_type}.",
        sizes,
        inputs,
        function=function,
        dtypes=ALL_DTYPES[:3] if function == "attention_vjp" else ALL_DTYPES,
        lse=True,
    )
