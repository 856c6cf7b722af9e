"""The sizes of the layer's cases, with tokens and parameters that are exact in bfloat16 and float16.

Values and output projections have a mean other than 0, so that a sum over heads and components is large compared with
the allowance of 16-bit types. Queries and keys have the mean 0, so that the weights differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from description import Input

from .sizes import Sizes
from .tensors import bell

if TYPE_CHECKING:
    import numpy

__all__ = ["BIASES", "JOINT_NORMS", "NORMS", "LayerSizes", "parameters", "tokens"]

BIASES = ("b_q", "b_k", "b_v", "b_o")
NORMS = ("q_norm", "k_norm")
JOINT_NORMS = ("q_joint_norm", "k_joint_norm")
CENTRE = 0.75
"""The means of the tokens."""


class LayerSizes(NamedTuple):
    """The sizes of one call; `capacity` is 0 without a cache."""

    batch: int
    q_len: int
    kv_len: int
    embed: int
    k_embed: int
    v_embed: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    out: int
    capacity: int = 0

    @property
    def itself(self) -> bool:
        """True if queries, keys and values may be the same tokens."""
        return self.q_len == self.kv_len and self.embed == self.k_embed == self.v_embed

    @property
    def attention(self) -> Sizes:
        """The sizes of the attention in the layer, over the whole buffer if there is a cache."""
        keys = self.capacity or self.kv_len
        return Sizes(self.batch, self.heads, self.kv_heads, self.q_len, keys, self.qk_dim, self.v_dim)

    @property
    def caches(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the cache's keys and values."""
        lead = (self.batch, self.kv_heads, self.capacity)
        return (*lead, self.qk_dim), (*lead, self.v_dim)


SELF = LayerSizes(2, 5, 5, 7, 7, 7, 6, 3, 8, 3, 4)
CROSS = LayerSizes(2, 3, 5, 7, 11, 13, 4, 2, 6, 5, 9)
CUBE = LayerSizes(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 3)
LARGE = LayerSizes(1, 3, 3, 5, 5, 5, 2, 1, 64, 64, 7)
STEP = LayerSizes(2, 1, 1, 7, 7, 7, 4, 2, 6, 3, 5, 8)
CHUNK = STEP._replace(q_len=3, kv_len=3)
ENCODED = STEP._replace(q_len=3, kv_len=0)
WHOLE = STEP._replace(q_len=6, kv_len=6)
TURNING = WHOLE._replace(capacity=4)
LARGE_CHUNK = LARGE._replace(capacity=5)


def tokens(sizes: LayerSizes, flavour: str) -> dict[str, Input]:
    """Return query, key and value: one array in self-attention, and only the query if there are no new keys."""
    query = bell((sizes.batch, sizes.q_len, sizes.embed), 2.0**-4, "tokens", flavour) + CENTRE
    if sizes.kv_len == 0:
        return {"query": Input(query)}
    if sizes.itself:
        return {name: Input(query) for name in ("query", "key", "value")}
    key = bell((sizes.batch, sizes.kv_len, sizes.k_embed), 2.0**-4, "key tokens", flavour) + CENTRE
    value = bell((sizes.batch, sizes.kv_len, sizes.v_embed), 2.0**-4, "value tokens", flavour) + CENTRE
    return {"query": Input(query), "key": Input(key), "value": Input(value)}


def parameters(sizes: LayerSizes, names: tuple[str, ...] = ()) -> dict[str, Input]:
    """Return the four weights and the named biases and gains; they are the same in every case of these sizes."""
    s = sizes
    shapes = {
        "w_q": (s.embed, s.heads, s.qk_dim),
        "w_k": (s.k_embed, s.kv_heads, s.qk_dim),
        "w_v": (s.v_embed, s.kv_heads, s.v_dim),
        "w_o": (s.heads, s.v_dim, s.out),
        "b_q": (s.heads, s.qk_dim),
        "b_k": (s.kv_heads, s.qk_dim),
        "b_v": (s.kv_heads, s.v_dim),
        "b_o": (s.out,),
        "q_norm": (s.qk_dim,),
        "k_norm": (s.qk_dim,),
        "q_joint_norm": (s.heads, s.qk_dim),
        "k_joint_norm": (s.kv_heads, s.qk_dim),
    }
    chosen = [name for name in shapes if name.startswith("w_") or name in names]
    return {name: Input(_parameter(name, shapes[name])) for name in chosen}


def _parameter(name: str, shape: tuple[int, ...]) -> numpy.ndarray:
    unit, lean = {
        "w_q": (2.0**-5, 0.0),
        "w_k": (2.0**-5, 0.0),
        "w_v": (2.0**-5, 0.25),
        "w_o": (2.0**-7, 0.25),
        "b_q": (2.0**-5, 0.0),
        "b_k": (2.0**-5, 0.0),
        "b_v": (2.0**-5, 0.5),
        "b_o": (2.0**-4, 0.5),
        "q_norm": (2.0**-6, 1.0),
        "k_norm": (2.0**-6, 1.0),
        "q_joint_norm": (2.0**-6, 1.0),
        "k_joint_norm": (2.0**-6, 1.0),
    }[name]
    return bell(shape, unit, name) + lean
