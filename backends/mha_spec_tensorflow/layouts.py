"""The axes of the arguments of each function, by which the shapes that a trace does not know are compared."""

from __future__ import annotations

from typing import NamedTuple

from mha_spec.parameters import AXES

__all__ = [
    "ALIBI",
    "APPENDED",
    "ATTENTION",
    "HALVES",
    "KNOWN",
    "LAYER",
    "PACKED",
    "PAGED",
    "PAGED_CACHE",
    "POSITIONS",
    "POSITIONS_OF_LAYER",
    "ROTATED",
    "WINDOW_CACHE",
    "Layout",
]


class Layout(NamedTuple):
    """The axes of an argument, and the clause that defines them.

    An axis marked `*` may have size 1 and broadcast; an axis marked `+1` has an entry more than the size that it names.
    """

    axes: str
    clause: str
    limit: str = ""
    """The size that limits integers on the host, or a product of sizes; empty where none does."""

    @property
    def labels(self) -> list[str]:
        """The label of each axis in an error."""
        return self.axes.replace("*", "").split()

    @property
    def sizes(self) -> list[str]:
        """The name of the size of each axis."""
        return [label.removesuffix("+1") for label in self.labels]

    @property
    def more(self) -> list[int]:
        """The entries of each axis beyond the size that it names."""
        return [int(label.endswith("+1")) for label in self.labels]

    @property
    def broadcasts(self) -> list[bool]:
        """Return a flag for each axis, True if it may broadcast."""
        return [axis.endswith("*") for axis in self.axes.split()]


KNOWN = ("heads", "kv_heads", "qk_dim", "v_dim")
"""The sizes that a trace must know."""

_PAIRS, _ROWS = "batch* heads* q_len* kv_len*", "batch heads q_len"
_PER_ENTRY = {
    "q_offset": Layout("batch", "MHA-LEN-3"),
    "q_lengths": Layout("batch", "MHA-LEN-3", "q_len"),
    "kv_lengths": Layout("batch", "MHA-LEN-3", "kv_len"),
    **dict.fromkeys(("prefix_lengths", "kv_starts"), Layout("batch", "MHA-LEN-5", "kv_len")),
}

ATTENTION = {
    "query": Layout("batch heads q_len qk_dim", "MHA-SHAPE-1"),
    "key": Layout("batch kv_heads kv_len qk_dim", "MHA-SHAPE-3"),
    "value": Layout("batch kv_heads kv_len v_dim", "MHA-SHAPE-3"),
    "mask": Layout(_PAIRS, "MHA-MASK-2"),
    "bias": Layout(_PAIRS, "MHA-BIAS-1"),
    "dropout_mask": Layout(_PAIRS, "MHA-MASK-2"),
    **_PER_ENTRY,
    "q_segment_ids": Layout("batch q_len", "MHA-SEG-1"),
    "kv_segment_ids": Layout("batch kv_len", "MHA-SEG-1"),
    "sinks": Layout("heads", "MHA-SINK-1"),
    "grad_output": Layout(f"{_ROWS} v_dim", "MHA-VJP-7"),
    "grad_lse": Layout(_ROWS, "MHA-VJP-7"),
}
"""The arguments of attention, its weights and its gradients."""

_ROWS_OF_TOKENS = {
    "query": Layout("q_tokens heads qk_dim", "MHA-VARLEN-1"),
    "cu_seqlens_q": Layout("sequences+1", "MHA-VARLEN-2", "q_tokens"),
    "cu_seqlens_kv": Layout("sequences+1", "MHA-VARLEN-2"),
    "seqused_kv": Layout("sequences", "MHA-VARLEN-4"),
    "q_offset": Layout("sequences", "MHA-VARLEN-5"),
    "sinks": Layout("heads", "MHA-SINK-1"),
    "alibi_slopes": Layout("heads", "MHA-VARLEN-8"),
    "grad_output": Layout("q_tokens heads v_dim", "MHA-VARLEN-11"),
    "grad_lse": Layout("heads q_tokens", "MHA-VARLEN-11"),
}

PACKED = _ROWS_OF_TOKENS | {
    "key": Layout("kv_tokens kv_heads qk_dim", "MHA-VARLEN-1"),
    "value": Layout("kv_tokens kv_heads v_dim", "MHA-VARLEN-1"),
    "cu_seqlens_kv": Layout("sequences+1", "MHA-VARLEN-2", "kv_tokens"),
}
"""The arguments of varlen_attention and of its gradients."""

PAGED = _ROWS_OF_TOKENS | {
    "key": Layout("blocks block_size kv_heads qk_dim", "MHA-VARLEN-6"),
    "value": Layout("blocks block_size kv_heads v_dim", "MHA-VARLEN-6"),
    "block_table": Layout("sequences max_blocks", "MHA-VARLEN-6"),
    "seqused_kv": Layout("sequences", "MHA-VARLEN-4", "max_blocks * block_size"),
}
"""The same with a block table."""

HALVES = {
    f"{kind}_{half}": Layout(axes, "MHA-MERGE-4")
    for half in "ab"
    for kind, axes in {"output": f"{_ROWS} v_dim", "lse": _ROWS}.items()
} | {"grad_output": Layout(f"{_ROWS} v_dim", "MHA-MERGE-7"), "grad_lse": Layout(_ROWS, "MHA-MERGE-7")}
"""The arguments of merging and of its gradients."""

_CACHE = {
    "cache.key": Layout("batch kv_heads capacity qk_dim", "MHA-CACHE-7"),
    "cache.value": Layout("batch kv_heads capacity v_dim", "MHA-CACHE-7"),
    "cache.lengths": Layout("batch", "MHA-CACHE-7", "capacity"),
}

PAGED_CACHE = {
    "cache.key": Layout("blocks block_size kv_heads qk_dim", "MHA-CACHE-9"),
    "cache.value": Layout("blocks block_size kv_heads v_dim", "MHA-CACHE-9"),
    "cache.lengths": Layout("batch", "MHA-CACHE-9", "max_blocks * block_size"),
    "cache.block_table": Layout("batch max_blocks", "MHA-CACHE-9"),
}
"""A paged cache, whose layouts replace those of a cache."""

WINDOW_CACHE = {"cache.lengths": Layout("batch", "MHA-CACHE-12")}
"""A cache of the last tokens, which counts more tokens than it has slots."""

LAYER = {
    "query": Layout("batch q_len embed", "MHA-LAYER-2"),
    "key": Layout("batch kv_len k_embed", "MHA-LAYER-2"),
    "value": Layout("batch kv_len v_embed", "MHA-LAYER-2"),
    **_PER_ENTRY,
    # With a cache they count from its first token; attention compares them with all keys.
    **dict.fromkeys(("prefix_lengths", "kv_starts"), Layout("batch", "MHA-LEN-5")),
    **{f"params[{name!r}]": Layout(" ".join(axes), "MHA-PROJ-4") for name, axes in AXES.items()},
    **_CACHE,
}
"""The arguments of the layer, without those that it passes on to attention unchanged."""

APPENDED = {
    "key": Layout("batch kv_heads length qk_dim", "MHA-CACHE-7"),
    "value": Layout("batch kv_heads length v_dim", "MHA-CACHE-7"),
    "lengths": Layout("batch", "MHA-LEN-3", "length"),
    **_CACHE,
}
"""The arguments of append_cache."""

ALIBI = {"slopes": Layout("heads", "MHA-ALIBI-3"), "q_offset": Layout("batch", "MHA-LEN-3")}

ROTATED = Layout("batch heads length size", "MHA-ROTARY-6")
POSITIONS = tuple(Layout(axes, "MHA-ROTARY-6") for axes in ("length", "batch length", "axes batch length"))
"""The positions of rotary_embedding, of rank 1 to 3."""
POSITIONS_OF_LAYER = tuple(Layout(axes, "MHA-LAYER-7") for axes in ("q_len", "batch q_len", "axes batch q_len"))
"""The positions of the layer, of rank 1 to 3."""
