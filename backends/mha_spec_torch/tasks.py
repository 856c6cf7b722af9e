"""Tasks, into which a call is cut: batch entries, heads, consecutive queries, and the keys that they may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

__all__ = ["Operands", "Span", "Task", "blocks", "pieces"]

SCORES = 2**21
"""The number of scores that the formula holds at once: 8 MiB in float32, and more only for the rows of `ROWS`."""
ROWS = 128
"""The number of rows that the formula takes at once; matrix products with far fewer rows are slow."""


class Span(NamedTuple):
    """Consecutive indices; unlike a range, a span may have ends that a tracer left open."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of indices."""
        return self.stop - self.start

    @property
    def last(self) -> int:
        """The last index."""
        return self.stop - 1

    @property
    def slice(self) -> slice:
        """The indices as a slice."""
        return slice(self.start, self.stop)


class Operands(NamedTuple):
    """The arguments that have gradients; the value has no components in a call for the weights alone."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Operands:
        """Apply a function to each operand that is not None, in their order."""
        query, key, value = function(self.query), function(self.key), function(self.value)
        bias = None if self.bias is None else function(self.bias)
        sinks = None if self.sinks is None else function(self.sinks)
        return Operands(query, key, value, bias, sinks)

    def to(self, dtype: torch.dtype) -> Operands:
        """Convert each operand to `dtype`."""
        return self.each(lambda operand: operand.to(dtype))

    def cut(self, task: Task) -> Operands:
        """Select the part of each operand that a task reads; sinks become (heads, 1, 1), to broadcast to the scores."""
        query, key, value, bias, sinks = self
        if not task.is_whole:
            query, key, value = task.of_rows(query), task.of_keys(key), task.of_keys(value)
            bias = None if bias is None else task.of_pairs(bias)
            sinks = None if sinks is None else sinks[task.heads.slice]
        return Operands(query, key, value, bias, None if sinks is None else sinks[:, None, None])


@dataclass(frozen=True, slots=True)
class Task:
    """Consecutive queries of some batch entries and heads, and consecutive keys that include all keys they see."""

    batch: Span
    kv_heads: Span
    group: int
    queries: Span
    keys: Span
    is_whole: bool = False
    """True if the task is the whole call, so that no operand has to be cut."""

    @property
    def heads(self) -> Span:
        """The query heads that read these key/value heads (MHA-HEAD-1)."""
        return Span(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    @property
    def pairs(self) -> int:
        """The number of scores."""
        return self.batch.size * self.kv_heads.size * self.group * self.queries.size * self.keys.size

    def has_rows_of(self, other: Task) -> bool:
        """Tell whether both tasks have the same rows."""
        return (self.batch, self.kv_heads, self.queries) == (other.batch, other.kv_heads, other.queries)

    def of_rows(self, array: torch.Tensor) -> torch.Tensor:
        """Select the rows of this task in (batch, heads, q_len, ...)."""
        return array if self.is_whole else array[self.batch.slice, self.heads.slice, self.queries.slice]

    def of_keys(self, array: torch.Tensor) -> torch.Tensor:
        """Select the keys of this task in (batch, kv_heads, kv_len, size)."""
        return array if self.is_whole else array[self.batch.slice, self.kv_heads.slice, self.keys.slice]

    def of_pairs(self, array: torch.Tensor) -> torch.Tensor:
        """Select the pairs of this task in a mask or a bias, of which axes of size 1 stay whole (MHA-MASK-2)."""
        if self.is_whole:
            return array
        spans = (self.batch, self.heads, self.queries, self.keys)
        return array[
            tuple(span.slice if size > 1 else slice(None) for span, size in zip(spans, array.shape, strict=True))
        ]


def blocks(indices: Span, length: int) -> list[Span]:
    """Cut consecutive indices into blocks of `length`; the last may be shorter."""
    starts = range(indices.start, indices.stop, length)
    return [Span(start, min(start + length, indices.stop)) for start in starts]


def pieces(task: Task) -> Iterator[Task]:
    """Cut a task into pieces of limited size: along queries first, then batch entries, then heads."""
    if task.pairs <= SCORES:
        yield task
        return
    rows = min(task.queries.size, max(ROWS // task.group, 1))
    rows = max(rows, min(task.queries.size, SCORES // max(1, task.pairs // task.queries.size)))
    matrices = max(1, SCORES // (task.group * rows * max(1, task.keys.size)))
    entries = max(1, matrices // task.kv_heads.size)
    for batch in blocks(task.batch, entries):
        for kv_heads in blocks(task.kv_heads, min(task.kv_heads.size, matrices)):
            for queries in blocks(task.queries, rows):
                yield replace(task, batch=batch, kv_heads=kv_heads, queries=queries, is_whole=False)
