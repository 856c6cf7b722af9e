"""The expected values of a case, computed in ball arithmetic and proven to be correctly rounded to float64.

The oracle shares no code with the implementations that it checks. It decides visibility per pair in plain integers,
computes products exactly, and evaluates everything else in balls, at rising precision until both ends of each ball
round to the same float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy
from oracle_backward import attention_vjp
from oracle_balls import InadmissibleError
from oracle_forward import attention, attention_weights
from oracle_kinds import Marked
from oracle_layer import multi_head_attention, multi_head_attention_and_weights, multi_head_attention_weights
from oracle_merge import merge_attention
from oracle_merge_vjp import merge_attention_vjp
from oracle_positions import alibi_bias, alibi_slopes, rotary_embedding
from oracle_varlen import varlen_attention, varlen_attention_vjp
from oracle_visibility import AttentionCall
from portable import words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from description import Description

    Sample = Callable[[tuple[int, ...]], numpy.ndarray | None]

__all__ = ["Answer", "InadmissibleError", "expect", "sample", "sample_edges"]

_WHOLE: dict[str, Callable[[Description], dict[str, Marked]]] = {
    "alibi_bias": alibi_bias,
    "alibi_slopes": alibi_slopes,
    "merge_attention": merge_attention,
    "merge_attention_vjp": merge_attention_vjp,
    "multi_head_attention": multi_head_attention,
    "multi_head_attention_and_weights": multi_head_attention_and_weights,
    "multi_head_attention_weights": multi_head_attention_weights,
    "rotary_embedding": rotary_embedding,
    "varlen_attention": varlen_attention,
    "varlen_attention_vjp": varlen_attention_vjp,
}
"""Functions that are evaluated as a whole, not row by row."""

TILE_BORDERS = tuple(2**n for n in range(4, 13))

TILE = 64
"""The distance of the borders at which rows are sampled in cases of tiles."""


@dataclass(frozen=True)
class Answer:
    """One expected output.

    `values` has the full shape, or (len(rows), last axis) if `rows` holds flat indices over all axes except the last
    (over all axes for lse). `kinds` has the shape of `values`, or is None if every element is finite.
    """

    values: numpy.ndarray
    kinds: numpy.ndarray | None
    rows: numpy.ndarray | None
    shape: tuple[int, ...]


def expect(description: Description) -> dict[str, Answer]:
    """Return the expected outputs of a case by name; none for a case that must raise an error.

    Raises:
        InadmissibleError: An element cannot be proven.
    """
    if description.error is not None:
        return {}
    choose = partial(sample_edges if description.edges else sample, count=description.sampled_rows)
    if description.function in _WHOLE:
        answers = _WHOLE[description.function](description)
        wanted = {name: answers[name] for name in description.outputs or answers}
        return _sampled(wanted, choose)
    call = AttentionCall(description)
    if description.function == "attention_vjp":
        every = [call.row(*place) for place in numpy.ndindex(call.batch, call.heads, call.q_len)]
        return _sampled(attention_vjp(call, every, choose), choose)
    return _forward(description, call, choose)


def _forward(description: Description, call: AttentionCall, choose: Sample) -> dict[str, Answer]:
    lead = (call.batch, call.heads, call.q_len)
    indices = choose(lead)
    places = [numpy.unravel_index(n, lead) for n in (range(math.prod(lead)) if indices is None else indices)]
    rows = [call.row(*map(int, place)) for place in places]
    evaluate = attention_weights if description.function == "attention_weights" else attention
    answers = evaluate(call, rows)
    if not description.lse:
        answers.pop("lse", None)
    shapes = {name: (*lead, *marked.values.shape[1:]) for name, marked in answers.items()}
    return {name: _answer(marked, indices, shapes[name]) for name, marked in answers.items()}


def _sampled(outputs: Mapping[str, Marked], choose: Sample) -> dict[str, Answer]:
    return {name: _sampled_output(marked, name, choose) for name, marked in outputs.items()}


def _sampled_output(marked: Marked, name: str, choose: Sample) -> Answer:
    shape = marked.values.shape
    lead = shape if name == "lse" else shape[:-1]
    indices = choose(lead)
    if indices is None:
        return _answer(marked, None, shape)
    flat = (math.prod(lead), *shape[len(lead) :])
    return _answer(Marked(marked.values.reshape(flat)[indices], marked.kinds.reshape(flat)[indices]), indices, shape)


def _answer(marked: Marked, rows: numpy.ndarray | None, shape: tuple[int, ...]) -> Answer:
    stored = shape if rows is None else marked.values.shape
    kinds = marked.kinds.reshape(stored) if marked.kinds.any() else None
    return Answer(marked.values.reshape(stored), kinds, rows, shape)


def sample(lead: tuple[int, ...], count: int | None) -> numpy.ndarray | None:
    """Choose rows of the axes `lead`, of which the last is the length; return None if there are at most `count` rows.

    The choice is `count` rows at equal distances, including the first and the last, and the two rows at each power of
    two from 16 on, where tiles of kernels end; each pair is in another leading entry.
    """
    total = math.prod(lead)
    if count is None or total <= count:
        return None
    even = numpy.round(numpy.linspace(0, total - 1, count)).astype(numpy.int64)
    length = lead[-1]
    borders = [
        (n * 7 % (total // length)) * length + row
        for n, border in enumerate(border for border in TILE_BORDERS if border < length)
        for row in (border - 1, border)
    ]
    return numpy.unique(numpy.concatenate([even, numpy.asarray(borders, dtype=numpy.int64)])).astype(numpy.int32)


def sample_edges(lead: tuple[int, ...], count: int | None) -> numpy.ndarray | None:
    """Choose `count` rows of the axes `lead`, each at another place of the last; None if there are at most `count`.

    The places are the first, the last, those on both sides of multiples of 64, and others at random; the heads and
    batch entries take turns.
    """
    total = math.prod(lead)
    if count is None or total <= count:
        return None
    length, entries = lead[-1], total // lead[-1]
    borders = [place for border in range(TILE, length, TILE) for place in (border - 1, border)]
    others = (words(2 * count, length) % numpy.uint64(length)).tolist()
    places = list(dict.fromkeys([0, length - 1, *borders[: count // 2], *others]))[:count]
    rows = [n % entries * length + place for n, place in enumerate(sorted(places))]
    return numpy.unique(numpy.asarray(rows)).astype(numpy.int32)
