"""The softmax of a row in balls: exact differences of scores, then exponentials, their sum and lse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flint import arb, fmpz
from oracle_balls import exact_product
from oracle_visibility import EMPTY, FINITE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from oracle_visibility import AttentionCall, Row

__all__ = ["Exponentials", "Scores", "by_head"]


@dataclass(frozen=True)
class Exponentials:
    """A row's exp(s - s_anchor) over its visible keys and for its sink, their sum, and lse.

    `anchor` is the index of the largest score among the keys of the row, or the number of keys if the sink is larger.
    """

    keys: list[arb]
    sink: arb
    total: arb
    lse: arb
    anchor: int


def by_head(rows: Iterable[Row]) -> dict[tuple[int, int], list[Row]]:
    """Group rows by batch entry and head."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.batch, row.head), []).append(row)
    return groups


class Scores:
    """The scores of some rows: exact products q.k, computed once, and balls at the current precision.

    A score is a pair (x, bias), where x is the integer product; a sink is the pair (0, sink), because neither scale nor
    cap changes 0. The difference of equal pairs is exactly 0, and they share an exponential.
    """

    def __init__(self, call: AttentionCall, rows: Iterable[Row]) -> None:
        self.call = call
        self._products: dict[tuple[int, int, int], tuple[list[int], int]] = {}
        for (b, h), members in by_head(rows).items():
            query = call.query[b, h][[row.index for row in members]]
            table, exponent = exact_product(query, call.key[b, h // call.group])
            for row, line in zip(members, table, strict=True):
                self._products[b, h, row.index] = line, exponent

    def scale(self) -> arb:
        """Return the scale, which is exact unless it is the default."""
        q = self.call
        return 1 / arb(q.qk_dim).sqrt() if q.scale is None else arb(q.scale)

    def exponentials(self, row: Row) -> Exponentials:
        """Return the exponentials of a finite row, or that of the sink of an empty row."""
        q = self.call
        line, exponent = self._products[row.batch, row.head, row.index]
        unit = self.scale() * power_of_two(exponent)
        sink = q.sinks[row.head]
        terms = [(line[j], q.bias(row.batch, row.head, row.index, j)) for j in row.keys] + [(0, sink)]
        scores = {term: self._score(term, unit) for term in dict.fromkeys(terms if has_weight(sink) else terms[:-1])}
        largest = max(scores, key=lambda term: float(scores[term]))
        powers = {term: self._difference(term, largest, unit).exp() for term in scores}
        keys = [powers[term] for term in terms[:-1]]
        sink_power = powers[terms[-1]] if has_weight(sink) else arb(0)
        total = sum(keys, sink_power)
        return Exponentials(keys, sink_power, total, scores[largest] + total.log(), terms.index(largest))

    def slopes(self, row: Row) -> list[arb] | None:
        """Return the slope of the soft cap at each visible key, 1 - tanh^2 = sech^2; None without a cap."""
        if self.call.softcap is None:
            return None
        line, exponent = self._products[row.batch, row.head, row.index]
        unit = self.scale() * power_of_two(exponent) / arb(self.call.softcap)
        slopes = {x: (unit * x).sech() ** 2 for x in {line[j] for j in row.keys}}
        return [slopes[line[j]] for j in row.keys]

    def _score(self, term: tuple[int, float], unit: arb) -> arb:
        return self._capped(term[0], unit) + arb(term[1])

    def _difference(self, term: tuple[int, float], anchor: tuple[int, float], unit: arb) -> arb:
        bias = arb(term[1]) - arb(anchor[1])
        if self.call.softcap is None:
            return unit * (term[0] - anchor[0]) + bias
        return bias if term[0] == anchor[0] else self._capped(term[0], unit) - self._capped(anchor[0], unit) + bias

    def _capped(self, x: int, unit: arb) -> arb:
        if self.call.softcap is None:
            return unit * x
        cap = arb(self.call.softcap)
        return cap * (unit * x / cap).tanh()


def has_weight(sink: float) -> bool:
    """Return True unless the sink is -inf, which means that there is none."""
    return sink != float("-inf")


def is_evaluated(row: Row, sink: float) -> bool:
    """Return True if the row has an exponential: it is finite, or it is empty and has a sink."""
    return row.state == FINITE or (row.state == EMPTY and has_weight(sink))


def power_of_two(exponent: int) -> arb:
    """Return 2**exponent exactly."""
    return arb((fmpz(1), fmpz(exponent)))
