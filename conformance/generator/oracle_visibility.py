"""Visibility, decided per pair in plain integers, and the state of each row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
from oracle_balls import InadmissibleError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from description import Description

__all__ = ["EMPTY", "FINITE", "NAN", "UNSPECIFIED", "AttentionCall", "Pairwise", "Row", "offsets_of_reading"]

EMPTY, FINITE, NAN, UNSPECIFIED = "empty", "finite", "nan", "unspecified"
"""States of a row: it sees nothing; it sees only finite numbers; it sees a NaN; its result is not specified."""


def offsets_of_reading(reading: str, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> list[int]:
    """Return the offset of each batch entry for a named alignment, from the lengths of queries and keys in use."""
    if reading == "upper_left":
        return [0] * len(q_lengths)
    return [keys - queries for queries, keys in zip(q_lengths, kv_lengths, strict=True)]


def in_softmax_type(bias: numpy.ndarray, description: Description) -> numpy.ndarray:
    """Replace biases beyond the range of the softmax's type, float32 or float64, by infinities.

    Raises:
        InadmissibleError: The case is asked in dtypes of both types, and their answers would differ.
    """
    with numpy.errstate(over="ignore"):
        narrow = bias.astype(numpy.float32)
    overflows = numpy.isinf(narrow) & numpy.isfinite(bias)
    wide = [dtype == "float64" for dtype in description.dtypes]
    if not overflows.any() or all(wide):
        return bias
    if any(wide):
        raise InadmissibleError(f"{description.id}: the bias is finite in float64 and infinite in float32")
    return numpy.where(overflows, narrow, bias)


class Pairwise:
    """An array that broadcasts to (batch, heads, q_len, kv_len), read at a pair; `absent` if there is no array."""

    def __init__(self, array: numpy.ndarray | None, absent: bool | float) -> None:
        values = numpy.full((1, 1, 1, 1), absent) if array is None else array
        self.shape = values.shape
        self._values = values.tolist()
        self._steps = [int(size != 1) for size in values.shape]

    def place(self, b: int, h: int, i: int, j: int) -> tuple[int, ...]:
        """Return the index of the element that the pair reads."""
        return tuple(0 if size == 1 else index for size, index in zip(self.shape, (b, h, i, j), strict=True))

    def __call__(self, b: int, h: int, i: int, j: int) -> Any:
        """Return the value of the element."""
        x, y, z, w = self._steps
        return self._values[x * b][y * h][z * i][w * j]


@dataclass(frozen=True)
class Row:
    """A query of a head: its place, the keys that it sees, and its state."""

    batch: int
    head: int
    index: int
    keys: tuple[int, ...]
    state: str


class AttentionCall:
    """The arrays and options of a call of attention, and the rules that need no arithmetic."""

    def __init__(self, description: Description) -> None:
        arrays = {name: numpy.asarray(item.values) for name, item in description.inputs.items()}
        options = description.options
        if "bias" in arrays:
            arrays["bias"] = in_softmax_type(arrays["bias"], description)
        self.name = description.id
        self.query, self.key = arrays["query"].astype(numpy.float64), arrays["key"].astype(numpy.float64)
        self.batch, self.heads, self.q_len, self.qk_dim = self.query.shape
        self.kv_heads, self.kv_len = self.key.shape[1:3]
        self.value = arrays.get("value", numpy.zeros((*self.key.shape[:3], 0))).astype(numpy.float64)
        self.grad_output = arrays.get("grad_output", numpy.zeros((*self.query.shape[:3], 0))).astype(numpy.float64)
        self.grad_lse = arrays["grad_lse"].astype(numpy.float64) if "grad_lse" in arrays else None
        self.group = self.heads // self.kv_heads
        self.scale, self.softcap = options.get("scale"), options.get("softcap")
        self.dropout_rate = options.get("dropout_rate", 0.0)
        self.has_bias, self.has_sinks = "bias" in arrays, "sinks" in arrays
        self.mask, self.bias = Pairwise(arrays.get("mask"), True), Pairwise(arrays.get("bias"), 0.0)
        self.kept = Pairwise(arrays.get("dropout_mask"), True)
        self.sinks = arrays["sinks"].tolist() if self.has_sinks else [-math.inf] * self.heads
        self._read_constraints(arrays, options)
        self._mark_non_finite()

    def _read_constraints(self, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any]) -> None:
        def per_entry(name: str, absent: int) -> list[int]:
            value = arrays.get(name, options.get(name))
            return numpy.broadcast_to(numpy.asarray(absent if value is None else value), (self.batch,)).tolist()

        self.causal, self.chunk = options.get("causal", False), options.get("chunk")
        self.left, self.right = options.get("window") or (None, None)
        self.q_lengths, self.kv_lengths = per_entry("q_lengths", self.q_len), per_entry("kv_lengths", self.kv_len)
        self.kv_starts, self.prefix_lengths = per_entry("kv_starts", 0), per_entry("prefix_lengths", 0)
        reading = options.get("q_offset") if "q_offset" not in arrays else None
        self.q_offset = (
            offsets_of_reading(reading, self.q_lengths, self.kv_lengths)
            if isinstance(reading, str)
            else per_entry("q_offset", 0)
        )
        self.q_ids, self.kv_ids = (
            arrays[name].tolist() if name in arrays else None for name in ("q_segment_ids", "kv_segment_ids")
        )

    def _mark_non_finite(self) -> None:
        self.query_nan, self.query_infinite = _holds(numpy.isnan, self.query), _holds(numpy.isinf, self.query)
        self.key_nan, self.key_infinite = _holds(numpy.isnan, self.key), _holds(numpy.isinf, self.key)
        self.value_columns = [
            [[numpy.flatnonzero(~numpy.isfinite(row)).tolist() for row in head] for head in entry]
            for entry in self.value
        ]

    def sees(self, b: int, h: int, i: int, j: int) -> bool:
        """Return True if query i of head h of batch entry b may attend to key j."""
        position, start = self.q_offset[b] + i, self.kv_starts[b]
        if i >= self.q_lengths[b] or not start <= j < self.kv_lengths[b]:
            return False
        if self.causal and j > position and j >= self.prefix_lengths[b]:
            return False
        if self.chunk is not None and (position - start) // self.chunk != (j - start) // self.chunk:
            return False
        if self.left is not None and j < position - self.left:
            return False
        if self.right is not None and j > position + self.right:
            return False
        if self.q_ids is not None and self.kv_ids is not None and self.q_ids[b][i] != self.kv_ids[b][j]:
            return False
        return bool(self.mask(b, h, i, j)) and self.bias(b, h, i, j) != -math.inf

    def row(self, b: int, h: int, i: int) -> Row:
        """Return the row of query i, with the keys that it sees."""
        keys = tuple(j for j in range(self.kv_len) if self.sees(b, h, i, j))
        return Row(b, h, i, keys, self._state(b, h, i, keys))

    def _state(self, b: int, h: int, i: int, keys: tuple[int, ...]) -> str:
        if math.isnan(self.sinks[h]) or self.sinks[h] == math.inf:
            return UNSPECIFIED
        if not keys:
            return EMPTY
        g = h // self.group
        biases = [self.bias(b, h, i, j) for j in keys] if self.has_bias else []
        if self.query_infinite[b][h][i] or any(self.key_infinite[b][g][j] for j in keys) or math.inf in biases:
            return UNSPECIFIED
        if self.query_nan[b][h][i] or any(self.key_nan[b][g][j] for j in keys) or any(map(math.isnan, biases)):
            return NAN
        return FINITE

    def non_finite_columns(self, row: Row) -> set[int]:
        """Return the components in which a value that the row sees is NaN or infinite."""
        columns = self.value_columns[row.batch][row.head // self.group]
        return {c for j in row.keys for c in columns[j]}


def _holds(predicate: numpy.ufunc, x: numpy.ndarray) -> list[Any]:
    """Test each vector of the last axis for an element with the property, as nested lists."""
    return numpy.any(predicate(x), axis=-1).tolist()
