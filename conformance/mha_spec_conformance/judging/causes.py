"""Group the failures of a run by cause: its name, what its failures share, and where their wrong elements lie.

A cause is a known mistake, rounding in a narrower dtype, an exception, a fault of the calls, or unknown. Failures of
unknown cause are grouped by the property that separates most of them from passes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mha_spec_conformance.mistakes import MISTAKES

from .amounts import NARROWER, amounts, rounded_to
from .places import WrongElements, described
from .properties import Properties, feature_of
from .result import FAILING, WITHOUT_ARRAYS
from .shares import cover, separating

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .places import Place
    from .result import Result
    from .shares import Share

    Key = tuple[str, str]

__all__ = ["Cause", "Findings", "Story", "WrongKeys", "find_causes"]

MOST_UNKNOWN = 12
"""The largest number of groups of failures without a name."""

MOST_LOCATED = 120
"""The number of failures of a group in which the wrong elements are located; they are spread over the group."""

LEAST_SHARED = 0.5
"""A property is called shared if this share of the failures has it."""

NEARLY_ALL = 0.9
"""The share of the unnamed failures of a function and dtype that must have only errors of rounding, and that of all
questions of a function from which its failures are not split."""

FEWEST_ROUNDED = 4
"""The failures in a dtype that are called rounding although the function has larger errors in other dtypes."""

ROUNDING = "MHA-ACC-1"


@dataclass(frozen=True)
class WrongKeys:
    """A description of the keys that have wrong weights in a failure, which was asked again with other values."""

    text: str
    case: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.text} [asked again: {self.case} {self.dtype}]"


@dataclass(frozen=True)
class Story:
    """The properties that failures share, where wrong elements lie, and how wrong numbers differ from right ones."""

    share: Share | None
    places: tuple[Place, ...] = ()
    amounts: tuple[Place, ...] = ()
    keys: WrongKeys | None = None

    @property
    def where(self) -> str:
        """The places, the keys and the amounts in a line; empty if nothing was compared."""
        places = ", ".join(map(str, [*self.places, *([self.keys] if self.keys else [])]))
        amounts = "; ".join(map(str, self.amounts))
        return f"{places or 'no common place'}: {amounts}" if amounts else places


@dataclass(frozen=True)
class Cause:
    """Failures that probably have the same cause."""

    kind: str
    """The kind: mistake, rounding, error, fault (a wrong form, or a call that differs from another) or unknown."""
    name: str | None
    """The mistake, or the convention as name=variant; the dtype that lost the digits; the exception or the fault."""
    results: tuple[Result, ...]
    story: Story
    others: tuple[str, ...] = ()
    """Further mistakes that explain all of these failures: the cases do not distinguish them."""
    clauses: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The cause in a few words."""
        return {
            "mistake": f"{self.name}",
            "rounding": f"rounding to {self.name}",
            "error": f"an exception: {self.name}",
            "fault": f"{self.name}",
        }.get(self.kind, "no known mistake")


@dataclass(frozen=True)
class Findings:
    """The causes of all failures, the largest first, and the story of all failures together."""

    story: Story | None = None
    causes: tuple[Cause, ...] = ()

    @cached_property
    def _by_key(self) -> dict[Key, Result]:
        return {result.ask.key: result for cause in self.causes for result in cause.results}

    def with_keys(self, keys: Mapping[int, WrongKeys]) -> Findings:
        """Add the wrong keys to the causes with these numbers; the keys of a single cause are those of all failures."""
        causes = tuple(
            replace(cause, story=replace(cause.story, keys=keys[number])) if number in keys else cause
            for number, cause in enumerate(self.causes)
        )
        return Findings(causes[0].story if len(causes) == 1 else self.story, causes)

    def with_cause(self, result: Result) -> Result:
        """Return a result with the clauses of its cause before its other clauses."""
        return self._by_key.get(result.ask.key, result)


def find_causes(results: Sequence[Result], profile: str = "standard") -> Findings:
    """Group the failures of MUST cases by cause, and tell the story of each group and of all."""
    musts = [result for result in results if result.must]
    failing = [result for result in musts if result.outcome in FAILING]
    if not failing:
        return Findings()
    teller = _Teller([result for result in musts if result.outcome == "pass"], profile)
    causes = [teller.cause(*group) for group in _groups(failing, teller)]
    return Findings(teller.story(failing), tuple(sorted(causes, key=lambda cause: -len(cause.results))))


class _Teller:
    """Describes groups of failures by comparing them with the passes."""

    def __init__(self, passing: Sequence[Result], profile: str) -> None:
        self.passing = passing
        self.profile = profile
        self.properties = Properties()
        self._passing = [self.properties(result.ask) for result in passing]
        self._located: dict[Key, WrongElements] = {}

    def share(self, failing: Iterable[Result]) -> Share | None:
        """Return the properties that separate failures best from passes."""
        return separating([self.properties(result.ask) for result in failing], self._passing)

    def story(self, failing: Sequence[Result]) -> Story:
        """Tell what failures share, where they are wrong and by how much."""
        located = self._spread(failing)
        share = self.share(failing)
        if share is not None and share.failures < LEAST_SHARED * share.of_failures:
            share = None
        return Story(share, tuple(described(located)), tuple(amounts(located)))

    def symptoms(self, failing: Sequence[Result]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the texts about the places and the amounts of failures."""
        located = self._spread(failing)
        return frozenset(p.text for p in described(located)), frozenset(p.text for p in amounts(located))

    def _spread(self, failing: Sequence[Result]) -> list[WrongElements]:
        """Locate the wrong elements of failures that are spread over all."""
        located = [result for result in failing if result.wrong is not None]
        return [self._elements(result) for result in located[:: max(1, -(-len(located) // MOST_LOCATED))]]

    def _elements(self, result: Result) -> WrongElements:
        if result.ask.key not in self._located:
            assert result.wrong is not None
            self._located[result.ask.key] = WrongElements(result.wrong, self.profile)
        return self._located[result.ask.key]

    def cause(self, kind: str, name: str | None, failing: Sequence[Result], others: tuple[str, ...] = ()) -> Cause:
        """Describe a group of failures."""
        story = self.story(failing)
        features = _of_share(story.share, failing)
        features = features or cover([r.ask.features for r in failing], [r.ask.features for r in self.passing])
        clauses = cover([r.clauses for r in failing], [r.ask.case.clauses for r in self.passing])
        if kind == "mistake":
            clauses = _of_mistake(name) or clauses
        if kind == "rounding":
            clauses = (ROUNDING,)
        results = tuple(replace(result, clauses=_first(clauses, result)) for result in failing)
        return Cause(kind, name, results, story, others, clauses, features)


def _of_share(share: Share | None, failing: Sequence[Result]) -> tuple[str, ...]:
    """Return the feature of the first shared property that belongs to one that all failures have, or none."""
    common = frozenset.intersection(*(frozenset(result.ask.features) for result in failing))
    texts = share.properties if share is not None and share.failures == share.of_failures else ()
    return tuple(feature for feature in map(feature_of, texts) if feature in common)[:1]


def _of_mistake(name: str | None) -> tuple[str, ...]:
    """Return the clauses of a mistake or of a convention."""
    parts = (name or "").split(" + ")
    return tuple(dict.fromkeys(c for m in MISTAKES if {m.name, m.variant} & set(parts) for c in m.clauses))


def _first(clauses: tuple[str, ...], result: Result) -> tuple[str, ...]:
    """Put the clauses of the cause before the other clauses of a result."""
    if not result.compared:
        return result.clauses
    cited = tuple(c for c in clauses if c in result.clauses or c == ROUNDING)
    return (*cited, *(clause for clause in result.clauses if clause not in cited))


def _groups(
    failing: Sequence[Result], teller: _Teller
) -> Iterator[tuple[str, str | None, list[Result], tuple[str, ...]]]:
    """Yield the groups: exceptions and faults by text, mistakes by name, rounding by dtype, and unknown causes."""
    texts: defaultdict[tuple[str, str], list[Result]] = defaultdict(list)
    named: list[Result] = []
    unnamed: list[Result] = []
    for result in failing:
        if result.diagnosis or result.conventions:
            named.append(result)
        elif result.wrong is not None:
            unnamed.append(result)
        else:
            texts["error" if result.outcome in WITHOUT_ARRAYS else "fault", _template(result.reason)].append(result)
    for (kind, _), members in texts.items():
        yield kind, members[0].reason, members, ()
    yield from _by_name(named)
    rounding = _by_rounding(unnamed, teller.profile)
    for dtype, members in rounding.items():
        yield "rounding", dtype, members, ()
    rounded = {result.ask.key for members in rounding.values() for result in members}
    unknown = [result for result in unnamed if result.ask.key not in rounded]
    for members in _alike(_by_property(unknown, teller), teller):
        yield "unknown", None, members, ()


def _template(reason: str | None) -> str:
    """Return a reason without its numbers and quoted names, so that reasons of the same kind are equal."""
    return re.sub(r"[-+]?\d[\d.e+-]*|'[^']*'", "#", reason or "")


def _variants(result: Result) -> list[str]:
    """Name the mistakes and conventions that explain a result."""
    by_name = {mistake.name: mistake.variant for mistake in MISTAKES}
    return [by_name.get(name, name) for name in result.diagnosis] or [str(c) for c in result.conventions]


def _by_name(named: Sequence[Result]) -> Iterator[tuple[str, str, list[Result], tuple[str, ...]]]:
    """Choose few mistakes that together explain all named failures, in order of the number that each explains.

    Of mistakes that explain the same number, a convention comes first.
    """
    left = {result.ask.key: (result, _variants(result)) for result in named}
    order = {name: i for i, name in enumerate(dict.fromkeys(mistake.variant for mistake in MISTAKES))}
    while left:
        counts = Counter(name for _, names in left.values() for name in names)
        best = min(counts, key=lambda name: (-counts[name], "=" not in name, order.get(name, len(order))))
        members = [(result, names) for result, names in left.values() if best in names]
        shared = set(members[0][1]).intersection(*(names for _, names in members)) - {best}
        yield "mistake", best, [result for result, _ in members], tuple(n for n in members[0][1] if n in shared)
        left = {key: entry for key, entry in left.items() if best not in entry[1]}


def _by_rounding(unnamed: Sequence[Result], profile: str) -> dict[str, list[Result]]:
    """Group failures that have only errors of rounding, if nearly all failures of their function and dtype do.

    A few failures in a dtype are not enough if the function has as many with larger errors.
    """
    cells: defaultdict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in unnamed:
        cells[result.ask.case.function, result.ask.dtype].append(result)
    rounded = {cell: _rounded(members, profile) for cell, members in cells.items()}
    groups: defaultdict[str, list[Result]] = defaultdict(list)
    for cell, members in cells.items():
        others = sum(len(cells[c]) - len(rounded[c]) for c in cells if c[0] == cell[0])
        if rounded[cell] and len(members) >= min(FEWEST_ROUNDED, 1 + others):
            coarsest = max(rounded[cell].values(), key=NARROWER.index)
            groups[coarsest] += [result for result in members if result.ask.key in rounded[cell]]
    return dict(groups)


def _rounded(members: Sequence[Result], profile: str) -> dict[Key, str]:
    """Return the dtype of the rounding of nearly all failures, the small ones first; empty if too many are larger."""
    rounded: dict[Key, str] = {}
    others = 0
    for result in sorted(members, key=_elements):
        assert result.wrong is not None
        dtype = rounded_to(result.wrong, profile)
        if dtype is not None:
            rounded[result.ask.key] = dtype
        else:
            others += 1
        if others > (1 - NEARLY_ALL) * len(members):
            return {}
    return rounded


def _elements(result: Result) -> int:
    return sum(array.size for array in result.wrong.outputs.values()) if result.wrong is not None else 0


def _alike(groups: Iterable[list[Result]], teller: _Teller) -> list[list[Result]]:
    """Join the groups that are wrong at the same places by the same amounts, because they have a common cause."""
    joined: dict[object, list[Result]] = {}
    for number, members in enumerate(groups):
        symptoms = teller.symptoms(members)
        key = symptoms if all(symptoms) else number
        joined[key] = [*joined.get(key, []), *members]
    return list(joined.values())


def _by_property(unknown: Sequence[Result], teller: _Teller) -> Iterator[list[Result]]:
    """Split failures by the property that separates most of them from passes, then the rest in the same way.

    If nearly every question of their functions fails, no property separates them, and they are one group.
    """
    left = list(unknown)
    functions = {result.ask.case.function for result in left}
    passes = sum(result.ask.case.function in functions for result in teller.passing)
    if len(left) >= NEARLY_ALL * (len(left) + passes):
        yield from [left] if left else []
        return
    for _ in range(MOST_UNKNOWN):
        share = teller.share(left)
        members = [r for r in left if share is None or teller.properties(r.ask).issuperset(share.properties)]
        if not members:
            break
        yield members
        keys = {result.ask.key for result in members}
        left = [result for result in left if result.ask.key not in keys]
    if left:
        yield left
