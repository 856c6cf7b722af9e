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
    from collections.abc import Callable, Mapping, Sequence

    from oracle_visibility import AttentionCall, Row

__all__ = ["Gradients", "attention_vjp", "kinds_of"]


def attention_vjp(
    call: AttentionCall, rows: Sequence[Row], sample: Callable[[tuple[int, ...]], numpy.ndarray | None]
) -> dict[str, Marked]:
    """Compute the gradients of query, key, value, bias and sinks, each in the shape of its operand.

    Args:
        call: The call.
        rows: Every row of the call.
        sample: Chooses rows of a gradient, as flat indices over the axes that it receives; the others are not computed.
    """
    kinds = kinds_of(call, rows)
    wanted = {name: _chosen(kind.shape, sample(kind.shape[:-1])) for name, kind in kinds.items()}
    gradients = Gradients(call, rows, wanted)
    finite = {name: (kind == FINITE_VALUE) & wanted[name] for name, kind in kinds.items()}
    values = rounded(call.name, gradients.evaluate, finite)
    return {name: Marked.fill(values[name], kinds[name], 0.0) for name in kinds}


def _chosen(shape: tuple[int, ...], rows: numpy.ndarray | None) -> numpy.ndarray:
    """Mark the elements of the chosen rows, or all elements if there is no choice."""
    if rows is None:
        return numpy.ones(shape, dtype=bool)
    chosen = numpy.zeros((math.prod(shape[:-1]), shape[-1]), dtype=bool)
    chosen[rows] = True
    return chosen.reshape(shape)


def _shapes(call: AttentionCall) -> dict[str, tuple[int, ...]]:
    shapes = {f"grad_{name}": getattr(call, name).shape for name in ("query", "key", "value")}
    if call.has_bias:
        shapes["grad_bias"] = call.bias.shape
    return shapes | ({"grad_sinks": (call.heads,)} if call.has_sinks else {})


def kinds_of(call: AttentionCall, rows: Sequence[Row]) -> dict[str, numpy.ndarray]:
    """Mark elements without a contribution as exactly 0; elements with an unspecified contribution are not compared."""
    kinds = {name: numpy.full(shape, EXACT, dtype=numpy.uint8) for name, shape in _shapes(call).items()}
    for row in rows:
        b, h, i = row.batch, row.head, row.index
        kind = FINITE_VALUE if is_specified(call, row) else ANY
        if row.state != EMPTY:
            kinds["grad_query"][b, h, i] = kind
        keys = numpy.array(row.keys, dtype=int)
        for name in ("grad_key", "grad_value"):
            _mark(kinds[name][b, h // call.group], keys, kind)
        if call.has_bias:
            x, y, z, _ = call.bias.place(b, h, i, 0)
            _mark(kinds["grad_bias"][x, y, z], keys if call.bias.shape[3] > 1 else keys[:1] * 0, kind)
        if _moves_sink(call, row, kind):
            _mark(kinds["grad_sinks"], numpy.array([h]), kind)
    return kinds


def _mark(kinds: numpy.ndarray, places: numpy.ndarray, kind: int) -> None:
    """Mark contributions of this kind at places of the first axis: ANY is kept, and everything else is replaced."""
    kinds[places] = numpy.where(kinds[places] == ANY, ANY, kind)


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
    """The contributions of a row: dX and dS of each visible key times `divisor`, l^2 (1 - rate), and that of the sink.

    Divisions come last, so that a quotient that float64 can hold is exact.
    """

    numerators: list[arb]
    logit_numerators: list[arb]
    divisor: arb
    grad_sink: arb
    exponentials: Exponentials


class Gradients:
    """The contributions of all rows whose gradients are specified, summed in balls, to the wanted elements."""

    def __init__(self, call: AttentionCall, rows: Sequence[Row], wanted: Mapping[str, numpy.ndarray]) -> None:
        self.call = call
        self.wanted = {name: numpy.asarray(chosen.any(axis=-1)) for name, chosen in wanted.items()}
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
        logits = [power * (e.total * (x + grad_lse) - total) for power, x in zip(e.keys, from_anchor[:-1], strict=True)]
        divisor = e.total * e.total * keep
        sink_numerator = e.sink * (e.total * (from_anchor[-1] + grad_lse) - total)
        slopes = self.scores.slopes(row)
        scores = logits if slopes is None else [x * slope for x, slope in zip(logits, slopes, strict=True)]
        return RowGradient(scores, logits, divisor, sink_numerator / divisor, e)

    def _add_tensors(
        self, totals: dict[str, numpy.ndarray], b: int, h: int, rows: Sequence[Row], parts: Sequence[RowGradient]
    ) -> None:
        q, g, scale = self.call, h // self.call.group, self.scores.scale()
        lines = [spread(q.kv_len, row, part.numerators) for row, part in zip(rows, parts, strict=True)]
        chosen = [n for n, row in enumerate(rows) if self.wanted["grad_query"][b, h, row.index]]
        for n, sums in zip(chosen, product([lines[n] for n in chosen], q.key[b, g]), strict=True):
            totals["grad_query"][b, h, rows[n].index] = sums * scale / parts[n].divisor
        indices = [row.index for row in rows]
        keys = numpy.flatnonzero(self.wanted["grad_key"][b, g])
        scaled = [[line[j] / part.divisor for j in keys] for line, part in zip(lines, parts, strict=True)]
        totals["grad_key"][b, g, keys] += product(_transposed(scaled, len(keys)), q.query[b, h][indices]) * scale
        keys = numpy.flatnonzero(self.wanted["grad_value"][b, g])
        weights = [self._kept_weights(row, part, keys) for row, part in zip(rows, parts, strict=True)]
        totals["grad_value"][b, g, keys] += product(_transposed(weights, len(keys)), q.grad_output[b, h][indices])

    def _kept_weights(self, row: Row, part: RowGradient, keys: numpy.ndarray) -> list[arb]:
        """Return the weights of some keys after dropout."""
        line = spread_kept(self.call, row, part.exponentials.keys)
        divisor = part.exponentials.total * (1 - arb(self.call.dropout_rate))
        return [line[j] / divisor for j in keys]

    def _add_bias_and_sinks(
        self, totals: dict[str, numpy.ndarray], rows: Sequence[Row], parts: Sequence[RowGradient]
    ) -> None:
        q = self.call
        for row, part in zip(rows, parts, strict=True):
            if q.has_bias:
                self._add_bias(totals["grad_bias"], row, part)
            if q.has_sinks:
                totals["grad_sinks"][row.head] += part.grad_sink

    def _add_bias(self, total: numpy.ndarray, row: Row, part: RowGradient) -> None:
        x, y, z, _ = self.call.bias.place(row.batch, row.head, row.index, 0)
        if self.wanted["grad_bias"][x, y, z]:
            for j, numerator in zip(row.keys, part.logit_numerators, strict=True):
                total[x, y, z, j if total.shape[3] > 1 else 0] += numerator / part.divisor


def spread(kv_len: int, row: Row, terms: Sequence[arb]) -> list[arb]:
    """Place the terms of visible keys among all keys, with 0 for hidden keys."""
    line = [arb(0)] * kv_len
    for j, term in zip(row.keys, terms, strict=True):
        line[j] = term
    return line


def _transposed(lines: Sequence[Sequence[arb]], columns: int) -> list[list[arb]]:
    return [[line[j] for line in lines] for j in range(columns)]
