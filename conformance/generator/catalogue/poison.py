"""NaN and infinities: hidden ones reach no result, and visible ones exactly the results of the rows that see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import Input

from .build import describe, inputs_of
from .pairs import EVERYTHING, SQUARES, TRIPLES
from .pairs import OFFSETS as OFFSET_SPECS
from .singles import AT_64, AT_128
from .sizes import EQUAL, PRIME, ROOMY, SQUARE, head_size
from .visible import visible_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from description import Description

    from .sizes import Sizes

__all__ = ["descriptions", "half_poisoned", "poisoned"]

GARBAGE = (numpy.nan, numpy.inf, -numpy.inf)
HIDING = {"mask", "bias", "causal", "window", "q_lengths", "kv_lengths", "segments"}


def poisoned(
    sizes: Sizes, inputs: Mapping[str, Input], options: Mapping[str, Any], garbage: tuple[float, ...] = GARBAGE
) -> dict[str, Input]:
    """Poison unread data: keys and values that no row sees, queries and cotangents of empty rows."""
    visible = visible_pairs(sizes, inputs, options)
    grouped = visible.reshape(sizes.batch, sizes.kv_heads, -1, sizes.q_len, sizes.kv_len)
    unseen, blind = numpy.asarray(~grouped.any(axis=(2, 3))), numpy.asarray(~visible.any(axis=-1))
    unused = {"key": unseen, "value": unseen, "query": blind, "grad_output": blind}
    replaced = {
        name: _filled(inputs[name], where, garbage) for name, where in unused.items() if name in inputs and where.any()
    }
    return {**inputs, **replaced, **_poisoned_bias(inputs, visible, garbage[:2])}


def _filled(item: Input, where: numpy.ndarray, garbage: tuple[float, ...]) -> Input:
    values = item.values.copy()
    values[where] = numpy.resize(garbage, int(where.sum()))[:, None]
    return Input(values, item.dtype)


def _poisoned_bias(inputs: Mapping[str, Input], visible: numpy.ndarray, garbage: tuple[float, ...]) -> dict[str, Input]:
    """Fill each bias element with garbage whose pairs are all hidden by other constraints."""
    if "bias" not in inputs:
        return {}
    values = inputs["bias"].values.copy()
    axes = tuple(axis for axis in range(4) if values.shape[axis] == 1)
    where = ~visible.any(axis=axes, keepdims=True) & (values != -numpy.inf)
    values[where] = numpy.resize(garbage, int(where.sum()))
    return {"bias": Input(values, inputs["bias"].dtype)}


def half_poisoned(sizes: Sizes, inputs: Mapping[str, Input], options: Mapping[str, Any]) -> dict[str, Input] | None:
    """Poison a key and a value that some rows of the batch entry see and other rows, not empty, do not see."""
    visible = visible_pairs(sizes, inputs, options)
    grouped = visible.reshape(sizes.batch, sizes.kv_heads, -1, sizes.kv_len)
    rows_that_see = grouped.sum(axis=2)
    rows_that_matter = grouped.any(axis=3).sum(axis=2)[..., None]
    places = numpy.argwhere((rows_that_see > 0) & (rows_that_see < rows_that_matter))
    if not len(places):
        return None
    key, value = inputs["key"].values.copy(), inputs["value"].values.copy()
    first, last = tuple(places[0]), tuple(places[-1])
    value[(*first, slice(0, None, 2))] = numpy.nan
    value[(*first, 1)] = numpy.inf
    if last != first:
        key[last] = numpy.nan
    return {**inputs, "key": Input(key), "value": Input(value)}


def descriptions() -> Iterator[Description]:
    """Yield poison under every option that hides, then visible NaN and infinities."""
    for name, sizes, spec, variant in _questions():
        inputs, options = inputs_of(sizes, "random", spec, variant)
        if any(
            new is not inputs[key] and not numpy.array_equal(new.values, inputs[key].values)
            for key, new in poisoned(sizes, inputs, options).items()
        ):
            yield describe(
                f"poison/unused/{name}",
                "NaN and infinities in storage that no visible pair uses reach nothing.",
                sizes,
                poisoned(sizes, inputs, options),
                options,
                clauses=("MHA-POISON-1",),
                features=("poison",),
                tags=("structured", "poison"),
            )
        half = half_poisoned(sizes, inputs, options)
        if half is not None:
            yield describe(
                f"poison/seen-by-some/{name}",
                "A NaN key and value reach the rows that see them and no other.",
                sizes,
                half,
                options,
                clauses=("MHA-POISON-2", "MHA-NAN-1", "MHA-NAN-2"),
                features=("poison",),
                tags=("structured", "poison"),
                level="SHOULD",
            )
    yield from _nonfinite()


def _questions() -> Iterator[tuple[str, Sizes, Mapping[str, Any], int]]:
    for size, table in ((64, AT_64), (128, AT_128)):
        for name, spec, square, _ in table:
            if HIDING & spec.keys():
                yield f"{name}/size-{size}", head_size(size, square=square), spec, 2 if name != "bias" else 1
    for spec in TRIPLES:
        if HIDING & spec.keys():
            yield "+".join(spec), EQUAL, spec, 2
    for sizes, specs in ((SQUARE, SQUARES[:3] + SQUARES[7:11]), (PRIME, OFFSET_SPECS)):
        for spec in specs:
            yield "+".join(spec), sizes, spec, 2
    for variant in (4, 5):
        yield f"everything-{variant + 1}", ROOMY, EVERYTHING, variant


def _nonfinite() -> Iterator[Description]:
    for label, sizes in (("prime", PRIME), ("size-64", head_size(64)), ("size-128", head_size(128))):
        for name, title, where in _SPOTS:
            inputs, _ = inputs_of(sizes, "steep" if name == "value-infinities" else "generic", {}, 0)
            clauses = ("MHA-NAN-2",) if name.startswith("value") else ("MHA-NAN-1",)
            yield _spoilt(f"{name}/{label}", title, sizes, inputs, {}, where, clauses)
    for size, table in ((64, AT_64), (128, AT_128)):
        for option, spots in (("bias", _BIAS_SPOTS), ("dropout", _DROPPED_SPOTS), ("mask", _SPOTS[:3])):
            spec = next(spec for name, spec, _, _ in table if name == option)
            for name, title, where in spots:
                inputs, options = inputs_of(head_size(size), "generic", spec, 0)
                clauses = ("MHA-NAN-2",) if "value" in name else ("MHA-NAN-1",)
                yield _spoilt(f"{name}/{option}/size-{size}", title, head_size(size), inputs, options, where, clauses)


def _spoilt(
    name: str,
    title: str,
    sizes: Sizes,
    inputs: dict[str, Input],
    options: Mapping[str, Any],
    where: Mapping[str, Any],
    clauses: tuple[str, ...],
) -> Description:
    spoilt = {**inputs}
    for tensor, places in where.items():
        values = inputs[tensor].values.copy()
        for place, number in places:
            values[place] = number
        spoilt[tensor] = Input(values, inputs[tensor].dtype)
    return describe(f"nonfinite/{name}", title, sizes, spoilt, options, clauses=clauses, features=("nonfinite",))


_SPOTS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("query-nan", "One NaN in a query makes its row NaN and no other.", {"query": [((0, 1, 1, 2), numpy.nan)]}),
    ("key-nan", "One NaN in a key makes the rows NaN that see it.", {"key": [((1, 0, 2, 3), numpy.nan)]}),
    (
        "value-nan",
        "One NaN in a value makes its component NaN in the rows that see it.",
        {"value": [((0, 0, 3, 2), numpy.nan)]},
    ),
    (
        "value-infinities",
        "Infinities in values make their components non-finite, whatever the weight.",
        {"value": [((0, 0, 3, 2), numpy.inf), ((1, 0, 0, 1), -numpy.inf)]},
    ),
    ("query-infinity", "An infinity in a query spoils its own row alone.", {"query": [((0, 1, 0, 2), numpy.inf)]}),
)
_BIAS_SPOTS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("bias-nan", "A NaN in the bias of a visible pair makes its row NaN.", {"bias": [((0, 1, 1, 2), numpy.nan)]}),
    ("bias-infinity", "A bias of +inf spoils its own row alone.", {"bias": [((0, 1, 0, 3), numpy.inf)]}),
)
_DROPPED_SPOTS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    (
        "dropped-value-nan",
        "A NaN value makes its component NaN although its weight is dropped.",
        {"value": [((0, 0, 3, 2), numpy.nan)], "dropout_mask": [((0, slice(None), slice(None), 3), False)]},
    ),
)
