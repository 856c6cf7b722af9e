"""The catalogue of known mistakes; each is the specification with a replaced step.

A mistake proves that the suite has a case for its clauses, recognises a convention that others chose on purpose, and
tells the author of a failing attention what went wrong.
"""

from __future__ import annotations

from .caching import CACHING
from .edges import EDGES
from .entries import ENTRIES
from .fills import FILLS_ADDED
from .gradients import GRADIENTS
from .ignored import IGNORED
from .layer import PROJECTIONS
from .loops import LOOPS
from .merging import MERGING
from .mistake import ANY_SIZE, Compared, Mistake, Sizes
from .online import ONLINE
from .packed import PACKED
from .precision import PRECISION
from .raising import RAISING
from .rotary import POSITIONS
from .rotary_tables import TABLES
from .scores import SCORES
from .softmax import SOFTMAX
from .tiled_gradients import TILED_GRADIENTS
from .tiles import TILES
from .values import VALUES
from .visibility import VISIBILITY

__all__ = ["ANY_SIZE", "MISTAKES", "Compared", "Mistake", "Sizes"]

AWAITING_CASES = frozenset(
    {
        *(f"{name}-lost-from-key-{start}" for name in ("bias", "scale", "dropout") for start in (64, 128)),
        *(
            f"{name}-lost-from-row-{start}"
            for name in ("mask", "bias", "scale", "softcap", "q-lengths", "sinks", "dropout")
            for start in (64, 128)
        ),
        *(f"{name}-lost-from-row-128" for name in ("causal", "window", "kv-lengths", "segments")),
        *(
            f"{name}-lost-in-the-gradients-from-key-{start}"
            for name in ("mask", "bias", "scale", "causal", "window", "kv-lengths", "q-lengths", "segments", "dropout")
            for start in (64, 128)
        ),
        "loop-of-64-ends-with-the-first-row",
        "loop-of-128-starts-with-the-last-row",
        "mask-of-the-first-tile-of-rows",
        "bias-of-the-first-tile-of-keys",
        "bias-of-the-first-tile-of-rows",
        "dropout-mask-of-the-first-tile-of-keys",
        "segments-of-the-first-tile-of-keys",
        "bias-of-the-tile-before",
        "segments-of-the-tile-before",
        "mask-of-the-diagonal-tile-of-16",
        "mask-of-the-diagonal-tile-of-64",
        "maximum-of-the-first-tile-of-64",
        "maximum-of-the-first-tile-of-128",
        "hidden-first-tile-of-128-nan",
        "heads-past-8-wrap",
        "heads-past-16-wrap",
        "heads-past-64-wrap",
        "kv-heads-past-8-wrap",
        "kv-heads-past-16-wrap",
        "group-of-16-heads",
        "key-gradients-without-the-last-rows",
        "key-gradients-of-the-last-rows",
        "value-gradient-of-the-last-rows",
        "sink-gradient-of-the-last-tile",
        "bias-gradient-of-the-first-tile",
        "merge-of-the-first-half-from-row-8",
        "merge-of-the-first-half-from-row-64",
        "layer-blind-from-key-16",
        "layer-blind-from-key-64",
        "lse-in-the-order-of-groups-of-3",
        "lse-in-the-order-of-groups-of-4",
        "lse-in-the-order-of-groups-of-8",
    }
)
"""Mistakes that fewer than three cases of the goldens show; they are named when the cases of larger sizes exist."""

WRITTEN: tuple[Mistake, ...] = (
    *IGNORED,
    *VISIBILITY,
    *EDGES,
    *SCORES,
    *SOFTMAX,
    *VALUES,
    *GRADIENTS,
    *MERGING,
    *RAISING,
    *PRECISION,
    *PROJECTIONS,
    *POSITIONS,
    *TABLES,
    *CACHING,
    *FILLS_ADDED,
    *ENTRIES,
    *TILES,
    *LOOPS,
    *ONLINE,
    *PACKED,
    *TILED_GRADIENTS,
)
"""Every mistake that is written down."""

MISTAKES: tuple[Mistake, ...] = tuple(mistake for mistake in WRITTEN if mistake.name not in AWAITING_CASES)
"""Every known mistake, conventions included."""
