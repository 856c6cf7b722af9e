"""The layer, written a second time: number by number, each with a bound on its error."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Bounded:
    """A number with a bound on the error of any evaluation that rounds to `unit` after every operation.

    Sums may be taken in any order, so a sum of n terms counts n roundings. Functions may be wrong by 4 units in the
    last place.
    """

    value: float
    error: float = 0.0
    unit: float = 2.0**-53

    def __mul__(self, other: Bounded) -> Bounded:
        error = abs(self.value) * other.error + abs(other.value) * self.error + self.error * other.error
        return self.rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient, least = self.value / other.value, abs(other.value) - other.error
        return self.rounded(quotient, (self.error + abs(quotient) * other.error) / least)

    def rounded(self, value: float, error: float, roundings: int = 1) -> Bounded:
        return Bounded(value, error + roundings * self.unit * (abs(value) + error), self.unit)

    def exp(self, less: float = 0.0) -> Bounded:
        value = math.exp(self.value - less)
        error = self.error + 2 * self.unit * (abs(self.value) + abs(less))
        return self.rounded(value, value * math.expm1(error), 8)

    def root(self) -> Bounded:
        return self.rounded(math.sqrt(self.value), self.error / math.sqrt(self.value - self.error), 2)


def total(terms: Iterable[Bounded]) -> Bounded:
    """Add numbers in any order."""
    terms = list(terms)
    magnitude = math.fsum(abs(term.value) + term.error for term in terms)
    unit = terms[0].unit if terms else 0.0
    error = math.fsum(term.error for term in terms) + len(terms) * unit * magnitude
    return Bounded(math.fsum(term.value for term in terms), error, unit)


class LayerByLoops:
    """The layer with these parameters, in loops over numbers.

    Every operation rounds to `unit`, and the results of the steps of the layer are also rounded to `stored`.
    """

    def __init__(
        self, params: Mapping[str, numpy.ndarray], unit: float = 2.0**-53, stored: float | None = None
    ) -> None:
        self.params, self.unit, self.stored = params, unit, unit if stored is None else stored

    def number(self, x: Any) -> Bounded:
        return Bounded(float(x), 0.0, self.unit)

    def store(self, x: Bounded) -> Bounded:
        return Bounded(x.value, x.error + self.stored * (abs(x.value) + x.error), self.unit)

    def head(self, token: numpy.ndarray, name: str, head: int) -> list[Bounded]:
        """Project a token to a head, and add the bias."""
        weight, bias = self.params[f"w_{name}"], self.params.get(f"b_{name}")
        components = []
        for c in range(weight.shape[2]):
            terms = [self.number(token[e]) * self.number(weight[e, head, c]) for e in range(weight.shape[0])]
            component = self.store(total(terms))
            if bias is not None:
                component = self.store(total([component, self.number(bias[head, c])]))
            components.append(component)
        return components

    def normalised(self, x: list[Bounded], name: str, epsilon: float) -> list[Bounded]:
        gain = self.params.get(name)
        if gain is None:
            return x
        mean = total(u * u for u in x) / self.number(len(x))
        root = total([mean, self.number(epsilon)]).root()
        return [self.store(u / root * self.number(gain[c])) for c, u in enumerate(x)]

    def rotated(
        self,
        x: list[Bounded],
        position: float,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int | None = None,
    ) -> list[Bounded]:
        """Rotate the pairs of a head of a token."""
        size = len(x) if rotary_dim is None else rotary_dim
        rotated = list(x)
        for i in range(size // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + size // 2)
            angle = position * base ** (-2 * i / size)
            error = self.unit * (abs(angle) * (10 + abs(math.log(base)) * 2 * i / size) + 8)
            cosine, sine, minus = (
                Bounded(turn, error, self.unit) for turn in (math.cos(angle), math.sin(angle), -math.sin(angle))
            )
            rotated[first] = self.store(total([x[first] * cosine, x[second] * minus]))
            rotated[second] = self.store(total([x[second] * cosine, x[first] * sine]))
        return rotated

    def weights(
        self, q: list[Bounded], keys: Sequence[list[Bounded]], bias: Sequence[float], sink: float | None
    ) -> list[Bounded]:
        """Compute the weights of a row over the keys that it sees."""
        scale = self.number(1.0) / self.number(len(q)).root()
        logits = [
            total([total(u * v for u, v in zip(q, key, strict=True)) * scale, self.number(b)])
            for key, b in zip(keys, bias, strict=True)
        ]
        sinks = [] if sink is None else [self.number(sink)]
        anchor = max(logit.value for logit in logits + sinks) if logits else 0.0
        exponentials = [logit.exp(anchor) for logit in logits + sinks]
        denominator = total(exponentials)
        return [exponential / denominator for exponential in exponentials[: len(logits)]]

    def __call__(
        self,
        query: numpy.ndarray,
        key: numpy.ndarray,
        value: numpy.ndarray,
        visible: numpy.ndarray,
        *,
        bias: numpy.ndarray | None = None,
        sinks: numpy.ndarray | None = None,
        rotary: Mapping[str, Any] | None = None,
        q_positions: numpy.ndarray | None = None,
        norm_epsilon: float = 1e-6,
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Compute the output and its errors; `visible` and `bias` are (batch, heads, q_len, kv_len)."""
        batch, heads, q_len, kv_len = visible.shape
        group, v_dim, out = heads // self.params["w_k"].shape[1], *self.params["w_o"].shape[1:]
        attended = numpy.empty((batch, q_len, heads, v_dim), dtype=object)
        for b, h in itertools.product(range(batch), range(heads)):
            keys, values = (
                [self.head(x[b, j], name, h // group) for j in range(kv_len)] for name, x in (("k", key), ("v", value))
            )
            keys = [self.normalised(k, "k_norm", norm_epsilon) for k in keys]
            if rotary is not None:
                keys = [self.rotated(k, j, **rotary) for j, k in enumerate(keys)]
            for i in range(q_len):
                q = self.normalised(self.head(query[b, i], "q", h), "q_norm", norm_epsilon)
                if rotary is not None:
                    q = self.rotated(q, i if q_positions is None else q_positions[b, i], **rotary)
                seen = [j for j in range(kv_len) if visible[b, h, i, j]]
                added = [0.0 if bias is None else bias[b, h, i, j] for j in seen]
                weights = self.weights(q, [keys[j] for j in seen], added, None if sinks is None else sinks[h])
                for c in range(v_dim):
                    terms = [w * values[j][c] for w, j in zip(weights, seen, strict=True)]
                    attended[b, i, h, c] = self.store(total(terms))
        return self.projected(attended, out)

    def projected(self, attended: numpy.ndarray, out: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Project all heads of each token to the output, and add the bias."""
        batch, q_len, heads, v_dim = attended.shape
        output, error = numpy.zeros((2, batch, q_len, out))
        for b, i, o in numpy.ndindex(output.shape):
            weight = self.params["w_o"][:, :, o]
            terms = [attended[b, i, h, c] * self.number(weight[h, c]) for h, c in numpy.ndindex(heads, v_dim)]
            component = self.store(total(terms))
            if "b_o" in self.params:
                component = self.store(total([component, self.number(self.params["b_o"][o])]))
            output[b, i, o], error[b, i, o] = component.value, component.error
        return output, error
