"""Find the property that separates failures best from passes, by the information that it gives about the outcome.

The information gain of a binary property is the entropy of the outcomes less their entropy within the questions that
have the property and within those that do not. Of properties with the same gain that with the fewest words is
chosen, and a second property is added only if both together give clearly more than the first. The first is then chosen
again.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Questions = Sequence[frozenset[str]]

__all__ = ["Share", "cover", "separating"]

WORTH_A_SECOND = 1.1
"""A second property must multiply the gain by this factor."""


@dataclass(frozen=True)
class Share:
    """The properties that separate failures best from passes, and how many of each have all of them."""

    properties: tuple[str, ...]
    failures: int
    of_failures: int
    passes: int
    of_passes: int

    def __str__(self) -> str:
        failures = f"{self.failures} of {self.of_failures} failures"
        return f"{' and '.join(self.properties)} ({failures}, {self.passes} of {self.of_passes} passes)"


def separating(failing: Questions, passing: Questions, most: int = 2) -> Share | None:
    """Return the properties that separate failures best from passes; None if no property separates them.

    Args:
        failing: The properties of each question that failed.
        passing: The properties of each question that passed.
        most: The largest number of properties that are combined.
    """
    chosen: tuple[str, ...] = ()
    share, gain = None, 0.0
    for _ in range(most):
        better = _best(chosen, failing, passing)
        if better is None or better[1] <= gain * WORTH_A_SECOND:
            break
        share, gain = better
        chosen = share.properties
    # Beside the second property, one with fewer words may tell as much as the first, which was chosen alone.
    again = _best(chosen[1:], failing, passing) if len(chosen) > 1 else None
    return again[0] if again is not None and again[1] >= gain else share


def _best(chosen: tuple[str, ...], failing: Questions, passing: Questions) -> tuple[Share, float] | None:
    """Add the property with which the chosen ones give the most information; failures must be more likely with it."""
    failed, passed = (_counts(chosen, questions) for questions in (failing, passing))
    best: tuple[tuple[float, int, str], Share] | None = None
    for name, failures in failed.items():
        share = Share((*chosen, name), failures, len(failing), passed[name], len(passing))
        if share.failures * share.of_passes <= share.passes * share.of_failures:
            continue
        rank = (-round(_gain(share), 9), len(name.split()), name)
        if best is None or rank < best[0]:
            best = rank, share
    return None if best is None else (best[1], -best[0][0])


def _counts(chosen: tuple[str, ...], questions: Questions) -> Counter[str]:
    """Count the questions that have all chosen properties, by each further property."""
    having = (properties for properties in questions if properties.issuperset(chosen))
    return Counter(name for properties in having for name in properties if name not in chosen)


def _gain(share: Share) -> float:
    """Return the information gain in bits."""
    failures, passes = share.of_failures, share.of_passes
    within = (share.failures, share.passes), (failures - share.failures, passes - share.passes)
    total = failures + passes
    return _entropy(failures, passes) - sum(sum(part) / total * _entropy(*part) for part in within)


def _entropy(failures: int, passes: int) -> float:
    total = failures + passes
    return -sum(part / total * math.log2(part / total) for part in (failures, passes) if part)


def cover(failing: Iterable[Sequence[str]], others: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Choose few labels, such as features or clauses, that cover every failure; the likeliest come first.

    A label is likely if most of the questions that have it fail. Of equally likely labels that of the most failures is
    chosen, and then the first.
    """
    left = [tuple(labels) for labels in failing if labels]
    order = list(dict.fromkeys(label for labels in left for label in labels))
    passed, whole = Counter(label for labels in others for label in set(labels)), _each(left)
    chosen: list[str] = []
    while left:
        failed = _each(left)
        rate = {label: whole[label] / (whole[label] + passed[label]) for label in failed}
        best = min(failed, key=lambda label: (-round(rate[label], 9), -failed[label], order.index(label)))
        chosen.append(best)
        left = [labels for labels in left if best not in labels]
    return tuple(chosen)


def _each(questions: Iterable[Sequence[str]]) -> Counter[str]:
    return Counter(label for labels in questions for label in set(labels))
