"""The pieces in which a call is worked: batch entries, heads, consecutive queries, and the keys that they may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

__all__ = ["Operands", "Span", "Task", "blocks", "pieces"]

SCORES = 2**21
"""How many scores the formula holds at once, as long as its rows keep within the bounds: 8 MiB in float32."""
ROWS = 128
"""Queries of one head that the formula takes at once; far below it, matrix products lose their speed."""


class Span(NamedTuple):
    """Consecutive indices; unlike those of a range, its ends may be sizes that a tracer left open."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of indices."""
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
    """What has a gradient; the value has no components where the weights alone are asked for."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Operands:
        """A function of each operand that is given, in their order."""
        query, key, value = function(self.query), function(self.key), function(self.value)
        bias = None if self.bias is None else function(self.bias)
        sinks = None if self.sinks is None else function(self.sinks)
        return Operands(query, key, value, bias, sinks)

    def to(self, dtype: torch.dtype) -> Operands:
        """Each operand in `dtype`."""
        return self.each(lambda operand: operand.to(dtype))

    def cut(self, task: Task) -> Operands:
        """The part of each operand that a task reads; sinks as (heads, 1, 1), which broadcasts to the scores."""
        query, key, value, bias, sinks = self
        if not task.is_whole:
            query, key, value = task.of_rows(query), task.of_keys(key), task.of_keys(value)
            bias = None if bias is None else task.of_pairs(bias)
            sinks = None if sinks is None else sinks[task.heads.slice]
        return Operands(query, key, value, bias, None if sinks is None else sinks[:, None, None])


@dataclass(frozen=True, slots=True)
class Task:
    """Consecutive queries of some batch entries and heads, and consecutive keys outside of which they see nothing."""

    batch: Span
    kv_heads: Span
    group: int
    queries: Span
    keys: Span
    is_whole: bool = False
    """Whether the task is the whole call, of which nothing has to be cut."""

    @property
    def heads(self) -> Span:
        """The query heads that read these key/value heads (MHA-HEAD-1)."""
        return Span(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    @property
    def pairs(self) -> int:
        """Number of scores."""
        return self.batch.size * self.kv_heads.size * self.group * self.queries.size * self.keys.size

    def has_rows_of(self, other: Task) -> bool:
        """Tell whether both tasks have the same rows."""
        return (self.batch, self.kv_heads, self.queries) == (other.batch, other.kv_heads, other.queries)

    def of_rows(self, array: torch.Tensor) -> torch.Tensor:
        """The rows of this task in (batch, heads, q_len, ...)."""
        return array if self.is_whole else array[self.batch.slice, self.heads.slice, self.queries.slice]

    def of_keys(self, array: torch.Tensor) -> torch.Tensor:
        """The keys of this task in (batch, kv_heads, kv_len, size)."""
        return array if self.is_whole else array[self.batch.slice, self.kv_heads.slice, self.keys.slice]

    def of_pairs(self, array: torch.Tensor) -> torch.Tensor:
        """The pairs of this task in a mask or a bias, whole along an axis of size 1, which broadcasts (MHA-MASK-2)."""
        if self.is_whole:
            return array
        spans = (self.batch, self.heads, self.queries, self.keys)
        return array[
            tuple(span.slice if size > 1 else slice(None) for span, size in zip(spans, array.shape, strict=True))
        ]


def blocks(indices: Span, length: int) -> list[Span]:
    """Cut consecutive indices into blocks of `length`, the last one shorter."""
    starts = range(indices.start, indices.stop, length)
    return [Span(start, min(start + length, indices.stop)) for start in starts]


def pieces(task: Task) -> Iterator[Task]:
    """Cut a task so that the scores of a piece may be held: queries first, then batch entries, then heads."""
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
