"""A float64 bias whose lowest numbers are -inf in float32, so that they hide if this is the softmax's type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import Input

from .build import describe, inputs_of
from .sizes import PRIME, head_size
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

    from .sizes import Sizes

NARROW = ("float32", "float16", "bfloat16")
BEYOND = -1e300
"""A bias below the range of float32."""


def descriptions() -> Iterator[Description]:
    """Yield rows in which such a bias hides all keys, some, and none."""
    for label, sizes in (("prime", PRIME), ("size-64", head_size(64)), ("size-128", head_size(128))):
        for function in ("attention", "attention_weights", "attention_vjp") if label == "prime" else ("attention",):
            yield _case(label, sizes, function)


def _case(label: str, sizes: Sizes, function: str) -> Description:
    inputs, _ = inputs_of(sizes, "generic", {"grad_lse": True} if function == "attention_vjp" else {}, 0, function)
    inputs["bias"] = Input(_bias(sizes), "float64")
    for name in {"key", "value"} & inputs.keys():
        values = inputs[name].values.copy()
        values[:, :, -1] = numpy.nan
        inputs[name] = Input(values)
    empty = ("MHA-EMPTY-3",) if function == "attention_vjp" else ("MHA-EMPTY-1",)
    return describe(
        f"bias/float64-hides/{label}",
        "A float64 bias of -1e300 is -inf in float32, and hides; it hides NaN in the last key and value from all rows.",
        sizes,
        inputs,
        function=function,
        clauses=("MHA-BIAS-2", "MHA-BIAS-3", "MHA-POISON-1", *empty),
        features=("poison",),
        dtypes=NARROW[:2] if function == "attention_vjp" else NARROW,
        lse=True,
    )


def _bias(sizes: Sizes) -> numpy.ndarray:
    """Alternate rows with all keys hidden, two of three, and the last key alone, over a bias of full mantissa."""
    _, heads, q_len, kv_len = sizes.scores
    head, row, key = numpy.indices((heads, q_len, kv_len))
    ordinary = bell((heads, q_len, kv_len), 2.0**-3, "float64 bias") + 2.0**-40
    turn = (row + head) % 3
    hidden = (turn == 0) | ((turn == 1) & (key % 3 != 0)) | (key == kv_len - 1)
    return numpy.where(hidden, BEYOND, ordinary)[None]
