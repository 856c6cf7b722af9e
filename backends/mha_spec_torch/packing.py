"""The sequences of a packed or paged call as tasks of a dense call, whose tokens are those of all sequences."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy
import torch

from mha_spec import steps
from mha_spec.arguments import Arguments
from mha_spec.varlen_sequences import sequences_of

from .problem import Problem, readable
from .tasks import SCORES, Operands, Span, Task, blocks, softmax_dtype
from .visibility import Visibility

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from mha_spec.varlen_arguments import VarlenArguments
    from mha_spec.varlen_sequences import PackedSequence

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

    def tasks(self, *, heads: int) -> Iterator[Task]:
        """Yield the tasks of the sequence among the tokens of all; with `heads` of a linear bias, small ones."""
        for task in self.visibility.tasks:
            rows = task.queries.size if not heads else max(1, SCORES // (heads * task.keys.size))
            if rows >= task.queries.size:
                yield _moved(task, self.queries.start, self.keys.start)
                continue
            for queries in blocks(task.queries, rows):
                piece = Task(task.batch, task.kv_heads, task.group, queries, task.keys, sees_all=task.sees_all)
                yield _moved(piece, self.queries.start, self.keys.start)


def _moved(task: Task, queries: int, keys: int) -> Task:
    """Move a task by a number of queries and of keys."""
    return replace(
        task,
        queries=Span(task.queries.start + queries, task.queries.stop + queries),
        keys=Span(task.keys.start + keys, task.keys.stop + keys),
        is_whole=False,
        has_all_rows=False,
        exact=None if task.exact is None else _moved(task.exact, queries, keys),
    )


class PackedVisibility:
    """The constraints of every sequence, as a `Visibility` that is cut into tasks."""

    def __init__(self, parts: Sequence[Part], *, heads: int = 0) -> None:
        self.parts = parts
        self.tasks = [task for part in parts for task in part.tasks(heads=heads)]
        self._starts = [part.queries.start for part in parts]

    def constraints(self, task: Task) -> list[Tensor]:
        """Compare the pairs of a task with every constraint that may hide some of them."""
        part = self._part(task)
        return part.visibility.constraints(_moved(task, -part.queries.start, -part.keys.start))

    def with_bias(self, slopes: Tensor | None, task: Task, x: Operands) -> Operands:
        """Add the linear bias to the operands of a task, (1, heads, queries, keys) (MHA-VARLEN-8)."""
        if slopes is None:
            return x
        part = self._part(task)
        task = _moved(task, -part.queries.start, -part.keys.start)
        return x._replace(bias=linear_bias(slopes[task.heads.slice], part.offset, task.queries, task.keys))

    def cut(self, slopes: Tensor | None, x: Operands, task: Task) -> Operands:
        """Select the part of operands whose tokens are those of all sequences."""
        return self.with_bias(slopes, task, x.cut(task))

    def cut_blocks(self, pages: Pages, slopes: Tensor | None, x: Operands, task: Task) -> Operands:
        """Select the part of operands whose keys and values are in blocks; only those of the task are gathered."""
        part = self._part(task)
        keys = Span(task.keys.start - part.keys.start, task.keys.stop - part.keys.start)
        key, value = (pages.gather(name, pool, part, keys) for name, pool in (("key", x.key), ("value", x.value)))
        sinks = None if x.sinks is None else x.sinks[:, None, None]
        return self.with_bias(slopes, task, Operands(task.of_rows(x.query), dense(key), dense(value), None, sinks))

    def _part(self, task: Task) -> Part:
        return self.parts[bisect_right(self._starts, task.queries.start) - 1]


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

    @classmethod
    def of(cls, a: VarlenArguments) -> Packed:
        """Read the sequences of a call."""
        sequences, dtype = sequences_of(a), softmax_dtype(a.query)
        parts = list(_parts(a, sequences, dtype))
        slopes = None if a.alibi_slopes is None else a.alibi_slopes.detach().to(dtype)
        visibility = PackedVisibility(parts, heads=0 if slopes is None else a.heads)
        host = readable(a.query)
        problem = Problem(
            scale=steps.scale_of(a.scale, a.query.shape[2]),
            softcap=a.softcap,
            dropout_rate=0.0,
            dtype=dtype,
            visibility=cast("Visibility", visibility),
            host=host,
            suits_flash=host and a.softcap is None,
            is_ready=False,
            suits_autograd=False,
            dropout_mask=None,
            draws=None,
            cutter=partial(visibility.cut, slopes),
        )
        paged = None
        if a.is_paged:
            cutter = partial(visibility.cut_blocks, Pages(a.key.shape[1]), slopes)
            paged = problem._replace(cutter=cutter)
        return cls(a, problem, paged, parts, _outside(sequences, a.q_tokens))

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
    """Undo `dense`."""
    return x[0].transpose(0, 1)


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
            visibility = known[shape] = _visibility(a, *shape, dtype)
        ordered = numpy.array(numbers or (), numpy.int64)
        yield Part(Span(queries.start, queries.stop), Span(start, end), offset, visibility, ordered)


def _visibility(a: VarlenArguments, queries: int, keys: int, offset: int, dtype: torch.dtype) -> Visibility:
    query, key = a.query.new_empty((1, a.heads, queries, 0)), a.query.new_empty((1, a.kv_heads, keys, 0))
    options: dict[str, Any] = {"causal": a.causal, "window": a.window, "q_offset": offset} if a.positional else {}
    return Visibility(Arguments(query, key, key, **options), dtype, host=True)


def _outside(sequences: Sequence[PackedSequence], tokens: int) -> list[slice]:
    """Return the queries before the first sequence and behind the last."""
    first, end = (sequences[0].queries.start, sequences[-1].queries.stop) if sequences else (0, 0)
    return [slice(start, stop) for start, stop in ((0, first), (end, tokens)) if start < stop]
