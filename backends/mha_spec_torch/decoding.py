"""The forward pass of a few queries of sequences in blocks on the CPU, which reads the blocks where they are.

To copy the blocks of a sequence takes as long as to attend to them. So the pairs of a row and a key that it sees are
the elements of a sparse matrix (rows, slots), whose rows are those of the query, (tokens, heads):

    scores  = elements of query by keys^T                   the product is computed for these elements only
    output  = weights by values                             a sum of the rows that the elements name

The keys of a query are cut into tiles that stay in a core's cache until the last head has read them; each tile has
rows of its own.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .packing import Packed, Part

__all__ = ["attend"]

ROWS = 8
"""The largest number of rows that may read a key, as each reads it again from the cache of the core."""
TILE = 2**17
"""The largest number of bytes of the keys of a tile, of all heads."""
PADDING = 4
"""How many times the pairs the scores may cover: the longest row sets their number for all."""


class Visible(NamedTuple):
    """The keys that each query sees in the blocks of all sequences, on which the pairs of a call depend."""

    blocks: bytes
    """The numbers of the blocks of all sequences."""
    spans: tuple[tuple[int, int], ...]
    """The first key of each query, and the end, as slots of these blocks."""
    heads: int
    pool: tuple[int, int, int]
    """The number of blocks that exist, their size, and kv_heads."""
    tile: int
    """The number of keys of a tile."""
    dtype: type[numpy.signedinteger]


class Pairs(NamedTuple):
    """The pairs of rows and visible keys, in the order of the rows, (queries, tiles, heads)."""

    bounds: Any
    """The first pair of each row, and their number."""
    slots: Any
    """The key of each pair among the rows of the keys of all slots and heads."""
    lengths: Any
    """The number of keys of each row."""
    longest: int
    tiles: int
    """The number of tiles of each query, of which the last may be empty."""
    sees_none: Any
    """The queries that see no key, (queries, 1); None if each sees a key."""

    def tensors(self) -> Pairs:
        """Return the pairs with tensors that share the memory of the arrays of NumPy."""
        bounds, slots, lengths = map(torch.from_numpy, self[:3])
        sees_none = None if self.sees_none is None else torch.from_numpy(self.sees_none)
        return Pairs(bounds, slots, lengths, self.longest, self.tiles, sees_none)


def attend(
    packed: Packed, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *, needs_lse: bool
) -> tuple[Tensor, Any] | None:
    """Compute output, (tokens, heads, v_dim), and if needed lse, (heads, tokens); None if another path must do so."""
    pairs = _pairs(_visible(packed)) if _suits(packed, query, key, value) else None
    if pairs is None:
        return None
    pairs = pairs.tensors()
    first, last = packed.parts[0].queries.start, packed.parts[-1].queries.stop
    rows = query.detach()[first:last, None].expand(-1, pairs.tiles, -1, -1).flatten(0, 2)
    scores = _padded(pairs, _scores(packed, pairs, rows, key.detach().flatten(0, 2)))
    scores = scores.view(-1, pairs.tiles, query.shape[1], pairs.longest)
    total, largest = _exponentials(pairs, scores, sinks)
    output = torch.nn.functional.embedding_bag(
        pairs.slots,
        value.detach().flatten(0, 2),
        pairs.bounds,
        mode="sum",
        include_last_offset=True,
        per_sample_weights=_pairs_of(pairs, scores.flatten(0, 2)),
    )
    # The sum of a row that sees a key or has a sink is at least 1.
    output = output.unflatten(0, scores.shape[:3]).sum(1) / total.clamp(min=1.0)[..., None]
    # A value that is not finite changes what the component of a row is, which the other path decides; so does a NaN
    # among the scores, which makes the weights and the output of its row NaN.
    if not math.isfinite(output.sum()) and not bool(output.isfinite().all()):
        return None
    return _placed(packed, output, largest + total.log() if needs_lse else None)


def _suits(packed: Packed, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if the blocks lie in memory as rows, and few queries read each of them."""
    a = packed.a
    if not packed.parts or not packed.problem.host or a.alibi_slopes is not None:
        return False
    if not (key.is_cpu and torch.backends.mkl.is_available() and key.is_contiguous() and value.is_contiguous()):
        return False
    if key.dtype not in (torch.float32, torch.float64) or 0 in (query.shape[2], value.shape[3]):
        return False
    queries = max(part.queries.size for part in packed.parts)
    return queries * (a.heads // a.kv_heads) <= ROWS


@lru_cache(maxsize=2)
def _pairs(visible: Visible) -> Pairs | None:
    """Return pairs as arrays of NumPy; None if there are none, or if the rows see too different numbers of keys.

    All layers of a model ask for the pairs of a step, or some of them for those of a window.
    """
    tile, spans = visible.tile, numpy.array(visible.spans)
    longest_row = int((spans[:, 1] - spans[:, 0]).max())
    tiles = max(1, -(-longest_row // tile))
    counts = numpy.clip(numpy.diff(spans) - numpy.arange(0, tiles * tile, tile), 0, tile)
    lengths, longest = numpy.repeat(counts, visible.heads), min(tile, longest_row)
    bounds = numpy.concatenate([[0], numpy.cumsum(lengths)], dtype=visible.dtype)
    # torch takes no more elements than a dense matrix has.
    most = len(lengths) * math.prod(visible.pool)
    if bounds[-1] > most or not 0 < len(lengths) * longest <= PADDING * bounds[-1]:
        return None
    slots, ends = numpy.empty(bounds[-1], visible.dtype), bounds[:: tiles * visible.heads].tolist()
    rows, heads = _rows_of_slots(visible), _heads_of_keys(visible)
    for (first, last), (start, end) in zip(visible.spans, pairwise(ends), strict=True):
        _put_pairs(rows[first:last], heads, tile, slots[start:end])
    sees_none = None if counts[:, 0].all() else counts[:, :1] == 0
    return Pairs(bounds, slots, lengths, longest, tiles, sees_none)


def _visible(packed: Packed) -> Visible:
    """Return the keys that each query of a call sees."""
    a, spans, start = packed.a, [], 0
    for part in packed.parts:
        spans += [(start + first, start + end) for first, end in _spans(part)]
        start += len(part.blocks) * a.key.shape[1]
    blocks = numpy.concatenate([part.blocks for part in packed.parts])
    tile = max(1, TILE // (a.key[0, 0].numel() * a.key.element_size()))
    return Visible(blocks.tobytes(), tuple(spans), a.heads, tuple(a.key.shape[:3]), tile, _index_dtype(packed))


def _rows_of_slots(visible: Visible) -> numpy.ndarray:
    """Return the row of the first head of each slot in the blocks of all sequences (MHA-VARLEN-6)."""
    _, block_size, kv_heads = visible.pool
    blocks, dtype = numpy.frombuffer(visible.blocks, numpy.int64), visible.dtype
    rows = (blocks * (block_size * kv_heads)).astype(dtype)[:, None] + numpy.arange(block_size, dtype=dtype) * kv_heads
    return rows.reshape(-1)


def _heads_of_keys(visible: Visible) -> numpy.ndarray:
    """Return the key/value head that each head reads, (heads, 1) (MHA-HEAD-1)."""
    kv_heads = visible.pool[2]
    return numpy.repeat(numpy.arange(kv_heads, dtype=visible.dtype), visible.heads // kv_heads)[:, None]


def _put_pairs(rows: numpy.ndarray, heads: numpy.ndarray, tile: int, pairs: numpy.ndarray) -> None:
    """Write the pairs of a query, whose slots have these rows, in the order (tiles, heads, keys)."""
    whole, count = len(rows) // tile * tile, len(heads)
    if whole:
        numpy.add(rows[:whole].reshape(-1, 1, tile), heads, out=pairs[: whole * count].reshape(-1, count, tile))
    if whole < len(rows):
        numpy.add(rows[whole:], heads, out=pairs[whole * count :].reshape(count, -1))


def _index_dtype(packed: Packed) -> type[numpy.signedinteger]:
    """Return int32, of which the kernels read half as much, unless int32 cannot count the pairs or the elements."""
    pairs = packed.a.heads * sum(part.queries.size * part.keys.size for part in packed.parts)
    return numpy.int32 if max(pairs, packed.a.key.numel(), packed.a.value.numel()) < 2**31 else numpy.int64


def _spans(part: Part) -> list[tuple[int, int]]:
    """Return the first key that each query of a sequence sees, and the end (MHA-CAUSAL-1, MHA-WINDOW-1)."""
    left, right, keys = part.visibility.left, part.visibility.right, part.keys.size
    if left is None and right is None:
        return [(0, keys)] * part.queries.size
    positions = range(part.offset, part.offset + part.queries.size)
    firsts = [0 if left is None else min(max(position - left, 0), keys) for position in positions]
    ends = [keys if right is None else min(max(position + right + 1, 0), keys) for position in positions]
    return [(first, max(first, end)) for first, end in zip(firsts, ends, strict=True)]


def _scores(packed: Packed, pairs: Pairs, rows: Tensor, keys: Tensor) -> Tensor:
    """Compute the score of each pair (MHA-SCORE-2, MHA-CAP-1)."""
    _accept_sparse_tensors()
    # NumPy leaves it to the system to give zeroed memory, while torch writes the zeros.
    zeros = torch.from_numpy(numpy.zeros(len(pairs.slots), str(rows.dtype).removeprefix("torch.")))
    size = rows.shape[0], keys.shape[0]
    matrix = torch.sparse_csr_tensor(pairs.bounds, pairs.slots, zeros, size=size, device="cpu")
    # Into the matrix itself, because a new matrix would first get a copy of its indices.
    torch.sparse.sampled_addmm(matrix, rows, keys.t(), beta=0.0, alpha=packed.problem.scale, out=matrix)
    scores = matrix.values()
    softcap: Any = packed.problem.softcap
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _exponentials(pairs: Pairs, scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replace scores, (queries, tiles, heads, keys), by exp(score - largest); return the sums and the largest."""
    largest = scores.amax((1, 3))
    if pairs.sees_none is not None:
        largest = largest.masked_fill(pairs.sees_none, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sinks = sinks.detach().to(scores.dtype)
        largest = torch.maximum(largest, sinks)
    total = scores.sub_(largest[:, None, :, None]).exp_().sum((1, 3))
    if sinks is not None:
        total += torch.exp(sinks - largest)
    return total, largest


@lru_cache(maxsize=1)
def _accept_sparse_tensors() -> None:
    """Create a sparse matrix, of which torch warns a process once that they are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), device="cpu")


def _padded(pairs: Pairs, values: Tensor) -> Tensor:
    """Return the values of the pairs of each row, (rows, longest); -inf behind its last."""
    if len(values) == len(pairs.lengths) * pairs.longest:
        return values.view(-1, pairs.longest)
    padded = values.new_full((len(pairs.lengths), pairs.longest), -math.inf)
    padded[_inside(pairs)] = values
    return padded


def _pairs_of(pairs: Pairs, padded: Tensor) -> Tensor:
    """Undo `_padded`."""
    return padded.flatten() if len(pairs.slots) == padded.numel() else padded[_inside(pairs)]


def _inside(pairs: Pairs) -> Tensor:
    return torch.arange(pairs.longest, device="cpu") < pairs.lengths[:, None]


def _placed(packed: Packed, output: Tensor, lse: Tensor | None) -> tuple[Tensor, Any]:
    """Add the rows of no sequence to output and lse, (tokens, heads, ...) (MHA-VARLEN-3)."""
    first, count = packed.parts[0].queries.start, packed.a.q_tokens
    before_and_after = first, count - first - len(output)
    if any(before_and_after):
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, *before_and_after))
        lse = None if lse is None else torch.nn.functional.pad(lse, (0, 0, *before_and_after), value=-math.inf)
    return output, None if lse is None else lse.t()
