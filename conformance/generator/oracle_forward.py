"""Expected output, lse and weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy
from flint import arb
from oracle_balls import product, rounded
from oracle_kinds import ANY, EXACT, FINITE_VALUE, NAN_VALUE, NON_FINITE, Marked
from oracle_softmax import Scores, by_head, is_evaluated
from oracle_visibility import EMPTY, FINITE, NAN, UNSPECIFIED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from oracle_visibility import AttentionCall, Row

__all__ = ["attention", "attention_weights"]

KIND_OF_ROW = {EMPTY: EXACT, FINITE: FINITE_VALUE, NAN: NAN_VALUE, UNSPECIFIED: ANY}


def attention(call: AttentionCall, rows: Sequence[Row]) -> dict[str, Marked]:
    """Compute output and lse of the rows: arrays (rows, v_dim) and (rows,)."""
    kinds = {"output": _output_kinds(call, rows), "lse": _lse_kinds(call, rows)}
    scores = Scores(call, rows)
    values = rounded(
        call.name, lambda: _evaluate(scores, rows), {name: kind == FINITE_VALUE for name, kind in kinds.items()}
    )
    exact = {"output": 0.0, "lse": -math.inf}
    return {name: Marked.fill(values[name], kinds[name], exact[name]) for name in kinds}


def _output_kinds(call: AttentionCall, rows: Sequence[Row]) -> numpy.ndarray:
    kinds = numpy.zeros((len(rows), call.value.shape[3]), dtype=numpy.uint8)
    for n, row in enumerate(rows):
        kinds[n] = KIND_OF_ROW[row.state]
        if row.state == FINITE:
            kinds[n, sorted(call.non_finite_columns(row))] = NON_FINITE
    return kinds


def _lse_kinds(call: AttentionCall, rows: Sequence[Row]) -> numpy.ndarray:
    kinds = [FINITE_VALUE if is_evaluated(row, call.sinks[row.head]) else KIND_OF_ROW[row.state] for row in rows]
    return numpy.asarray(kinds, dtype=numpy.uint8).reshape(len(rows))


def _evaluate(scores: Scores, rows: Sequence[Row]) -> dict[str, numpy.ndarray]:
    """Evaluate output = sum_j e_j kept_j v_j / (sum_j e_j (1 - rate)) and lse in balls."""
    call = scores.call
    place = {(row.batch, row.head, row.index): n for n, row in enumerate(rows)}
    output = numpy.full((len(rows), call.value.shape[3]), arb(0), dtype=object)
    lse = numpy.full(len(rows), arb(0), dtype=object)
    for (b, g), members in _by_kv_head(call, rows).items():
        evaluated = [row for row in members if is_evaluated(row, call.sinks[row.head])]
        exponentials = [scores.exponentials(row) for row in evaluated]
        kept = [spread_kept(call, row, e.keys) for row, e in zip(evaluated, exponentials, strict=True)]
        sums = product(kept, call.value[b, g])
        for row, e, total in zip(evaluated, exponentials, sums, strict=True):
            n = place[row.batch, row.head, row.index]
            output[n] = total / (e.total * (1 - arb(call.dropout_rate)))
            lse[n] = e.lse
    return {"output": output, "lse": lse}


def _by_kv_head(call: AttentionCall, rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    """Group rows by batch entry and key/value head."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for (b, h), members in by_head(rows).items():
        groups.setdefault((b, h // call.group), []).extend(members)
    return groups


def spread_kept(call: AttentionCall, row: Row, terms: Sequence[arb]) -> list[arb]:
    """Place the terms of visible keys among all keys, with 0 for hidden or dropped keys."""
    line = [arb(0)] * call.kv_len
    for j, term in zip(row.keys, terms, strict=True):
        if call.kept(row.batch, row.head, row.index, j):
            line[j] = term
    return line


def attention_weights(call: AttentionCall, rows: Sequence[Row]) -> dict[str, Marked]:
    """Compute the weights of the rows: an array (rows, kv_len)."""
    kinds = _weight_kinds(call, rows)
    scores = Scores(call, rows)
    values = rounded(
        call.name, lambda: {"weights": _evaluate_weights(scores, rows)}, {"weights": kinds == FINITE_VALUE}
    )
    return {"weights": Marked.fill(values["weights"], kinds, 0.0)}


def _weight_kinds(call: AttentionCall, rows: Sequence[Row]) -> numpy.ndarray:
    kinds = numpy.full((len(rows), call.kv_len), EXACT, dtype=numpy.uint8)
    for n, row in enumerate(rows):
        places = list(row.keys) if row.state == FINITE else slice(None)
        kinds[n, places] = KIND_OF_ROW[row.state]
    return kinds


def _evaluate_weights(scores: Scores, rows: Sequence[Row]) -> numpy.ndarray:
    weights = numpy.full((len(rows), scores.call.kv_len), arb(0), dtype=object)
    for n, row in enumerate(rows):
        if row.state == FINITE:
            e = scores.exponentials(row)
            for j, power in zip(row.keys, e.keys, strict=True):
                weights[n, j] = power / e.total
    return weights
