"""The forward pass of a few queries of sequences in blocks on the CPU, which reads the blocks where they are.

To copy the blocks of a sequence takes as long as to attend to them. So the pairs of a row and a key that it sees are
the elements of a sparse matrix (rows, slots), whose rows are those of the query, (tokens, heads):

    scores  = elements of query by keys^T                   the product is computed for these elements only
    output  = weights by values                             a sum of the rows that the elements name
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .packing import Packed, Part

__all__ = ["attend"]

ROWS = 8
"""The largest number of rows that may read a key, as each reads it again from the cache of the core."""
PADDING = 4
"""How many times the pairs the scores may cover: the longest row sets their number for all."""


class Pairs(NamedTuple):
    """The pairs of rows and visible keys, in the order of the rows."""

    bounds: Tensor
    """The first pair of each row, and their number."""
    slots: Tensor
    """The key of each pair among the rows of the keys of all slots and heads."""
    lengths: Tensor
    """The number of keys of each row."""
    longest: int


def attend(
    packed: Packed, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *, needs_lse: bool
) -> tuple[Tensor, Any] | None:
    """Compute output, (tokens, heads, v_dim), and if needed lse, (heads, tokens); None if another path must do so."""
    pairs = _pairs(packed) if _suits(packed, query, key, value) else None
    if pairs is None:
        return None
    first, last = packed.parts[0].queries.start, packed.parts[-1].queries.stop
    rows = query.detach()[first:last].flatten(0, 1)
    scores = _padded(pairs, _scores(packed, pairs, rows, key.detach().flatten(0, 2)))
    # exp(scores - lse) would round the weights by u |lse|; the softmax divides by a sum.
    weights, lse = scores.softmax(1), scores.logsumexp(1) if needs_lse or sinks is not None else None
    if sinks is not None and lse is not None:
        logits = sinks.detach().to(lse.dtype).repeat(last - first)
        weights, lse = weights * torch.sigmoid(lse - logits)[:, None], torch.logaddexp(lse, logits)
    output = torch.nn.functional.embedding_bag(
        pairs.slots,
        value.detach().flatten(0, 2),
        pairs.bounds[:-1],
        mode="sum",
        per_sample_weights=_pairs_of(pairs, weights),
    )
    # A value that is not finite changes what the component of a row is, which the other path decides; so does a NaN
    # among the scores, which makes the weights and the output of its row NaN.
    if not math.isfinite(output.sum()) and not bool(output.isfinite().all()):
        return None
    rows = (-1, query.shape[1])
    return _placed(packed, output.unflatten(0, rows), lse.unflatten(0, rows) if needs_lse and lse is not None else None)


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


def _pairs(packed: Packed) -> Pairs | None:
    """Return the pairs of a call; None if it has none, or if its rows see too different numbers of keys."""
    heads, kv_heads, block_size = packed.a.heads, packed.a.kv_heads, packed.a.key.shape[1]
    dtype = _index_dtype(packed)
    head_of_row = numpy.repeat(numpy.arange(kv_heads, dtype=dtype), heads // kv_heads)[:, None]
    seen = [(part, keys) for part in packed.parts for keys in _visible(part)]
    counts = [keys.stop - keys.start for _, keys in seen]
    lengths, longest = numpy.repeat(counts, heads), max(counts)
    bounds = numpy.concatenate([[0], numpy.cumsum(lengths)], dtype=dtype)
    # torch takes no more elements than a dense matrix has.
    most = len(lengths) * math.prod(packed.a.key.shape[:3])
    if bounds[-1] > most or not 0 < len(lengths) * longest <= PADDING * bounds[-1]:
        return None
    slots = numpy.empty(bounds[-1], dtype)
    for (part, keys), place in zip(seen, numpy.split(slots, bounds[heads:-1:heads]), strict=True):
        slots_of_row = (_slots(part, keys, block_size) * kv_heads).astype(dtype)
        numpy.add(slots_of_row, head_of_row, out=place.reshape(heads, -1))
    return Pairs(torch.from_numpy(bounds), torch.from_numpy(slots), torch.from_numpy(lengths), longest)


def _slots(part: Part, keys: slice, block_size: int) -> numpy.ndarray:
    """Return the slots of some keys of a sequence, counted over all blocks (MHA-VARLEN-6)."""
    slots = part.blocks[:, None] * block_size + numpy.arange(block_size)
    return slots.reshape(-1)[keys]


def _index_dtype(packed: Packed) -> type[numpy.signedinteger]:
    """Return int32, of which the kernels read half as much, unless int32 cannot count the pairs or the elements."""
    pairs = packed.a.heads * sum(part.queries.size * part.keys.size for part in packed.parts)
    return numpy.int32 if max(pairs, packed.a.key.numel(), packed.a.value.numel()) < 2**31 else numpy.int64


def _visible(part: Part) -> list[slice]:
    """Return the keys that each query of a sequence sees (MHA-CAUSAL-1, MHA-WINDOW-1, MHA-WINDOW-2)."""
    left, right, keys = part.visibility.left, part.visibility.right, part.keys.size
    positions = range(part.offset, part.offset + part.queries.size)
    firsts = [0 if left is None else min(max(position - left, 0), keys) for position in positions]
    ends = [keys if right is None else min(max(position + right + 1, 0), keys) for position in positions]
    return [slice(first, max(first, end)) for first, end in zip(firsts, ends, strict=True)]


def _scores(packed: Packed, pairs: Pairs, rows: Tensor, keys: Tensor) -> Tensor:
    """Compute the score of each pair (MHA-SCORE-2, MHA-CAP-1)."""
    _accept_sparse_tensors()
    zeros, size = rows.new_zeros(pairs.slots.shape), (rows.shape[0], keys.shape[0])
    matrix = torch.sparse_csr_tensor(pairs.bounds, pairs.slots, zeros, size=size)
    # Into the matrix itself, because a new one would first get a copy of its indices.
    torch.sparse.sampled_addmm(matrix, rows, keys.t(), beta=0.0, alpha=packed.problem.scale, out=matrix)
    scores = matrix.values()
    softcap: Any = packed.problem.softcap
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


@lru_cache(maxsize=1)
def _accept_sparse_tensors() -> None:
    """Create a sparse matrix, of which torch warns a process once that they are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], torch.zeros(0, dtype=torch.int64), torch.zeros(0), size=(1, 1))


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
    return torch.arange(pairs.longest) < pairs.lengths[:, None]


def _placed(packed: Packed, output: Tensor, lse: Tensor | None) -> tuple[Tensor, Any]:
    """Add the rows of no sequence to output and lse, (tokens, heads, ...) (MHA-VARLEN-3)."""
    first, count = packed.parts[0].queries.start, packed.a.q_tokens
    before_and_after = first, count - first - len(output)
    if any(before_and_after):
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, *before_and_after))
        lse = None if lse is None else torch.nn.functional.pad(lse, (0, 0, *before_and_after), value=-math.inf)
    return output, None if lse is None else lse.t()
