"""Name the mistakes of a target: those that explain its failures and that no passing case refutes.

A mistake is tried on few representative failures. If it explains any of them, it is put on trial: it must explain at
least 90 % of the failures that it could cause, and must not predict a failure where the target passes. A failure in
which NaN of an operand spreads has another cause, and does not count against it. A mistake that
holds only in some dtypes or functions is named for these. Pairs of mistakes are tried where no single mistake suffices.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from mha_spec.steps import Steps
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec_conformance.mistakes import MISTAKES, Compared, Mistake
from mha_spec_conformance.suite.functions import FUNCTIONS

from .pairs import together
from .prediction import can_show, elements, scores_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mha_spec_conformance.asking.selection import Ask

    from .recognition import Recognition, Wrong

    Cell = tuple[str, str]
    Key = tuple[str, str]

__all__ = ["named", "wherever_it_can_be"]

INEXACT = (Compared.BY_SIZE_OF_ERRORS, Compared.WHERE_NOT_FINITE)
"""The comparisons in which not every element must have the value that the mistake gives it."""

LEAST = 0.9
"""The share of the failures that a mistake could cause which it must explain."""

REPRESENTATIVES = 60
"""The largest number of failures on which every mistake is tried."""

MOST_FRUITLESS = 30
"""The number of failures in succession without a suspect after which the search ends."""

WITNESSES = 300
"""The largest number of passing cases that are consulted in each trial."""

MOST_SCORES = 2**21
"""The largest number of scores that these cases have together, because a prediction on a large case takes long."""

SMALL = 2**12
"""The largest number of scores of a small case, on which a prediction takes a millisecond."""

MOST_SCORES_TRIED = 2**25
"""The number of scores of the predictions on large representatives, about 5 seconds of work, after which they end."""

FIRST_WITNESSES = 12
"""The number of small passing cases that are consulted before a mistake is tried on a large failure."""

NOT_FINITE = ("MHA-POISON", "MHA-NAN", "MHA-SINK-2", "MHA-MERGE-2", "MHA-MERGE-3", "MHA-VARLEN-3", "MHA-VARLEN-12")
"""The clauses about numbers that are not finite, which sinks, an empty half of a merge and the tokens that a sequence
does not have may hold, too; NaN in a result alone is evidence only for a mistake against them."""

MOST_PAIRED = 5
"""The largest number of mistakes of which pairs are made."""

LEAST_OF_ROUNDING = 1 / 3
"""The share of the failures of a mistake of precision in which its own errors exceed the allowance; the errors of the
others are so small that they fit any precision."""

LEAST_OF_PAIR = 3
"""The number of failures that a pair, or a mistake that raises, must explain and no other mistake does."""

LEAST_OF_CELL = 4
"""The number of cases that a mistake must explain if it holds only for some functions in some dtypes."""

MOST_FAULTS = 3
"""The number of errors and malformed answers on which every mistake is tried."""

MOST_LEFT = 20
"""The largest number of unexplained failures on which a pair is tried."""


def named(
    wrong: Sequence[Wrong],
    passing: Sequence[Ask],
    recognition: Recognition,
    mistakes: Sequence[Mistake] = MISTAKES,
    faults: Sequence[tuple[Ask, str | None]] = (),
) -> dict[Key, tuple[Mistake, ...]]:
    """Name the mistakes that explain the failures of a run, by case and dtype; a failure without a name is left out.

    Args:
        wrong: The failures of which the values are wrong.
        passing: The questions that the target passes.
        recognition: Compares answers with the predictions of mistakes.
        mistakes: The mistakes that may be named.
        faults: The failures without values that can be compared: a wrong shape or dtype in words, None for an error.
    """
    search = _Search(wrong, passing, recognition)
    wherever = [wherever_it_can_be(mistake) for mistake in mistakes]
    search.try_on_representatives(wherever)
    search.try_pairs()
    search.try_without_values(wherever, faults)
    explained = Counter(mistake.name for names in search.names.values() for mistake in names)
    return _without_leftovers({key: _exact(names, explained) for key, names in search.names.items()})


class _Search:
    """The state of the search for names."""

    def __init__(self, wrong: Sequence[Wrong], passing: Sequence[Ask], recognition: Recognition) -> None:
        self.wrong = sorted(wrong, key=_size)
        self.passing = sorted(passing, key=lambda ask: elements(ask.case))
        self.recognition = recognition
        self.names: dict[Key, tuple[Mistake, ...]] = {}
        self.suspects: dict[str, Mistake] = {}
        self.settled: set[str] = set()
        self._small: dict[Cell, list[Ask]] = {}
        self.refuted: set[tuple[str, Cell]] = set()

    def try_on_representatives(self, mistakes: Sequence[Mistake]) -> None:
        """Try every mistake on failures of each kind; a trial follows if it explains any and is not refuted nearby."""
        small = [failure for failure in self.wrong if scores_of(failure.ask.case) <= SMALL]
        large = [failure for failure in self.wrong if scores_of(failure.ask.case) > SMALL]
        for failures in (small, large):
            fruitless, left = 0, MOST_SCORES_TRIED
            for representative in _representatives(failures, self.names):
                if fruitless == MOST_FRUITLESS or left < 0:
                    break
                scores = scores_of(representative.ask.case)
                untried = self._untried(mistakes, representative)
                left -= scores * len(untried) if scores > SMALL else 0
                fruitless = 0 if self._try(untried, representative) else fruitless + 1

    def _untried(self, mistakes: Sequence[Mistake], representative: Wrong) -> list[Mistake]:
        """Choose the mistakes to try; a large case is tried only with those that no small passing case refutes."""
        ask = representative.ask
        able = [
            mistake
            for mistake in mistakes
            if mistake.name not in self.settled and can_show(mistake, ask.case, ask.dtype)
        ]
        if scores_of(ask.case) > SMALL:
            for mistake in able:
                self._is_refuted_early(mistake, _cell(ask))
        return [mistake for mistake in able if (mistake.name, _cell(ask)) not in self.refuted]

    def _is_refuted_early(self, mistake: Mistake, cell: Cell) -> None:
        """Consult a few small passing questions of the same function and dtype, which is faster than a prediction."""
        if mistake.compared is Compared.WHERE_NOT_FINITE or (mistake.name, cell) in self.refuted:
            return
        if cell not in self._small:
            small = [ask for ask in self.passing if _cell(ask) == cell and scores_of(ask.case) <= SMALL]
            self._small[cell] = small[:WITNESSES]
        witnesses = _witnesses(mistake, self._small[cell])[:FIRST_WITNESSES]
        if any(self.recognition.shows(mistake, ask) for ask in witnesses):
            self.refuted.add((mistake.name, cell))

    def _try(self, mistakes: Sequence[Mistake], representative: Wrong) -> bool:
        """Try mistakes on a failure; tell whether any explains it."""
        cell = _cell(representative.ask)
        suspects = self.recognition.explaining(mistakes, representative)
        for mistake in suspects:
            self.suspects[mistake.name] = mistake
            if self.is_refuted(mistake, cell):
                self.refuted.add((mistake.name, cell))
            else:
                self.settled.add(mistake.name)
                self.name(mistake, (mistake,))
        return bool(suspects)

    def is_refuted(self, mistake: Mistake, cell: Cell) -> bool:
        """Tell whether a passing question of the same function and dtype refutes a mistake, which is fast."""
        if mistake.compared is Compared.WHERE_NOT_FINITE:
            return False
        near = [ask for ask in self.passing if _cell(ask) == cell]
        return any(self.recognition.shows(mistake, ask) for ask in _witnesses(mistake, near))

    def name(self, mistake: Mistake, parts: tuple[Mistake, ...]) -> None:
        """Put a mistake on trial, and name it where it holds; a failure that a part explains has that name."""
        trial = Trial.of(mistake, self.wrong, self.passing, self.recognition)
        holds = trial.cells_that_hold()
        for wrong in trial.explained:
            key = wrong.ask.key
            if _cell(wrong.ask) in holds and (len(parts) == 1 or key not in self.names):
                alone = tuple(part for part in parts if self.recognition.explains(part, wrong))
                self.names[key] = (*self.names.get(key, ()), *(alone or (mistake,)))

    def try_without_values(self, mistakes: Sequence[Mistake], faults: Sequence[tuple[Ask, str | None]]) -> None:
        """Name the mistakes that raise or give malformed results where the target does; named ones come first."""
        smallest = sorted(faults, key=lambda fault: elements(fault[0].case))[:MOST_FAULTS]
        for mistake in sorted(mistakes, key=lambda mistake: mistake.name not in self.settled):
            if not any(self.recognition.gives_fault(mistake, *fault) for fault in smallest):
                continue
            able = [fault for fault in faults if can_show(mistake, fault[0].case, fault[0].dtype)]
            explained = [ask for ask, fault in able if self.recognition.gives_fault(mistake, ask, fault)]
            cells = {_cell(ask) for ask in explained}
            refuted = any(self.is_refuted(mistake, cell) or self._raises_where_passing(mistake, cell) for cell in cells)
            if len(explained) >= max(LEAST_OF_PAIR, LEAST * len(able)) and not refuted:
                self.names |= {ask.key: (mistake,) for ask in explained if ask.key not in self.names}

    def _raises_where_passing(self, mistake: Mistake, cell: Cell) -> bool:
        near = [ask for ask in self.passing if _cell(ask) == cell]
        return any(self.recognition.gives_fault(mistake, ask, None) for ask in _witnesses(mistake, near))

    def try_pairs(self) -> None:
        """Try pairs of the mistakes that explain a failure each, where failures are left."""
        explained = Counter(name for name in self.suspects for w in self.wrong if w.verdicts.get(name))
        chosen = [self.suspects[name] for name, _ in explained.most_common(MOST_PAIRED)]
        small = [w for w in self.wrong if scores_of(w.ask.case) <= SMALL]
        for first, second in combinations(chosen, 2):
            left = [w for w in small if w.ask.key not in self.names][:MOST_LEFT]
            pair = together(first, second)
            if pair is None or sum(self.recognition.explains(pair, wrong) for wrong in left) < LEAST_OF_PAIR:
                continue
            if not any(self.is_refuted(pair, cell) for cell in {_cell(wrong.ask) for wrong in left}):
                self.name(pair, (first, second))


def wherever_it_can_be(mistake: Mistake) -> Mistake:
    """Return a mistake of attention as one that its gradients, layers and packed calls can have too.

    They contain it: a packed call is a call of attention for each sequence.
    """
    if not isinstance(mistake.steps, Steps):
        return mistake
    packed = [name for name in VARLEN_FUNCTIONS if name.removeprefix("varlen_") in mistake.functions]
    if "attention" not in mistake.functions:
        return replace(mistake, functions=(*mistake.functions, *packed))
    layers = [name for name, function in FUNCTIONS.items() if function.of_layer]
    if "attention_weights" not in mistake.functions:
        layers.remove("multi_head_attention_weights")
    containing = ("attention_vjp", *layers, *VARLEN_FUNCTIONS)
    return replace(mistake, functions=tuple(dict.fromkeys((*mistake.functions, *containing))))


def _without_leftovers(names: Mapping[Key, tuple[Mistake, ...]]) -> dict[Key, tuple[Mistake, ...]]:
    """Drop a name where it explains only what is left of another, which explains nearly all that it does and more."""
    explained: defaultdict[str, set[Key]] = defaultdict(set)
    for key, mistakes in names.items():
        for mistake in mistakes:
            explained[mistake.name].add(key)
    kept = dict(explained)
    for name, keys in explained.items():
        larger = [other for other in explained.values() if len(other) > len(keys) <= len(other & keys) / LEAST]
        kept[name] = keys & max(larger, key=len) if larger else keys
    chosen = {key: tuple(m for m in mistakes if key in kept[m.name]) for key, mistakes in names.items()}
    return {key: mistakes for key, mistakes in chosen.items() if mistakes}


def _exact(names: tuple[Mistake, ...], explained: Mapping[str, int]) -> tuple[Mistake, ...]:
    """Leave out the mistakes that are compared inexactly, if another explains as many failures."""
    exact = tuple(mistake for mistake in names if mistake.compared not in INEXACT)
    most = max((explained[mistake.name] for mistake in exact), default=0)
    return tuple(mistake for mistake in names if mistake in exact or explained[mistake.name] > most)


def _representatives(wrong: Iterable[Wrong], names: dict[Key, tuple[Mistake, ...]]) -> Iterator[Wrong]:
    """Yield failures without a name, the smallest of each kind first, and kinds with many failures before others."""
    kinds: defaultdict[object, list[Wrong]] = defaultdict(list)
    for failure in wrong:
        kinds[_kind(failure)].append(failure)
    tried: set[Key] = set()
    for _ in range(REPRESENTATIVES):
        left = {kind: [w for w in members if w.ask.key not in names] for kind, members in kinds.items()}
        fresh = {kind: [w for w in members if w.ask.key not in tried] for kind, members in left.items()}
        open_kinds = [kind for kind, members in fresh.items() if members]
        if not open_kinds:
            return
        times = {kind: sum(w.ask.key in tried for w in left[kind]) for kind in open_kinds}
        kind = max(open_kinds, key=lambda kind: (-times[kind], len(fresh[kind])))
        tried.add(fresh[kind][0].ask.key)
        yield fresh[kind][0]


def _compared(mistake: Mistake, wrong: Iterable[Wrong], recognition: Recognition) -> tuple[list[Wrong], list[Wrong]]:
    """Divide the failures into those that the mistake explains and others.

    If the first large failure of a kind is not explained, the others of the kind are not compared, to save time.
    """
    explained: list[Wrong] = []
    unlike: list[Wrong] = []
    kinds: dict[object, bool] = {}
    for failure in wrong:
        kind = _kind(failure) if scores_of(failure.ask.case) > SMALL else None
        if not kinds.get(kind, True):
            continue
        explains = recognition.fits(mistake, failure)
        (explained if explains else unlike).append(failure)
        if kind is not None:
            kinds.setdefault(kind, explains)
    return explained, unlike


def _kind(failure: Wrong) -> object:
    return failure.ask.case.function, failure.ask.features, failure.ask.dtype


@dataclass
class Trial:
    """The evidence about a mistake in each function and dtype."""

    explained: list[Wrong]
    unexplained: Counter[Cell]
    refuting: Counter[Cell]

    @classmethod
    def of(cls, mistake: Mistake, wrong: Iterable[Wrong], passing: Iterable[Ask], recognition: Recognition) -> Trial:
        """Ask every failure, and then passing questions, until each function and dtype has refuted the mistake."""
        explained, others = _divided(mistake, wrong, recognition)
        unexplained = _unexplained(mistake, explained, others, recognition)
        return cls(explained, unexplained, _refuting(mistake, explained, passing, recognition))

    def cells_that_hold(self) -> frozenset[Cell]:
        """Return the functions and dtypes for which the mistake may be named.

        These are all, whole dtypes or whole functions; or functions in dtypes, if more cases are the evidence.
        """
        explained = Counter(_cell(failure.ask) for failure in self.explained)
        cells = {*explained, *self.unexplained, *self.refuting}
        if self._hold(cells, explained):
            return frozenset(cells)
        disproved = {cell for cell in explained if self._is_disproved(cell, explained)}
        for axis in (1, 0):
            parts = {cell[axis] for cell in cells}
            groups = [{cell for cell in cells if cell[axis] == part} for part in parts]
            holding = {cell for group in groups if self._hold(group, explained) for cell in group}
            if len(self._cases(holding)) > 1:
                return frozenset(_without(disproved, holding))
        holding = {cell for cell in cells if self._hold({cell}, explained)}
        return frozenset(_without(disproved, holding) if len(self._cases(holding)) >= LEAST_OF_CELL else ())

    def _is_disproved(self, cell: Cell, explained: Counter[Cell]) -> bool:
        """Tell whether most failures, or a pass, show that the failures it gives in a cell have another cause."""
        return self.unexplained[cell] > explained[cell] or self.refuting[cell] > 0

    def _hold(self, cells: set[Cell], explained: Counter[Cell]) -> bool:
        right, wrong = (sum(counter[cell] for cell in cells) for counter in (explained, self.unexplained))
        return right > 0 and right >= LEAST * (right + wrong) and not any(self.refuting[cell] for cell in cells)

    def _cases(self, cells: set[Cell]) -> set[str]:
        return {failure.ask.case.id for failure in self.explained if _cell(failure.ask) in cells}


def _divided(mistake: Mistake, wrong: Iterable[Wrong], recognition: Recognition) -> tuple[list[Wrong], list[Wrong]]:
    """Return the failures that count for the mistake, and those that may count against it."""
    explained, unlike = _compared(mistake, wrong, recognition)
    if not _is_about_nan(mistake) and all(failure.only_spreads for failure in explained):
        explained, unlike = [], [*explained, *unlike]
    if mistake.compared is Compared.BY_SIZE_OF_ERRORS:
        exceeding = sum(recognition.explains(mistake, failure) for failure in explained)
        explained = explained if exceeding >= LEAST_OF_ROUNDING * len(explained) else []
    return explained, [failure for failure in unlike if not failure.spreads]


def _unexplained(
    mistake: Mistake, explained: Sequence[Wrong], others: Iterable[Wrong], recognition: Recognition
) -> Counter[Cell]:
    """Count the failures that an attention with the mistake has too, but with another answer.

    Failures are compared until a cell has so many that it and every group with it are refuted.
    """
    by_errors = mistake.compared is Compared.BY_SIZE_OF_ERRORS
    makes_nan = mistake.compared is Compared.WHERE_NOT_FINITE and any(w.of_finite_operands for w in explained)
    most = len(explained) * (1 / LEAST - 1)
    count = Counter(_cell(failure.ask) for failure in explained)

    def counts(failure: Wrong) -> bool:
        # A mistake that makes a NaN must also explain the failures with a NaN in which it cannot make any.
        if by_errors or (makes_nan and failure.loses_finite):
            return True
        return recognition.shows(mistake, failure.ask) or recognition.rounds(mistake, failure)

    unexplained: Counter[Cell] = Counter()
    for failure in others:
        cell = _cell(failure.ask)
        if unexplained[cell] <= max(most, count[cell]) and counts(failure):
            unexplained[cell] += 1
    return unexplained


def _refuting(
    mistake: Mistake, explained: Sequence[Wrong], passing: Iterable[Ask], recognition: Recognition
) -> Counter[Cell]:
    """Count the passing questions that an attention with the mistake fails, in the cells where they refute it.

    The reach of a NaN depends on the size of tiles, so that as many passes as failures do not refute such a mistake.
    """
    by_reach = mistake.compared is Compared.WHERE_NOT_FINITE
    tolerated = Counter(_cell(failure.ask) for failure in explained if by_reach)
    refuting: Counter[Cell] = Counter()
    for ask in _witnesses(mistake, passing):
        cell = _cell(ask)
        if refuting[cell] <= tolerated[cell] and recognition.shows(mistake, ask):
            refuting[cell] += 1
    return Counter({cell: number for cell, number in refuting.items() if number > tolerated[cell]})


def _without(disproved: set[Cell], holding: set[Cell]) -> set[Cell]:
    """Leave out the cells of a function in which the mistake gives the results of another mistake in another dtype."""
    functions = {function for function, _ in disproved - holding}
    return {cell for cell in holding if cell[0] not in functions}


def _is_about_nan(mistake: Mistake) -> bool:
    """Tell whether the mistake concerns numbers that are not finite."""
    about = any(clause.startswith(NOT_FINITE) for clause in mistake.clauses)
    return about or mistake.compared is Compared.WHERE_NOT_FINITE


def _witnesses(mistake: Mistake, passing: Iterable[Ask]) -> list[Ask]:
    """Choose the passing questions that are consulted, in every dtype: first those that cite clauses of the mistake.

    The questions come in order of their size. The first case is chosen whatever its size.
    """
    able = [ask for ask in passing if ask.case.expect != "error" and can_show(mistake, ask.case, ask.dtype)]
    cases = {ask.case.id: ask.case for ask in able}
    ids: set[str] = set()
    left = MOST_SCORES
    for case in sorted(cases.values(), key=lambda case: not set(case.clauses) & set(mistake.clauses))[:WITNESSES]:
        scores = scores_of(case)
        if not ids or scores <= left:
            ids.add(case.id)
            left -= scores
    return [ask for ask in able if ask.case.id in ids]


def _cell(ask: Ask) -> tuple[str, str]:
    return ask.case.function, ask.dtype


def _size(wrong: Wrong) -> int:
    return sum(array.size for array in wrong.outputs.values())
