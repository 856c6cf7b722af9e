"""Contents that ordinary data never have: biases that round, rows of low logits, empty rows, dominant sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import Input

from .build import describe, inputs_of
from .options import integers
from .pairs import OFFSETS, SQUARES
from .singles import AT_64, AT_128
from .sizes import PRIME, SQUARE, head_size
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from description import Description

    from .sizes import Sizes

LOW = -59904.0
"""A bias below every finite fill that kernels use instead of -inf; float16 and bfloat16 hold it exactly."""


def descriptions() -> Iterator[Description]:
    """Yield biases, empty rows, sinks and dropout at both head sizes, then rows that only two constraints empty."""
    for size, table in ((64, AT_64), (128, AT_128)):
        specs = {name: spec for name, spec, _, _ in table}
        sizes = head_size(size)
        for option, name, title, change, clauses in _CHANGES:
            for flavour in ("generic", "random"):
                inputs, options = inputs_of(sizes, flavour, specs[option], 0)
                changed = {**inputs, **change(sizes, inputs)}
                yield describe(
                    f"{option}/{name}/size-{size}-{flavour}", title, sizes, changed, options, clauses=clauses, lse=True
                )
    yield from _emptied_together()


def _float32_bias(shape: tuple[int, ...]) -> Callable[[Sizes, Any], dict[str, Input]]:
    def make(sizes: Sizes, _: Any) -> dict[str, Input]:
        axes = tuple(1 if size == 1 else full for size, full in zip(shape, sizes.scores, strict=True))
        drift = bell((1, *axes[1:]), 2.0**-6, "float32 bias") + 1000.37
        return {"bias": Input(numpy.float32(drift).astype(float), "float32")}

    return make


def _low_everywhere(sizes: Sizes, inputs: dict[str, Input]) -> dict[str, Input]:
    return {"bias": Input(numpy.full_like(inputs["bias"].values, LOW))}


def _low_row_and_hidden_row(sizes: Sizes, inputs: dict[str, Input]) -> dict[str, Input]:
    bias = inputs["bias"].values.copy()
    bias[:, :, 0] = LOW
    bias[:, 0, 1] = -numpy.inf
    bias[:, 1, 2, 1:] = -numpy.inf
    return {"bias": Input(bias)}


def _low_beside_hidden(sizes: Sizes, inputs: dict[str, Input]) -> dict[str, Input]:
    bias = numpy.where(numpy.arange(sizes.kv_len) % 2 == 0, -numpy.inf, LOW) + 0 * inputs["bias"].values
    return {"bias": Input(bias)}


def _ids(query: int, key: int) -> Callable[[Sizes, Any], dict[str, Input]]:
    def make(sizes: Sizes, _: Any) -> dict[str, Input]:
        q_ids = numpy.full((sizes.batch, sizes.q_len), query)
        kv_ids = numpy.full((sizes.batch, sizes.kv_len), key)
        q_ids[0], kv_ids[0, ::2] = 7, 7
        return {"q_segment_ids": integers(q_ids), "kv_segment_ids": integers(kv_ids)}

    return make


def _sinks(*values: float) -> Callable[[Sizes, Any], dict[str, Input]]:
    return lambda sizes, _: {"sinks": Input(numpy.resize(values, sizes.heads).astype(float))}


def _lengths(name: str, *values: int) -> Callable[[Sizes, Any], dict[str, Input]]:
    return lambda sizes, _: {name: integers(values)}


def _one_head_masked(sizes: Sizes, inputs: dict[str, Input]) -> dict[str, Input]:
    mask = inputs["mask"].values.copy()
    mask[0] = False
    mask[1, :, 1] = [False, True, False, False, False]
    return {"mask": Input(mask, "bool")}


def _all_dropped(sizes: Sizes, inputs: dict[str, Input]) -> dict[str, Input]:
    keep = inputs["dropout_mask"].values.copy()
    keep[:, :, 1] = False
    return {"dropout_mask": Input(keep, "bool")}


_EMPTY = ("MHA-EMPTY-1", "MHA-EMPTY-2")
_CHANGES: tuple[tuple[str, str, str, Callable[[Any, Any], dict[str, Input]], tuple[str, ...]], ...] = (
    (
        "bias",
        "float32",
        "A float32 bias near 1000.37 is not rounded to a 16-bit type.",
        _float32_bias((1, 4, 3, 5)),
        ("MHA-BIAS-2",),
    ),
    (
        "bias",
        "low-everywhere",
        "A bias of -59904 everywhere shifts the lse and hides nothing.",
        _low_everywhere,
        ("MHA-BIAS-3",),
    ),
    (
        "bias",
        "low-and-hidden-rows",
        "A row of finite, very low biases is a row; a row of -inf is none.",
        _low_row_and_hidden_row,
        ("MHA-BIAS-3", *_EMPTY),
    ),
    (
        "bias",
        "low-beside-hidden",
        "All that is visible lies at -59904, beside -inf.",
        _low_beside_hidden,
        ("MHA-BIAS-3",),
    ),
    (
        "segments",
        "one-side",
        "A batch entry whose segment ids are on one side only sees nothing.",
        _ids(0, -1),
        ("MHA-SEG-1", *_EMPTY),
    ),
    ("segments", "zero-and-negative", "Ids 0 and -1 are ids as any other.", _ids(-1, -1), ("MHA-SEG-2",)),
    ("sinks", "large", "A sink that takes nearly all of the weight of its head.", _sinks(8.0, -1.0), ("MHA-SINK-2",)),
    (
        "sinks",
        "none-but-one",
        "One head has a sink, for the others -inf is none.",
        _sinks(-numpy.inf, 2.5),
        ("MHA-SINK-2",),
    ),
    (
        "kv_lengths",
        "zero-and-full",
        "One batch entry has no keys, the other all.",
        _lengths("kv_lengths", 0, 5),
        ("MHA-LEN-1", *_EMPTY),
    ),
    ("kv_lengths", "one", "One batch entry has one key.", _lengths("kv_lengths", 4, 1), ("MHA-LEN-1",)),
    (
        "q_lengths",
        "zero-and-full",
        "One batch entry has no queries, the other all.",
        _lengths("q_lengths", 0, 3),
        ("MHA-LEN-2", *_EMPTY),
    ),
    (
        "mask",
        "one-batch-entry",
        "A mask that empties a batch entry and leaves one key to a row.",
        _one_head_masked,
        _EMPTY,
    ),
    (
        "dropout",
        "all-dropped-row",
        "A row whose visible pairs are all dropped has output 0 and an ordinary lse.",
        _all_dropped,
        ("MHA-DROP-3",),
    ),
)


def _emptied_together() -> Iterator[Description]:
    """Yield rows that two constraints empty together, but neither alone."""
    row, key = numpy.indices((SQUARE.q_len, SQUARE.kv_len))
    above = numpy.broadcast_to(numpy.where(row == 3, key > 3, key != row), (2, 1, 7, 7))
    inputs, options = inputs_of(SQUARE, "generic", SQUARES[0], 0)
    title = "Row 3 may attend, by its mask, to later keys alone, which causal hides."
    clauses = ("MHA-MASK-3", *_EMPTY)
    yield describe(
        "emptied-together/causal+mask",
        title,
        SQUARE,
        {**inputs, "mask": Input(above, "bool")},
        options,
        clauses=clauses,
        lse=True,
    )
    for offsets, lengths in (((3, 2), (2, 7)), ((-2, 5), (7, 3))):
        inputs, options = inputs_of(PRIME, "generic", OFFSETS[1], 0)
        changed = {**inputs, "q_offset": integers(offsets), "kv_lengths": integers(lengths)}
        title = "The window lies beyond the keys that there are."
        name = f"emptied-together/window+kv_lengths/{offsets[0]}-{lengths[0]}"
        yield describe(name, title, PRIME, changed, options, clauses=clauses, lse=True)
