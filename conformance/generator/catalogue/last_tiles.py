"""One key after the last whole tile of a blocked kernel, which is hidden from all rows or from most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Input

from .build import describe, inputs_of
from .options import integers
from .sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

LENGTHS = (129, 257, 513, 641)
GARBAGE = (numpy.nan, numpy.inf)


def descriptions() -> Iterator[Description]:
    """Yield each constraint that can hide the last key, which is NaN or infinite, at each length."""
    for kv_len in LENGTHS:
        sizes = Sizes(2, 2, 1, 3, kv_len, 16, 16)
        for cause, (more, options) in _causes(sizes).items():
            yield _case(cause, sizes, more, options, "attention", {})
        if kv_len in (LENGTHS[0], LENGTHS[-1]):
            more, options = _causes(sizes)["kv_lengths"]
            yield _case("kv_lengths", sizes, more, options, "attention_vjp", {"grad_lse": True})


def _causes(sizes: Sizes) -> dict[str, tuple[dict[str, Input], dict[str, Any]]]:
    """Return the constraints by name; each hides the last key from every row."""
    last = sizes.kv_len - 1
    keys = numpy.arange(sizes.kv_len).reshape(1, 1, 1, -1)
    entries = numpy.array([last, 0]).reshape(2, 1, 1, 1)
    return {
        "kv_lengths": ({"kv_lengths": integers((last, 3))}, {}),
        "mask": ({"mask": Input((keys != last) & (keys >= entries - last), "bool")}, {}),
        "causal": ({"q_offset": integers((last - 3, last - 64))}, {"causal": True}),
    }


def _case(
    cause: str, sizes: Sizes, more: dict[str, Input], options: dict[str, Any], function: str, spec: dict[str, Any]
) -> Description:
    inputs, _ = inputs_of(sizes, "steep", spec, 0, function)
    for name in ("key", "value"):
        values = inputs[name].values.copy()
        values[:, :, -1] = numpy.resize(GARBAGE, sizes.qk_dim)
        inputs[name] = Input(values)
    return describe(
        f"last-tile/{cause}/{sizes.kv_len}",
        f"{sizes.kv_len} keys, of which no row sees the last one, which is not finite.",
        sizes,
        {**inputs, **more},
        options,
        function=function,
        clauses=("MHA-POISON-1",),
        features=("poison",),
        tags=("structured", "poison"),
        dtypes=ALL_DTYPES[:2] if function == "attention_vjp" else ALL_DTYPES,
        lse=True,
    )
