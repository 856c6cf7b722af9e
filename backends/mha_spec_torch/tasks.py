"""Tasks, into which a call is cut: batch entries, heads, consecutive queries, and the keys that they may see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mha_spec.arguments import Arguments

__all__ = [
    "CAUSAL",
    "FEWEST_KEYS",
    "NOTHING_HIDDEN",
    "Constraint",
    "Operands",
    "Span",
    "Task",
    "blocks",
    "converted",
    "dense_rows",
    "logits_of",
    "narrowed",
    "pieces",
    "softmax_dtype",
]

SCORES = 2**21
"""The number of scores that the formula holds at once: 8 MiB in float32, and more only for the rows of `ROWS`."""
ROWS = 128
"""The number of rows that the formula takes at once; matrix products with far fewer rows are slow."""

FEWEST_KEYS = 16
"""With fewer keys, the flash kernel may take a row whose scores are all NaN for one that sees no key (MHA-NAN-1)."""


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
    """The arguments that have gradients, and the mask; the value has no components in a call for the weights alone."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, a: Arguments) -> Operands:
        """Select the operands among the arguments of a call."""
        return cls(a.query, a.key, a.key[..., :0] if a.value is None else a.value, a.bias, a.sinks, a.mask)

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Operands:
        """Apply a function to each operand that is not None and has a gradient, in their order."""
        query, key, value = function(self.query), function(self.key), function(self.value)
        bias = None if self.bias is None else function(self.bias)
        sinks = None if self.sinks is None else function(self.sinks)
        return Operands(query, key, value, bias, sinks, self.mask)

    def to(self, dtype: torch.dtype) -> Operands:
        """Convert each operand to `dtype`."""
        return self.each(lambda operand: converted(operand, dtype))

    def cut(self, task: Task) -> Operands:
        """Select the part of each operand that a task reads; sinks become (heads, 1, 1), to broadcast to the scores."""
        query, key, value, bias, sinks, mask = self
        if not task.is_whole:
            query, key, value = task.of_rows(query), task.of_keys(key), task.of_keys(value)
            bias, mask = (None if array is None else task.of_pairs(array) for array in (bias, mask))
            sinks = None if sinks is None else sinks[task.heads.slice]
        return Operands(query, key, value, bias, None if sinks is None else sinks[:, None, None], mask)


def converted(array: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a tensor to `dtype`; comparing the dtypes is faster than a call of `to` without effect."""
    return array if array.dtype == dtype else array.to(dtype)


# `torch.where` would make these tensors anew from Python's numbers, and convert the result.
_SEEN, _HIDDEN = (
    {dtype: torch.tensor(logit, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
    for logit in (0.0, -math.inf)
)


def logits_of(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert visible pairs to logits that are added to the scores: 0, or -inf where a pair is hidden."""
    return torch.where(visible, _SEEN[dtype], _HIDDEN[dtype])


def softmax_dtype(query: torch.Tensor) -> torch.dtype:
    """Return the softmax's type (MHA-SOFTMAX-2)."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Copy an operand unless each row is contiguous and no two rows overlap.

    The kernels assume both of query, key, value and output without a check; they respect all other strides.
    """
    if x.is_contiguous():
        return x
    stride, size = x.stride(), x.shape[3]
    is_dense = stride[3] == 1 and (stride[2] >= size or x.shape[2] == 1)
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)


class Constraint(NamedTuple):
    """The arguments of the flash kernel for hidden pairs."""

    is_causal: bool
    added: torch.Tensor | None
    """Logits that are added to the scores."""


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
    has_all_rows: bool = False
    """True if no row of the call is outside of the task."""
    sees_all: bool = False
    """True if lengths, positions and segments are known to hide no pair."""
    is_diagonal: bool = False
    """True if they are known to hide exactly the pairs (i, j) with i < j, counted from the start of the task.

    There are not more keys than queries, so that the last query sees every key.
    """
    visible: torch.Tensor | None = None
    """The pairs that they leave visible, if that is known and small."""
    added: torch.Tensor | None = None
    """`visible` as logits to be added: 0 or -inf."""
    has_empty_rows: bool = True
    """False if `visible` has a key for every row."""
    exact: Task | None = None
    """The same rows with exactly the keys that they see, if this task has a few more."""

    @property
    def heads(self) -> Span:
        """The query heads that read these key/value heads (MHA-HEAD-1)."""
        return Span(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    @property
    def pairs(self) -> int:
        """The number of scores."""
        return self.rows * self.keys.size

    @property
    def rows(self) -> int:
        """The number of rows of scores."""
        return self.batch.size * self.kv_heads.size * self.group * self.queries.size

    def constraint(self, scale: float) -> Constraint | None:
        """Return the kernel's arguments for what lengths, positions and segments hide, if they are known.

        The kernel multiplies the -inf of `is_causal` by the scale, so that the scale must be positive.
        """
        if self.sees_all:
            return NOTHING_HIDDEN
        if self.is_diagonal and scale > 0:
            return CAUSAL
        return None if self.added is None else Constraint(is_causal=False, added=self.added)

    def piece(self, batch: Span, kv_heads: Span, queries: Span) -> Task:
        """Return the task of some of the rows, with the same keys."""
        return Task(batch, kv_heads, self.group, queries, self.keys, sees_all=self.sees_all)

    def of_rows(self, array: torch.Tensor) -> torch.Tensor:
        """Select the rows of this task in (batch, heads, q_len, ...)."""
        return array if self.has_all_rows else narrowed(array, self.batch, self.heads, self.queries)

    def of_keys(self, array: torch.Tensor) -> torch.Tensor:
        """Select the keys of this task in (batch, kv_heads, kv_len, size)."""
        if self.is_whole:
            return array
        if self.has_all_rows:
            return array.narrow(2, self.keys.start, self.keys.size)
        return narrowed(array, self.batch, self.kv_heads, self.keys)

    def of_pairs(self, array: torch.Tensor) -> torch.Tensor:
        """Select the pairs of this task in a mask or a bias, of which axes of size 1 stay whole (MHA-MASK-2)."""
        if self.is_whole:
            return array
        spans = (self.batch, self.heads, self.queries, self.keys)
        return narrowed(array, *(span if size > 1 else ALL for span, size in zip(spans, array.shape, strict=True)))


ALL = Span(0, 1)
"""The only index of an axis of size 1."""
NOTHING_HIDDEN, CAUSAL = Constraint(is_causal=False, added=None), Constraint(is_causal=True, added=None)


def narrowed(array: torch.Tensor, *spans: Span) -> torch.Tensor:
    """Select a span of each of the first axes; `narrow` is faster than an index, and most axes stay whole."""
    for axis, (span, size) in enumerate(zip(spans, array.shape, strict=False)):
        if span.size != size:
            array = array.narrow(axis, span.start, span.size)
    return array


def blocks(indices: Span, length: int) -> list[Span]:
    """Cut consecutive indices into blocks of `length`; the last may be shorter."""
    starts = range(indices.start, indices.stop, length)
    return [Span(start, min(start + length, indices.stop)) for start in starts]


def pieces(task: Task) -> Iterator[Task]:
    """Cut a task into pieces of limited size: along queries first, then batch entries, then heads."""
    task = task.exact or task
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
                yield task.piece(batch, kv_heads, queries)
