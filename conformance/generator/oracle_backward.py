"""Expected gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
from flint import arb
from oracle_balls import exact_product, product, rounded
from oracle_forward import spread_kept
from oracle_kinds import ANY, EXACT, FINITE_VALUE, Marked
from oracle_softmax import Exponentials, Scores, by_head, has_weight, power_of_two
from oracle_visibility import EMPTY, FINITE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from oracle_visibility import AttentionCall, Row

__all__ = ["attention_vjp"]


def attention_vjp(call: AttentionCall, rows: Sequence[Row]) -> dict[str, Marked]:
    """Compute the gradients of query, key, value, bias and sinks, each in the shape of its operand."""
    kinds = _kinds(call, rows)
    gradients = Gradients(call, rows)
    finite = {name: kind == FINITE_VALUE for name, kind in kinds.items()}
    values = rounded(call.name, gradients.evaluate, finite)
    return {name: Marked.fill(values[name], kinds[name], 0.0) for name in kinds}


def _shapes(call: AttentionCall) -> dict[str, tuple[int, ...]]:
    shapes = {f"grad_{name}": getattr(call, name).shape for name in ("query", "key", "value")}
    if call.has_bias:
        shapes["grad_bias"] = call.bias.shape
    return shapes | ({"grad_sinks": (call.heads,)} if call.has_sinks else {})


def _kinds(call: AttentionCall, rows: Sequence[Row]) -> dict[str, numpy.ndarray]:
    """Mark elements without a contribution as exactly 0; elements with an unspecified contribution are not compared."""
    kinds = {name: numpy.full(shape, EXACT, dtype=numpy.uint8) for name, shape in _shapes(call).items()}
    for row in rows:
        b, h, i = row.batch, row.head, row.index
        kind = FINITE_VALUE if is_specified(call, row) else ANY
        if row.state != EMPTY:
            kinds["grad_query"][b, h, i] = kind
        places: list[tuple[str, tuple[int, ...]]] = [("grad_key", (b, h // call.group, j)) for j in row.keys]
        places += [("grad_value", (b, h // call.group, j)) for j in row.keys]
        if call.has_bias:
            places += [("grad_bias", call.bias.place(b, h, i, j)) for j in row.keys]
        if _moves_sink(call, row, kind):
            places.append(("grad_sinks", (h,)))
        for name, place in places:
            _mark(kinds[name], place, kind)
    return kinds


def _mark(kinds: numpy.ndarray, place: tuple[int, ...], kind: int) -> None:
    """Mark a contribution of this kind: ANY is kept, and everything else is replaced."""
    if not (kinds[place] == ANY).any():
        kinds[place] = kind


def _moves_sink(call: AttentionCall, row: Row, kind: int) -> bool:
    """Return True if the row contributes to the gradient of its sink; an empty row does only through grad_lse."""
    if not call.has_sinks or (row.state == EMPTY and call.grad_lse is None):
        return False
    return kind == ANY or has_weight(call.sinks[row.head])


def is_specified(call: AttentionCall, row: Row) -> bool:
    """Return True if the contribution of the row to the gradients is specified."""
    place = row.batch, row.head, row.index
    if call.grad_lse is not None and not math.isfinite(call.grad_lse[place]):
        return row.state == EMPTY and not has_weight(call.sinks[row.head])
    if row.state == EMPTY:
        return True
    return (
        row.state == FINITE and not call.non_finite_columns(row) and bool(numpy.isfinite(call.grad_output[place]).all())
    )


@dataclass(frozen=True)
class RowGradient:
    """The contributions of a row: dX of each visible key times `divisor`, l^2 (1 - rate); dS; and that of the sink.

    Divisions come last, so that a quotient that float64 can hold is exact.
    """

    numerators: list[arb]
    divisor: arb
    grad_logits: list[arb]
    grad_sink: arb
    exponentials: Exponentials


class Gradients:
    """The contributions of all rows whose gradients are specified, summed in balls."""

    def __init__(self, call: AttentionCall, rows: Sequence[Row]) -> None:
        self.call = call
        self.groups = by_head(row for row in rows if is_specified(call, row))
        self.scores = Scores(call, rows)
        self.grad_weights = {
            (b, h): exact_product(call.grad_output[b, h], call.value[b, h // call.group]) for b, h in self.groups
        }

    def evaluate(self) -> dict[str, numpy.ndarray]:
        """Evaluate every gradient in balls."""
        totals = {name: numpy.full(shape, arb(0), dtype=object) for name, shape in _shapes(self.call).items()}
        for (b, h), rows in self.groups.items():
            evaluated = [row for row in rows if row.keys or has_weight(self.call.sinks[h])]
            parts = [self._row(row) for row in evaluated]
            self._add_tensors(totals, b, h, evaluated, parts)
            self._add_bias_and_sinks(totals, evaluated, parts)
        return totals

    def _row(self, row: Row) -> RowGradient:
        """Compute dS_j = e_j (l dP_j - sum_k e_k dP_k + l g) / l^2, with dP minus that of the largest score, exactly.

        The sink is a key whose dP is 0. If all dP are equal, or if there is a single key, dS is exactly 0.
        """
        q = self.call
        e = self.scores.exponentials(row)
        keep = 1 - arb(q.dropout_rate)
        table, exponent = self.grad_weights[row.batch, row.head]
        line = [table[row.index][j] if q.kept(row.batch, row.head, row.index, j) else 0 for j in row.keys] + [0]
        unit = power_of_two(exponent)
        from_anchor = [unit * (x - line[e.anchor]) for x in line]
        total = sum((power * x for power, x in zip([*e.keys, e.sink], from_anchor, strict=True)), arb(0))
        grad_lse = arb(0) if q.grad_lse is None else arb(float(q.grad_lse[row.batch, row.head, row.index])) * keep
        numerators = [
            power * (e.total * (x + grad_lse) - total) for power, x in zip(e.keys, from_anchor[:-1], strict=True)
        ]
        divisor = e.total * e.total * keep
        grad_logits = [numerator / divisor for numerator in numerators]
        sink_numerator = e.sink * (e.total * (from_anchor[-1] + grad_lse) - total)
        slopes = self.scores.slopes(row)
        if slopes is not None:
            numerators = [numerator * slope for numerator, slope in zip(numerators, slopes, strict=True)]
        return RowGradient(numerators, divisor, grad_logits, sink_numerator / divisor, e)

    def _add_tensors(
        self, totals: dict[str, numpy.ndarray], b: int, h: int, rows: Sequence[Row], parts: Sequence[RowGradient]
    ) -> None:
        q, g, scale = self.call, h // self.call.group, self.scores.scale()
        lines = [spread(q.kv_len, row, part.numerators) for row, part in zip(rows, parts, strict=True)]
        grad_query = product(lines, q.key[b, g])
        for row, part, sums in zip(rows, parts, grad_query, strict=True):
            totals["grad_query"][b, h, row.index] = sums * scale / part.divisor
        indices = [row.index for row in rows]
        scaled = [[x / part.divisor for x in line] for line, part in zip(lines, parts, strict=True)]
        totals["grad_key"][b, g] += product(_transposed(scaled, q.kv_len), q.query[b, h][indices]) * scale
        keep = 1 - arb(q.dropout_rate)
        weights = [
            spread_kept(q, row, [x / (part.exponentials.total * keep) for x in part.exponentials.keys])
            for row, part in zip(rows, parts, strict=True)
        ]
        values = product(_transposed(weights, q.kv_len), q.grad_output[b, h][indices])
        totals["grad_value"][b, g] += values

    def _add_bias_and_sinks(
        self, totals: dict[str, numpy.ndarray], rows: Sequence[Row], parts: Sequence[RowGradient]
    ) -> None:
        q = self.call
        for row, part in zip(rows, parts, strict=True):
            if q.has_bias:
                for j, grad in zip(row.keys, part.grad_logits, strict=True):
                    totals["grad_bias"][q.bias.place(row.batch, row.head, row.index, j)] += grad
            if q.has_sinks:
                totals["grad_sinks"][row.head] += part.grad_sink


def spread(kv_len: int, row: Row, terms: Sequence[arb]) -> list[arb]:
    """Place the terms of visible keys among all keys, with 0 for hidden keys."""
    line = [arb(0)] * kv_len
    for j, term in zip(row.keys, terms, strict=True):
        line[j] = term
    return line


def _transposed(lines: Sequence[Sequence[arb]], columns: int) -> list[list[arb]]:
    return [[line[j] for line in lines] for j in range(columns)]
