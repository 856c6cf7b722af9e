"""Options at lengths that cross the tiles of blocked kernels and do not fill the last tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .build import vary
from .sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

TILES = Sizes(2, 2, 1, 67, 131, 16, 16)
SPECS: tuple[dict[str, Any], ...] = (
    {"causal": True, "offset": True},
    {"window": (40, 3), "offset": True},
    {"kv_lengths": True},
    {"segments": True},
)


def descriptions() -> Iterator[Description]:
    """Yield cases of tiles that kernels skip, and of state that they must carry from tile to tile."""
    for spec in SPECS:
        variants = [("generic", 0), ("coded", 1), ("falling", 2), ("random", 3)]
        yield from vary(f"{'+'.join(spec)}/lengths-67-131", TILES, spec, variants, sampled_rows=60)
