"""An attention layer by its definition in float64, with a bound of the error of each number in float32.

It judges layers of other projects, so that nothing of mha_spec computes here: every step is one einsum of NumPy with a
bound of its error. Each operation adds its roundings, in any order of its sums, to the errors of its operands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec_conformance.judging.bounds import precision, unit_roundoff
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Mapping

    Array = numpy.ndarray

__all__ = ["attended"]

UNIT = unit_roundoff("float32") + unit_roundoff("float64")
"""The layers compute in float32; the values that they are compared with are computed in float64."""

ELEMENTARY = precision("float32").e_x
"""Allowed relative error of exp, sine, cosine and powers."""


def gamma(roundings: int) -> float:
    """Return the relative error of this number of roundings in sequence."""
    return roundings * UNIT / (1 - roundings * UNIT)


@dataclass(frozen=True)
class Rounded:
    """Values, and the largest errors of an implementation's values."""

    value: Array
    error: Array

    @classmethod
    def exact(cls, array: Any) -> Rounded:
        """Return values without an error, such as inputs."""
        value = to_numpy(array).astype(numpy.float64)
        return cls(value, numpy.zeros_like(value))

    @property
    def largest(self) -> Array:
        """The largest magnitude that a value of an implementation can have."""
        return abs(self.value) + self.error

    def repeated(self, group: int) -> Rounded:
        """Repeat each head of key or value for every query head of its group."""
        return Rounded(self.value.repeat(group, axis=1), self.error.repeat(group, axis=1))

    def for_each_position(self) -> Rounded:
        """Reshape a vector for each head, (heads, size), to (heads, 1, size)."""
        return Rounded(self.value[:, None, :], self.error[:, None, :])

    def einsum(self, subscripts: str, other: Rounded, roundings: int = 0) -> Rounded:
        """Compute sums of products, in any order."""
        operands, result = subscripts.split("->")
        sizes = dict(zip(operands.replace(",", ""), self.value.shape + other.value.shape, strict=True))
        terms = math.prod(size for letter, size in sizes.items() if letter not in result)
        large = numpy.einsum(subscripts, self.largest, other.largest)
        carried = large - numpy.einsum(subscripts, abs(self.value), abs(other.value))
        return Rounded(
            numpy.einsum(subscripts, self.value, other.value), carried + gamma(terms + roundings + 1) * large
        )

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.value + other.value, self.error + other.error + gamma(1) * (self.largest + other.largest))

    def softmax(self, visible: Array) -> Rounded:
        """Compute weights over the visible keys; scores may be shifted by their maximum."""
        shifted = numpy.where(
            visible, self.value - self.value.max(-1, where=visible, initial=-numpy.inf, keepdims=True), 0
        )
        error = self.error + self.error.max(-1, where=visible, initial=0, keepdims=True)
        exponent = error + UNIT * (abs(shifted) + error)
        relative = (numpy.where(visible, numpy.expm1(exponent), 0)).max(-1, keepdims=True)
        relative = (1 + relative) * (1 + ELEMENTARY) - 1
        summed = (1 + relative) * (1 + gamma(visible.shape[-1])) - 1
        weights = numpy.where(visible, numpy.exp(shifted), 0)
        weights = weights / weights.sum(-1, keepdims=True)
        return Rounded(weights, weights * ((1 + relative) / (1 - summed) * (1 + gamma(2)) - 1))

    def normalised(self, gain: Rounded, epsilon: float) -> Rounded:
        """Divide by the root mean square, whose error is at most the root mean square of the errors."""
        root = numpy.sqrt((self.value**2).mean(-1, keepdims=True) + epsilon)
        moved = numpy.sqrt((self.error**2).mean(-1, keepdims=True))
        steps = gamma(self.value.shape[-1] + 8)
        value, largest = self.value / root, self.largest / (root - moved) * (1 + steps)
        return Rounded(value * gain.value, (largest - abs(value)) * abs(gain.value) + gamma(1) * largest * gain.largest)

    def normalised_jointly(self, gain: Rounded, epsilon: float) -> Rounded:
        """Normalise (batch, heads, length, size) by the root mean square over heads and size."""
        batch, heads, length, size = self.value.shape
        values, errors = (x.transpose(0, 2, 1, 3).reshape(batch, length, -1) for x in (self.value, self.error))
        whole = Rounded(values, errors).normalised(Rounded(gain.value.reshape(-1), gain.error.reshape(-1)), epsilon)
        values, errors = (
            x.reshape(batch, length, heads, size).transpose(0, 2, 1, 3) for x in (whole.value, whole.error)
        )
        return Rounded(values, errors)

    def rotated(self, base: float = 10000.0, interleaved: bool = False, rotary_dim: int | None = None) -> Rounded:
        """Rotate the first rotary_dim components, pair i by position / base^(2i/rotary_dim)."""
        length, size = self.value.shape[-2:]
        turned = size if rotary_dim is None else rotary_dim
        angles = numpy.arange(length)[:, None] * base ** (-numpy.arange(0, turned, 2) / turned)
        error = angles * (ELEMENTARY + gamma(4) + math.log(base) * gamma(1)) + ELEMENTARY
        first = numpy.arange(0, turned, 2) if interleaved else numpy.arange(turned // 2)
        second = first + 1 if interleaved else first + turned // 2
        turn = Rounded(numpy.tile(numpy.eye(size), (length, 1, 1)), numpy.zeros((length, size, size)))
        for rows, columns, part in (
            (first, first, numpy.cos(angles)),
            (second, second, numpy.cos(angles)),
            (first, second, -numpy.sin(angles)),
            (second, first, numpy.sin(angles)),
        ):
            turn.value[:, rows, columns] = part
            turn.error[:, rows, columns] = error
        return self.einsum("bhld,led->bhle", turn)


def attended(
    params: Mapping[str, Any],
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Array | None = None,
    rotary: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-6,
) -> Rounded:
    """Compute a layer: projections, norms, rotation, softmax over the visible keys, output projection."""
    known = {name: Rounded.exact(array) for name, array in params.items()}
    queries = placed(projected(known, "q", query), known, "q", norm_epsilon, rotary)
    keys = placed(projected(known, "k", key), known, "k", norm_epsilon, rotary)
    values = projected(known, "v", value)
    group = queries.value.shape[1] // keys.value.shape[1]
    products = queries.einsum("bhqd,bhkd->bhqk", keys.repeated(group), roundings=4)
    factor = 1 / math.sqrt(queries.value.shape[-1]) if scale is None else scale
    scores = Rounded(products.value * factor, products.error * abs(factor))
    if bias is not None:
        scores += Rounded.exact(bias)
    seen = numpy.tri(*scores.value.shape[-2:], dtype=bool) if causal else numpy.ones(scores.value.shape[-2:], bool)
    weights = scores.softmax(numpy.broadcast_to(seen, scores.value.shape))
    output = weights.einsum("bhqk,bhkd->bhqd", values.repeated(group)).einsum("bhqd,hdo->bqo", known["w_o"])
    return output + known["b_o"] if "b_o" in known else output


def projected(known: Mapping[str, Rounded], name: str, sequence: Array) -> Rounded:
    """Project a sequence to the heads of query, key or value, (batch, heads, length, size)."""
    heads = Rounded.exact(sequence).einsum("ble,ehd->bhld", known[f"w_{name}"])
    return heads + known[f"b_{name}"].for_each_position() if f"b_{name}" in known else heads


def placed(
    heads: Rounded, known: Mapping[str, Rounded], name: str, epsilon: float, rotary: Mapping[str, Any] | None
) -> Rounded:
    """Normalise heads if there is a gain, and rotate them if there is a rotation."""
    if f"{name}_norm" in known:
        heads = heads.normalised(known[f"{name}_norm"], epsilon)
    elif f"{name}_joint_norm" in known:
        heads = heads.normalised_jointly(known[f"{name}_joint_norm"], epsilon)
    return heads if rotary is None else heads.rotated(**rotary)
