"""Describe a set of indices along an axis in a few words: a single index, a range, a period or a list."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TILES", "covering", "described_indices", "plural"]

TILES = (256, 128, 64, 32, 16)
"""The sizes of tiles at whose edges a range probably begins or ends."""

MOST_NUMBERS = 8
"""The number of indices that are listed."""

FEWEST_OF_PERIOD = 3
"""The number of bad indices from which a period is named."""

MOST_SCATTERED = 3
"""The number of scattered indices that are worth a list; of more, the range that contains them is described."""


def plural(axis: str) -> str:
    """Return the plural of the name of an axis."""
    return "batch entries" if axis == "batch entry" else f"{axis}s"


def described_indices(bad: Sequence[int], compared: Sequence[int], noun: str, *, tiles: Sequence[int] = ()) -> str:
    """Describe which of the compared indices are bad; both are sorted.

    Where indices are missing between the bad and the others, a range begins and ends at the edge of a tile, whose size
    is in `tiles`.
    """
    bad, compared = list(bad), list(compared)
    nouns = plural(noun)
    if bad == compared:
        return f"{noun} {bad[0]}" if len(bad) == 1 else f"all compared {nouns}"
    if len(bad) == 1:
        return f"{noun} {bad[0]}"
    start, stop = compared.index(bad[0]), compared.index(bad[-1]) + 1
    if compared[start:stop] == bad:
        first = _edge(compared[start - 1], bad[0], tiles) if start else bad[0]
        last = _edge(bad[-1], compared[stop], tiles, bad[-1] + 1) - 1 if stop < len(compared) else bad[-1]
        return _range(first, last, nouns, from_start=start == 0, to_end=stop == len(compared))
    if (period := _period(bad, compared)) is not None:
        return f"{nouns} {period[1]} modulo {period[0]}"
    more = f" and {len(bad) - MOST_NUMBERS} more" if len(bad) > MOST_NUMBERS else ""
    return f"{nouns} {', '.join(map(str, bad[:MOST_NUMBERS]))}{more}"


def covering(bad: Sequence[int], compared: Sequence[int]) -> list[int]:
    """Return the bad indices, or the range that contains them if they are many and have neither range nor period."""
    bad, compared = list(bad), list(compared)
    whole = compared[compared.index(bad[0]) : compared.index(bad[-1]) + 1]
    return bad if len(bad) <= MOST_SCATTERED or _period(bad, compared) is not None else whole


def _edge(before: int, after: int, tiles: Sequence[int], otherwise: int | None = None) -> int:
    """Return the edge of the largest tile that lies after `before` and not after `after`."""
    edges = (after // tile * tile for tile in tiles)
    return next((edge for edge in edges if edge > before), after if otherwise is None else otherwise)


def _range(first: int, last: int, nouns: str, *, from_start: bool, to_end: bool) -> str:
    if to_end:
        return f"{nouns} from {first} on"
    return f"{nouns} up to {last}" if from_start else f"{nouns} {first} to {last}"


def _period(bad: list[int], compared: list[int]) -> tuple[int, int] | None:
    """Return a period and a remainder that exactly the bad indices have; two indices are listed instead."""
    if len(bad) < FEWEST_OF_PERIOD:
        return None
    for period in (2, 4, 8, 16, 32, 64, 128, 256):
        remainder = bad[0] % period
        if bad == [index for index in compared if index % period == remainder]:
            return period, remainder
    return None
