"""Which keys a query sees: ranges where the constraints can be read, comparisons for what is left of them.

Numbers, sequences, NumPy arrays and, in eager mode, tensors on the CPU are read. Tensors that are traced or lie on an
accelerator are compared, never read (MHA-LEN-3).
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy
import torch

from mha_spec.arrays import host_integers

from .tasks import Task, blocks, part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mha_spec.arguments import Arguments

__all__ = ["Visibility"]

SHORTEST_RUN = 16
"""Packed sequences that are shorter on average are compared in blocks, not worked one by one."""
ROWS = (64, 512)
"""Bounds of the queries that share a range of keys under a window."""
COST_OF_TASK = 2**18
"""How many scores are worked in the time that one more task costs."""


class PerEntry:
    """One integer for each batch entry: numbers where they may be read, else a tensor."""

    def __init__(self, value: torch.Tensor | Sequence[int] | int, batch: int, *, host: bool) -> None:
        self.unread = value if isinstance(value, torch.Tensor) else None
        numbers = value.tolist() if host and isinstance(value, torch.Tensor) else host_integers(value)
        self.numbers: list[int] | None = numbers * batch if isinstance(value, int) and numbers else numbers

    def known(self, batch: range) -> list[int] | None:
        """The integers of some batch entries, or None where they must not be read."""
        return None if self.numbers is None else self.numbers[part(batch)]

    def get(self, batch: range, device: torch.device) -> torch.Tensor | int:
        """The integers of some batch entries beside the scores, (batch, 1, 1, 1), or the one that all have."""
        numbers = self.known(batch)
        if self.unread is not None and numbers is None:
            return self.unread[part(batch)].to(torch.int64)[:, None, None, None]
        one = _one(numbers)
        return one if one is not None else torch.tensor(numbers, device=device)[:, None, None, None]


class Visibility:
    """The constraints of one call."""

    def __init__(self, a: Arguments, *, host: bool) -> None:
        """Read what may be read; causal is the window (None, 0) (MHA-CAUSAL-1, MHA-WINDOW-2)."""
        self.a, self.device = a, a.query.device
        left, right = a.bounded_window or (None, None)
        self.left, self.right = left, 0 if a.causal else right
        given = (0, a.q_offset), (a.q_len, a.q_lengths), (a.kv_len, a.kv_lengths)
        self.offset, self.q_lengths, self.kv_lengths = (
            PerEntry(default if value is None else value, a.batch, host=host) for default, value in given
        )
        ids = a.q_segment_ids, a.kv_segment_ids
        self.q_ids, self.kv_ids = (one.numpy() if host and isinstance(one, torch.Tensor) else one for one in ids)

    @property
    def whole(self) -> Task:
        """The call as one task."""
        a = self.a
        return Task(range(a.batch), range(a.kv_heads), a.heads // a.kv_heads, range(a.q_len), range(a.kv_len))

    def tasks(self) -> list[Task]:
        """Cut the call so that what no query of a task sees is left out, where that saves time."""
        whole = self.whole
        if not whole.pairs:
            return []
        if not (self.a.positional or self._per_entry):
            return [whole]
        groups = self._alike()
        if whole.pairs <= COST_OF_TASK * (len(groups) - 1):
            return [whole]
        exact = [task for batch in groups for task in self._of_entries(batch)]
        saved = whole.pairs - sum(task.pairs for task in exact)
        return exact if saved > COST_OF_TASK * (len(exact) - 1) else [whole]

    def visible(self, task: Task, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """Which pairs of a task are visible, (batch*, heads*, queries*, keys*); None where all are."""
        constraints = [*self._see_positions(task), *self._see_lengths(task), *self._see_segments(task)]
        if self.a.mask is not None:
            constraints.append(task.of_pairs(self.a.mask))
        if bias is not None:
            constraints.append(bias != -math.inf)
        if not constraints:
            return None
        visible = reduce(torch.Tensor.logical_and, constraints)
        return visible[(None,) * (4 - visible.ndim)]

    def diagonal(self, task: Task, bias: torch.Tensor | None = None) -> bool:
        """Whether key j is seen from query i where j <= i, both counted within the task, and nothing else is hidden."""
        offset = _one(self.offset.known(task.batch))
        if self.right != 0 or offset is None or self.a.mask is not None or bias is not None:
            return False
        aligned = offset + task.queries.start == task.keys.start and (
            self.left is None or self.left >= len(task.queries)
        )
        return aligned and not [*self._see_lengths(task), *self._see_segments(task)]

    @property
    def _per_entry(self) -> bool:
        a = self.a
        return a.q_lengths is not None or a.kv_lengths is not None or a.q_segment_ids is not None

    def _alike(self) -> list[range]:
        """Consecutive batch entries that have the same constraints."""
        numbers = [one.numbers for one in (self.offset, self.q_lengths, self.kv_lengths) if one.numbers is not None]
        ids = [one for one in (self.q_ids, self.kv_ids) if isinstance(one, numpy.ndarray)]
        starts = [
            entry
            for entry in range(1, self.a.batch)
            if any(one[entry] != one[entry - 1] for one in numbers)
            or any((one[entry] != one[entry - 1]).any() for one in ids)
        ]
        return [range(*ends) for ends in pairwise([0, *starts, self.a.batch])]

    def _of_entries(self, batch: range) -> Iterator[Task]:
        """The tasks of batch entries that have the same constraints; a row that sees no key is in none."""
        q_length = _one(self.q_lengths.known(batch))
        queries = range(self.a.q_len if q_length is None else max(0, min(q_length, self.a.q_len)))
        for run in self._runs(batch[0], queries):
            keys = self._keys(batch, run)
            rows = len(run) if self._needs_no_cut(batch, run, keys) else self._rows
            for block in blocks(run, rows):
                keys = self._keys(batch, block)
                if keys:
                    yield Task(batch, range(self.a.kv_heads), self.a.heads // self.a.kv_heads, block, keys)

    def _runs(self, entry: int, queries: range) -> list[range]:
        """Cut queries where their segment ends, unless the segments are too short for that."""
        if not queries or not isinstance(self.q_ids, numpy.ndarray):
            return [queries] if queries else []
        ids = self.q_ids[entry, part(queries)]
        starts = numpy.flatnonzero(ids[1:] != ids[:-1]) + 1
        if len(starts) * SHORTEST_RUN > len(queries):
            return blocks(queries, ROWS[0])
        return [range(*ends) for ends in pairwise([0, *starts.tolist(), len(queries)])]

    def _keys(self, batch: range, queries: range) -> range:
        """The keys between the first and the last that some of the queries see."""
        offset, kv_length = (_one(numbers.known(batch)) for numbers in (self.offset, self.kv_lengths))
        start, stop = 0, self.a.kv_len if kv_length is None else min(kv_length, self.a.kv_len)
        if offset is not None and self.left is not None:
            start = max(start, offset + queries[0] - self.left)
        if offset is not None and self.right is not None:
            stop = min(stop, offset + queries[-1] + self.right + 1)
        keys = range(start, max(start, stop))
        if not isinstance(self.q_ids, numpy.ndarray) or not isinstance(self.kv_ids, numpy.ndarray):
            return keys
        ids = numpy.unique(self.q_ids[batch[0], part(queries)])
        used = numpy.flatnonzero(numpy.isin(self.kv_ids[batch[0], part(keys)], ids))
        return keys[int(used[0]) : int(used[-1]) + 1] if used.size else range(0)

    def _needs_no_cut(self, batch: range, queries: range, keys: range) -> bool:
        task = Task(batch, range(1), 1, queries, keys)
        return not keys or self._within_window(task) or self.diagonal(task)

    @property
    def _rows(self) -> int:
        lowest, highest = ROWS
        if self.left is None or self.right is None:
            return min(highest, max(lowest, self.a.q_len // 8))
        return min(highest, max(lowest, (self.left + self.right) // 4))

    def _see_positions(self, task: Task) -> Iterator[torch.Tensor]:
        if self._within_window(task):
            return
        positions = self._indices(task.queries)[:, None] + self.offset.get(task.batch, self.device)
        distance = self._indices(task.keys) - positions
        if self.left is not None:
            yield distance >= -self.left
        if self.right is not None:
            yield distance <= self.right

    def _within_window(self, task: Task) -> bool:
        """Whether causal and window are known to hide no pair of a task."""
        if self.left is None and self.right is None:
            return True
        known = self.offset.known(task.batch)
        if known is None:
            return False
        nearest = task.keys[0] - max(known) - task.queries[-1]
        farthest = task.keys[-1] - min(known) - task.queries[0]
        return (self.left is None or -self.left <= nearest) and (self.right is None or farthest <= self.right)

    def _see_lengths(self, task: Task) -> Iterator[torch.Tensor]:
        q_lengths, kv_lengths = self.q_lengths.known(task.batch), self.kv_lengths.known(task.batch)
        if q_lengths is None or min(q_lengths) < task.queries.stop:
            yield self._indices(task.queries)[:, None] < self.q_lengths.get(task.batch, self.device)
        if kv_lengths is None or min(kv_lengths) < task.keys.stop:
            yield self._indices(task.keys) < self.kv_lengths.get(task.batch, self.device)

    def _see_segments(self, task: Task) -> Iterator[torch.Tensor]:
        if self.q_ids is None or self.kv_ids is None:
            return
        q_ids, kv_ids = self.q_ids[part(task.batch), part(task.queries)], self.kv_ids[part(task.batch), part(task.keys)]
        read = isinstance(q_ids, numpy.ndarray) and isinstance(kv_ids, numpy.ndarray)
        if read and (q_ids == q_ids[0, 0]).all() and (kv_ids == q_ids[0, 0]).all():
            return
        q_ids, kv_ids = (torch.as_tensor(ids, device=self.device).to(torch.int64) for ids in (q_ids, kv_ids))
        yield q_ids[:, None, :, None] == kv_ids[:, None, None, :]

    def _indices(self, indices: range) -> torch.Tensor:
        return torch.arange(indices.start, indices.stop, dtype=torch.int32, device=self.device)


def _one(numbers: list[int] | None) -> int | None:
    """The number that all batch entries have; None where there is none, or it must not be read."""
    return numbers[0] if numbers and min(numbers) == max(numbers) else None
