"""Choose the cases, dtypes and arguments of a run by the claims of the target and the selection of the user."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy

from mha_spec.arrays import FLOATING
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec_conformance.suite.functions import FUNCTIONS, OF_ATTENTION

from .alignments import ALIGNMENTS, alignments, has_positions, offset_in_numbers
from .calls import keyword_of
from .layouts import obstacle
from .question import FURTHER, Question, Sample
from .tiles import hidden_by_dense_alone

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mha_spec_conformance.suite.cases import Case, Expected
    from mha_spec_conformance.targets.claims import Claims

MOST_ROWS = 2**14
"""The largest number of rows that a question names, because a message is short."""

LEAST_ROOM, WIDEST = 2**20, 16
"""The bytes that an answer may have in addition to its outputs, and those of an element of the widest dtype."""

__all__ = ["Ask", "Selection", "asks", "matches", "probes", "tried_in_every_layout"]


@dataclass(frozen=True)
class Selection:
    """A part of the suite: cases by id, pattern or clause, and dtypes; an empty selection is the whole suite."""

    only: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    """The number of the shard, from 1 on, and the number of shards; see `sharding`."""

    @property
    def everything(self) -> bool:
        """True if the whole suite is selected."""
        return not self.only and not self.dtypes and not self.exclude and self.shard is None

    def takes(self, case: Case) -> bool:
        """Tell whether the case is selected; see `matches`."""
        if any(matches(case, pattern) for pattern in self.exclude):
            return False
        return not self.only or any(matches(case, pattern) for pattern in self.only)

    def asks_in(self, dtype: str) -> bool:
        """Tell whether the dtype is selected."""
        return not self.dtypes or dtype in self.dtypes


def matches(case: Case, pattern: str) -> bool:
    """Tell whether the id of the case matches or contains the pattern, or the case cites a clause of that name."""
    return fnmatchcase(case.id, pattern) or pattern in case.id or pattern in case.clauses


@dataclass(frozen=True)
class Ask:
    """A case in a dtype, with the outputs that a target can return; `omitted` arguments are not passed."""

    case: Case
    dtype: str
    outputs: tuple[str, ...]
    omitted: frozenset[str] = frozenset()
    every_layout: bool = False
    """If True, all further calls are made: the same again, in every memory layout, and with other numbers."""
    of_suite: frozenset[str] = frozenset()
    """The features of the case that the suite supplies, as when it repeats heads for the target."""
    relaxed: bool = False
    """True if the profile of the target makes a SHOULD of the case."""
    takes_names: bool = True
    """False if a q_offset that the case names is passed in numbers, because only backends promise to take names."""

    @property
    def key(self) -> tuple[str, str]:
        """The id and dtype, which identify an ask in a run."""
        return self.case.id, self.dtype

    @property
    def level(self) -> str:
        """MUST or SHOULD."""
        return "SHOULD" if self.relaxed else self.case.level

    @property
    def features(self) -> tuple[str, ...]:
        """The features of the case that the target has, without `lse` if that output is not asked for."""
        features = (name for name in self.case.features if name not in self.of_suite)
        return tuple(name for name in features if name != "lse" or "lse" in self.outputs or not self.case.expected)

    @property
    def expected(self) -> dict[str, Expected]:
        """The expected outputs that are asked for, by name; empty if the case must raise."""
        return {name: self.case.expected[name] for name in self.outputs if name in self.case.expected}

    def question(self) -> Question:
        """Return the question, with fresh arrays."""
        case = self.case
        options = {name: _plain(value) for name, value in case.options.items() if name not in self.omitted}
        optional = FUNCTIONS[case.function].optional
        options |= {optional[name]: True for name in self.outputs if name in optional}
        arrays = {name: array for name, array in case.inputs(self.dtype).items() if name not in self.omitted}
        if isinstance(options.get("q_offset"), str) and not self.takes_names:
            del options["q_offset"]
            arrays["q_offset"] = offset_in_numbers(case)
        return Question(
            id=case.id,
            function=case.function,
            dtype=self.dtype,
            arrays=arrays,
            options=options,
            outputs=self.outputs,
            features=self.features,
            clauses=tuple(case.clauses),
            tags=tuple(case.tags),
            further=FURTHER if self.every_layout else (),
            sampled={} if self.every_layout else self._sampled(),
            most_bytes=self._most_bytes(),
        )

    def _sampled(self) -> dict[str, Sample]:
        """Return the outputs of which the golden holds only rows."""
        return {
            name: Sample(tuple(golden.shape), golden.rows.astype(numpy.int64), golden.values.size // golden.rows.size)
            for name, golden in self.expected.items()
            if golden.rows is not None and 0 < golden.rows.size <= MOST_ROWS
        }

    def _most_bytes(self) -> int:
        """Return an upper bound of the size of the outputs of all calls, in every dtype."""
        elements = sum(math.prod(golden.shape) for golden in self.expected.values())
        return LEAST_ROOM + elements * WIDEST * (1 + len(FURTHER))


def _plain(value: object) -> object:
    """Convert a list of JSON to a tuple."""
    return tuple(value) if isinstance(value, list) else value


def asks(cases: Iterable[Case], claims: Claims, selection: Selection) -> list[Ask]:
    """Return all asks of the target, case by case and within a case dtype by dtype."""
    return [
        ask
        for case in cases
        if selection.takes(case)
        for dtype in FLOATING
        if dtype in case.dtypes and dtype in claims.dtypes and selection.asks_in(dtype)
        if (ask := _ask(case, dtype, claims)) is not None
    ]


def _ask(case: Case, dtype: str, claims: Claims) -> Ask | None:
    if case.expect == "error":
        return Ask(case, dtype, ("output",)) if claims.registered and case.function in claims.keywords else None
    omitted = _omitted(case, claims)
    if omitted is None or _has_obstacle(case, claims) or _needs_names(case, claims):
        return None
    optional, claimed = FUNCTIONS[case.function].optional, claims.keywords[case.function]
    outputs = tuple(name for name in case.expected if name not in optional or optional[name] in claimed)
    of_suite = frozenset(() if claims.groups else ("groups",))
    relaxed = claims.profile == "fused" and hidden_by_dense_alone(case)
    return Ask(case, dtype, outputs, omitted, of_suite=of_suite, relaxed=relaxed, takes_names=claims.registered)


def _omitted(case: Case, claims: Claims) -> frozenset[str] | None:
    """Name the arguments that are not passed, or return None if the target cannot be asked the case.

    A target without q_offset is asked the cases whose offset its alignment implies. If its alignment is not known, it
    is asked the cases whose offset every alignment implies.
    """
    keywords, omitted = _keywords(case), frozenset[str]()
    if has_positions(case) and "q_offset" not in claims.words(case.function):
        known = claims.conventions.get("causal_alignment")
        if not set(alignments(case)).issuperset(ALIGNMENTS if known is None else [known]):
            return None
        omitted = keywords & {"q_offset"}
    return omitted if claims.accepts(case.function, keywords - omitted) else None


def _needs_names(case: Case, claims: Claims) -> bool:
    """Tell whether the case names an offset that depends on more than the lengths of attention, such as a cache."""
    named = isinstance(case.options.get("q_offset"), str)
    return named and not claims.registered and case.function not in (*OF_ATTENTION, *VARLEN_FUNCTIONS)


def _has_obstacle(case: Case, claims: Claims) -> bool:
    """Tell whether the layout of the target has no place for an argument of the case."""
    shapes = {name: case.shape_of(name) for name in case.input_names}
    names = (*case.options, *case.input_names)
    return obstacle(claims, case.function, shapes, names, lambda name: case.input(name, case.dtypes[0])) is not None


def _keywords(case: Case) -> frozenset[str]:
    arguments = {keyword_of(case.function, name) for name in (*case.options, *case.input_names)}
    return frozenset(arguments - set(FUNCTIONS[case.function].operands))


def probes(cases: Iterable[Case], claims: Claims, selection: Selection) -> dict[str, list[Ask]]:
    """Return the probes of a target without q_offset: by alignment, the asks that it passes and another fails.

    There are none if no selected case is causal, or the target declares its alignment.
    """
    taken = claims.keywords.get("attention", ())
    dtype = next((name for name in claims.dtypes if selection.asks_in(name)), None)
    if "causal" not in taken or "q_offset" in taken or "causal_alignment" in claims.conventions or dtype is None:
        return {}
    causal = [case for case in cases if case.function == "attention" and "causal" in case.features]
    if not any(selection.takes(case) for case in causal):
        return {}
    asked: dict[str, list[Ask]] = {name: [] for name in ALIGNMENTS}
    for case in causal:
        readings = alignments(case) if case.expect != "error" else ()
        if len(readings) == len(ALIGNMENTS) or dtype not in case.dtypes or case.level != "MUST":
            continue
        for name in readings:
            aligned = replace(claims, conventions={"causal_alignment": name})
            if (ask := _ask(case, dtype, aligned)) is not None:
                asked[name].append(replace(ask, outputs=("output",)))
    # Alignments that the lengths of the target cannot tell apart have the same probes; the first stands for them.
    distinct = {tuple(ask.key for ask in of_name): name for name, of_name in reversed(asked.items()) if of_name}
    return {name: of_name for name, of_name in asked.items() if name in distinct.values()}


def tried_in_every_layout(asked: Iterable[Ask]) -> list[Ask]:
    """Mark an ask of each feature: it is repeated, and asked in every memory layout."""
    covered: set[str] = set()
    marked: list[Ask] = []
    for ask in asked:
        new = set(ask.features) - covered
        chosen = bool(new) and ask.case.expect != "error" and ask.level == "MUST"
        covered |= new if chosen else set()
        marked.append(replace(ask, every_layout=True) if chosen else ask)
    return marked
