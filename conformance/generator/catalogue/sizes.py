"""The sizes that cases share: few, because frameworks compile for each of them."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """The seven sizes of one attention."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    qk_dim: int
    v_dim: int

    @property
    def query(self) -> tuple[int, ...]:
        """Shape of the query."""
        return (self.batch, self.heads, self.q_len, self.qk_dim)

    @property
    def key(self) -> tuple[int, ...]:
        """Shape of the key."""
        return (self.batch, self.kv_heads, self.kv_len, self.qk_dim)

    @property
    def value(self) -> tuple[int, ...]:
        """Shape of the value."""
        return (self.batch, self.kv_heads, self.kv_len, self.v_dim)

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the output."""
        return (self.batch, self.heads, self.q_len, self.v_dim)

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """Shape of the scores."""
        return (self.batch, self.heads, self.q_len, self.kv_len)

    def pairwise(self, axes: str) -> tuple[int, ...]:
        """Return a shape that broadcasts to the scores: "1h1k" has 1 for batch and queries."""
        return tuple(1 if axis == "1" else size for axis, size in zip(axes, self.scores, strict=True))


PRIME = Sizes(2, 6, 2, 5, 7, 11, 13)
EQUAL = Sizes(2, 6, 2, 5, 7, 11, 11)
ONE_QUERY = Sizes(2, 4, 2, 1, 7, 11, 11)
ROOMY = Sizes(2, 6, 2, 11, 17, 7, 13)
SQUARE = Sizes(2, 6, 2, 7, 7, 11, 11)


def head_size(size: int, *, square: bool = False) -> Sizes:
    """Return sizes for kernels that only support head sizes 64 and 128; at 128 two query heads share a key head."""
    return Sizes(2, 2, 2 if size == 64 else 1, 5 if square else 3, 5, size, size)


PAIRWISE_AXES = tuple(
    f"{batch}{heads}{queries}{keys}" for batch in "1b" for heads in "1h" for queries in "1q" for keys in "1k"
)
"""The sixteen ways to broadcast to the scores."""
