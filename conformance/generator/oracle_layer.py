"""Expected results of multi_head_attention: projections, norms, rotation, cache and attention in balls.

No intermediate result is rounded. The rules of plain attention decide the keys that a row sees in the buffer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
from description import Input
from flint import arb
from oracle_balls import rounded
from oracle_kinds import ANY, EXACT, FINITE_VALUE, Marked
from oracle_positions import Rotation, as_balls
from oracle_softmax import Scores
from oracle_visibility import EMPTY, AttentionCall, Row

if TYPE_CHECKING:
    from collections.abc import Iterable

    from description import Description

__all__ = ["multi_head_attention", "multi_head_attention_and_weights", "multi_head_attention_weights"]


class Layer:
    """A call of the layer: its arrays, its buffer of keys, and its rows."""

    def __init__(self, description: Description) -> None:
        self.name, self.options = description.id, description.options
        self.arrays = {name: numpy.asarray(item.values) for name, item in description.inputs.items()}
        self.batch, self.q_len = self.arrays["query"].shape[:2]
        self.heads, self.qk_dim = self.arrays["w_q"].shape[1:]
        self.kv_heads = self.arrays["w_k"].shape[1]
        self.new_len = self.arrays["key"].shape[1] if "key" in self.arrays else 0
        self.cached = "cache_lengths" in self.arrays
        self.old = self._per_entry("cache_lengths", 0)
        real = self._per_entry("kv_lengths", self.new_len) if self.cached else [self.new_len] * self.batch
        self.lengths = [old + new for old, new in zip(self.old, real, strict=True)]
        self.table = self.arrays.get("cache_block_table")
        self.wraps = bool(self.options.get("window_cache", False))
        self.buffer = self._buffer()
        self.call = AttentionCall(replace(description, inputs=self._inner(description)))
        places = numpy.ndindex(self.batch, self.heads, self.q_len)
        self.rows = [self.call.row(b, h, i) for b, h, i in places]

    @property
    def stores(self) -> bool:
        """True if the buffers of the new cache are expected values: those of a cache whose slots are positions."""
        return self.cached and self.table is None and not self.wraps

    def _per_entry(self, name: str, absent: int) -> list[int]:
        value = self.arrays[name] if name in self.arrays else self.options.get(name, absent)
        return numpy.broadcast_to(value, (self.batch,)).tolist()

    def _buffer(self) -> int:
        """Return the number of keys: the slots of a cache, those of a row of the table, or all tokens."""
        if not self.cached:
            return self.new_len
        shape = self.arrays["cache_key"].shape
        if self.wraps:
            return max(self.lengths)
        return shape[2] if self.table is None else shape[1] * self.table.shape[1]

    def _held(self, cache: numpy.ndarray) -> numpy.ndarray:
        """Return the tokens of a cache at their positions; those that no query sees may be 0."""
        if self.table is None and not self.wraps:
            return cache
        held = numpy.zeros((self.batch, self.kv_heads, self.buffer, cache.shape[3]))
        for b in range(self.batch):
            for j in range(self.old[b]):
                if self.table is not None:
                    held[b, :, j] = cache[self.table[b, j // cache.shape[1]], j % cache.shape[1]]
                elif j >= self.old[b] - cache.shape[2]:
                    held[b, :, j] = cache[b, :, j % cache.shape[2]]
        return held

    def _inner(self, description: Description) -> dict[str, Input]:
        """Return the inputs of the attention in the layer: constraints over the whole buffer, and zeros."""
        kept = {name: item for name, item in description.inputs.items() if name not in ("query", "key", "value")}
        kept["query"] = Input(numpy.zeros((self.batch, self.heads, self.q_len, self.qk_dim)))
        kept["key"] = Input(numpy.zeros((self.batch, self.kv_heads, self.buffer, self.qk_dim)))
        if "q_offset" not in {*self.arrays, *self.options}:
            kept["q_offset"] = Input(numpy.asarray(self.old))
        if self.cached:
            kept["kv_lengths"] = Input(numpy.asarray(self.lengths))
        return kept

    def projected(self, side: str, source: str, positions: list[range] | None) -> numpy.ndarray:
        """Project, add the bias, normalise, rotate: balls (batch, heads, length, size)."""
        tokens, weight = as_balls(self.arrays[source]), as_balls(self.arrays[f"w_{side}"])
        x = numpy.tensordot(tokens, weight, axes=1)
        if f"b_{side}" in self.arrays:
            x = x + as_balls(self.arrays[f"b_{side}"])
        x = x.swapaxes(1, 2)
        if f"{side}_norm" in self.arrays:
            x = self._normalised(x, as_balls(self.arrays[f"{side}_norm"]))
        if f"{side}_joint_norm" in self.arrays:
            x = self._normalised_jointly(x, as_balls(self.arrays[f"{side}_joint_norm"]))
        rotary: dict[str, Any] | None = self.options.get("rotary")
        if rotary is None or positions is None:
            return x
        if "positions" in self.arrays:
            return Rotation(x.shape[3], **rotary).rotate(x, self.arrays["positions"])
        return Rotation(x.shape[3], **rotary).rotate(x, positions)

    def _normalised(self, x: numpy.ndarray, gain: numpy.ndarray) -> numpy.ndarray:
        """Compute x / sqrt(mean x^2 + epsilon) * gain over the components of each head."""
        epsilon = arb(self.options.get("norm_epsilon", 1e-6))
        result = x.copy()
        for place in numpy.ndindex(*x.shape[:3]):
            mean = sum((component * component for component in x[place]), arb(0)) / arb(x.shape[3])
            result[place] = x[place] * gain / (mean + epsilon).sqrt()
        return result

    def _normalised_jointly(self, x: numpy.ndarray, gain: numpy.ndarray) -> numpy.ndarray:
        """Compute x / sqrt(mean x^2 + epsilon) * gain over all heads of a token, x (batch, heads, length, size)."""
        epsilon, result = arb(self.options.get("norm_epsilon", 1e-6)), x.copy()
        for b, i in numpy.ndindex(x.shape[0], x.shape[2]):
            components = [x[b, h, i, c] for h in range(x.shape[1]) for c in range(x.shape[3])]
            mean = sum((component * component for component in components), arb(0)) / arb(len(components))
            result[b, :, i] = x[b, :, i] * gain / (mean + epsilon).sqrt()
        return result

    def positions(self, first: Iterable[int], length: int) -> list[range]:
        """Return the positions of each batch entry."""
        return [range(start, start + length) for start in first]

    def stored(self, side: str, source: str, *, rotated: bool) -> numpy.ndarray:
        """Return the buffer (batch, kv_heads, length, size) with the new tokens stored after the old ones."""
        old = self.arrays.get(f"cache_{source}")
        places = self.positions(self.old, self.new_len) if rotated else None
        new = self.projected(side, source, places) if self.new_len else None
        if old is None:
            return numpy.zeros((self.batch, self.kv_heads, 0, 1)) if new is None else new
        buffer = as_balls(self._held(old))
        for b in range(self.batch):
            start, stop = self.old[b], self.lengths[b]
            if new is not None:
                buffer[b, :, start:stop] = new[b, :, : stop - start]
        return buffer

    def kinds_of_buffer(self, source: str) -> numpy.ndarray:
        """Mark old tokens as exact, new tokens as computed, and the rest of the buffer as not compared."""
        kinds = numpy.full(self.arrays[f"cache_{source}"].shape, ANY, dtype=numpy.uint8)
        for b in range(self.batch):
            kinds[b, :, : self.lengths[b]] = FINITE_VALUE
            kinds[b, :, : self.old[b]] = EXACT
        return kinds


class BallScores(Scores):
    """Scores whose products are balls: a term names a product by its index, and index 0 is the product 0."""

    def __init__(self, layer: Layer, query: numpy.ndarray, key: numpy.ndarray) -> None:
        self.call = layer.call
        self._balls = [arb(0)]
        self._products = {}
        for row in layer.rows:
            first = len(self._balls)
            keys = key[row.batch, row.head // layer.call.group]
            seen = {j: numpy.dot(query[row.batch, row.head, row.index], keys[j]) for j in row.keys}
            self._balls += [seen.get(j, arb(0)) for j in range(layer.buffer)]
            self._products[row.batch, row.head, row.index] = list(range(first, len(self._balls))), 0

    def _difference(self, term: tuple[int, float], anchor: tuple[int, float], unit: arb) -> arb:
        bias = arb(term[1]) - arb(anchor[1])
        return bias if term[0] == anchor[0] else self._capped(term[0], unit) - self._capped(anchor[0], unit) + bias

    def _capped(self, x: int, unit: arb) -> arb:
        score = unit * self._balls[x]
        if self.call.softcap is None:
            return score
        cap = arb(self.call.softcap)
        return cap * (score / cap).tanh()


def _weights(layer: Layer, key: numpy.ndarray) -> dict[tuple[int, int, int], dict[int, arb]]:
    """Compute the weights of each row that is not empty, by key, before dropout."""
    query = layer.projected("q", "query", layer.positions(layer.call.q_offset, layer.q_len))
    scores = BallScores(layer, query, key)
    weights: dict[tuple[int, int, int], dict[int, arb]] = {}
    for row in layer.rows:
        if row.state != EMPTY:
            e = scores.exponentials(row)
            powers = zip(row.keys, e.keys, strict=True)
            weights[row.batch, row.head, row.index] = {j: power / e.total for j, power in powers}
    return weights


def _attended(layer: Layer, row: Row, weights: dict[int, arb], value: numpy.ndarray) -> numpy.ndarray:
    """Sum the values that the row sees, after dropout."""
    values = value[row.batch, row.head // layer.call.group]
    kept = 1 - arb(layer.call.dropout_rate)
    result = as_balls(numpy.zeros(values.shape[1]))
    for j, weight in weights.items():
        if layer.call.kept(row.batch, row.head, row.index, j):
            result = result + values[j] * (weight / kept)
    return result


def _evaluate(layer: Layer) -> dict[str, numpy.ndarray]:
    key, value = layer.stored("k", "key", rotated=True), layer.stored("v", "value", rotated=False)
    weights = _weights(layer, key)
    w_o = as_balls(layer.arrays["w_o"])
    output = numpy.full((layer.batch, layer.q_len, w_o.shape[2]), arb(0), dtype=object)
    if "b_o" in layer.arrays:
        output = output + as_balls(layer.arrays["b_o"])
    for row in layer.rows:
        b, h, i = row.batch, row.head, row.index
        if (b, h, i) in weights:
            output[b, i] = output[b, i] + numpy.dot(_attended(layer, row, weights[b, h, i], value), w_o[h])
    return {"output": output} | ({"cache_key": key, "cache_value": value} if layer.stores else {})


def multi_head_attention(description: Description) -> dict[str, Marked]:
    """Compute the output (batch, q_len, out), and with a cache its arrays and lengths."""
    layer = Layer(description)
    empty = numpy.array([row.state == EMPTY for row in layer.rows]).reshape(layer.batch, layer.heads, layer.q_len)
    out = layer.arrays["w_o"].shape[2]
    alone = numpy.broadcast_to(numpy.all(empty, axis=1, keepdims=True).swapaxes(1, 2), (layer.batch, layer.q_len, out))
    kinds = {"output": numpy.where(alone, EXACT, FINITE_VALUE).astype(numpy.uint8)}
    exact: dict[str, Any] = {"output": layer.arrays.get("b_o", 0.0)}
    for source in ("key", "value") if layer.stores else ():
        kinds[f"cache_{source}"] = layer.kinds_of_buffer(source)
        exact[f"cache_{source}"] = layer.arrays[f"cache_{source}"]
    values = rounded(
        description.id, lambda: _evaluate(layer), {name: kind == FINITE_VALUE for name, kind in kinds.items()}
    )
    marked = {name: Marked.fill(values[name], kinds[name], exact[name]) for name in kinds}
    if layer.cached:
        lengths = numpy.asarray(layer.lengths, dtype=numpy.float64)
        marked["cache_lengths"] = Marked(lengths, numpy.full(lengths.shape, EXACT, dtype=numpy.uint8))
    return marked


def multi_head_attention_weights(description: Description) -> dict[str, Marked]:
    """Compute the weights of each head, (batch, heads, q_len, kv_len or capacity)."""
    layer = Layer(description)
    shape = (layer.batch, layer.heads, layer.q_len, layer.buffer)
    kinds = numpy.full(shape, EXACT, dtype=numpy.uint8)
    for row in layer.rows:
        kinds[row.batch, row.head, row.index, list(row.keys)] = FINITE_VALUE

    def evaluate() -> dict[str, numpy.ndarray]:
        weights = numpy.full(shape, arb(0), dtype=object)
        for (b, h, i), by_key in _weights(layer, layer.stored("k", "key", rotated=True)).items():
            for j, weight in by_key.items():
                weights[b, h, i, j] = weight
        return {"weights": weights}

    values = rounded(description.id, evaluate, {"weights": kinds == FINITE_VALUE})
    return {"weights": Marked.fill(values["weights"], kinds, 0.0)}


def multi_head_attention_and_weights(description: Description) -> dict[str, Marked]:
    """Compute the output and the weights of each head, and with a cache its arrays and lengths."""
    return multi_head_attention(description) | multi_head_attention_weights(description)
