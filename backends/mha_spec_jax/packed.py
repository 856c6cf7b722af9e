"""Packed sequences as blocks of queries, each with the range of keys that it can see, walked in tiles.

Lengths are arrays that a program reads when it runs: their number and the number of tokens decide its shapes, so that
other lengths need no other program. A block holds queries of a single sequence. Blocks and tiles have a fixed size; the
last of a sequence is moved or cut by a mask, never padded in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mha_spec.arguments import LOWER_RIGHT

from .plan import are_known
from .problem import bounded

if TYPE_CHECKING:
    from jax import Array

__all__ = [
    "Block",
    "Lengths",
    "PackedSequences",
    "Packing",
    "Sizes",
    "Tile",
    "cut",
    "put",
    "sequences_of",
    "shapes_of",
    "with_room",
]

ROWS, SCORES = 128, 2**14
"""The most queries of a block, and the number of scores of a tile for a head within the bounds of its keys, on a CPU.

The scores stay in the cache of a core, and few are hidden in the last block and the last tile of a sequence.
"""
ACCELERATED_ROWS, ACCELERATED_SCORES = 256, 2**17
"""The same on an accelerator."""
LEAST_KEYS, MOST_KEYS = 128, 1024
"""The bounds of the number of keys of a tile."""
COLUMNS = 64
"""The most queries of all heads that a CPU multiplies with the keys of all heads in a single product."""


@dataclass(frozen=True)
class Packing:
    """The constants of a program."""

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    alignment: str | None
    """The name of an alignment, from which the offsets are computed."""
    rows: int
    """The number of queries of a block."""
    keys: int
    """The number of keys of a tile; a multiple of the size of a page, where keys lie in pages."""
    heads: int
    """The number of key/value heads of a block."""
    spread: bool
    """True if the few queries of all heads are the columns of a single matrix, with 0 for the other heads."""


class Lengths(NamedTuple):
    """The arrays without a gradient."""

    cu_seqlens_q: Array
    cu_seqlens_kv: Array | None
    seqused_kv: Array | None
    block_table: Array | None
    q_offset: Array | None
    alibi_slopes: Array | None


class Sizes(NamedTuple):
    """The sizes of a call, which may be symbolic."""

    q_tokens: int
    kv_tokens: int
    """The number of keys, or the most keys of a sequence where they lie in pages."""
    sequences: int
    heads: int
    kv_heads: int
    page: int | None


def shapes_of(sizes: Sizes) -> tuple[int, int, int, bool]:
    """Return the queries of a block, the keys of a tile, the heads of a block, and if the heads are spread.

    A CPU computes a head after the other, because it takes longer to transpose keys than to multiply them.
    """
    on_cpu = jax.default_backend() == "cpu"
    most, scores = (ROWS, SCORES) if on_cpu else (ACCELERATED_ROWS, ACCELERATED_SCORES)
    rows = min(most, _power(sizes.q_tokens, sizes.sequences))
    mean = _power(sizes.kv_tokens, sizes.sequences if sizes.page is None else 1)
    keys = max(LEAST_KEYS, min(MOST_KEYS, scores // rows, mean))
    if sizes.page is not None:
        keys = sizes.page * (max(1, keys // sizes.page) if are_known(sizes.page) else 1)
    spread = on_cpu and sizes.heads * rows <= COLUMNS
    return rows, keys, sizes.kv_heads if spread or not on_cpu else 1, spread


def _power(total: int, count: int) -> int:
    """Return the mean, rounded up to a power of two; a large number if it is not known."""
    if not are_known(total, count):
        return MOST_KEYS
    return 1 << max(0, -(-total // max(1, count)) - 1).bit_length()


def with_room(array: Array, size: int) -> Array:
    """Append zeros to an array of packed tokens that may be shorter than a block."""
    if are_known(array.shape[0]) and array.shape[0] >= size:
        return array
    return jnp.pad(array, ((0, size), *((0, 0),) * (array.ndim - 1)))


def cut(array: Array, at: tuple[Array | int, ...], shape: tuple[int, ...]) -> Array:
    """Return a part of an array, whose first indices may be traced; indices of different types are an error of JAX."""
    return lax.dynamic_slice(array, [jnp.asarray(index, jnp.int32) for index in at], shape)


def put(array: Array, part: Array, at: tuple[Array | int, ...]) -> Array:
    """Replace a part of an array, whose first indices may be traced."""
    return lax.dynamic_update_slice(array, part, [jnp.asarray(index, jnp.int32) for index in at])


class PackedSequences(NamedTuple):
    """Where each sequence lies: arrays of int32, (sequences,)."""

    q_first: Array
    q_length: Array
    kv_first: Array
    """The index of the first key among the tokens; 0 where keys lie in pages."""
    kv_length: Array
    offset: Array
    """The position of the first query."""
    blocks: Array
    """The number of blocks of this sequence and of all before it."""
    rows: int
    """The number of queries of a block."""

    @property
    def total(self) -> Array:
        """The number of blocks of all sequences."""
        return jnp.max(self.blocks, initial=0)

    def block(self, index: Array, head: Array) -> Block:
        """Return a block of some heads; it belongs to the first sequence that has more blocks up to its end."""
        sequence = jnp.sum(self.blocks <= index, dtype=jnp.int32)
        before = jnp.where(sequence > 0, self.blocks[jnp.maximum(sequence - 1, 0)], 0)
        skipped = (index - before) * self.rows
        length, offset = self.q_length[sequence] - skipped, self.offset[sequence] + skipped
        return Block(head, sequence, self.q_first[sequence] + skipped, jnp.minimum(length, self.rows), offset)


def sequences_of(packing: Packing, lengths: Lengths, q_tokens: int, kv_tokens: int) -> PackedSequences:
    """Locate the sequences; ends are clamped to the tokens, and a sequence never ends before it begins (MHA-LEN-3).

    `kv_tokens` is the number of keys, or the most keys of a sequence where they lie in pages.
    """
    q_ends = _clamped(lengths.cu_seqlens_q, q_tokens)
    q_first, q_length = q_ends[:-1], q_ends[1:] - q_ends[:-1]
    kv_first, kv_length = _keys(lengths, kv_tokens, q_length)
    if packing.alignment is not None:
        offset = kv_length - q_length if packing.alignment == LOWER_RIGHT else jnp.zeros_like(q_length)
    else:
        offset = jnp.zeros_like(q_length) if lengths.q_offset is None else lengths.q_offset.astype(jnp.int32)
    arrays = q_first, q_length, kv_first, kv_length, jnp.broadcast_to(offset, q_length.shape)
    # An array without elements cannot be read at an index, not even in a loop without steps.
    q_first, q_length, kv_first, kv_length, offset = (with_room(array, 1) for array in arrays)
    blocks = jnp.cumsum(-(-q_length // packing.rows), dtype=jnp.int32)
    return PackedSequences(q_first, q_length, kv_first, kv_length, offset, blocks, packing.rows)


def _keys(lengths: Lengths, kv_tokens: int, like: Array) -> tuple[Array, Array]:
    """Return the first key and the number of keys of each sequence."""
    paged = lengths.block_table is not None
    first, length = jnp.zeros_like(like), jnp.full_like(like, kv_tokens)
    if lengths.cu_seqlens_kv is not None and paged:
        # Blocks may be shared, so that the sum of the lengths has no bound that int32 holds (MHA-VARLEN-2).
        ends = lax.cummax(jnp.maximum(lengths.cu_seqlens_kv, 0))
        length = bounded(ends[1:] - ends[:-1], kv_tokens)
    elif lengths.cu_seqlens_kv is not None:
        ends = _clamped(lengths.cu_seqlens_kv, kv_tokens)
        first, length = ends[:-1], ends[1:] - ends[:-1]
    if lengths.seqused_kv is not None:
        length = jnp.minimum(bounded(lengths.seqused_kv, kv_tokens), length)
    return first, length


def _clamped(ends: Array, tokens: int) -> Array:
    return lax.cummax(bounded(ends, tokens))


class Block(NamedTuple):
    """Consecutive queries of a sequence."""

    head: Array
    """The first key/value head."""
    sequence: Array
    first: Array
    """The index of the first query among the tokens."""
    length: Array
    """The number of queries, at most the rows of a block."""
    position: Array
    """The position of the first query."""

    def keys(self, packing: Packing, kv_length: Array) -> tuple[Array, Array]:
        """Return the first and the last key, plus 1, that a query sees; sums stay in the range of int32."""
        first, stop = jnp.zeros_like(kv_length), kv_length
        if packing.left is not None:
            first = jnp.clip(self.position, packing.left, packing.left + kv_length) - packing.left
        if packing.right is not None:
            last = self.position + self.length - 1
            stop = jnp.clip(last, -packing.right - 1, kv_length - packing.right - 1) + packing.right + 1
        return first, stop


class Tile(NamedTuple):
    """Consecutive keys of a sequence, of some heads."""

    head: Array
    """The first key/value head."""
    place: Array
    """The index of the first key among the tokens, or the numbers of the pages."""
    keys: Array
    """The indices of the keys in their sequence, (keys,)."""
    inside: Array
    """True for the keys that belong to the tile, (keys,); the others are hidden."""

    def read(self, array: Array, heads: int) -> Array:
        """Return the keys in an array of tokens or pages, (keys, heads, size)."""
        size = array.shape[-1]
        if self.place.ndim == 0:
            return cut(array, (self.place, self.head, 0), (self.keys.shape[0], heads, size))
        shape = (1, array.shape[1], heads, size)
        pages = jax.vmap(lambda number: cut(array, (number, 0, self.head, 0), shape))(self.place)
        return pages.reshape(-1, heads, size)

    def add(self, total: Array, part: Array) -> Array:
        """Add to the keys in an array of tokens or pages; a page may occur more than once."""
        if self.place.ndim == 0:
            at = self.place, self.head, 0
            return put(total, cut(total, at, part.shape) + part, at)
        heads = self.head + lax.iota(jnp.int32, part.shape[1])
        part = part.reshape(-1, total.shape[1], *part.shape[1:])
        return total.at[self.place[:, None], :, heads].add(jnp.swapaxes(part, 1, 2), mode="promise_in_bounds")
