"""The key/value cache: what decoding keeps of the tokens that were there before."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, NamedTuple
from weakref import finalize

from .arrays import host_integers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, Int

    from .arrays import Array

__all__ = ["HighWater", "KVCache"]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, in buffers of a fixed capacity, and how many of them there are.

    A value: appending gives a new cache, and this one still reads as before (MHA-CACHE-3). As a named tuple it passes
    through `jax.jit`, `torch.compile` and `tf.function` as its three arrays. Only positions below `lengths` are read.
    """

    key: Float[Array, "batch kv_heads capacity qk_dim"]
    """Normalised and rotated, as attention reads them."""
    value: Float[Array, "batch kv_heads capacity v_dim"]
    lengths: Int[Array, "batch"] | Sequence[int]
    """Tokens of each batch entry. Host data is checked for overflow; an array that must not be read is not."""

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None = None, *, like: Array
    ) -> KVCache:
        """A cache without tokens, with the library, dtype and device of the array `like`; v_dim None is qk_dim."""
        return _function_for("empty_cache", like, "like")(batch, kv_heads, capacity, qk_dim, v_dim, like=like)

    def append(
        self,
        key: Float[Array, "batch kv_heads length qk_dim"],
        value: Float[Array, "batch kv_heads length v_dim"],
        lengths: Int[Array, "batch"] | Sequence[int] | None = None,
    ) -> KVCache:
        """Put new tokens behind those of each batch entry; see `mha_spec.reference.append_cache`."""
        return _function_for("append_cache", self.key, "cache")(self, key, value, lengths)

    @property
    def batch(self) -> int:
        """Number of batch entries."""
        return self.key.shape[0]

    @property
    def capacity(self) -> int:
        """Number of tokens that each batch entry has room for."""
        return self.key.shape[2]

    def __repr__(self) -> str:
        """Shapes in place of contents."""
        key, value = (tuple(getattr(buffer, "shape", ())) for buffer in (self.key, self.value))
        return f"KVCache(key={key}, value={value}, lengths={self.lengths!r})"


def _function_for(name: str, array: Array, label: str) -> Callable[..., KVCache]:
    """Give a function of the backend of an array; one that is fixed at import is loaded there, and imports this."""
    from .selection import function_for

    return function_for(name, array, label)


class HighWater:
    """How far the buffers of caches are in use, so that an eager backend need not copy them for every token.

    Several caches may share one pair of buffers, each showing as much of it as its lengths say. A token may be written
    in place only beyond what any of them shows: where the lengths of the cache are the mark of its buffers. A pair that
    has no mark is somebody else's, and is copied first.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[int, int], list[int]] = {}
        self._lock = Lock()

    def claim(self, cache: KVCache, start: list[int], stop: list[int]) -> bool:
        """Whether the buffers of `cache` may be written from its lengths `start` to `stop`, which moves their mark."""
        pair = (id(cache.key), id(cache.value))
        with self._lock:
            if self._marks.get(pair) != start:
                return False
            self._marks[pair] = stop
            return True

    def own(self, cache: KVCache) -> KVCache:
        """Put the mark of fresh buffers, which nobody else holds, at the lengths of their cache."""
        pair = (id(cache.key), id(cache.value))
        self._marks[pair] = host_integers(cache.lengths) or []
        for buffer in (cache.key, cache.value):
            finalize(buffer, self._marks.pop, pair, None)
        return cache
