"""Attention of a rank's queries over the keys of another rank, as calls on a single device.

A shard is one or two pieces of evenly spaced tokens, so the pairs of two pieces are those of a call whose window,
offset and lengths are shifted. The pairs that no shift describes have a mask, a block of rows at a time.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mha_spec.arguments import Arguments
from mha_spec.arrays import host_integers
from mha_spec.sharding import Piece, ShardedArguments, count_before, pieces

from .problem import Problem, readable
from .tasks import Operands, Span, blocks
from .visibility import with_integers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Block", "Form", "Shard", "visit"]

ROWS = 256
"""The number of rows that have a mask at once."""


class Form(NamedTuple):
    """The options of the whole sequence as integers, one for each batch entry; None where an option is absent."""

    layout: str
    ranks: int
    batch: int
    causal: bool
    window: tuple[int | None, int | None] | None
    chunk: int | None
    scale: float | None
    softcap: float | None
    q_offset: list[int]
    q_lengths: list[int] | None
    kv_lengths: list[int] | None
    kv_starts: list[int] | None
    prefix_lengths: list[int] | None

    @classmethod
    def of(cls, a: ShardedArguments, layout: str) -> Form:
        """Read the integers of a checked call; those on an accelerator are copied once (MHA-SHARD-2)."""
        a = with_integers(a)  # pyright: ignore[reportAssignmentType]
        return cls(
            *(layout, a.kv_ranks, a.batch, a.causal, a.bounded_window, a.chunk, a.scale, a.softcap),
            q_offset=_read(a.q_offset, a.batch) or [0] * a.batch,
            q_lengths=_read(a.q_lengths, a.batch, a.q_len),
            kv_lengths=_read(a.kv_lengths, a.batch, a.kv_len),
            kv_starts=_read(a.kv_starts, a.batch, a.kv_len),
            prefix_lengths=_read(a.prefix_lengths, a.batch, a.kv_len),
        )

    @property
    def positional(self) -> bool:
        """True if a constraint compares positions."""
        return self.causal or self.window is not None or self.chunk is not None

    def pieces(self, rank: int, length: int) -> list[tuple[Span, Piece]]:
        """Return the pieces of a rank's shard of `length` rows, and the rows that they take in it."""
        parts, spans = pieces(self.layout, rank, self.ranks, length), []
        for part in parts:
            start = spans[-1].stop if spans else 0
            spans.append(Span(start, start + part.size))
        return list(zip(spans, parts, strict=True))


def _read(value: Any, batch: int, most: int | None = None) -> list[int] | None:
    """Return an integer for each batch entry, clamped to 0 and to `most` (MHA-LEN-5)."""
    if value is None:
        return None
    numbers: Any = value.tolist() if isinstance(value, torch.Tensor) else host_integers(value)
    numbers = numbers if isinstance(numbers, list) else [numbers]
    numbers = numbers if len(numbers) == batch else numbers * batch
    return numbers if most is None else [min(max(number, 0), most) for number in numbers]


class Shard(NamedTuple):
    """The tensors of some tokens: queries, or keys and values, and their segment ids."""

    tensors: tuple[Tensor, ...]
    ids: Tensor | None

    def cut(self, rows: Span) -> Shard:
        """Select consecutive rows."""
        ids = None if self.ids is None else self.ids[:, rows.slice]
        return Shard(tuple(tensor.narrow(2, rows.start, rows.size) for tensor in self.tensors), ids)


class Block(NamedTuple):
    """Rows of a shard of queries and rows of a shard of keys, as a call on a single device."""

    rows: Span
    keys: Span
    problem: Problem
    x: Operands


def visit(
    form: Form,
    queries: tuple[Shard, list[tuple[Span, Piece]]],
    keys: tuple[Shard, list[tuple[Span, Piece]]],
) -> Iterator[Block]:
    """Yield the blocks of two shards, each with its pieces; those that are known to be hidden are left out."""
    for rows, q_piece in queries[1]:
        for columns, kv_piece in keys[1]:
            pair = _Pair(form, q_piece, kv_piece)
            if pair.is_hidden():
                continue
            seeing = Span(pair.first_row, rows.size)
            for block in [seeing] if pair.is_regular else blocks(seeing, ROWS):
                part = pair.of_rows(block)
                of_block = Span(rows.start + block.start, rows.start + block.stop)
                if not part.is_hidden():
                    call = part.call(queries[0].cut(of_block), keys[0].cut(columns))
                    if call is not None:
                        yield Block(of_block, columns, *call)


class _Pair(NamedTuple):
    """A piece of the queries and a piece of the keys."""

    form: Form
    q_piece: Piece
    kv_piece: Piece

    @property
    def is_regular(self) -> bool:
        """True if a shift of offset and window describes the pairs, as steps of a common stride allow it."""
        form, stride = self.form, self.kv_piece.stride
        if not form.positional or (stride == 1 and self.q_piece.stride == 1):
            return True
        is_common = form.window is None or len({*form.q_offset}) == 1
        return stride == self.q_piece.stride and form.chunk is None and is_common

    @property
    def first_row(self) -> int:
        """The number of rows that causal hides from all keys; without them, striped pairs lie on the diagonal."""
        form, stride = self.form, self.q_piece.stride
        if not form.causal or form.prefix_lengths is not None:
            return 0
        return max(0, -((max(form.q_offset) + self.q_piece.first - self.kv_piece.first) // stride))

    def of_rows(self, rows: Span) -> _Pair:
        """Select consecutive rows of the queries."""
        piece = self.q_piece
        return self._replace(q_piece=Piece(piece.first + piece.stride * rows.start, piece.stride, rows.size))

    def is_hidden(self) -> bool:
        """Tell whether lengths and positions hide all pairs of every batch entry."""
        return all(self._hides(entry) for entry in range(self.form.batch))

    def _hides(self, entry: int) -> bool:
        form, q_piece, kv_piece = self.form, self.q_piece, self.kv_piece
        q_length, kv_length, start, prefix = (
            None if numbers is None else numbers[entry]
            for numbers in (form.q_lengths, form.kv_lengths, form.kv_starts, form.prefix_lengths)
        )
        last_row = _size_before(q_length, q_piece) - 1
        first_key = 0 if start is None else max(0, count_before(start, kv_piece))
        last_key = _size_before(kv_length, kv_piece) - 1
        if last_row < 0 or first_key > last_key:
            return True
        first, last = (form.q_offset[entry] + q_piece.first + q_piece.stride * row for row in (0, last_row))
        least, most = (kv_piece.first + kv_piece.stride * key for key in (first_key, last_key))
        left, right = form.window or (None, None)
        too_late = right is not None and least > last + right
        too_late |= form.causal and least > last and least >= (prefix or 0)
        if too_late or (left is not None and most < first - left):
            return True
        if form.chunk is None:
            return False
        first, last, least, most = ((token - (start or 0)) // form.chunk for token in (first, last, least, most))
        return last < least or most < first

    def call(self, queries: Shard, keys: Shard) -> tuple[Problem, Operands] | None:
        """Describe the pair as a call on a single device; None if segments hide all of it."""
        if not _may_overlap(queries.ids, keys.ids):
            return None
        (query,), form = queries.tensors, self.form
        key, value = (tensor.to(query.dtype) for tensor in keys.tensors)
        options: dict[str, Any] = {"q_lengths": self._counts(form.q_lengths, self.q_piece)}
        options["kv_lengths"] = self._counts(form.kv_lengths, self.kv_piece)
        options |= self._shifted() if self.is_regular else {"kv_starts": self._starts()}
        mask = None if self.is_regular else self._mask(query.device)
        options |= {"q_segment_ids": queries.ids, "kv_segment_ids": keys.ids}
        a = Arguments(query, key, value, scale=form.scale, softcap=form.softcap, **options)
        return Problem.of(a, host=readable(query)), Operands(query, key, value, None, None, mask)

    def _counts(self, numbers: list[int] | None, piece: Piece) -> list[int] | None:
        """Count the rows of a piece before each number."""
        return None if numbers is None else [max(0, _size_before(number, piece)) for number in numbers]

    def _starts(self) -> list[int] | None:
        return self._counts(self.form.kv_starts, self.kv_piece)

    def _shifted(self) -> dict[str, Any]:
        """Return the options of position for rows that are counted from the start of the pieces.

        With `shift` the position of the first query less that of the first key, a bound of `shift + right` tokens is
        one of `(shift + right) // stride` rows. The origin of chunks may lie before the piece.
        """
        form, stride = self.form, self.kv_piece.stride
        if not form.positional:
            return {"kv_starts": self._starts()}
        shifts = [offset + self.q_piece.first - self.kv_piece.first for offset in form.q_offset]
        offsets = [shift // stride for shift in shifts]
        left, right = form.window or (None, None)
        left = None if left is None else offsets[0] + (left - shifts[0]) // stride
        right = None if right is None else (shifts[0] + right) // stride - offsets[0]
        starts = self._starts()
        if form.chunk is not None:
            starts = [start - self.kv_piece.first for start in form.kv_starts or [0] * form.batch]
        return {
            "causal": form.causal,
            "q_offset": offsets,
            "window": None if left is None and right is None else (left, right),
            "chunk": form.chunk,
            "kv_starts": starts,
            "prefix_lengths": self._counts(form.prefix_lengths, self.kv_piece),
        }

    def _mask(self, device: torch.device) -> Tensor:
        """Compare the positions of all pairs, (batch, 1, rows, keys)."""
        form = self.form
        offset, start, prefix = (
            0 if numbers is None else torch.tensor(numbers, device=device)[:, None, None, None]
            for numbers in (form.q_offset, form.kv_starts, form.prefix_lengths)
        )
        positions, keys = _tokens(self.q_piece, device)[:, None] + offset, _tokens(self.kv_piece, device)
        left, right = form.window or (None, None)
        shown = []
        if form.causal:
            shown.append((keys <= positions) | (keys < prefix))
        if left is not None:
            shown.append(keys >= positions - left)
        if right is not None:
            shown.append(keys <= positions + right)
        if form.chunk is not None:
            shown.append((positions - start) // form.chunk == (keys - start) // form.chunk)
        return reduce(torch.Tensor.logical_and, shown)


def _size_before(number: int | None, piece: Piece) -> int:
    """Return the number of rows of a piece before a token; it is negative or 0 if there is none."""
    return piece.size if number is None else min(piece.size, count_before(number, piece))


def _tokens(piece: Piece, device: torch.device) -> Tensor:
    return piece.first + piece.stride * torch.arange(piece.size, device=device)


def _may_overlap(q_ids: Tensor | None, kv_ids: Tensor | None) -> bool:
    """Return False if the ranges of ids on the host have no number in common in any batch entry."""
    if q_ids is None or kv_ids is None or not readable(q_ids) or torch.uint64 in {q_ids.dtype, kv_ids.dtype}:
        return True
    (least, most), (kv_least, kv_most) = (torch.aminmax(ids.to(torch.int64), dim=1) for ids in (q_ids, kv_ids))
    return bool(((most >= kv_least) & (kv_most >= least)).any())
