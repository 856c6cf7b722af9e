"""The key/value cache of decoding."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar
from weakref import finalize

import numpy

from .array_checks import check_table, require_array
from .arrays import host_integers
from .errors import refuse_value
from .scalars import check_size, is_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, Int

    from .arrays import Array

__all__ = ["AnyCache", "Cache", "HighWater", "KVCache", "PagedKVCache", "WindowKVCache"]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, in buffers of a fixed capacity, and the number of tokens.

    A cache is immutable: appending returns a new cache (MHA-CACHE-3). As a named tuple it passes through `jax.jit`,
    `torch.compile` and `tf.function` as its three arrays. Only positions below `lengths` are read.
    """

    key: Float[Array, "batch kv_heads capacity qk_dim"]
    """Normalised and rotated, as attention reads them."""
    value: Float[Array, "batch kv_heads capacity v_dim"]
    lengths: Int[Array, "batch"] | Sequence[int]
    """The number of tokens of each batch entry; only host data is checked against the capacity."""

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None = None, *, like: Array
    ) -> KVCache:
        """Make a cache without tokens, with the library, dtype and device of `like`; v_dim is qk_dim by default."""
        return _function_for("empty_cache", like, "like")(batch, kv_heads, capacity, qk_dim, v_dim, like=like)

    def append(
        self,
        key: Float[Array, "batch kv_heads length qk_dim"],
        value: Float[Array, "batch kv_heads length v_dim"],
        lengths: Int[Array, "batch"] | Sequence[int] | None = None,
    ) -> KVCache:
        """Append new tokens to those of each batch entry; see `mha_spec.reference.append_cache`."""
        return _function_for("append_cache", self.key, "cache")(self, key, value, lengths)

    @property
    def batch(self) -> int:
        """Number of batch entries."""
        return self.key.shape[0]

    @property
    def capacity(self) -> int:
        """The most tokens that a batch entry can hold."""
        return self.key.shape[2]

    def __repr__(self) -> str:
        """Show shapes, not contents."""
        key, value = (tuple(getattr(buffer, "shape", ())) for buffer in (self.key, self.value))
        return f"KVCache(key={key}, value={value}, lengths={self.lengths!r})"


class WindowKVCache(NamedTuple):
    """Keys and values of the last `capacity` tokens, for attention with a window or chunks (MHA-CACHE-12).

    Token j of a batch entry is in slot j mod capacity, so that a new token takes the slot of the oldest. A `KVCache`
    holds the same tokens in the same slots: `WindowKVCache(*cache)` continues it. As `KVCache`, it is immutable and
    passes through compilers.
    """

    key: Float[Array, "batch kv_heads capacity qk_dim"]
    """Normalised and rotated, as attention reads them."""
    value: Float[Array, "batch kv_heads capacity v_dim"]
    lengths: Int[Array, "batch"] | Sequence[int]
    """The number of all tokens of each batch entry, also of those that later tokens have replaced."""

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None = None, *, like: Array
    ) -> WindowKVCache:
        """Make a cache without tokens, with the library, dtype and device of `like`; v_dim is qk_dim by default."""
        return cls(*KVCache.empty(batch, kv_heads, capacity, qk_dim, v_dim, like=like))

    def append(
        self,
        key: Float[Array, "batch kv_heads length qk_dim"],
        value: Float[Array, "batch kv_heads length v_dim"],
        lengths: Int[Array, "batch"] | Sequence[int] | None = None,
    ) -> WindowKVCache:
        """Append new tokens to those of each batch entry; see `mha_spec.reference.append_cache`."""
        return _function_for("append_cache", self.key, "cache")(self, key, value, lengths)

    @property
    def batch(self) -> int:
        """Number of batch entries."""
        return self.key.shape[0]

    @property
    def capacity(self) -> int:
        """The number of tokens of each batch entry that the cache holds, which are the last ones."""
        return self.key.shape[2]

    def __repr__(self) -> str:
        """Show shapes, not contents."""
        key, value = (tuple(getattr(buffer, "shape", ())) for buffer in (self.key, self.value))
        return f"WindowKVCache(key={key}, value={value}, lengths={self.lengths!r})"


class PagedKVCache(NamedTuple):
    """Keys and values of the tokens so far in blocks, which a table names for each batch entry (MHA-CACHE-9).

    Token j of batch entry b is in slot j mod block_size of block `block_table[b, j // block_size]`. Numbers in the
    table that no token needs may be any integers. Batch entries may share the blocks of a common prefix; a token that
    is appended needs a slot that holds no other (MHA-CACHE-11). The caller chooses the blocks; more of them are given
    to a cache by `_replace(block_table=...)`. As `KVCache`, it is immutable and passes through compilers.
    """

    key: Float[Array, "blocks block_size kv_heads qk_dim"]
    """Normalised and rotated, as attention reads them."""
    value: Float[Array, "blocks block_size kv_heads v_dim"]
    lengths: Int[Array, "batch"] | Sequence[int]
    """The number of tokens of each batch entry; only host data is checked."""
    block_table: Int[Array, "batch max_blocks"]
    """The blocks of each batch entry; only an array of NumPy is checked."""

    @classmethod
    def empty(
        cls,
        block_table: Int[Array, "batch max_blocks"],
        blocks: int,
        block_size: int,
        kv_heads: int,
        qk_dim: int,
        v_dim: int | None = None,
        *,
        like: Array,
    ) -> PagedKVCache:
        """Make blocks without tokens, with the library, dtype and device of `like`; v_dim is qk_dim by default."""
        require_array("like", like, "MHA-CACHE-7")
        check_table("block_table", block_table, like, None)
        sizes = {"blocks": (blocks, 0), "block_size": (block_size, 1), "kv_heads": (kv_heads, 1)}
        first = [check_size(name, size, least, "MHA-CACHE-9", symbolic=True) for name, (size, least) in sizes.items()]
        batch: Any = block_table.shape[0]
        if batch is None:
            refuse_value(
                "MHA-CACHE-9",
                "`block_table` must have a known number of rows when it is traced, received shape="
                f"{tuple(block_table.shape)}. Set it, or make the cache from blocks and lengths of your own.",
            )
        make = _function_for("empty_cache", like, "like")
        # The buffers of a cache in which each batch entry is a block have the same axes, except for their order.
        pools = make(*first, qk_dim, v_dim, like=like)
        # A number that a trace leaves open needs lengths in an array of the library.
        lengths = numpy.zeros(batch, numpy.int32) if is_integer(batch) else make(batch, 1, 0, 1, like=like).lengths
        return cls(pools.key, pools.value, lengths, block_table)

    def append(
        self,
        key: Float[Array, "batch kv_heads length qk_dim"],
        value: Float[Array, "batch kv_heads length v_dim"],
        lengths: Int[Array, "batch"] | Sequence[int] | None = None,
    ) -> PagedKVCache:
        """Append new tokens to those of each batch entry; see `mha_spec.reference.append_cache`."""
        return _function_for("append_cache", self.key, "cache")(self, key, value, lengths)

    @property
    def batch(self) -> int:
        """Number of batch entries."""
        return self.block_table.shape[0]

    @property
    def block_size(self) -> int:
        """Number of slots of a block."""
        return self.key.shape[1]

    @property
    def capacity(self) -> int:
        """The most tokens that a row of the table has room for."""
        return self.block_table.shape[1] * self.block_size

    def __repr__(self) -> str:
        """Show shapes, not contents."""
        arrays = self.key, self.value, self.block_table
        key, value, table = (tuple(getattr(array, "shape", ())) for array in arrays)
        return f"PagedKVCache(key={key}, value={value}, lengths={self.lengths!r}, block_table={table})"


AnyCache: TypeAlias = KVCache | PagedKVCache | WindowKVCache
"""A cache of any kind, also for `isinstance`."""

Cache = TypeVar("Cache", KVCache, PagedKVCache, WindowKVCache)
"""The type of a cache, which an append keeps."""


def _function_for(name: str, array: Array, label: str) -> Callable[..., Any]:
    """Return a function of the backend of an array.

    The import is late because `selection` may load a backend, which imports this module.
    """
    from .selection import function_for

    return function_for(name, array, label)


class HighWater:
    """High-water marks of cache buffers, with which an eager backend appends tokens without copying.

    Several caches may share a pair of buffers; each reads only the tokens below its lengths. A token may be written
    in place only past the end of every cache that shares the buffers, that is, when the lengths of this cache equal
    their high-water mark. Buffers without a mark come from elsewhere, and are copied first.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[int, int], list[int]] = {}
        self._lock = Lock()

    def claim(self, cache: KVCache, start: list[int], stop: list[int]) -> bool:
        """Move the mark from `start`, the lengths of `cache`, to `stop`; return False if it is not at `start`."""
        pair = (id(cache.key), id(cache.value))
        with self._lock:
            if self._marks.get(pair) != start:
                return False
            self._marks[pair] = stop
            return True

    def register(self, cache: KVCache) -> KVCache:
        """Set the mark of new buffers, which no other cache shares, to the lengths of their cache."""
        pair = (id(cache.key), id(cache.value))
        self._marks[pair] = host_integers(cache.lengths) or []
        for buffer in (cache.key, cache.value):
            finalize(buffer, self._marks.pop, pair, None)
        return cache
