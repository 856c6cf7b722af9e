"""Expected results of rotary embedding and ALiBi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
from flint import arb
from oracle_balls import rounded
from oracle_kinds import EXACT, FINITE_VALUE, Marked
from oracle_visibility import offsets_of_reading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from description import Description
    from numpy.typing import ArrayLike

__all__ = ["Rotation", "alibi_bias", "alibi_slopes", "as_balls", "rotary_embedding"]

as_balls: Callable[[numpy.ndarray], numpy.ndarray] = numpy.vectorize(arb, otypes=[object])
"""Convert floats to balls of radius 0."""


@dataclass(frozen=True)
class Rotation:
    """The rotation of vectors of some size."""

    size: int
    base: float = 10000.0
    interleaved: bool = False
    rotary_dim: int | None = None
    frequencies: Sequence[float] | None = None
    attention_factor: float = 1.0
    sections: Sequence[int] | None = None

    @property
    def rotated(self) -> int:
        """Number of components that are rotated; the others are unchanged."""
        return self.size if self.rotary_dim is None else self.rotary_dim

    def pairs(self) -> list[tuple[int, int]]:
        """Return the components of each pair: neighbours if interleaved, else a component of each half."""
        half = self.rotated // 2
        return [(2 * n, 2 * n + 1) if self.interleaved else (n, n + half) for n in range(half)]

    def angle(self, position: float, pair: int) -> arb:
        """Return position * frequencies[pair], by default position * base^(-2 pair / rotary_dim)."""
        if self.frequencies is not None:
            return arb(position) * arb(self.frequencies[pair])
        return arb(position) * (arb(self.base).log() * arb(-2 * pair) / arb(self.rotated)).exp()

    def rotate(self, x: numpy.ndarray, positions: ArrayLike) -> numpy.ndarray:
        """Rotate balls (batch, heads, length, size), each vector by the angles of its position, times the factor.

        Positions are (length,) or (batch, length), with sections also (axes, batch, length).
        """
        result, factor = x.copy(), arb(self.attention_factor)
        places = numpy.asarray(positions)
        sections = self.sections if places.ndim == 3 and self.sections is not None else [len(self.pairs())]
        axes = numpy.repeat(range(len(sections)), sections)
        lines = numpy.broadcast_to(places, (len(sections), len(x), x.shape[2]))
        for b in range(len(x)):
            for i in range(x.shape[2]):
                for pair, (first, second) in enumerate(self.pairs()):
                    position = lines[axes[pair], b, i].item()
                    sine, cosine = (factor * turn for turn in self.angle(position, pair).sin_cos())
                    a, c = x[b, :, i, first], x[b, :, i, second]
                    result[b, :, i, first], result[b, :, i, second] = a * cosine - c * sine, c * cosine + a * sine
        return result


def _rounded_finite(name: str, evaluate: Callable[[], Mapping[str, numpy.ndarray]]) -> dict[str, Marked]:
    """Round balls that are all finite numbers."""
    finite = {output: numpy.ones(balls.shape, dtype=bool) for output, balls in evaluate().items()}
    values = rounded(name, evaluate, finite)
    return {
        output: Marked(array, numpy.full(array.shape, FINITE_VALUE, dtype=numpy.uint8))
        for output, array in values.items()
    }


def rotary_embedding(description: Description) -> dict[str, Marked]:
    """Compute the rotated vectors, (batch, heads, length, size)."""
    arrays = {name: numpy.asarray(item.values) for name, item in description.inputs.items()}
    x = arrays["x"]
    rotation = Rotation(x.shape[3], **description.options)
    places = arrays["positions"]
    turned = _rounded_finite(description.id, lambda: {"output": rotation.rotate(as_balls(x), places)})["output"]
    turned.kinds[..., rotation.rotated :] = EXACT
    return {"output": turned}


def slopes(heads: int) -> list[arb]:
    """Return 2^(-8 (h+1) / heads) for a power of two; else those of the power below, then every other of the next."""
    power = 1 << (heads.bit_length() - 1)
    first = [arb(2) ** (arb(-8 * (h + 1)) / arb(power)) for h in range(power)]
    return first if power == heads else first + slopes(2 * power)[0::2][: heads - power]


def alibi_slopes(description: Description) -> dict[str, Marked]:
    """Compute the slope of each head, (heads,)."""
    heads: int = description.options["heads"]
    return _rounded_finite(description.id, lambda: {"slopes": numpy.array(slopes(heads), dtype=object)})


def alibi_bias(description: Description) -> dict[str, Marked]:
    """Compute -slope |p - j|, (1 or batch, heads, q_len, kv_len)."""
    options: Mapping[str, Any] = description.options
    offset = description.inputs["q_offset"].values if "q_offset" in description.inputs else options.get("q_offset", 0)
    if isinstance(offset, str):
        offset = offsets_of_reading(offset, [options["q_len"]], [options["kv_len"]])
    offsets = numpy.reshape(offset, (-1, 1, 1, 1))
    rows, keys = numpy.arange(options["q_len"])[:, None], numpy.arange(options["kv_len"])
    distance = as_balls(numpy.abs(offsets + rows - keys).astype(numpy.float64))

    def evaluate() -> dict[str, numpy.ndarray]:
        if "slopes" in description.inputs:
            by_head = as_balls(description.inputs["slopes"].values)
        else:
            by_head = numpy.array(slopes(options["heads"]), dtype=object)
        return {"bias": -by_head.reshape(1, -1, 1, 1) * distance}

    return _rounded_finite(description.id, evaluate)
