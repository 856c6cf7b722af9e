"""Reduce a packed or paged call: fewer sequences, tokens, heads and components."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Arrays = dict[str, numpy.ndarray]

__all__ = ["fewer", "smaller_packed"]

HEADS = {"query": 1, "grad_output": 1, "grad_lse": 0, "sinks": 0, "alibi_slopes": 0}
"""The axis of the query heads in each argument."""

COMPONENTS = (("value", "grad_output"), ("query", "key"))
"""The arguments whose last axes are reduced together: first those of the values, then those of the scores."""

OF_SEQUENCES = ("seqused_kv", "q_offset", "block_table")
MOST_LEFT_OUT = 8
"""The size of an axis up to which each index is left out alone; of a longer axis only the last and the first."""

TOKENS = {"query": 0, "grad_output": 0, "grad_lse": 1}
"""The axis of the tokens of queries in each argument."""


def smaller_packed(arrays: Arrays) -> Iterator[Arrays]:
    """Yield the arrays of smaller calls: first with fewer sequences, then with fewer tokens, heads and components."""
    count = len(arrays["cu_seqlens_q"]) - 1
    q_lengths = numpy.diff(arrays["cu_seqlens_q"]).tolist()
    kv_lengths = _kv_lengths(arrays)
    for kept in fewer(count, least=0):
        yield _taking(arrays, kept, [q_lengths[b] for b in kept], [kv_lengths[b] for b in kept])
    if _has_tail(arrays):
        yield _taking(arrays, range(count), q_lengths, kv_lengths, tail=False)
    for b in range(count):
        for length in _less(q_lengths[b]):
            yield _taking(arrays, range(count), [*q_lengths[:b], length, *q_lengths[b + 1 :]], kv_lengths)
        for length in _less(kv_lengths[b]):
            yield _taking(arrays, range(count), q_lengths, [*kv_lengths[:b], length, *kv_lengths[b + 1 :]])
    kv_heads = arrays["key"].shape[-2]
    groups = numpy.arange(arrays["query"].shape[1]).reshape(kv_heads, -1)
    for kept in fewer(kv_heads):
        yield _with_heads(arrays, kept, groups[kept].ravel().tolist())
    for kept in fewer(groups.shape[1]):
        yield _with_heads(arrays, range(kv_heads), groups[:, kept].ravel().tolist())
    for names in COMPONENTS:
        for kept in fewer(arrays[names[0]].shape[-1]):
            yield arrays | {name: arrays[name][..., kept] for name in names if name in arrays}


def _has_tail(arrays: Arrays) -> bool:
    """Tell whether a token of queries or packed keys belongs to no sequence."""
    packed = () if "block_table" in arrays else (("key", "cu_seqlens_kv"),)
    return any(arrays[name].shape[0] > arrays[bounds][-1] for name, bounds in (("query", "cu_seqlens_q"), *packed))


def _kv_lengths(arrays: Arrays) -> list[int]:
    """Return the numbers of keys of the sequences: for packed keys also those that are not in use."""
    if "cu_seqlens_kv" in arrays:
        return numpy.diff(arrays["cu_seqlens_kv"]).tolist()
    return arrays["seqused_kv"].tolist()


def fewer(size: int, least: int = 1) -> list[list[int]]:
    """Return the halves of the indices of an axis, and the indices without a single one, if at least `least` remain."""
    kept = [list(range(size // 2)), list(range(size // 2, size))]
    left_out = range(size) if size <= MOST_LEFT_OUT else (size - 1, 0)
    kept += [[i for i in range(size) if i != left] for left in left_out]
    return [indices for indices in kept if least <= len(indices) < size]


def _less(length: int) -> set[int]:
    return {length // 2, length - 1} if length else set()


def _taking(
    arrays: Arrays, kept: Sequence[int], q_lengths: list[int], kv_lengths: list[int], *, tail: bool = True
) -> Arrays:
    """Return the call of these sequences, of their first tokens and, with a tail, of the tokens of no sequence."""
    smaller = dict(arrays)
    tokens = _tokens(arrays["cu_seqlens_q"], kept, q_lengths, arrays["query"].shape[0] if tail else 0)
    smaller |= {name: arrays[name].take(tokens, axis) for name, axis in TOKENS.items() if name in arrays}
    smaller |= {name: arrays[name][list(kept)] for name in OF_SEQUENCES if arrays.get(name, numpy.array(0)).ndim}
    if "cu_seqlens_kv" in arrays and "block_table" not in arrays:
        tokens = _tokens(arrays["cu_seqlens_kv"], kept, kv_lengths, arrays["key"].shape[0] if tail else 0)
        smaller |= {name: arrays[name][tokens] for name in ("key", "value")}
    for name, lengths in (("cu_seqlens_q", q_lengths), ("cu_seqlens_kv", kv_lengths)):
        if name in arrays:
            smaller[name] = numpy.cumsum([0, *lengths]).astype(arrays[name].dtype)
    if "seqused_kv" in arrays:
        used = smaller["seqused_kv"]
        smaller["seqused_kv"] = numpy.minimum(used, numpy.array(kv_lengths, used.dtype))
    return smaller


def _tokens(bounds: numpy.ndarray, kept: Sequence[int], lengths: list[int], tokens: int) -> list[int]:
    """Return the indices of the first tokens of the sequences that are kept, and of those behind the last sequence."""
    starts = [start for start, _ in pairwise(bounds.tolist())]
    inside = [starts[b] + i for b, length in zip(kept, lengths, strict=True) for i in range(length)]
    return [*inside, *range(int(bounds[-1]), tokens)]


def _with_heads(arrays: Arrays, kv_heads: Sequence[int], heads: Sequence[int]) -> Arrays:
    smaller = {name: arrays[name].take(heads, axis) for name, axis in HEADS.items() if name in arrays}
    return arrays | smaller | {name: arrays[name][..., list(kv_heads), :] for name in ("key", "value")}
