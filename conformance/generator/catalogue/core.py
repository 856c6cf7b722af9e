"""Plain attention: every size that kernels treat separately, and every range of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .build import vary
from .sizes import ONE_QUERY, PRIME, Sizes, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

SMALL = {
    "one-head": Sizes(3, 1, 1, 3, 5, 7, 7),
    "heads-equal-lengths": Sizes(2, 5, 5, 5, 5, 7, 7),
    "batch-equals-heads-equals-lengths": Sizes(3, 3, 1, 3, 3, 3, 3),
    "one-kv-head": Sizes(2, 3, 1, 5, 7, 11, 11),
    "narrow-values": Sizes(1, 3, 3, 2, 5, 13, 7),
    "one-query": ONE_QUERY,
    "one-key": Sizes(2, 4, 2, 3, 1, 5, 7),
    "size-one": Sizes(2, 4, 2, 3, 5, 1, 1),
    "size-64": head_size(64),
    "size-128": head_size(128),
    "size-64-values-128": head_size(64)._replace(v_dim=128),
    "size-128-values-64": head_size(128)._replace(v_dim=64),
    "size-64-grouped": head_size(64)._replace(kv_heads=1),
    "size-256": Sizes(1, 2, 1, 3, 5, 256, 256),
    "size-257": Sizes(1, 1, 1, 5, 3, 257, 257),
}
EMPTY = {
    "no-keys": Sizes(2, 2, 1, 3, 0, 5, 7),
    "no-queries": Sizes(2, 2, 1, 0, 3, 5, 7),
    "no-batch": Sizes(0, 2, 1, 3, 5, 7, 11),
    "no-keys-size-64": head_size(64)._replace(kv_len=0),
    "no-keys-size-128": head_size(128)._replace(kv_len=0),
}
LONG = {
    "lengths-65-129": Sizes(1, 2, 1, 65, 129, 64, 64),
    "lengths-129-65": Sizes(1, 1, 1, 129, 65, 128, 128),
    "lengths-1-257-size-129": Sizes(1, 2, 1, 1, 257, 129, 129),
    "lengths-3-300": Sizes(2, 1, 1, 3, 300, 16, 16),
}


def descriptions() -> Iterator[Description]:
    """Yield ordinary sizes, empty sizes and long sequences."""
    flavours = (
        "generic",
        "random",
        "coded",
        "steep",
        "levels",
        "low",
        "lowest",
        "high",
        "flat",
        "far",
        "rising",
        "falling",
    )
    yield from vary("prime", PRIME, {}, [(flavour, 0) for flavour in flavours], clauses=_shape_clauses(PRIME))
    for name, sizes in SMALL.items():
        yield from vary(
            name,
            sizes,
            {},
            [("generic", 0), ("coded", 0), ("levels", 0)],
            clauses=_shape_clauses(sizes),
            lse=_lse(sizes),
        )
    for size in (64, 128):
        variants = [("random", 0), ("low", 0), ("steep", 0)]
        yield from vary(
            f"lse/size-{size}", head_size(size), {}, variants, features=("lse",), clauses=("MHA-LSE-2",), lse=True
        )
    for name, sizes in EMPTY.items():
        yield from vary(name, sizes, {}, [("generic", 0)], clauses=("MHA-SHAPE-2",), lse=True)
    for name, sizes in LONG.items():
        flavours = (
            ("generic", "random", "steep") if sizes.qk_dim > 16 else ("generic", "random", "steep", "rising", "falling")
        )
        clauses = ("MHA-SHAPE-1", "MHA-SOFTMAX-1")
        yield from vary(name, sizes, {}, [(flavour, 0) for flavour in flavours], clauses=clauses, sampled_rows=24)


def _lse(sizes: Sizes) -> bool | None:
    """Compare lse for one key, whose weight is always 1; else leave the choice to `describe`."""
    return True if sizes.kv_len == 1 else None


def _shape_clauses(sizes: Sizes) -> tuple[str, ...]:
    clauses = ("MHA-SHAPE-1", "MHA-SOFTMAX-1", "MHA-SOFTMAX-2", "MHA-PURE-1", "MHA-PURE-2", "MHA-PURE-3")
    return clauses if sizes.batch > 1 else clauses[:-1]
