"""Describe which keys have wrong weights in a call whose values tell the keys apart.

A wrong key changes the sum of its row, and thus all weights of the row by a factor. A weight therefore counts as right
if it is right up to the factor that most weights of its row share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy

from .indices import TILES, covering, described_indices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mha_spec.arguments import Arguments

    Array = numpy.ndarray

__all__ = ["Weights", "wrong_keys"]

DECISIVE = 2
"""A row has a common factor if at least this many times more of its weights have the factor than have another."""

FEWEST, FEW_OF = 2, 16
"""A common factor needs this many weights, and the second number's share of the weights that must not be 0."""

LEAST_DECISIVE = 0.5
"""The share of the wrong rows that must have a common factor; in few rows it may be a coincidence."""

ALIKE = 1.1
"""Of descriptions that keep nearly the same number of pairs, up to this factor, the first is chosen."""

MOST_KEPT = 0.75
"""A description that says nothing else is worth a line if it keeps at most this share of the pairs."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a call, (batch, heads, q_len, columns); a column is the sum of the weights of `width` keys."""

    received: Array
    expected: Array
    allowance: Array
    visible: Array
    """The visible pairs, (batch, heads, q_len, kv_len)."""
    offset: Array
    """The position of query 0, (batch, 1, 1, 1)."""
    arguments: Arguments
    width: int = 1

    def off(self, factor: Array | float) -> Array:
        """Mark the weights that are not the expected ones times a factor; those without an allowance are not marked."""
        with numpy.errstate(invalid="ignore"):
            near = abs(self.received - factor * self.expected) <= self.allowance * numpy.maximum(factor, 1)
        return self.compared & ~near

    @cached_property
    def compared(self) -> Array:
        """The weights that can be compared."""
        return numpy.isfinite(self.expected) & numpy.isfinite(self.allowance)

    @cached_property
    def factors(self) -> tuple[Array, Array]:
        """The factor that most weights of each row have, and whether it is decisive; both (batch, heads, q_len, 1)."""
        received, wanted, allowed = self.received, self.expected, self.allowance
        voters = self.compared & numpy.isfinite(received) & (received > allowed) & (wanted > allowed)
        with numpy.errstate(all="ignore"):
            low = numpy.where(
                received <= wanted + allowed, (received - allowed) / wanted, received / (wanted + allowed)
            )
            high = numpy.where(
                received <= wanted - allowed, (received + allowed) / wanted, received / (wanted - allowed)
            )
        low, high = (numpy.where(voters, bound, numpy.inf) for bound in (low, high))
        factor, votes = _most_common(low, high, voters)
        total = voters.sum(axis=3, keepdims=True)
        right = ((low <= 1) & (high >= 1)).sum(axis=3, keepdims=True)
        clear = (self.compared & (wanted > allowed)).sum(axis=3, keepdims=True)
        enough = votes >= numpy.minimum(clear, numpy.maximum(FEWEST, clear / FEW_OF))
        return numpy.where(right == votes, 1.0, factor), enough & (votes >= DECISIVE * (total - votes))

    def of_keys(self, columns: Array) -> Array:
        """Repeat what is known about columns for each of their keys."""
        return numpy.repeat(columns, self.width, axis=3)[..., : self.visible.shape[3]]


def _most_common(low: Array, high: Array, voters: Array) -> tuple[Array, Array]:
    """Return a number in the most intervals of each row, and the number of these intervals."""
    bounds = numpy.concatenate([low, high], axis=3)
    steps = numpy.concatenate([voters.astype(int), -voters.astype(int)], axis=3)
    order = numpy.argsort(bounds, axis=3, kind="stable")
    counts = numpy.cumsum(numpy.take_along_axis(steps, order, axis=3), axis=3)
    best = numpy.argmax(counts, axis=3, keepdims=True)
    places = (numpy.take_along_axis(order, best + after, axis=3) for after in (0, 1))
    first, last = (numpy.take_along_axis(bounds, place, axis=3) for place in places)
    return (first + last) / 2, numpy.take_along_axis(counts, best, axis=3)


def wrong_keys(weights: Weights) -> str | None:
    """Describe which keys have wrong weights; None if no weight is wrong, or if the wrong keys have no pattern.

    Rows without a finite weight are left out: a single NaN makes the whole row NaN.
    """
    has_weights = numpy.isfinite(weights.received).any(axis=3, keepdims=True)
    if not (has_weights & weights.off(1.0)).any():
        return None
    if (order := _order(weights)) is not None:
        return f"each key has the weight of another, as if {order}"
    factor, decisive = weights.factors
    decisive = decisive & has_weights
    rows = (has_weights & weights.off(1.0)).any(axis=3, keepdims=True)
    if not (decisive & rows).any() or (decisive & rows).sum() < LEAST_DECISIVE * rows.sum():
        factor, decisive = numpy.ones_like(factor), has_weights
    wrong = weights.off(factor) & decisive
    if not wrong.any():
        return "no key in particular: all weights of a row are wrong by the same factor"
    clear = weights.compared & decisive & ((weights.expected > weights.allowance) | (weights.expected == 0))
    return _Pairs(weights, weights.of_keys(wrong), weights.of_keys(clear | wrong)).described()


def _order(weights: Weights) -> str | None:
    """Name the order of the keys in which the weights are right."""
    if weights.width > 1:
        return None
    for text, order in _orders(weights.visible.shape[3]):
        wanted, allowed = (array[..., order] for array in (weights.expected, weights.allowance))
        if (abs(weights.received - wanted) <= numpy.maximum(allowed, weights.allowance)).all():
            return text
    return None


def _orders(keys: int) -> Iterator[tuple[str, Array]]:
    """Yield orders of keys, each with its description."""
    index = numpy.arange(keys)
    yield "the keys were in the reversed order", index[::-1]
    for tile in TILES:
        if keys > tile:
            order = numpy.concatenate([index[start : start + tile] for start in range(0, keys, tile)][::-1])
            yield f"the tiles of {tile} keys were in the reversed order", order
            yield f"the tiles of {tile} keys were in the reversed order", numpy.argsort(order)
    yield "the keys were shifted by 1", numpy.roll(index, 1)
    yield "the keys were shifted by -1", numpy.roll(index, -1)


class _Pairs:
    """The wrong pairs and the compared pairs of a call, (batch, heads, q_len, kv_len)."""

    def __init__(self, weights: Weights, wrong: Array, compared: Array) -> None:
        self.weights, self.arguments = weights, weights.arguments
        self.wrong = wrong
        self.single = weights.width == 1
        seen, received = weights.visible, weights.of_keys(weights.received)
        hidden_alone, visible_alone = not (wrong & seen).any(), not (wrong & ~seen).any()
        self.added = self.single and hidden_alone and bool(numpy.isfinite(received[wrong]).all())
        near_0 = weights.of_keys(weights.received <= weights.allowance)
        self.lost = self.single and visible_alone and bool(near_0[wrong].all())
        self.compared = compared & (~seen if hidden_alone else seen if visible_alone else True)
        self.key = numpy.arange(wrong.shape[3]).reshape(1, 1, 1, -1)
        self.position = weights.offset + numpy.arange(wrong.shape[2]).reshape(1, 1, -1, 1)
        self.distance = self.key - self.position
        a = self.arguments
        self.beyond, self.from_start, self.from_prefix = map(
            self._distance_from, (a.kv_lengths, a.kv_starts, a.prefix_lengths)
        )

    def _distance_from(self, ends: object) -> Array | None:
        """Return the distances j - end of the keys from an index in each batch entry, or None without indices."""
        return None if ends is None else self.key - numpy.asarray(ends, numpy.int64).reshape(-1, 1, 1, 1)

    def described(self) -> str | None:
        """Describe the keys of the wrong pairs by the first description that keeps about the fewest pairs."""
        kept = [(text, int((members & self.compared).sum())) for text, members in self._descriptions()]
        fewest = min(number for _, number in kept)
        text, number = next(entry for entry in kept if entry[1] <= ALIKE * fewest)
        if not (self.added or self.lost) and number > MOST_KEPT * self.compared.sum():
            return None
        if text == "keys":
            return "only hidden keys, which have a weight" if self.added else "only visible keys, which have no weight"
        effect = (
            " (hidden, but with a weight)" if self.added else " (visible, but without a weight)" if self.lost else ""
        )
        return f"only {text}{effect}"

    def _descriptions(self) -> Iterator[tuple[str, Array]]:
        """Yield descriptions that contain all wrong pairs, each with its pairs."""
        if self.single:
            yield from self._beside_lengths()
        for text, members in self._kinds():
            if not (self.wrong & ~members).any():
                yield f"keys{text}", members
                along, of_keys = self._along(self.key, members, "key", TILES)
                last = along == f"key {self.key.size - 1}" and self.key.size > 1
                yield f"{'the last key' if last else along}{text}", members & of_keys
        if self.single and (self.arguments.positional or self.added or self.lost):
            yield self._by_distance()

    def _kinds(self) -> Iterator[tuple[str, Array]]:
        """Yield kinds of pairs, each with the words that follow "keys"."""
        everywhere = numpy.ones_like(self.wrong)
        if self.added:
            left, right = self.arguments.bounds
            border = "diagonal" if self.arguments.causal else "window"
            if self.beyond is not None:
                yield " past kv_lengths", everywhere & (self.beyond >= 0)
            if self.from_start is not None:
                yield " before kv_starts", everywhere & (self.from_start < 0)
            if self.arguments.chunk is not None:
                yield " of other chunks", everywhere & self._other_chunks(self.arguments.chunk)
            if right is not None:
                yield f" after the {border}", everywhere & (self.distance > right)
            if left is not None:
                yield " before the window", everywhere & (self.distance < -left)
        if self.lost and self.from_prefix is not None:
            yield " of the prefix after the diagonal", everywhere & (self.from_prefix < 0) & (self.distance > 0)
        yield "", everywhere

    def _other_chunks(self, chunk: int) -> Array:
        starts = 0 if self.from_start is None else self.key - self.from_start
        return (self.key - starts) // chunk != (self.position - starts) // chunk

    def _beside_lengths(self) -> Iterator[tuple[str, Array]]:
        """Yield the keys on both sides of the ends of lengths, padding on the left and prefixes."""
        for text, distance, number in (
            ("the first key past kv_lengths", self.beyond, 0),
            ("the last key of kv_lengths", self.beyond, -1),
            ("the last key before kv_starts", self.from_start, -1),
            ("the first key of kv_starts", self.from_start, 0),
            ("the first key past prefix_lengths", self.from_prefix, 0),
            ("the last key of prefix_lengths", self.from_prefix, -1),
        ):
            if distance is not None:
                members = numpy.broadcast_to(distance == number, self.wrong.shape)
                if not (self.wrong & ~members).any():
                    yield text, members

    def _by_distance(self) -> tuple[str, Array]:
        """Return the wrong pairs by their distance j - p."""
        text, members = self._along(self.distance, True, "distance", ())
        left, right = self.arguments.bounds
        names: dict[int, str] = {}
        if left is not None:
            names |= {-left: "the first key of the window", -left - 1: "the last key before the window"}
        if right is not None and not self.arguments.causal:
            names |= {right: "the last key of the window", right + 1: "the first key after the window"}
        if self.arguments.causal:
            names |= {0: "the key on the diagonal", 1: "the first key after the diagonal"}
        wrong = numpy.unique(numpy.broadcast_to(self.distance, self.wrong.shape)[self.wrong])
        name = names.get(int(wrong[0])) if len(wrong) == 1 else None
        return name or f"keys at {text} (j - p)", members

    def _along(self, coordinate: Array, kind: Array | bool, noun: str, tiles: Sequence[int]) -> tuple[str, Array]:
        """Describe the wrong pairs of a kind by a coordinate of the pairs."""
        whole = numpy.broadcast_to(coordinate, self.wrong.shape)
        compared = numpy.unique(whole[(self.compared & kind) | self.wrong]).tolist()
        bad = covering(numpy.unique(whole[self.wrong]).tolist(), compared)
        return described_indices(bad, compared, noun, tiles=tiles), numpy.isin(whole, bad)
