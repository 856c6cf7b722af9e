"""Convert a question to the layout of a target, and the outputs of its answer back (MHA-LAYOUT-1 to -5)."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec_conformance.suite.functions import FUNCTIONS, OF_ATTENTION, STACKED, with_stacked
from mha_spec_conformance.targets.layouts import PACKED, TAIL, Dense, Pages, Tokens

from .question import Answer, Further

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec_conformance.targets.claims import Claims
    from mha_spec_conformance.targets.layouts import Storage

    from .question import Question

    Arrays = Mapping[str, numpy.ndarray]

__all__ = ["Conversion", "clipped", "has_layout"]

QUERY_SIDE = ("query", "output", "lse", "output_a", "lse_a", "output_b", "lse_b")
KEY_SIDE = ("key", "value")
"""The arrays of each side; a gradient has the side of its operand."""

WITH_HEADS = (*OF_ATTENTION, "merge_attention", "merge_attention_vjp")
"""The functions whose arrays have axes of heads and tokens; a layout does not concern the others."""

HEADS_OF_PARAMS = {"w_k": 1, "w_v": 1, "b_k": 0, "b_v": 0}
"""The parameters of the layer that have an axis of key and value heads, with that axis."""

BYTES_OF_ELEMENT = 2**8
"""The bytes that an element of an output may take in the answer: 16 in each of eleven calls, and more."""


class _WrongShape(Exception):
    """An output does not have its shape in the layout."""


def has_layout(claims: Claims, function: str) -> bool:
    """Tell whether the target takes the arrays of a function otherwise than the specification has them."""
    if claims.layout == "bhsd" and claims.groups and claims.stacked is None:
        return False
    return not claims.groups if FUNCTIONS[function].of_layer else function in WITH_HEADS


def clipped(lengths: Any, batch: int, most: int) -> tuple[int, ...]:
    """Return the length of each batch entry, within the buffer (MHA-LEN-3); without lengths, all are full."""
    values = numpy.full(batch, most) if lengths is None else numpy.asarray(lengths).astype(numpy.int64)
    return tuple(int(length) for length in numpy.clip(values, 0, most))


class Conversion:
    """A question as the specification has it, `plain`, and in the layout of a target, `question`."""

    def __init__(self, plain: Question, claims: Claims) -> None:
        """Convert a question to which the layout has no obstacle."""
        self.plain = self.question = plain
        self.claims = claims
        if not has_layout(claims, plain.function):
            return
        if FUNCTIONS[plain.function].of_layer:
            self.question = replace(plain, arrays=_with_repeated_params(plain.arrays))
            return
        self._arrays, self._options = dict(plain.arrays), dict(plain.options)
        self._parts: tuple[str, ...] = STACKED.get(claims.stacked or "", ()) if plain.function in OF_ATTENTION else ()
        self._repeat_heads()
        self._dense_shapes = self._shapes_of_outputs()
        self._choose_storages()
        if plain.function in OF_ATTENTION and claims.layout in PACKED:
            self._pass_lengths()
        stored = self._stack({name: self._stored(name, array) for name, array in self._arrays.items()})
        elements = sum(math.prod(self._stored_shape(name)) for name in self._dense_shapes)
        self.question = replace(
            plain,
            arrays=stored,
            options=self._options,
            outputs=with_stacked(plain.outputs, str(claims.stacked)) if self._parts else plain.outputs,
            host={name: form for name, form in plain.host.items() if name in stored},
            placed=self._placed(stored),
            sampled={},
            most_bytes=plain.most_bytes + BYTES_OF_ELEMENT * elements,
        )

    def _repeat_heads(self) -> None:
        """Repeat keys and values for a target without groups."""
        if self.claims.groups or "key" not in self._arrays:
            return
        group = self._arrays["query"].shape[1] // self._arrays["key"].shape[1]
        for name in KEY_SIDE:
            if name in self._arrays:
                self._arrays[name] = numpy.repeat(self._arrays[name], group, axis=1)

    def _shapes_of_outputs(self) -> dict[str, tuple[int, ...]]:
        """Return the dense shape of each output that has axes of heads and tokens."""
        shapes = {name: array.shape for name, array in self._arrays.items()}
        if "value" in shapes:
            shapes["output"] = (*shapes["query"][:3], shapes["value"][3])
            shapes["lse"] = shapes["query"][:3]
        elif "output_a" in shapes:
            shapes["output"], shapes["lse"] = shapes["output_a"], shapes["lse_a"]
        return {name: shapes[_operand(name)] for name in self.plain.outputs if self._side(name)}

    @staticmethod
    def _side(name: str) -> tuple[str, ...]:
        """Return the side of an array or output; it is empty for arrays without an axis of tokens."""
        return next((side for side in (QUERY_SIDE, KEY_SIDE) if _operand(name) in side), ())

    def _choose_storages(self) -> None:
        """Choose how the arrays of each side are stored."""
        claims, arrays = self.claims, self._arrays
        batch, _, q_len, *_ = arrays["query" if "query" in arrays else "output_a"].shape
        kv_len = arrays["key"].shape[2] if "key" in arrays else 0
        with_lengths = not {"q_lengths", "kv_lengths"}.isdisjoint(arrays)
        self._empty_at = 1 if with_lengths and batch and claims.packs_queries else None
        self._q_lengths = clipped(arrays.get("q_lengths"), batch, q_len)
        self._kv_lengths = clipped(arrays.get("kv_lengths"), batch, kv_len)
        dense = Dense(claims.layout != "bhsd")
        tail = TAIL if with_lengths else 0
        self._queries: Storage = dense
        if claims.packs_queries:
            self._queries = Tokens(self._q_lengths, tail, self._empty_at)
        self._keys: Storage = dense
        if claims.layout == "thd":
            self._keys = Tokens(self._kv_lengths, tail, self._empty_at)
        elif claims.layout == "paged":
            shared = () if "grad_key" in self.plain.outputs else tuple(arrays[n] for n in KEY_SIDE if n in arrays)
            seed = zlib.crc32(self.plain.id.encode())
            self._keys = Pages(self._kv_lengths, claims.block_size, seed, shared, self._empty_at)

    def _pass_lengths(self) -> None:
        """Pass the lengths of the sequences, and the position of the first query where it would be ambiguous."""
        words = self.claims.keywords[self.plain.function]
        self._pass_offset(words)
        batch = len(self._q_lengths)
        if isinstance(self._queries, Tokens):
            self._arrays.pop("q_lengths", None)
            self._pass_bounds("q", self._queries, words)
        self._arrays.pop("kv_lengths", None)
        if isinstance(self._keys, Pages):
            self._arrays["block_table"] = self._keys.table
            self._arrays["kv_lengths"] = self._with_empty(numpy.asarray(self._kv_lengths, numpy.int32).reshape(batch))
        if isinstance(self._keys, Tokens) or "cu_seqlens_kv" in words:
            self._pass_bounds("kv", Tokens(self._kv_lengths, empty_at=self._empty_at), words)
        elif "max_seqlen_kv" in words:
            self._options["max_seqlen_kv"] = max(self._kv_lengths, default=0)

    def _pass_bounds(self, side: str, tokens: Tokens, words: tuple[str, ...]) -> None:
        self._arrays[f"cu_seqlens_{side}"] = tokens.bounds
        if f"max_seqlen_{side}" in words:
            self._options[f"max_seqlen_{side}"] = max(tokens.lengths, default=0)

    def _pass_offset(self, words: tuple[str, ...]) -> None:
        """Pass q_offset; its default is 0, which sequences of unequal lengths need (MHA-LAYOUT-2)."""
        offset = self._arrays.get("q_offset", self._options.get("q_offset"))
        positional = any(self._options.get(name) for name in ("causal", "window", "chunk"))
        if offset is None and positional and "q_offset" in words and self._q_lengths != self._kv_lengths:
            self._options["q_offset"] = 0
        if isinstance(offset, numpy.ndarray) and offset.ndim == 1:
            self._arrays["q_offset"] = self._with_empty(offset)

    def _with_empty(self, of_entries: numpy.ndarray) -> numpy.ndarray:
        """Insert the entry of the sequence without tokens."""
        return of_entries if self._empty_at is None else numpy.insert(of_entries, self._empty_at, 0)

    def _storage(self, name: str) -> Storage | None:
        side = self._side(name)
        return self._queries if side is QUERY_SIDE else self._keys if side is KEY_SIDE else None

    def _stored(self, name: str, array: numpy.ndarray) -> numpy.ndarray:
        storage = self._storage(name)
        return array if storage is None else self._ordered(name, storage.store(array))

    def _ordered(self, name: str, stored: numpy.ndarray) -> numpy.ndarray:
        """Exchange heads and tokens of an lse if the target has its heads first; the same exchange undoes it."""
        axis = self._queries.heads_axis
        if not _is_lse(name) or self.claims.layout == "bhsd" or self.claims.lse_layout != "heads_first":
            return stored
        return numpy.ascontiguousarray(stored.swapaxes(axis - 1, axis))

    def _stack(self, stored: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
        """Replace the operands that the target takes as a single array, along a new axis before that of the heads."""
        if not self._parts:
            return stored
        axis = self._axis_of_parts()
        together = numpy.stack([stored.pop(part) for part in self._parts], axis=axis)
        return {str(self.claims.stacked): together, **stored}

    def _axis_of_parts(self) -> int:
        return (self._keys if self.claims.stacked == "kv" else self._queries).heads_axis

    def _placed(self, stored: Arrays) -> dict[str, str]:
        """Return the memory layout of each array; an array that the plain question lacks has that of its first."""
        placed = self.plain.placed
        return {name: placed.get(name, next(iter(placed.values()))) for name in stored} if placed else {}

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an output in the layout."""
        storage = self._storage(name)
        assert storage is not None
        return self._ordered(name, numpy.broadcast_to(0, storage.shape(self._dense_shapes[name]))).shape

    def restored(self, answer: Answer) -> Answer:
        """Convert the outputs of an answer, and of its further calls, to those of the plain question."""
        if self.question is self.plain or FUNCTIONS[self.plain.function].of_layer or answer.kind != "returned":
            return answer
        try:
            outputs = self._restored(answer.outputs)
        except _WrongShape as error:
            return Answer("malformed", reason=str(error), seconds=answer.seconds)
        further = {name: self._restored_further(call) for name, call in answer.further.items()}
        return replace(answer, outputs=outputs, further=further)

    def _restored_further(self, call: Further) -> Further:
        if call.kind != "returned":
            return call
        try:
            return replace(call, outputs=self._restored(call.outputs))
        except _WrongShape as error:
            return Further("malformed", reason=str(error))

    def _restored(self, outputs: Arrays) -> dict[str, numpy.ndarray]:
        outputs = self._unstacked(outputs)
        return {name: self._dense(name, array) if self._side(name) else array for name, array in outputs.items()}

    def _unstacked(self, outputs: Arrays) -> dict[str, numpy.ndarray]:
        outputs, name = dict(outputs), f"grad_{self.claims.stacked}"
        if name not in outputs:
            return outputs
        together, axis = outputs.pop(name), self._axis_of_parts()
        shape = list(self._stored_shape(f"grad_{self._parts[0]}"))
        self._check(name, together, (*shape[:axis], len(self._parts), *shape[axis:]))
        return outputs | {f"grad_{part}": together.take(index, axis=axis) for index, part in enumerate(self._parts)}

    def _dense(self, name: str, stored: numpy.ndarray) -> numpy.ndarray:
        """Return an output as the specification has it; rows that are not packed have the results of empty rows."""
        storage = self._storage(name)
        assert storage is not None
        self._check(name, stored, self._stored_shape(name))
        dense = numpy.zeros(self._dense_shapes[name], stored.dtype)
        if name == "lse" and stored.dtype.kind not in "biu":
            sinks = self._arrays.get("sinks")
            dense[...] = -numpy.inf if sinks is None else sinks.astype(stored.dtype)[:, None]
        storage.read(self._ordered(name, stored), dense)
        return self._summed_over_groups(name, dense)

    def _summed_over_groups(self, name: str, dense: numpy.ndarray) -> numpy.ndarray:
        """Sum the gradients of the heads that were repeated."""
        operand = self.plain.arrays.get(_operand(name))
        if operand is None or self._side(name) is not KEY_SIDE or operand.shape[1] == dense.shape[1]:
            return dense
        batch, kv_heads, *rest = operand.shape
        group = dense.shape[1] // kv_heads
        with numpy.errstate(all="ignore"):
            return dense.reshape(batch, kv_heads, group, *rest).astype(numpy.float64).sum(axis=2).astype(dense.dtype)

    def _check(self, name: str, stored: numpy.ndarray, shape: tuple[int, ...]) -> None:
        if tuple(stored.shape) != shape:
            layout = self.claims.layout + (f", stacked {self.claims.stacked}" if self._parts else "")
            raise _WrongShape(
                f"`{name}` must have shape={shape} in the layout {layout}, received shape={tuple(stored.shape)}"
            )


def _with_repeated_params(arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Repeat the parameters of key and value heads for a layer without groups."""
    group = arrays["w_q"].shape[1] // arrays["w_k"].shape[1]
    repeated = {n: numpy.repeat(arrays[n], group, axis) for n, axis in HEADS_OF_PARAMS.items() if n in arrays}
    return {**arrays, **repeated}


def _operand(name: str) -> str:
    """Return the operand whose gradient an array is, or the name itself."""
    return name.removeprefix("grad_")


def _is_lse(name: str) -> bool:
    return _operand(name).startswith("lse")
