"""The sequences of a packed or paged call as tasks of a dense call, whose tokens are those of all sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy
import torch

from mha_spec import steps
from mha_spec.arguments import Arguments
from mha_spec.varlen_sequences import sequences_of

from .function import transformed
from .problem import Problem, readable
from .tasks import SCORES, Operands, Span, Task, blocks, narrowed, softmax_dtype
from .visibility import Visibility

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from mha_spec.varlen_arguments import VarlenArguments
    from mha_spec.varlen_sequences import PackedSequence

    Cutter = Callable[[Operands, Task], Operands]

__all__ = ["Packed", "Part", "dense", "linear_bias", "packed_again"]


class Part(NamedTuple):
    """A sequence that has queries, with its constraints, which count queries and keys from 0."""

    queries: Span
    keys: Span
    """Its keys among those of all sequences."""
    offset: int
    visibility: Visibility
    blocks: numpy.ndarray
    """Its blocks in order; none in a call without a block table."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive sequences of equal lengths, which are the batch entries of a dense call without a copy."""

    first: Part
    count: int
    visibility: Visibility
    """The constraints of the batch."""

    def batch(self, array: Tensor, tokens: Span) -> Tensor:
        """View tokens of the first sequence and of those after it in (1, heads, tokens, ...) as a batch."""
        if self.count == 1:
            return array.narrow(2, tokens.start, tokens.size)
        part = array[0].narrow(1, tokens.start, self.count * tokens.size)
        return part.unflatten(1, (self.count, tokens.size)).transpose(0, 1)

    def tasks(self, *, heads: int, tokens: int) -> Iterator[PackedTask]:
        """Yield the tasks of a call of `tokens` queries; with `heads` of a linear bias, small ones."""
        for task in self.visibility.tasks:
            whole = self._task(task, has_all_rows=task.has_all_rows and self.count * self.first.queries.size == tokens)
            rows = task.queries.size if not heads else max(1, SCORES // (heads * task.keys.size))
            if rows >= task.queries.size:
                yield whole
            else:
                for queries in blocks(task.queries, rows):
                    yield whole.piece(task.batch, task.kv_heads, queries)

    def _task(self, task: Task, *, has_all_rows: bool = False) -> PackedTask:
        rows = task.batch, task.kv_heads, task.group, task.queries, task.keys
        return PackedTask(
            *rows,
            has_all_rows=has_all_rows,
            sees_all=task.sees_all,
            is_diagonal=task.is_diagonal,
            exact=None if task.exact is None else self._task(task.exact),
            run=self,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTask(Task):
    """A task of a run, whose queries and keys count from the start of each sequence."""

    run: Run

    def piece(self, batch: Span, kv_heads: Span, queries: Span) -> PackedTask:
        """Return the task of some of the rows, with the same keys."""
        return PackedTask(batch, kv_heads, self.group, queries, self.keys, sees_all=self.sees_all, run=self.run)

    def of_rows(self, array: Tensor) -> Tensor:
        """Select the rows of this task in (1, heads, tokens, ...)."""
        return narrowed(self.run.batch(array, self.run.first.queries), self.batch, self.heads, self.queries)

    def of_keys(self, array: Tensor) -> Tensor:
        """Select the keys of this task in (1, kv_heads, tokens, size)."""
        return narrowed(self.run.batch(array, self.run.first.keys), self.batch, self.kv_heads, self.keys)


class PackedVisibility:
    """The constraints of every sequence, as a `Visibility` that is cut into tasks."""

    def __init__(self, a: VarlenArguments, parts: Sequence[Part], dtype: torch.dtype) -> None:
        self._a, self._parts, self._dtype = a, parts, dtype

    @cached_property
    def tasks(self) -> list[PackedTask]:
        """The tasks of all sequences, which not every path of a call needs."""
        a, runs = self._a, _runs(self._a, self._parts, self._dtype)
        heads = 0 if a.alibi_slopes is None else a.heads
        return [task for run in runs for task in run.tasks(heads=heads, tokens=a.q_tokens)]

    def constraints(self, task: PackedTask) -> list[Tensor]:
        """Compare the pairs of a task with every constraint that may hide some of them."""
        return task.run.visibility.constraints(task)


def with_bias(slopes: Tensor | None, task: PackedTask, x: Operands) -> Operands:
    """Add the linear bias to the operands of a task, (1, heads, queries, keys) (MHA-VARLEN-8)."""
    if slopes is None:
        return x
    return x._replace(bias=linear_bias(slopes[task.heads.slice], task.run.first.offset, task.queries, task.keys))


def cut(slopes: Tensor | None, x: Operands, task: PackedTask) -> Operands:
    """Select the part of operands whose tokens are those of all sequences."""
    return with_bias(slopes, task, x.cut(task))


def cut_blocks(pages: Pages, slopes: Tensor | None, x: Operands, task: PackedTask) -> Operands:
    """Select the part of operands whose keys and values are in blocks; only those of the task are gathered."""
    part = task.run.first
    key, value = (pages.gather(name, pool, part, task.keys) for name, pool in (("key", x.key), ("value", x.value)))
    sinks = None if x.sinks is None else x.sinks[:, None, None]
    return with_bias(slopes, task, Operands(task.of_rows(x.query), dense(key), dense(value), None, sinks))


class Pages:
    """The blocks of a call, and memory into which those of a sequence are gathered.

    The memory stays in a core's cache, so that gathering costs little more than reading the blocks.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._memory: dict[str, Tensor] = {}

    def gather(self, name: str, pool: Tensor, part: Part, keys: Span) -> Tensor:
        """Return keys of a sequence, (keys, kv_heads, size), until the next call with this name (MHA-VARLEN-6)."""
        first, last = keys.start // self._block_size, -(-keys.stop // self._block_size)
        numbers = part.blocks[first:last]
        start, count = int(numbers[0]), len(numbers)
        if bool((numbers == numpy.arange(start, start + count)).all()):
            gathered = pool[start : start + count]
        else:
            shape = (count, *pool.shape[1:])
            memory = self._memory.get(name)
            if memory is None or memory.shape[0] < count:
                memory = self._memory[name] = pool.new_empty(shape)
            gathered = memory[:count]
            torch.index_select(pool, 0, torch.as_tensor(numbers, device=pool.device), out=gathered)
        return gathered.flatten(0, 1).narrow(0, keys.start - first * self._block_size, keys.size)


def linear_bias(slopes: Tensor, offset: int, queries: Span, keys: Span) -> Tensor:
    """Compute -slope[h] |p - j|, (1, heads, queries, keys), in the type of the slopes (MHA-VARLEN-8)."""
    positions = torch.arange(queries.start + offset, queries.stop + offset, device=slopes.device)
    distances = (torch.arange(keys.start, keys.stop, device=slopes.device) - positions[:, None]).abs()
    return -slopes[None, :, None, None] * distances.to(slopes.dtype)


@dataclass
class Packed:
    """A packed or paged call that has been read, without its operands."""

    a: VarlenArguments
    problem: Problem
    """The call with the tokens of all sequences."""
    paged: Problem | None
    """The call with keys and values in blocks; None in a call without a block table."""
    parts: list[Part]
    outside: list[slice]
    """The queries of no sequence (MHA-VARLEN-3)."""
    slopes: Tensor | None
    """A copy of the slopes of a linear bias, in the softmax's type."""

    @classmethod
    def of(cls, a: VarlenArguments) -> Packed:
        """Read the sequences of a call."""
        sequences, dtype = sequences_of(_with_table_on_host(a)), softmax_dtype(a.query)
        parts = list(_parts(a, sequences, dtype))
        slopes = None if a.alibi_slopes is None else a.alibi_slopes.detach().to(dtype, copy=True)
        host = readable(a.query)
        problem = Problem(
            scale=steps.scale_of(a.scale, a.query.shape[2]),
            softcap=a.softcap,
            dropout_rate=0.0,
            dtype=dtype,
            visibility=cast("Visibility", PackedVisibility(a, parts, dtype)),
            host=host,
            suits_flash=host and a.softcap is None,
            is_ready=False,
            direct=None,
            dropout_mask=None,
            draws=None,
            cutter=cast("Cutter", partial(cut, slopes)),
        )
        paged = None
        if a.is_paged:
            cutter = partial(cut_blocks, Pages(a.key.shape[1]), slopes)
            paged = problem._replace(cutter=cast("Cutter", cutter))
        return cls(a, problem, paged, parts, _outside(sequences, a.q_tokens), slopes)

    @cached_property
    def slots(self) -> Tensor:
        """The slot of every key in use of a call with a block table, counted over all blocks (MHA-VARLEN-6)."""
        block_size = self.a.key.shape[1]
        offsets, slots = numpy.arange(block_size), [numpy.zeros(0, numpy.int64)]
        slots += [(part.blocks[:, None] * block_size + offsets).reshape(-1)[: part.keys.size] for part in self.parts]
        return torch.as_tensor(numpy.concatenate(slots), device=self.a.query.device)

    def operands(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Operands:
        """Give the operands the axes of a dense call with a single batch entry; gather blocks (MHA-VARLEN-6)."""
        key, value = self.gather(key), self.gather(value)
        return Operands(dense(query), dense(key), dense(value), None, sinks)

    def gather(self, x: Tensor) -> Tensor:
        """Return keys or values as tokens, (tokens, kv_heads, size); blocks in the order of the table."""
        return x.flatten(0, 1).index_select(0, self.slots) if self.a.is_paged else x

    def scatter(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Undo `gather`: add the gradients of keys or values to their slots (MHA-VARLEN-11)."""
        if not self.a.is_paged:
            return gradient
        slots = gradient.new_zeros((like.shape[0] * like.shape[1], *like.shape[2:]))
        return slots.index_add_(0, self.slots, gradient).view(like.shape)


def dense(x: Tensor) -> Tensor:
    """Give packed tokens the axes of a dense call: (1, heads, tokens, size)."""
    return x.transpose(0, 1)[None]


def packed_again(x: Tensor) -> Tensor:
    """Undo `dense`; the entries of a batch (sequences, heads, length, size) follow each other."""
    return x.transpose(1, 2).flatten(0, 1)


def _with_table_on_host(a: VarlenArguments) -> VarlenArguments:
    """Return the call with its block table in NumPy; torch.func has no conversion to it, but one to a list."""
    if not isinstance(a.block_table, torch.Tensor) or transformed():
        return a
    return replace(a, block_table=a.block_table.numpy(force=True))


def _parts(a: VarlenArguments, sequences: Sequence[PackedSequence], dtype: torch.dtype) -> Iterator[Part]:
    """Yield the sequences that have queries; sequences of equal lengths share their constraints."""
    known: dict[tuple[int, int, int], Visibility] = {}
    end = 0
    for queries, keys, offset, numbers in sequences:
        if not queries:
            continue
        start = keys.start if numbers is None else end
        end = start + len(keys)
        shape = len(queries), len(keys), offset
        visibility = known.get(shape)
        if visibility is None:
            visibility = known[shape] = _visibility(a, 1, *shape, dtype)
        ordered = numpy.asarray(() if numbers is None else numbers, numpy.int64)
        yield Part(Span(queries.start, queries.stop), Span(start, end), offset, visibility, ordered)


def _visibility(a: VarlenArguments, count: int, queries: int, keys: int, offset: int, dtype: torch.dtype) -> Visibility:
    """Return the constraints of a number of sequences of equal lengths."""
    query, key = a.query.new_empty((count, a.heads, queries, 0)), a.query.new_empty((count, a.kv_heads, keys, 0))
    options: dict[str, Any] = {"causal": a.causal, "window": a.window, "q_offset": offset} if a.positional else {}
    return Visibility(Arguments(query, key, key, **options), dtype, host=True)


def _runs(a: VarlenArguments, parts: Sequence[Part], dtype: torch.dtype) -> Iterator[Run]:
    """Join consecutive sequences of equal lengths; blocks are gathered for each sequence, into a core's cache."""
    start = 0
    while start < len(parts):
        first, stop = parts[start], start + 1
        while stop < len(parts) and not a.is_paged and _continues(parts[stop - 1], parts[stop]):
            stop += 1
        count, shape = stop - start, (first.queries.size, first.keys.size, first.offset)
        yield Run(first, count, first.visibility if count == 1 else _visibility(a, count, *shape, dtype))
        start = stop


def _continues(before: Part, part: Part) -> bool:
    """Tell whether a sequence lies behind another of the same lengths and offset, which have the same constraints."""
    return part.visibility is before.visibility and part.keys.start == before.keys.stop


def _outside(sequences: Sequence[PackedSequence], tokens: int) -> list[slice]:
    """Return the queries before the first sequence and behind the last."""
    first, end = (sequences[0].queries.start, sequences[-1].queries.stop) if sequences else (0, 0)
    return [slice(start, stop) for start, stop in ((0, first), (end, tokens)) if start < stop]
