"""The pieces in which a call is worked: batch entries, heads, consecutive queries, and the keys that they may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

__all__ = ["Operands", "Task", "blocks", "part", "pieces"]

SCORES = 2**21
"""How many scores the formula holds at once, as long as its rows keep within the bounds: 8 MiB in float32."""
ROWS = 128
"""Queries of one head that the formula takes at once; far below it, matrix products lose their speed."""


class Operands(NamedTuple):
    """What has a gradient."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Operands:
        """A function of each operand that is given."""
        query, key, value = (function(one) for one in (self.query, self.key, self.value))
        bias, sinks = (None if one is None else function(one) for one in (self.bias, self.sinks))
        return Operands(query, key, value, bias, sinks)

    def to(self, dtype: torch.dtype) -> Operands:
        """Each operand in `dtype`."""
        return self.each(lambda one: one.to(dtype))

    def cut(self, task: Task) -> Operands:
        """The part of each operand that a task reads; sinks as (heads, 1, 1), which stands beside the scores."""
        bias = None if self.bias is None else task.of_pairs(self.bias)
        sinks = None if self.sinks is None else self.sinks[part(task.heads)][:, None, None]
        return Operands(task.of_rows(self.query), task.of_keys(self.key), task.of_keys(self.value), bias, sinks)


@dataclass(frozen=True, slots=True)
class Task:
    """Consecutive queries of some batch entries and heads, and consecutive keys outside of which they see nothing."""

    batch: range
    kv_heads: range
    group: int
    queries: range
    keys: range

    @property
    def heads(self) -> range:
        """The query heads that read these key/value heads (MHA-HEAD-1)."""
        return range(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    @property
    def pairs(self) -> int:
        """Number of scores."""
        return len(self.batch) * len(self.heads) * len(self.queries) * len(self.keys)

    def of_rows(self, array: torch.Tensor) -> torch.Tensor:
        """The rows of this task in (batch, heads, q_len, ...)."""
        return array[part(self.batch), part(self.heads), part(self.queries)]

    def of_keys(self, array: torch.Tensor) -> torch.Tensor:
        """The keys of this task in (batch, kv_heads, kv_len, size)."""
        return array[part(self.batch), part(self.kv_heads), part(self.keys)]

    def of_pairs(self, array: torch.Tensor) -> torch.Tensor:
        """The pairs of this task in a mask or a bias, 1 where it broadcasts (MHA-MASK-2)."""
        wanted = (self.batch, self.heads, self.queries, self.keys)
        return array[
            tuple(part(one) if size > 1 else slice(None) for one, size in zip(wanted, array.shape, strict=True))
        ]


def part(indices: range) -> slice:
    """Say consecutive indices as a slice."""
    return slice(indices.start, indices.stop)


def blocks(indices: range, length: int) -> list[range]:
    """Cut consecutive indices into blocks of `length`, the last one shorter."""
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def pieces(task: Task) -> Iterator[Task]:
    """Cut a task so that the scores of a piece may be held: queries first, then batch entries, then heads."""
    rows = min(len(task.queries), max(ROWS // task.group, 1))
    rows = max(rows, min(len(task.queries), SCORES // max(1, task.pairs // len(task.queries))))
    matrices = max(1, SCORES // (task.group * rows * max(1, len(task.keys))))
    entries = max(1, matrices // len(task.kv_heads))
    for batch in blocks(task.batch, entries):
        for kv_heads in blocks(task.kv_heads, min(len(task.kv_heads), matrices)):
            for queries in blocks(task.queries, rows):
                yield replace(task, batch=batch, kv_heads=kv_heads, queries=queries)
