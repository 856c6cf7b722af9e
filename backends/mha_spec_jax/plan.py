"""The plan of a call: blocks of queries, each with the stretch of keys that contains all keys it can see.

Sizes, windows, and offsets and lengths on the host decide the blocks when a call is traced. Programs are compiled for
the sizes of stretches alone, which are rounded, so that a new offset seldom compiles a new program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy

from mha_spec.arrays import host_integers
from mha_spec.constraints import Structure, key_range, segment_keys, trimmed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

__all__ = ["Group", "Plan", "Stretches", "are_known", "coarse", "plan_of"]

SCORES = 2**20
"""The largest number of scores of a block on a CPU, within the bounds of its queries: 4 MiB in float32."""
ACCELERATED = 2**7
"""The factor of SCORES on an accelerator, which a single head cannot keep busy."""
LOWEST, HIGHEST = 64, 512
"""The bounds of the number of queries in a block."""
TRIANGLE = 4
"""The number of blocks of a large triangle; more of them would skip more scores, but each adds code to compile."""
SIZES = 4
"""The number of sizes that a stretch of keys can have."""


@dataclass(frozen=True)
class Group:
    """Consecutive blocks of the same shape."""

    first: int
    count: int
    rows: int
    keys: int
    from_zero: bool
    """True if every stretch begins at key 0."""


@dataclass(frozen=True)
class Plan:
    """The blocks of a call."""

    groups: tuple[Group, ...]
    heads: int | None
    """The number of key/value heads of an entry in a block; None for all heads of all entries."""


Stretches = tuple[numpy.ndarray | None, ...]
"""For each group, the first key of each block, or None where all are 0."""


class _Block(NamedTuple):
    first: int
    rows: int
    start: int
    keys: int


def plan_of(a: Arguments) -> tuple[Plan, Stretches]:
    """Cut a call into blocks, and group blocks of the same shape; a call of symbolic sizes is a single block."""
    if not are_known(a.batch, a.heads, a.q_len, a.kv_len):
        return Plan((Group(0, 1, a.q_len, a.kv_len, from_zero=True),), None), (None,)
    if a.q_len == 0:
        return Plan((), None), ()
    a = _with_known_bounds(a)
    height, heads = _height(a)
    groups: list[Group] = []
    stretches: list[numpy.ndarray | None] = []
    for (rows, keys, from_zero), run in groupby(_blocks(a, height), _shape):
        blocks = list(run)
        groups.append(Group(blocks[0].first, len(blocks), rows, keys, from_zero))
        stretches.append(None if from_zero else numpy.asarray([block.start for block in blocks], numpy.int32))
    return Plan(tuple(groups), heads), tuple(stretches)


def _with_known_bounds(a: Arguments) -> Arguments:
    """Remove symbolic bounds of a window and a symbolic chunk, without which a query sees more keys."""
    if a.window is None and a.chunk is None:
        return a
    window = None if a.window is None else tuple(bound if are_known(bound) else None for bound in a.window)
    return replace(a, window=window, chunk=a.chunk if are_known(a.chunk) else None)


def are_known(*sizes: object) -> bool:
    """Tell whether no size is symbolic, so that sizes can be compared."""
    return all(isinstance(size, int) for size in sizes)


def coarse(plan: Plan, kv_len: int) -> Plan:
    """Return the same blocks with every key, in a group for each height, which compiles quickly."""
    runs = (list(run) for _, run in groupby(plan.groups, lambda group: group.rows))
    groups = (Group(run[0].first, sum(part.count for part in run), run[0].rows, kv_len, from_zero=True) for run in runs)
    return Plan(tuple(groups), plan.heads)


def _shape(block: _Block) -> tuple[int, int, bool]:
    return block.rows, block.keys, block.start == 0


def _height(a: Arguments) -> tuple[int, int | None]:
    """Return the number of queries of a block, a power of two, and the number of its key/value heads.

    The taller a block, the more hidden scores it computes outside the band of a window or above a causal diagonal.
    """
    highest, keys, band = HIGHEST, a.kv_len, a.band
    if band is not None:
        highest = min(HIGHEST, max(LOWEST, band // 2))
        keys = min(a.kv_len, highest + band)
    elif a.positional and host_integers(_offset(a)) is not None:
        highest = min(HIGHEST, max(2 * LOWEST, a.q_len // TRIANGLE))
    if a.chunk is not None:
        highest = min(highest, max(LOWEST, a.chunk))
    scores = SCORES if jax.default_backend() == "cpu" else SCORES * ACCELERATED
    apart = a.batch * a.kv_heads > 1 and a.batch * a.heads * min(a.q_len, highest) * keys > scores
    group = a.heads // a.kv_heads
    limit = min(highest, max(LOWEST, scores // max(1, (group if apart else a.batch * a.heads) * keys)))
    height = 1 << (limit.bit_length() - 1)
    return height, _heads_at_once(a.kv_heads, scores // 2 // (group * min(a.q_len, height) * keys)) if apart else None


def _heads_at_once(heads: int, most: int) -> int:
    """Return the largest divisor of the number of heads that is at most `most`."""
    return max((part for part in range(1, most + 1) if heads % part == 0), default=1)


def _blocks(a: Arguments, rows: int) -> list[_Block]:
    blocks = [range(first, min(first + rows, a.q_len)) for first in range(0, a.q_len, rows)]
    bounds = [_visible_keys(a, block) for block in blocks]
    sizes, band = [len(keys) for keys in bounds], a.band
    if band is not None:
        sizes = [max(rows + band, *sizes)] * len(sizes)
    elif a.q_segment_ids is not None or a.chunk is not None:
        sizes = [max(sizes)] * len(sizes)
    sizes = [_rounded(size, a) for size in sizes]
    return [
        _Block(block[0], len(block), min(keys.start, a.kv_len - size), size)
        for block, keys, size in zip(blocks, bounds, sizes, strict=True)
    ]


def _offset(a: Arguments) -> Array | Sequence[int] | int:
    return 0 if a.q_offset is None else a.q_offset


def _rounded(size: int, a: Arguments) -> int:
    """Round the size of a stretch up, because each size compiles a program; with segments, the units are smaller."""
    unit = max(LOWEST, -(-a.kv_len // (SIZES if a.q_segment_ids is None else SIZES**2)))
    if a.chunk is not None:
        unit = LOWEST
    return min(a.kv_len, size if a.band is not None else max(1, -(-size // unit)) * unit)


def _visible_keys(a: Arguments, queries: range) -> range:
    """Return the range of keys that the queries can see, from what the host knows."""
    offsets, q_lengths, kv_lengths = (
        None if numbers is None else host_integers(numbers) for numbers in (_offset(a), a.q_lengths, a.kv_lengths)
    )
    starts, prefixes = (
        (0,) if numbers is None else host_integers(numbers) for numbers in (a.kv_starts, a.prefix_lengths)
    )
    structure = Structure(a.chunk, starts, prefixes, a.unlifted_right)
    keys = range(*key_range(a.bounds, queries, a.kv_len, offsets, q_lengths, kv_lengths, structure))
    if not (isinstance(a.q_segment_ids, numpy.ndarray) and isinstance(a.kv_segment_ids, numpy.ndarray)):
        return keys
    q_ids, kv_ids = a.q_segment_ids[:, queries.start : queries.stop], a.kv_segment_ids[:, keys.start : keys.stop]
    return trimmed(keys, segment_keys(q_ids, kv_ids))
