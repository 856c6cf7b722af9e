"""Compute the kinds of the results of a packed or paged call: those of attention on each sequence, put in place."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.varlen_reference import VarlenSteps
from mha_spec_conformance.judging.bounds.evaluation import in_float64
from mha_spec_conformance.judging.bounds.varlen import dense_calls
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.arrays import Array
    from mha_spec.varlen_reference import Call as PackedCall

    from .call import Call

    Kinds = Mapping[str, Array]
    Of = Callable[[dict[str, Array], dict[str, Any]], Kinds]

__all__ = ["packed_kinds"]


def packed_kinds(call: Call, of_sequence: Of) -> dict[str, Array]:
    """Return the kinds of every output; `of_sequence` returns those of a dense call on its arrays and options."""
    calls = dense_calls(call.function, in_float64(call.arrays), call.options, VarlenSteps())
    parts = [(packed, of_sequence(arrays, packed.options)) for packed, arrays in calls]
    return _of_results(call, parts) if call.function == "varlen_attention" else _of_gradients(call, parts)


def _of_results(call: Call, parts: list[tuple[PackedCall, Kinds]]) -> dict[str, Array]:
    tokens, heads, _ = call.arrays["query"].shape
    output = numpy.full((tokens, heads, call.arrays["value"].shape[-1]), EXACT)
    lse = numpy.full((heads, tokens), EXACT)
    for packed, kinds in parts:
        place = packed.sequence.queries
        output[place.start : place.stop] = kinds["output"][0].swapaxes(0, 1)
        lse[:, place.start : place.stop] = kinds["lse"][0]
    return {"output": output, "lse": lse}


def _of_gradients(call: Call, parts: list[tuple[PackedCall, Kinds]]) -> dict[str, Array]:
    """Put the kinds at the tokens, slots and sinks; a sum is as unspecified as the worst of its terms."""
    names = ("query", "key", "value", *(["sinks"] if "sinks" in call.arrays else []))
    results = {f"grad_{name}": numpy.full(call.arrays[name].shape, EXACT) for name in names}
    put = {name: partial(_add, results[name]) for name in results}
    for packed, kinds in parts:
        queries, keys = packed.sequence.queries, packed.sequence.keys
        put["grad_query"](slice(queries.start, queries.stop), kinds["grad_query"][0].swapaxes(0, 1))
        for name in ("grad_key", "grad_value"):
            rows = kinds[name][0].swapaxes(0, 1)
            blocks = packed.sequence.blocks
            if blocks is None:
                put[name](slice(keys.start, keys.stop), rows)
            else:
                size = call.arrays["key"].shape[1]
                for key, row in enumerate(rows):
                    put[name]((blocks[key // size], key % size), row)
        if "grad_sinks" in results:
            put["grad_sinks"](slice(None), kinds["grad_sinks"])
    return results


def _add(whole: Array, place: Any, part: Array) -> None:
    """Combine kinds with those at a place."""
    present = whole[place]
    anything = (present == ANY) | (part == ANY)
    whole[place] = numpy.where(anything, ANY, numpy.where(part == FINITE, FINITE, present))
