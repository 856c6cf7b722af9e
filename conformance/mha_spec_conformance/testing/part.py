"""A part of an attention problem: some rows and keys of some heads, evaluated with the positions of the whole.

A part has the results of the whole problem at its rows, but none of the scores of other rows. It is evaluated by the
steps of the specification, or by those of a known mistake.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec_conformance.judging.bounds import SPECIFICATION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.steps import Steps

__all__ = ["Part"]

SAME = ("causal", "window", "chunk", "scale", "softcap", "dropout_rate")
"""The options that are the same for a part."""

PER_KEYS = ("kv_lengths", "kv_starts", "prefix_lengths")
"""The options with an index of a key for each batch entry."""


@dataclass(frozen=True)
class Part:
    """Rows and keys of heads that read the same key/value head, in a batch entry.

    Attributes:
        whole: The arguments of the whole problem, checked, as NumPy arrays.
        entry: The batch entry.
        heads: The query heads.
        rows: The indices of the rows.
        keys: The indices of the keys; None for all keys that a row may see.
        checked_by: The steps that evaluate the part.
    """

    whole: Arguments
    entry: int
    heads: Sequence[int]
    rows: numpy.ndarray
    keys: numpy.ndarray | None = None
    checked_by: Steps = SPECIFICATION

    @cached_property
    def kv_head(self) -> int:
        """The key/value head that the heads read."""
        indices = numpy.arange(self.whole.kv_heads).reshape(1, -1, 1, 1)
        return int(self.checked_by.repeat_heads(indices, self.whole.heads)[0, self.heads[0], 0, 0])

    @cached_property
    def kept_keys(self) -> numpy.ndarray:
        """The keys of the part: those asked for, or the range that holds every key that a row sees."""
        if self.keys is not None:
            return self.keys
        every = numpy.arange(self.whole.kv_len)
        whole = self.whole
        if not whole.positional and whole.kv_lengths is whole.kv_starts is whole.q_segment_ids is None:
            return every
        visible = numpy.ones((1, 1, len(self.rows), len(every)), bool)
        for constraint in self._constraints(every):
            visible = visible & constraint
        seen = numpy.flatnonzero(visible.any(axis=(0, 1, 2)))
        return every[seen[0] : seen[-1] + 1] if seen.size else every[:1]

    def _constraints(self, keys: numpy.ndarray) -> list[numpy.ndarray]:
        """Return the constraints of the specification that compare positions, lengths and segments."""
        whole = self.whole
        constraints = self._constraints_of_positions(keys) if whole.positional else []
        if whole.kv_lengths is not None:
            constraints.append(keys < self._entry(_integers(whole.kv_lengths)))
        if whole.kv_starts is not None:
            constraints.append(keys >= self._entry(_integers(whole.kv_starts)))
        if whole.q_segment_ids is not None and whole.kv_segment_ids is not None:
            ids = numpy.asarray(whole.q_segment_ids)[self.entry, self.rows]
            constraints.append((ids[:, None] == numpy.asarray(whole.kv_segment_ids)[self.entry, keys])[None, None])
        return constraints

    def _constraints_of_positions(self, keys: numpy.ndarray) -> list[numpy.ndarray]:
        whole, positions = self.whole, self._query_positions(SPECIFICATION)
        left, right = whole.window or (None, None)
        constraints: list[numpy.ndarray] = []
        if whole.causal:
            prefix = 0 if whole.prefix_lengths is None else self._entry(_integers(whole.prefix_lengths))
            constraints.append((keys <= positions) | (keys < prefix))
        if left is not None:
            constraints.append(keys >= positions - left)
        if right is not None:
            constraints.append(keys - positions <= right)
        if whole.chunk is not None:
            starts = 0 if whole.kv_starts is None else self._entry(_integers(whole.kv_starts))
            constraints.append((positions - starts) // whole.chunk == (keys - starts) // whole.chunk)
        return constraints

    @cached_property
    def arrays(self) -> dict[str, numpy.ndarray]:
        """The arrays of the part by argument name."""
        whole, entry, head = self.whole, slice(self.entry, self.entry + 1), slice(self.kv_head, self.kv_head + 1)
        keys = _as_slice(self.kept_keys)
        arrays = {
            "query": self.of_rows(whole.query),
            "key": whole.key[entry, head][:, :, keys],
            "value": whole.value[entry, head][:, :, keys],
        }
        for name in ("mask", "bias", "dropout_mask"):
            if (array := getattr(whole, name)) is not None:
                arrays[name] = self._pairwise(array)
        if whole.sinks is not None:
            arrays["sinks"] = whole.sinks[list(self.heads)]
        if whole.q_segment_ids is not None:
            arrays["q_segment_ids"] = numpy.asarray(whole.q_segment_ids)[entry, self.rows]
            arrays["kv_segment_ids"] = numpy.asarray(whole.kv_segment_ids)[entry, keys]
        return arrays

    def of_rows(self, array: numpy.ndarray) -> numpy.ndarray:
        """Return the rows of the part of an array over (batch, heads, q_len, ...)."""
        heads = slice(self.heads[0], self.heads[-1] + 1)
        return array[self.entry : self.entry + 1, heads][:, :, _as_slice(self.rows)]

    def _pairwise(self, array: numpy.ndarray) -> numpy.ndarray:
        """Return the part of an array that broadcasts to (batch, heads, q_len, kv_len)."""
        array = self._entry(array)
        array = array[:, slice(self.heads[0], self.heads[-1] + 1)] if array.shape[1] > 1 else array
        array = array[:, :, _as_slice(self.rows)] if array.shape[2] > 1 else array
        return array[..., _as_slice(self.kept_keys)] if array.shape[3] > 1 else array

    def _entry(self, array: numpy.ndarray) -> numpy.ndarray:
        """Return the batch entry of an array, or the whole array if all entries share it."""
        return array[self.entry : self.entry + 1] if array.shape[0] > 1 else array

    @property
    def options(self) -> dict[str, Any]:
        """The options of the part that are not arrays; the steps replace offset and lengths by those of the whole."""
        options = {name: getattr(self.whole, name) for name in SAME}
        options |= {"q_offset": 0} if self.whole.positional else {}
        options |= {"q_lengths": [len(self.rows)]} if self.whole.q_lengths is not None else {}
        of_keys = [name for name in PER_KEYS if getattr(self.whole, name) is not None]
        return options | {name: [len(self.kept_keys)] for name in of_keys}

    @property
    def steps(self) -> Steps:
        """The steps over the rows and keys of the part, with the positions and lengths of the whole problem."""
        steps, keys, whole = self.checked_by, self.kept_keys, self.whole
        shift = keys - numpy.arange(len(keys))

        def see_kv_lengths(positions: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
            return self._entry(steps.see_kv_lengths(keys, _integers(whole.kv_lengths)))

        def see_kv_starts(positions: numpy.ndarray, starts: numpy.ndarray) -> numpy.ndarray:
            return self._entry(steps.see_kv_starts(keys, _integers(whole.kv_starts)))

        def see_prefix(causal: numpy.ndarray, positions: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
            return self._entry(steps.see_prefix(causal, keys, _integers(whole.prefix_lengths)))

        def see_chunk(
            queries: numpy.ndarray, positions: numpy.ndarray, chunk: int, starts: numpy.ndarray | int
        ) -> numpy.ndarray:
            first = 0 if whole.kv_starts is None else _integers(whole.kv_starts)
            return self._entry(steps.see_chunk(queries, keys, chunk, first))

        def see_q_lengths(indices: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
            return self._entry(steps.see_q_lengths(self.rows[:, None], _integers(whole.q_lengths)))

        return replace(
            steps,
            check=lambda a: a,
            repeat_heads=SPECIFICATION.repeat_heads,
            sum_group=SPECIFICATION.sum_group,
            offset_of=lambda a: 0,
            query_positions=lambda offset, q_len: self._query_positions(steps),
            see_causal=lambda distance: steps.see_causal(distance + shift),
            see_window_left=lambda distance, left: steps.see_window_left(distance + shift, left),
            see_window_right=lambda distance, right: steps.see_window_right(distance + shift, right),
            see_chunk=see_chunk,
            see_prefix=see_prefix,
            see_kv_lengths=see_kv_lengths,
            see_kv_starts=see_kv_starts,
            see_q_lengths=see_q_lengths,
        )

    def _query_positions(self, steps: Steps) -> numpy.ndarray:
        """Return the positions of the rows, (1, 1, rows, 1)."""
        if not self.whole.positional:
            return numpy.zeros((1, 1, len(self.rows), 1), numpy.int64)
        positions = steps.query_positions(_integers(steps.offset_of(self.whole)), self.whole.q_len)
        return self._entry(positions)[:, :, self.rows]


def _integers(values: Any) -> numpy.ndarray:
    """Return integers of batch entries as an array of shape (batch or 1, 1, 1, 1)."""
    return numpy.asarray(values, dtype=numpy.int64).reshape(-1, 1, 1, 1)


def _as_slice(indices: numpy.ndarray) -> numpy.ndarray | slice:
    """Return a slice for consecutive indices, which copies nothing."""
    consecutive = len(indices) > 0 and indices[-1] - indices[0] == len(indices) - 1
    return slice(int(indices[0]), int(indices[-1]) + 1) if consecutive else indices
