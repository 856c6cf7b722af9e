"""Expected results of packed and paged attention: a call of one batch entry, in which a row sees its sequence alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
from description import Input
from flint import arb
from oracle_backward import Gradients, kinds_of
from oracle_balls import rounded
from oracle_forward import attention
from oracle_kinds import ANY, EXACT, FINITE_VALUE, Marked
from oracle_visibility import AttentionCall, offsets_of_reading

if TYPE_CHECKING:
    from description import Description

__all__ = ["varlen_attention", "varlen_attention_vjp"]


class PackedCall(AttentionCall):
    """A packed or paged call: queries and keys of all sequences, one after the other.

    Keys in blocks are listed sequence by sequence, so that a shared slot is listed repeatedly; `slots` holds the index
    of each key in the array of the call, whose first axes are flattened.
    """

    def __init__(self, description: Description) -> None:
        arrays = {name: numpy.asarray(item.values) for name, item in description.inputs.items()}
        options = description.options
        self._read_sequences(arrays, options)
        dense: dict[str, Any] = {name: arrays[name] for name in ("sinks",) if name in arrays}
        dense |= {name: _dense(arrays[name]) for name in ("query", "grad_output") if name in arrays}
        for name in ("key", "value"):
            array = arrays[name]
            tokens = array.reshape(-1, *array.shape[-2:])
            dense[name] = _dense(tokens[numpy.array(self.slots, dtype=int)])
        if "grad_lse" in arrays:
            dense["grad_lse"] = arrays["grad_lse"][None]
        if "alibi_slopes" in arrays:
            dense["bias"] = self._linear_bias(arrays["alibi_slopes"], len(arrays["query"]))
        super().__init__(_described(description, dense))

    def _read_sequences(self, arrays: dict[str, numpy.ndarray], options: Any) -> None:
        def listed(name: str) -> list[int] | None:
            value = arrays.get(name, options.get(name))
            return None if value is None else numpy.asarray(value).tolist()

        q_bounds, kv_bounds, used = listed("cu_seqlens_q"), listed("cu_seqlens_kv"), listed("seqused_kv")
        assert q_bounds is not None
        self.sequences = len(q_bounds) - 1
        lengths = used
        if lengths is None:
            assert kv_bounds is not None
            lengths = [kv_bounds[b + 1] - kv_bounds[b] for b in range(self.sequences)]
        table, self.slots, self.keys_of = arrays.get("block_table"), [], []
        for b in range(self.sequences):
            self.keys_of.append(range(len(self.slots), len(self.slots) + lengths[b]))
            if table is None:
                assert kv_bounds is not None
                self.slots += range(kv_bounds[b], kv_bounds[b] + lengths[b])
            else:
                size = arrays["key"].shape[1]
                self.slots += [int(table[b, j // size]) * size + j % size for j in range(lengths[b])]
        self.queries_of = [range(q_bounds[b], q_bounds[b + 1]) for b in range(self.sequences)]
        self.offsets = self._offsets(listed, options, lengths)
        self.sequence_of = {i: b for b, queries in enumerate(self.queries_of) for i in queries}

    def _offsets(self, listed: Any, options: Any, lengths: list[int]) -> list[int]:
        offset = options.get("q_offset")
        if isinstance(offset, str):
            return offsets_of_reading(offset, [len(queries) for queries in self.queries_of], lengths)
        offset = listed("q_offset")
        return numpy.broadcast_to(0 if offset is None else offset, (self.sequences,)).tolist()

    def place(self, i: int, j: int) -> tuple[int, int] | None:
        """Return the position of query i and that of key j, if they are of the same sequence."""
        b = self.sequence_of.get(i)
        if b is None or j not in self.keys_of[b]:
            return None
        return self.offsets[b] + i - self.queries_of[b].start, j - self.keys_of[b].start

    def _linear_bias(self, slopes: numpy.ndarray, tokens: int) -> numpy.ndarray:
        """Return -slope[h] |p - j|, exactly in float64 for the slopes of the cases."""
        bias = numpy.zeros((1, len(slopes), tokens, len(self.slots)))
        for i in range(tokens):
            for j in range(len(self.slots)):
                place = self.place(i, j)
                if place is not None:
                    bias[0, :, i, j] = -slopes * abs(place[0] - place[1])
        return bias

    def sees(self, b: int, h: int, i: int, j: int) -> bool:
        """Return True if query i may attend to key j."""
        place = self.place(i, j)
        if place is None:
            return False
        position, key = place
        if self.causal and key > position:
            return False
        if self.left is not None and key < position - self.left:
            return False
        return self.right is None or key <= position + self.right

    @property
    def outside(self) -> numpy.ndarray:
        """True for a query that no sequence has."""
        return numpy.array([i not in self.sequence_of for i in range(self.q_len)], dtype=bool)


def _dense(tokens: numpy.ndarray) -> numpy.ndarray:
    return tokens.swapaxes(0, 1)[None]


def _described(description: Description, dense: dict[str, numpy.ndarray]) -> Description:
    inputs = {name: Input(array) for name, array in dense.items()}
    kept = ("scale", "softcap", "causal", "window")
    options = {name: description.options[name] for name in kept if name in description.options}
    return replace(description, inputs=inputs, options=options)


def varlen_attention(description: Description) -> dict[str, Marked]:
    """Compute output (q_tokens, heads, v_dim) and lse (heads, q_tokens)."""
    call = PackedCall(description)
    rows = [call.row(0, h, i) for h in range(call.heads) for i in range(call.q_len)]
    answers = attention(call, rows)
    lead = (call.heads, call.q_len)
    output, lse = (
        Marked(x.values.reshape(*lead, *x.values.shape[1:]), x.kinds.reshape(*lead, *x.kinds.shape[1:]))
        for x in (answers["output"], answers["lse"])
    )
    lse.values[:, call.outside], lse.kinds[:, call.outside] = -math.inf, EXACT
    output = Marked(output.values.swapaxes(0, 1).copy(), output.kinds.swapaxes(0, 1).copy())
    return {"output": output} | ({"lse": lse} if description.lse else {})


def varlen_attention_vjp(description: Description) -> dict[str, Marked]:
    """Compute the gradients of query, key, value and sinks, each in the shape of its operand."""
    call = PackedCall(description)
    inside = [i for i in range(call.q_len) if i in call.sequence_of]
    rows = [call.row(0, h, i) for h in range(call.heads) for i in inside]
    kinds = {name: kind for name, kind in kinds_of(call, rows).items() if name != "grad_bias"}
    wanted = {name: numpy.ones(kind.shape, dtype=bool) for name, kind in kinds_of(call, rows).items()}
    gradients = Gradients(call, rows, wanted)
    shapes = {f"grad_{name}": description.inputs[name].values.shape for name in ("query", "key", "value")}
    of_operands = {name: _kinds_in_place(call, name, kind, shapes) for name, kind in kinds.items()}

    def evaluate() -> dict[str, numpy.ndarray]:
        totals = gradients.evaluate()
        return {name: _in_place(call, name, totals[name], shapes) for name in kinds}

    finite = {name: kind == FINITE_VALUE for name, kind in of_operands.items()}
    values = rounded(call.name, evaluate, finite)
    return {name: Marked.fill(values[name], of_operands[name], 0.0) for name in kinds}


def _in_place(call: PackedCall, name: str, total: numpy.ndarray, shapes: Any) -> numpy.ndarray:
    """Move a gradient of the dense call to its operand; those of a slot add."""
    if name == "grad_sinks":
        return total
    rows = total[0].swapaxes(0, 1)
    if name == "grad_query":
        return rows
    shape = shapes[name]
    whole = numpy.full((math.prod(shape[:-2]), *shape[-2:]), arb(0), dtype=object)
    for slot, row in zip(call.slots, rows, strict=True):
        whole[slot] = whole[slot] + row
    return whole.reshape(shape)


def _kinds_in_place(call: PackedCall, name: str, kind: numpy.ndarray, shapes: Any) -> numpy.ndarray:
    if name == "grad_sinks":
        return kind
    rows = kind[0].swapaxes(0, 1)
    if name == "grad_query":
        return rows.copy()
    shape = shapes[name]
    whole = numpy.full((math.prod(shape[:-2]), *shape[-2:]), EXACT, dtype=numpy.uint8)
    for slot, row in zip(call.slots, rows, strict=True):
        either = (whole[slot] == ANY) | (row == ANY)
        whole[slot] = numpy.where(either, ANY, numpy.where(row == FINITE_VALUE, FINITE_VALUE, whole[slot]))
    return whole.reshape(shape)
