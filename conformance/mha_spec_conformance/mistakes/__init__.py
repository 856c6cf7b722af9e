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
from .layer_variants import LAYER_VARIANTS
from .loops import LOOPS
from .merging import MERGING
from .mistake import ANY_SIZE, Compared, Mistake, Sizes
from .online import ONLINE
from .packed import PACKED
from .precision import PRECISION
from .raising import RAISING
from .rotary import POSITIONS
from .rotary_frequencies import FREQUENCIES
from .rotary_positions import TOKEN_POSITIONS
from .rotary_tables import TABLES
from .scores import SCORES
from .softmax import SOFTMAX
from .structured import STRUCTURED
from .tiled_gradients import TILED_GRADIENTS
from .tiles import TILES
from .values import VALUES
from .varlen import VARLEN
from .visibility import VISIBILITY

__all__ = ["ANY_SIZE", "MISTAKES", "Compared", "Mistake", "Sizes"]

MISTAKES: tuple[Mistake, ...] = (
    *IGNORED,
    *VISIBILITY,
    *EDGES,
    *STRUCTURED,
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
    *FREQUENCIES,
    *TOKEN_POSITIONS,
    *CACHING,
    *FILLS_ADDED,
    *ENTRIES,
    *TILES,
    *LOOPS,
    *ONLINE,
    *PACKED,
    *TILED_GRADIENTS,
    *VARLEN,
    *LAYER_VARIANTS,
)
"""Every known mistake, conventions included."""
