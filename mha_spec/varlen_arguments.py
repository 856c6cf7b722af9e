"""The arguments of a packed or paged call, in which the tokens of all sequences stand one after the other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

    from .arrays import Array

__all__ = ["VARLEN_FUNCTIONS", "VARLEN_OPTIONS", "VarlenArguments", "VarlenOptions", "count_of"]

VARLEN_FUNCTIONS = ("varlen_attention", "varlen_attention_vjp")


class VarlenOptions(TypedDict, total=False):
    """The options of varlen_attention, by default None or False."""

    max_seqlen_q: int | None
    """The number of queries of the longest sequence: a hint, which changes no result (MHA-VARLEN-10)."""
    max_seqlen_kv: int | None
    """The number of keys of the longest sequence: a hint, which changes no result (MHA-VARLEN-10)."""
    block_table: Int[Array, "sequences max_blocks"] | None
    """The blocks of each sequence; key and value are then (blocks, block_size, kv_heads, size) (MHA-VARLEN-6)."""
    seqused_kv: Int[Array, "sequences"] | Sequence[int] | None
    """The keys in use: the first of each sequence (MHA-VARLEN-4)."""
    causal: bool
    """Key j is seen from position p where j <= p; both count from the start of the sequence (MHA-VARLEN-5)."""
    q_offset: Int[Array, "sequences"] | Int[Array, ""] | Sequence[int] | int | str | None
    """Position of query 0 of each sequence, or "upper_left" (0) or "lower_right" (keys in use - queries); required
    where positions are compared and the lengths are not known to be equal (MHA-VARLEN-5)."""
    window: tuple[int | None, int | None] | None
    """(left, right), both inclusive, in positions: -left <= j - p <= right (MHA-WINDOW-1, MHA-WINDOW-2)."""
    scale: float | None
    """1/sqrt(qk_dim) by default (MHA-SCORE-2)."""
    softcap: float | None
    """softcap * tanh(scores / softcap), before the linear bias (MHA-CAP-1, MHA-CAP-2)."""
    sinks: Float[Array, "heads"] | None
    """One more logit per query head, which takes weight and has no value (MHA-SINK-1)."""
    alibi_slopes: Float[Array, "heads"] | None
    """The linear bias -slope[h] * |p - j|, a constant for gradients (MHA-VARLEN-8)."""


@dataclass(slots=True)
class VarlenArguments:
    """The arrays and all options of a packed or paged call."""

    query: Array
    key: Array
    value: Array
    cu_seqlens_q: Array | Sequence[int]
    cu_seqlens_kv: Any
    """Cumulative lengths; None is allowed if `block_table` and `seqused_kv` are passed."""
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    block_table: Array | None = None
    seqused_kv: Array | Sequence[int] | None = None
    causal: bool = False
    q_offset: Array | Sequence[int] | int | str | None = None
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Array | None = None
    alibi_slopes: Array | None = None
    function: str = "varlen_attention"
    """The name of the function that was called."""

    @property
    def sequences(self) -> Any:
        """Number of sequences; None where a trace of TensorFlow does not know it."""
        count = count_of(self.cu_seqlens_q)
        return None if count is None else count - 1

    @property
    def q_tokens(self) -> int:
        """Number of tokens of the query, those behind the last sequence included."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.key.shape[-2]

    @property
    def is_paged(self) -> bool:
        """True if keys and values are in blocks."""
        return self.block_table is not None

    @property
    def capacity(self) -> Any:
        """The most keys of a sequence: with blocks, those that a row of the table has room for; None if unknown."""
        if self.block_table is None:
            return self.key.shape[0]
        (blocks, block_size), columns = self.key.shape[:2], self.block_table.shape[1]
        if blocks == 0:
            return 0
        return None if block_size is None or columns is None else columns * block_size

    @property
    def positional(self) -> bool:
        """True if an option compares positions, so that the causal diagonal must be known."""
        bounded = self.window is not None and tuple(self.window) != (None, None)
        return self.causal or bounded or self.alibi_slopes is not None


VARLEN_OPTIONS = tuple(
    field.name
    for field in fields(VarlenArguments)
    if field.name not in {"query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv", "function"}
)
"""The names of all options, in the order of the signature."""


def count_of(value: Any) -> Any:
    """Return the number of entries of a sequence or of an array of one axis; None if a trace does not know it."""
    shape = getattr(value, "shape", None)
    return len(value) if shape is None else shape[0]
