"""Compute the kinds of the results of a packed or paged call: those of attention on each sequence, put in place."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.varlen_reference import Varlen, VarlenSteps
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.arrays import Array
    from mha_spec.varlen_reference import Call as PackedCall

    from .call import Call

    Kinds = Mapping[str, Array]
    Of = Callable[[dict[str, Array], dict[str, Any]], Kinds]

__all__ = ["packed_kinds"]

OPERANDS = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")


def packed_kinds(call: Call, of_sequence: Of) -> dict[str, Array]:
    """Return the kinds of every output; `of_sequence` returns those of a dense call on its arrays and options."""
    parts: list[tuple[PackedCall, Kinds]] = []
    arguments: dict[str, Any] = {
        name: x if x.dtype.kind in "biu" else x.astype("float64") for name, x in call.arrays.items()
    }
    arguments |= call.options
    operands = [arguments.pop(name, None) for name in OPERANDS]

    def keep(packed: PackedCall, steps: VarlenSteps, **cotangents: Array) -> None:
        arrays = {"query": packed.query, "key": packed.key, "value": packed.value, **cotangents}
        more = {"bias": steps.linear_bias(packed), "sinks": packed.sinks}
        arrays |= {name: array for name, array in more.items() if array is not None}
        parts.append((packed, of_sequence(arrays, packed.options)))

    def attend(packed: PackedCall, steps: VarlenSteps, *, return_lse: bool) -> tuple[Array, Array]:
        keep(packed, steps)
        rows = packed.query.shape[:3]
        return numpy.zeros((*rows, packed.value.shape[3])), numpy.zeros(rows)

    def differentiate(packed: PackedCall, grad_output: Array, grad_lse: Array | None, steps: VarlenSteps) -> Any:
        keep(packed, steps, grad_output=grad_output, **({} if grad_lse is None else {"grad_lse": grad_lse}))
        return *map(numpy.zeros_like, packed[:3]), None if packed.sinks is None else numpy.zeros_like(packed.sinks)

    function = getattr(Varlen(replace(VarlenSteps(), attend=attend, differentiate=differentiate)), call.function)
    if call.function == "varlen_attention":
        function(*operands, return_lse=True, **arguments)
        return _of_results(call, parts)
    function(arguments.pop("grad_output"), *operands, **arguments)
    return _of_gradients(call, parts)


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
