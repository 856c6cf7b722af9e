"""Reduce a call that a target answers wrongly: fewer options, batch entries, heads, rows, keys and components."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.varlen_arguments import VARLEN_FUNCTIONS

from .call import Call, Recipe
from .reduction_packed import fewer, smaller_packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["call_of", "reduced"]

AXES = {
    "query": ("batch", "heads", "q_len", "qk_dim"),
    "key": ("batch", "kv_heads", "kv_len", "qk_dim"),
    "value": ("batch", "kv_heads", "kv_len", "v_dim"),
    "grad_output": ("batch", "heads", "q_len", "v_dim"),
    "grad_lse": ("batch", "heads", "q_len"),
    **dict.fromkeys(("mask", "bias", "dropout_mask"), ("batch", "heads", "q_len", "kv_len")),
    **dict.fromkeys(("q_lengths", "kv_lengths", "kv_starts", "prefix_lengths", "q_offset"), ("batch",)),
    "q_segment_ids": ("batch", "q_len"),
    "kv_segment_ids": ("batch", "kv_len"),
    "sinks": ("heads",),
}
"""The axes of each argument of attention; arrays of pairs broadcast."""

LENGTHS = {"q_lengths": "q_len", **dict.fromkeys(("kv_lengths", "kv_starts", "prefix_lengths"), "kv_len")}

TENSORS = ("query", "key", "value", "grad_output")

ORDER = ("batch", "kv_heads", "group", "q_len", "kv_len", "v_dim", "qk_dim")

PAIRED = (("q_segment_ids", "kv_segment_ids"), ("dropout_mask", "dropout_rate"))
"""Options that a call has together or not at all."""


def call_of(
    function: str, dtype: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], *, lse: bool
) -> Call:
    """Return a call whose arrays are written as numbers."""
    recipes = {name: _recipe(array) for name, array in arrays.items()}
    plain = {name: value for name, value in options.items() if name != "return_lse"}
    return Call(function, dtype, recipes, plain, lse=lse)


def _recipe(array: numpy.ndarray) -> Recipe:
    wide = array if array.dtype.kind in "biu" else array.astype(numpy.float64)
    text = repr(wide.tolist()).replace("nan", "numpy.nan").replace("inf", "numpy.inf")
    return Recipe(text if array.size else f"numpy.zeros({array.shape})", array.dtype.name)


def reduced(call: Call, fails: Callable[[Call], bool], seconds: float) -> Call:
    """Return the smallest failing call that the search reaches in the time."""
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(call):
            if time.monotonic() > end:
                return call
            if fails(candidate):
                call, smaller = candidate, True
                break
    return call


def _candidates(call: Call) -> Iterator[Call]:
    """Return smaller calls: without an option, then with a part of an axis, then with rounder numbers."""
    yield from _without_options(call)
    if {"query", "key"} <= call.recipes.keys() and all(call.arrays[n].ndim == 4 for n in ("query", "key")):
        for axis in ORDER:
            yield from _with_less(call, axis)
        yield from _with_less_of_both_lengths(call)
    if call.function in VARLEN_FUNCTIONS:
        for arrays in smaller_packed(call.arrays):
            yield call_of(call.function, call.dtype, arrays, call.options, lse=call.lse)
    for digits in (0, 1, 2):
        rounded = {name: _rounded(array, digits) for name, array in call.arrays.items()}
        if any(not numpy.array_equal(rounded[name], array, equal_nan=True) for name, array in _numbers(call).items()):
            yield call_of(call.function, call.dtype, rounded, call.options, lse=call.lse)


def _numbers(call: Call) -> dict[str, numpy.ndarray]:
    return {name: array for name, array in call.arrays.items() if array.dtype.kind not in "biu"}


def _rounded(array: numpy.ndarray, digits: int) -> numpy.ndarray:
    if array.dtype.kind in "biu":
        return array
    return numpy.round(array.astype(numpy.float64), digits).astype(array.dtype)


def _without_options(call: Call) -> Iterator[Call]:
    names = [name for name in (*call.recipes, *call.options) if name not in TENSORS]
    groups = [pair for pair in PAIRED if names and set(pair) & set(names)]
    groups += [(name,) for name in names if not any(name in pair for pair in groups)]
    for group in groups:
        recipes = {name: recipe for name, recipe in call.recipes.items() if name not in group}
        options = {name: value for name, value in call.options.items() if name not in group}
        beyond = {name: recipe for name, recipe in call.beyond.items() if name not in group}
        yield replace(call, recipes=recipes, options=options, beyond=beyond)
    if call.lse:
        yield replace(call, lse=False)


def _with_less(call: Call, axis: str) -> Iterator[Call]:
    """Return calls with a half of an axis, or without an element of it."""
    sizes = _sizes(call)
    for indices in fewer(sizes.get(axis, 0)):
        yield _taking(call, axis, indices, sizes)


def _with_less_of_both_lengths(call: Call) -> Iterator[Call]:
    """Return calls with fewer rows and as many keys, because some targets take causal only for equal lengths."""
    sizes = _sizes(call)
    if sizes["q_len"] == sizes["kv_len"]:
        for indices in fewer(sizes["q_len"]):
            shorter = _taking(call, "q_len", indices, sizes)
            yield _taking(shorter, "kv_len", indices, _sizes(shorter))


def _sizes(call: Call) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name in TENSORS:
        if name in call.arrays and name in AXES:
            sizes |= dict(zip(AXES[name], call.arrays[name].shape, strict=True))
    sizes["group"] = sizes["heads"] // sizes["kv_heads"]
    return sizes


def _taking(call: Call, axis: str, indices: list[int], sizes: Mapping[str, int]) -> Call:
    """Return the call with these indices of an axis alone; lengths are shortened to the new size."""
    taken = {axis: indices}
    if axis in ("kv_heads", "group"):
        heads = numpy.arange(sizes["heads"]).reshape(sizes["kv_heads"], sizes["group"])
        taken["heads"] = numpy.take(heads, indices, 0 if axis == "kv_heads" else 1).ravel().tolist()
    arrays = {name: _part(name, array, taken, sizes) for name, array in call.arrays.items()}
    for name, limited in LENGTHS.items():
        if limited == axis and name in arrays:
            arrays[name] = numpy.minimum(arrays[name], len(indices))
    return call_of(call.function, call.dtype, arrays, call.options, lse=call.lse)


def _part(name: str, array: numpy.ndarray, taken: Mapping[str, list[int]], sizes: Mapping[str, int]) -> numpy.ndarray:
    """Return the indices of an array that are taken along each of its axes that is not broadcast."""
    part = array
    for position, label in enumerate(AXES.get(name, ())):
        if label in taken and position < array.ndim and array.shape[position] == sizes[label]:
            part = numpy.take(part, taken[label], position)
    return part
