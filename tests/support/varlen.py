"""Packed and paged calls in which all sizes differ, and their results by separate calls of attention."""

from __future__ import annotations

from typing import Any

import numpy

from mha_spec import reference

from .numbers import numbers

__all__ = [
    "BLOCK_SIZE",
    "HEADS",
    "KV_HEADS",
    "QK_DIM",
    "Q_LENGTHS",
    "V_DIM",
    "cotangents",
    "packed",
    "paged",
    "separate",
]

HEADS, KV_HEADS, QK_DIM, V_DIM, BLOCK_SIZE = 6, 3, 7, 5, 4
Q_LENGTHS, KV_LENGTHS, USED = (3, 0, 5, 1, 2), (5, 4, 0, 11, 3), (5, 1, 0, 9, 2)
Q_TAIL, KV_TAIL = 4, 6
Q_TOKENS, KV_TOKENS, BLOCKS = sum(Q_LENGTHS) + Q_TAIL, sum(KV_LENGTHS) + KV_TAIL, 8
TABLE = [[6, 2, -1], [5, -1, 10**6], [-1, 99, 99], [6, 0, 0], [2, 10**6, -5]]
"""The blocks of each sequence: permuted, shared by two, repeated in a row; the other entries name no block."""

Call = dict[str, Any]


def cumulative(lengths: tuple[int, ...], dtype: str = "int32") -> numpy.ndarray:
    """Return the bounds of sequences of these lengths."""
    return numpy.cumsum([0, *lengths]).astype(dtype)


def packed(**changed: Any) -> Call:
    """Return a packed call; the tokens behind the last sequence hold NaN."""
    query, key, value = (
        numbers(Q_TOKENS, HEADS, QK_DIM),
        numbers(KV_TOKENS, KV_HEADS, QK_DIM),
        numbers(KV_TOKENS, KV_HEADS, V_DIM),
    )
    for array, tail in ((query, Q_TAIL), (key, KV_TAIL), (value, KV_TAIL)):
        array[-tail:] = numpy.nan
    bounds = {"cu_seqlens_q": cumulative(Q_LENGTHS), "cu_seqlens_kv": cumulative(KV_LENGTHS)}
    return {"query": query, "key": key, "value": value} | bounds | changed


def paged(lengths: tuple[int, ...] = USED, **changed: Any) -> Call:
    """Return a paged call; slots that no sequence uses hold NaN."""
    table = numpy.array(TABLE, "int32")
    used = numpy.zeros((BLOCKS, BLOCK_SIZE), bool)
    for row, length in zip(table, lengths, strict=True):
        for position in range(length):
            used[row[position // BLOCK_SIZE], position % BLOCK_SIZE] = True
    key, value = (
        numpy.where(used[..., None, None], numbers(BLOCKS, BLOCK_SIZE, KV_HEADS, size), numpy.nan)
        for size in (QK_DIM, V_DIM)
    )
    operands = {"query": packed()["query"], "key": key, "value": value, "cu_seqlens_q": cumulative(Q_LENGTHS)}
    return (
        operands | {"cu_seqlens_kv": None, "block_table": table, "seqused_kv": numpy.array(lengths, "int32")} | changed
    )


def cotangents(call: Call, *, lse: bool = True) -> Call:
    """Return cotangents of output and lse; those of tokens of no sequence are NaN."""
    tokens = len(call["query"])
    grad_output, grad_lse = numbers(tokens, HEADS, V_DIM, seed=5), numbers(HEADS, tokens, seed=6)
    grad_output[call["cu_seqlens_q"][-1] :], grad_lse[:, call["cu_seqlens_q"][-1] :] = numpy.nan, numpy.nan
    return {"grad_output": grad_output} | ({"grad_lse": grad_lse} if lse else {})


def separate(call: Call) -> tuple[Any, ...]:
    """Compute output, lse and, with cotangents, the gradients of query, key, value and sinks, sequence by sequence."""
    query, key, value, sinks = (call.get(name) for name in ("query", "key", "value", "sinks"))
    output, lse = numpy.zeros((*query.shape[:2], V_DIM)), numpy.full((HEADS, len(query)), -numpy.inf)
    gradients = [numpy.zeros_like(operand) for operand in (query, key, value)]
    of_sinks = None if sinks is None else numpy.zeros_like(sinks)
    for b, rows in enumerate(map(slice, call["cu_seqlens_q"], call["cu_seqlens_q"][1:])):
        places = _keys(call, b)
        operands = [dense(query[rows]), dense(key[places]), dense(value[places])]
        options = _options(call, b, operands)
        output[rows], lse[:, rows] = (
            packed_again(x) if x.ndim == 4 else x[0] for x in reference.attention(*operands, return_lse=True, **options)
        )
        if "grad_output" not in call:
            continue
        cotangent = None if call.get("grad_lse") is None else call["grad_lse"][None, :, rows]
        parts = reference.attention_vjp(dense(call["grad_output"][rows]), *operands, grad_lse=cotangent, **options)
        gradients[0][rows] = packed_again(parts[0])
        for whole, part in zip(gradients[1:], parts[1:3], strict=True):
            numpy.add.at(whole, places, packed_again(part))
        of_sinks = None if of_sinks is None else of_sinks + parts[4]
    return (output, lse) if "grad_output" not in call else (output, lse, *gradients, of_sinks)


def dense(x: numpy.ndarray) -> numpy.ndarray:
    """Give packed tokens the axes of a batch with a single entry."""
    return x.swapaxes(0, 1)[None]


def packed_again(x: numpy.ndarray) -> numpy.ndarray:
    """Undo `dense`."""
    return x[0].swapaxes(0, 1)


def _keys(call: Call, b: int) -> Any:
    """Return the index of the keys in use of a sequence."""
    used = None if call.get("seqused_kv") is None else int(call["seqused_kv"][b])
    bounds = call["cu_seqlens_kv"]
    if call.get("block_table") is None:
        return slice(bounds[b], bounds[b + 1] if used is None else bounds[b] + used)
    positions = numpy.arange(bounds[b + 1] - bounds[b] if used is None else used)
    return call["block_table"][b][positions // BLOCK_SIZE], positions % BLOCK_SIZE


def _options(call: Call, b: int, operands: list[numpy.ndarray]) -> dict[str, Any]:
    names = ("causal", "window", "scale", "softcap", "sinks")
    options = {name: call[name] for name in names if name in call}
    offset, lengths = call.get("q_offset"), [operand.shape[2] for operand in operands[:2]]
    if isinstance(offset, str):
        offset = lengths[1] - lengths[0] if offset == "lower_right" else 0
    elif offset is not None and numpy.ndim(offset):
        offset = int(offset[b])
    if call.get("alibi_slopes") is not None:
        options["bias"] = reference.alibi_bias(call["alibi_slopes"], *lengths, q_offset=0 if offset is None else offset)
    return options | {"q_offset": 0 if offset is None else offset}
