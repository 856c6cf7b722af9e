"""Plot how much of the allowance the results use: for each feature and dtype a strip with a logarithmic axis.

Results whose shares fall into the same bin of an eighth of a decade are a single mark, whose height shows their
number, so that a plot of thousands of results stays small.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Cases = Sequence[Mapping[str, Any]]

__all__ = ["HEIGHT", "LIMIT", "TICKS", "WIDTH", "strips"]

DECADES = (-3, 3)
"""The powers of ten at the ends of the axis; results beyond them are drawn at the ends."""

BINS = 8
"""The number of bins of a decade."""

LEFT, DECADE, HEIGHT, MIDDLE = 26, 25, 18, 9
"""The place of the lower end of the axis, the length of a decade, and the height of a strip."""

ZERO = 6
"""The place of results without any error."""

INFINITE = LEFT + DECADE * (DECADES[1] - DECADES[0]) + 20
"""The place of results whose error is infinite, or that are wrong for another reason than a number."""

WIDTH = INFINITE + 8

LEAST, DOUBLED = 3.0, 1.6
"""The height of the mark of a single result, and the height that each doubling of their number adds."""


@dataclass(frozen=True)
class Strip:
    """The results of a feature in a dtype: their numbers, the largest share that passed, and their marks."""

    passed: int
    failed: int
    largest: float | None
    """The largest share of the allowance of a result that passed; None if no number was compared."""
    right: str
    """The data of an SVG path of bars, for the results that passed."""
    wrong: str
    """The data of an SVG path of diamonds, for the results that did not."""


def _place(share: float) -> float:
    """Return the place of a share of the allowance on the axis, the middle of its bin; that of 1 ends at the line."""
    if share == 0:
        return ZERO
    if not math.isfinite(share):
        return INFINITE
    power = min(max(math.log10(share), DECADES[0]), DECADES[1])
    return _tick((math.ceil(power * BINS) - 0.5) / BINS)


def _tick(power: float) -> float:
    """Return the place of a power of ten."""
    return LEFT + DECADE * (power - DECADES[0])


LIMIT = _tick(0)
"""The place of the allowance itself."""

TICKS = (
    (ZERO, "0"),
    *((_tick(power), f"{10.0**power:g}".replace("0.", ".")) for power in range(DECADES[0], DECADES[1] + 1)),
    (INFINITE, "∞"),
)
"""The places and labels of the axis."""


def strips(cases: Cases, features: Iterable[str], dtypes: Sequence[str]) -> dict[str, list[Strip]]:
    """Return the strip of each dtype for each feature, and for all features together.

    Args:
        cases: The cases of a report, as `as_json` returns them.
        features: The features in order.
        dtypes: The dtypes in order.
    """
    rows = {"all": cases} | {name: [case for case in cases if name in case["features"]] for name in features}
    return {name: [_strip([c for c in row if c["dtype"] == dtype]) for dtype in dtypes] for name, row in rows.items()}


def _strip(cases: Cases) -> Strip:
    measured = [(float(case["allowance_used"]), case) for case in cases if case["allowance_used"] is not None]
    passed = [share for share, case in measured if case["outcome"] == "pass"]
    failed = [share for share, case in measured if case["outcome"] != "pass"]
    outcomes = Counter(case["outcome"] for case in cases)
    return Strip(
        passed=outcomes["pass"],
        failed=outcomes.total() - outcomes["pass"] - outcomes["unsupported"],
        largest=max(passed, default=None),
        right="".join(f"M{x:.4g} {MIDDLE - h:.3g}v{2 * h:.3g}" for x, h in _marks(passed)),
        wrong="".join(
            f"M{x - h:.4g} {MIDDLE}l{h:.3g}-{h:.3g} {h:.3g} {h:.3g}-{h:.3g} {h:.3g}z" for x, h in _marks(failed)
        ),
    )


def _marks(shares: Iterable[float]) -> list[tuple[float, float]]:
    """Return the place and half the height of each mark."""
    counts = Counter(map(_place, shares))
    return [(x, min(LEAST + DOUBLED * math.log2(n), HEIGHT - 2) / 2) for x, n in sorted(counts.items())]
