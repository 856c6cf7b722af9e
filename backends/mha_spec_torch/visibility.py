"""Determine which keys a query sees: by ranges if the constraints can be read, and by comparisons for all others.

Numbers, sequences, NumPy arrays and, in eager mode, tensors on the CPU are read. Tensors that are traced or on an
accelerator are compared, never read (MHA-LEN-3).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy
import torch

from mha_spec.arguments import offset_of_reading
from mha_spec.arrays import host_integers
from mha_spec.constraints import (
    PLAIN,
    Structure,
    distances,
    equal_entries,
    key_range,
    segment_keys,
    segment_runs,
    shown,
    trimmed,
)

from .host import on_device
from .symbols import surely
from .tasks import Span, Task, blocks, logits_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mha_spec.arguments import Arguments

    Integers = torch.Tensor | Sequence[int] | int

__all__ = ["Visibility", "all_hold", "with_integers"]

SHORTEST_RUN = 16
"""Packed sequences that are shorter on average are compared in blocks; longer ones become tasks."""
ROWS = (64, 512)
"""The least and the largest number of queries in a task under a window."""
COST_OF_CUT = 2**12
"""The number of scores computed in the time that it takes to cut a call by its segment ids."""
KEPT_PAIRS = 2**14
"""The most elements of all comparisons that are kept with a call."""
TILE = 16
"""The number of keys that the kernel computes together. It computes others singly, and a mask is faster."""
COST_OF_TASK = 2**18
"""The number of scores computed in the time that an additional task costs."""


class PerEntry:
    """An integer for each batch entry, or a common integer: numbers if they may be read, else a tensor or a symbol."""

    __slots__ = ("most", "numbers", "unread")

    def __init__(self, value: Any, *, host: bool, most: int | None = None) -> None:
        """Read integers that may be read; with `most`, clamp them to 0 and to it (MHA-LEN-5)."""
        self.most = most
        self.numbers = value.tolist() if host and isinstance(value, torch.Tensor) else host_integers(value)
        if self.numbers is not None and isinstance(value, torch.Tensor) and most is not None:
            self.numbers = [min(max(number, 0), most) for number in self.numbers]
        # A prepared call outlives its arguments, so it keeps a tensor only if it has not read it.
        self.unread: Any = value if self.numbers is None else None

    def known(self, batch: Span) -> list[int] | None:
        """Return the integers of some batch entries, or the common integer; None if they must not be read."""
        return self.numbers if self.numbers is None or len(self.numbers) == 1 else self.numbers[batch.slice]

    def get(self, task: Task, device: torch.device) -> torch.Tensor | int:
        """Return the integers of a task's batch entries as (batch, 1, 1, 1), or the common integer."""
        if self.numbers is None:
            if not isinstance(self.unread, torch.Tensor):
                return self.unread
            unread = self.unread if task.is_whole else self.unread[task.batch.slice]
            numbers = saturated(unread)[:, None, None, None]
            return numbers if self.most is None else numbers.clamp(0, self.most)
        numbers = self.known(task.batch)
        common = _common(numbers)
        return common if common is not None else torch.tensor(numbers, device=device)[:, None, None, None]


class Visibility:
    """The constraints of a call, without those that hold an element for each pair, such as a mask or a bias."""

    def __init__(self, a: Arguments, dtype: torch.dtype, *, host: bool) -> None:
        """Read the constraints that may be read."""
        self.dtype, self.device = dtype, a.query.device
        self.left, self.right = a.bounds
        self.offset = PerEntry(0 if a.q_offset is None else a.q_offset, host=host)
        self.q_lengths = None if a.q_lengths is None else PerEntry(a.q_lengths, host=host)
        self.kv_lengths = None if a.kv_lengths is None else PerEntry(a.kv_lengths, host=host)
        self.kv_starts, self.prefixes = (
            None if numbers is None else PerEntry(numbers, host=host, most=a.kv_len)
            for numbers in (a.kv_starts, a.prefix_lengths)
        )
        self.chunk, self.unlifted_right = a.chunk, a.unlifted_right
        self._is_structured, self._positional = a.is_structured, a.positional
        ids = a.q_segment_ids, a.kv_segment_ids
        self.q_ids: Any
        self.kv_ids: Any
        self.q_ids, self.kv_ids = (
            array.numpy().copy() if host and isinstance(array, torch.Tensor) else _copied(array) for array in ids
        )
        (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = a.query.shape, a.key.shape
        rows, keys = (Span(0, batch), Span(0, kv_heads), heads // kv_heads, Span(0, q_len)), Span(0, kv_len)
        self.whole = Task(*rows, keys, is_whole=True, has_all_rows=True)

    @property
    def unread(self) -> tuple[torch.Tensor, ...]:
        """The tensors that are compared; of those that may be read, the numbers are kept instead."""
        per_entry = (self.offset, self.q_lengths, self.kv_lengths, self.kv_starts, self.prefixes)
        values = [None if option is None else option.unread for option in per_entry]
        return tuple(value for value in (*values, self.q_ids, self.kv_ids) if isinstance(value, torch.Tensor))

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks into which the call is cut, without hidden pairs if that saves time."""
        return [self._described(task) for task in self._cut()]

    def _described(self, task: Task) -> Task:
        """Fill in the properties of a task that are known before it is computed."""
        has_all_rows = (task.batch, task.queries) == (self.whole.batch, self.whole.queries)
        sees_all, is_diagonal = self.sees_all(task), task.keys.size <= task.queries.size and self.diagonal(task)
        task = replace(task, has_all_rows=has_all_rows, sees_all=sees_all, is_diagonal=is_diagonal)
        keys = Span(task.keys.start, -(-task.keys.stop // TILE) * TILE)
        if not sees_all or task.queries.size < TILE or not task.keys.stop < keys.stop <= self.whole.keys.stop:
            return task
        is_whole = has_all_rows and keys == self.whole.keys
        return replace(task, keys=keys, is_whole=is_whole, sees_all=False, is_diagonal=False, exact=task)

    @torch.inference_mode(False)
    def compare(self) -> None:
        """Compare now what every call would compare, and keep the results as long as they are small together."""
        tasks, left = [], KEPT_PAIRS
        for task in self.tasks:
            compared = task if task.sees_all or task.is_diagonal else self._compared(task, left)
            left -= 0 if compared.visible is None else compared.visible.numel()
            tasks.append(compared)
        self.tasks = tasks

    def _compared(self, task: Task, most: int) -> Task:
        visible = all_hold(self.constraints(task))
        if visible is None or visible.numel() > most:
            return task
        added = logits_of(visible, self.dtype)
        return replace(task, visible=visible, added=added, has_empty_rows=not bool(visible.any(-1).all()))

    def _cut(self) -> list[Task]:
        whole = self.whole
        if not whole.pairs:
            return []
        if not (self._positional or self._per_entry) or (self.q_ids is not None and whole.pairs <= COST_OF_CUT):
            return [whole]
        groups = self._equal_entries()
        if whole.pairs <= COST_OF_TASK * (len(groups) - 1):
            return [whole]
        exact = [task for batch in groups for task in self._of_entries(batch)]
        saved = whole.pairs - sum(task.pairs for task in exact)
        return exact if saved > COST_OF_TASK * (len(exact) - 1) else [whole]

    def constraints(self, task: Task) -> list[torch.Tensor]:
        """Compare the pairs of a task with every constraint that may hide some of them."""
        if task.sees_all:
            return []
        if task.visible is not None:
            return [task.visible]
        return [*self._see_positions(task), *self._see_lengths(task), *self._see_segments(task)]

    def sees_all(self, task: Task) -> bool:
        """Tell whether the constraints are known to hide no pair of a task."""
        return self._within_window(task) and self._within_lengths_and_segment(task)

    def diagonal(self, task: Task) -> bool:
        """Tell whether query i sees exactly the keys j <= i, both counted from the start of the task."""
        if self.right != 0:
            return False
        offset = _common(self.offset.known(task.batch))
        if offset is None or not surely(offset + task.queries.start == task.keys.start):
            return False
        if self._is_structured and not self._is_plain_diagonal(task):
            return False
        if self.left is not None and not surely(self.left >= task.queries.size):
            return False
        return self._within_lengths_and_segment(task)

    def _within_lengths_and_segment(self, task: Task) -> bool:
        lengths = (self.q_lengths, task.queries), (self.kv_lengths, task.keys)
        covered = all(_covers(length, task.batch, indices) for length, indices in lengths)
        return covered and self._starts_before(task) and self._of_one_segment(task)

    def _starts_before(self, task: Task) -> bool:
        """Tell whether the keys of all batch entries are known to start at or before those of a task (MHA-LEN-4)."""
        if self.kv_starts is None:
            return True
        starts = self.kv_starts.known(task.batch)
        return starts is not None and surely(max(starts) <= task.keys.start)

    def _is_plain_diagonal(self, task: Task) -> bool:
        """Tell whether neither a chunk nor a prefix changes what causal alone shows in a task on the diagonal."""
        structure, position = self._structure(task.batch), task.keys.start
        if self.unlifted_right is not None or not structure.starts or not structure.prefixes:
            return False
        if not _is_known(position, task.queries.size) or max(structure.prefixes) > position + 1:
            return False
        ends = ((end - start for end in (position, position + task.queries.size - 1)) for start in structure.starts)
        return self.chunk is None or all(first // self.chunk == last // self.chunk for first, last in ends)

    def _structure(self, batch: Span) -> Structure:
        if not self._is_structured and self.kv_starts is None:
            return PLAIN
        starts, prefixes = (
            (0,) if numbers is None else numbers.known(batch) for numbers in (self.kv_starts, self.prefixes)
        )
        return Structure(self.chunk, starts, prefixes, self.unlifted_right)

    @property
    def _per_entry(self) -> bool:
        options = (self.q_lengths, self.kv_lengths, self.kv_starts, self.q_ids)
        return any(option is not None for option in options)

    def _equal_entries(self) -> list[Span]:
        """Return spans of consecutive batch entries that have the same constraints."""
        per_entry = (self.offset, self.q_lengths, self.kv_lengths, self.kv_starts, self.prefixes)
        options = [option.numbers for option in per_entry if option is not None]
        numbers = [values for values in options if values is not None and len(values) > 1]
        ids = [array for array in (self.q_ids, self.kv_ids) if isinstance(array, numpy.ndarray)]
        return [Span(*ends) for ends in equal_entries(self.whole.batch.stop, [*numbers, *ids])]

    def _of_entries(self, batch: Span) -> Iterator[Task]:
        """Yield the tasks of batch entries that have the same constraints, without rows that see no key."""
        q_length = None if self.q_lengths is None else _common(self.q_lengths.known(batch))
        q_len = self.whole.queries.stop
        queries = Span(0, q_len if q_length is None else max(0, min(q_length, q_len)))
        runs = [part for run in self._runs(batch.start, queries) for part in self._cut_at_structure(batch, run)]
        for run in runs:
            keys = self._keys(batch, run)
            rows = run.size if self._needs_no_cut(batch, run, keys) else self._rows
            for block in blocks(run, rows):
                keys = self._keys(batch, block)
                if keys.size:
                    yield Task(batch, self.whole.kv_heads, self.whole.group, block, keys)

    def _runs(self, entry: int, queries: Span) -> list[Span]:
        """Cut queries at the ends of segments, or into blocks if the segments are too short."""
        if not queries.size or not isinstance(self.q_ids, numpy.ndarray):
            return [queries] if queries.size else []
        runs = segment_runs(self.q_ids[entry, queries.slice], SHORTEST_RUN)
        return blocks(queries, ROWS[0]) if runs is None else [Span(*ends) for ends in runs]

    def _cut_at_structure(self, batch: Span, queries: Span) -> list[Span]:
        """Cut queries after the prefix, and at the ends of chunks or of several small ones: many parts need no mask."""
        offset, structure = _common(self.offset.known(batch)), self._structure(batch)
        if not self._is_structured or offset is None:
            return [queries]
        start, prefix = (_common(numbers) for numbers in (structure.starts, structure.prefixes))
        ends = {queries.start, queries.stop}
        if prefix is not None:
            ends.add(prefix - offset)
        if self.chunk is not None and start is not None:
            step = self.chunk * -(-ROWS[0] // self.chunk)
            first = start - offset + (queries.start + offset - start) // step * step
            ends.update(range(first, queries.stop, step))
        cuts = sorted(end for end in ends if queries.start <= end <= queries.stop)
        return [Span(*ends) for ends in pairwise(cuts)]

    def _keys(self, batch: Span, queries: Span) -> Span:
        """Return the keys from the first to the last that some of the queries see."""
        kv_lengths = None if self.kv_lengths is None else self.kv_lengths.known(batch)
        offsets, bounds = self.offset.known(batch), (self.left, self.right)
        structure = self._structure(batch)
        keys = Span(*key_range(bounds, queries, self.whole.keys.stop, offsets, None, kv_lengths, structure))
        if not isinstance(self.q_ids, numpy.ndarray) or not isinstance(self.kv_ids, numpy.ndarray):
            return keys
        first = slice(batch.start, batch.start + 1)
        seen = trimmed(range(*keys), segment_keys(self.q_ids[first, queries.slice], self.kv_ids[first, keys.slice]))
        return Span(seen.start, seen.stop)

    def _needs_no_cut(self, batch: Span, queries: Span, keys: Span) -> bool:
        task = Task(batch, Span(0, 1), 1, queries, keys)
        return not keys.size or self._within_window(task) or self.diagonal(task)

    @property
    def _rows(self) -> int:
        lowest, highest = ROWS
        if self.left is None or self.right is None or self.prefixes is not None:
            return min(highest, max(lowest, self.whole.queries.stop // 8))
        return min(highest, max(lowest, (self.left + self.right) // 4))

    def _see_positions(self, task: Task) -> Iterator[torch.Tensor]:
        if self._within_window(task):
            return
        positions = self._indices(task.queries)[:, None] + self.offset.get(task, self.device)
        keys = self._indices(task.keys)
        distance = keys - positions
        if self.left is not None:
            yield distance >= -self.left
        if self.right is not None:
            shows = distance <= self.right
            yield shows if self.prefixes is None else shows | (keys < self.prefixes.get(task, self.device))
        if self.unlifted_right is not None:
            yield distance <= self.unlifted_right
        if self.chunk is not None:
            starts = 0 if self.kv_starts is None else self.kv_starts.get(task, self.device)
            yield (positions - starts) // self.chunk == (keys - starts) // self.chunk

    def _within_window(self, task: Task) -> bool:
        """Tell whether causal and window are known to hide no pair of a task."""
        if not self._positional:
            return True
        known = self.offset.known(task.batch)
        if known is None:
            return False
        if self._is_structured:
            return self._within_structure(task, known)
        nearest, farthest = distances(known, task.queries, task.keys)
        return (self.left is None or surely(-self.left <= nearest)) and (
            self.right is None or surely(farthest <= self.right)
        )

    def _within_structure(self, task: Task, offsets: list[int]) -> bool:
        if not _is_known(*offsets, *task.queries, *task.keys) or not (task.queries.size and task.keys.size):
            return False
        ends = task.queries.start, task.queries.last
        start, stop = shown((self.left, self.right), *ends, offsets, self._structure(task.batch))
        return (start is None or start <= task.keys.start) and (stop is None or task.keys.stop <= stop)

    def _see_lengths(self, task: Task) -> Iterator[torch.Tensor]:
        if self.kv_starts is not None and not self._starts_before(task):
            yield self._indices(task.keys) >= self.kv_starts.get(task, self.device)
        for lengths, indices in ((self.q_lengths, task.queries), (self.kv_lengths, task.keys)):
            if lengths is None or _covers(lengths, task.batch, indices):
                continue
            positions = self._indices(indices)
            yield (positions[:, None] if lengths is self.q_lengths else positions) < lengths.get(task, self.device)

    def _see_segments(self, task: Task) -> Iterator[torch.Tensor]:
        if self.q_ids is None or self._of_one_segment(task):
            return
        q_ids, kv_ids = (on_device(ids, self.device) for ids in self._ids(task))
        yield equal_ids(q_ids[:, None, :, None], kv_ids[:, None, None, :])

    def _of_one_segment(self, task: Task) -> bool:
        """Tell whether all queries and keys of a task are known to have the same id."""
        if self.q_ids is None:
            return True
        q_ids, kv_ids = self._ids(task)
        on_host = isinstance(q_ids, numpy.ndarray) and isinstance(kv_ids, numpy.ndarray)
        return on_host and bool((q_ids == q_ids[0, 0]).all() and (kv_ids == q_ids[0, 0]).all())

    def _ids(self, task: Task) -> tuple[Any, Any]:
        """Select the segment ids of the queries and the keys of a task."""
        if task.is_whole:
            return self.q_ids, self.kv_ids
        return self.q_ids[task.batch.slice, task.queries.slice], self.kv_ids[task.batch.slice, task.keys.slice]

    def _indices(self, indices: Span) -> torch.Tensor:
        return torch.arange(indices.start, indices.stop, dtype=torch.int32, device=self.device)


def _copied(array: Any) -> Any:
    """Copy an array of NumPy, of which autograd does not notice a change."""
    return array.copy() if isinstance(array, numpy.ndarray) else array


def all_hold(constraints: list[torch.Tensor]) -> torch.Tensor | None:
    """Tell where all constraints hold, in an array of rank 4; None if there are none."""
    if not constraints:
        return None
    visible = reduce(torch.Tensor.logical_and, constraints)
    return visible[(None,) * (4 - visible.ndim)] if visible.ndim < 4 else visible


def with_integers(a: Arguments) -> Arguments:
    """Replace a named offset by its integers, which depend on the lengths (MHA-POS-2, MHA-LEN-3)."""
    if not isinstance(a.q_offset, str):
        return a
    q_length = _clamped(a.q_lengths, a.q_len, a.query.device)
    kv_length = _clamped(a.kv_lengths, a.kv_len, a.query.device)
    return replace(a, q_offset=offset_of_reading(a.q_offset, q_length, kv_length))


def _clamped(lengths: Integers | None, size: int, device: torch.device) -> torch.Tensor | int:
    return size if lengths is None else saturated(on_device(lengths, device)).clamp(0, size)


def saturated(integers: torch.Tensor) -> torch.Tensor:
    """Convert integers to int64; larger ones, of uint64, become the largest int64 (MHA-LEN-3)."""
    wide = integers.to(torch.int64)
    return wide.where(wide >= 0, 2**63 - 1) if integers.dtype == torch.uint64 else wide


def equal_ids(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Compare ids of any integer types by value; an id of uint64 that int64 cannot hold becomes negative."""
    wide = ids.to(torch.int64)
    equal = wide == others.to(torch.int64)
    return equal if (ids.dtype == torch.uint64) == (others.dtype == torch.uint64) else equal & (wide >= 0)


def _covers(lengths: PerEntry | None, batch: Span, indices: Span) -> bool:
    """Tell whether lengths are known to reach past all indices of a task."""
    known = None if lengths is None else lengths.known(batch)
    return lengths is None or (known is not None and surely(min(known) >= indices.stop))


def _is_known(*numbers: object) -> bool:
    """Tell whether no number is a symbol, so that comparing them adds no guard."""
    return all(isinstance(number, int) for number in numbers)


def _common(numbers: Sequence[int] | None) -> int | None:
    """Return the number that all batch entries have; None if they differ or must not be read."""
    return numbers[0] if numbers and min(numbers) == max(numbers) else None
