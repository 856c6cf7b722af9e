"""Random problems for honest implementations: regimes of data, shapes and options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy

from mha_spec_conformance.judging.bounds import precision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mha_spec.arrays import Array

__all__ = ["LONG_SHAPES", "REGIMES", "SHAPES", "TRENDS", "Problem", "draw", "overflows", "stored"]

SHAPES = (
    (2, 2, 2, 13, 17, 8, 8),
    (1, 4, 2, 31, 67, 16, 16),
    (2, 3, 1, 7, 131, 32, 32),
    (1, 2, 1, 1, 509, 64, 64),
    (1, 2, 2, 67, 131, 64, 64),
    (1, 2, 2, 3, 1, 5, 5),
    (1, 1, 1, 16, 1024, 64, 64),
)
"""(batch, heads, kv_heads, q_len, kv_len, qk_dim, v_dim)."""

LONG_SHAPES = (
    (1, 2, 1, 1, 4096, 64, 64),
    (1, 4, 2, 5, 8192, 64, 64),
    (2, 2, 1, 8, 2049, 128, 96),
    (1, 2, 2, 65, 1000, 64, 64),
    (1, 1, 1, 130, 1290, 32, 32),
)
"""Shapes of decoding, of chunks and of training with 1,000 keys and more."""

BIAS_SHAPES = ((1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1), (1, 0, 1, 0), (0, 0, 0, 0))
"""The axes of the scores that a bias has; the others have size 1."""

STRUCTURED = ("constant_value", "uniform_weights")
"""Regimes whose roundings are not independent of each other, so that statistics do not apply."""


@dataclass(frozen=True)
class Problem:
    """One call with its cotangents, its arrays stored in the dtype of the run."""

    dtype: str
    regime: str
    arrays: Mapping[str, numpy.ndarray]
    options: Mapping[str, float]
    visible: numpy.ndarray
    unrounded: bool = False
    """True keeps the results in the type of the sums, for a caller that adds them before it rounds."""

    @property
    def id(self) -> str:
        """The name of the problem in messages."""
        tensors = ("query", "key", "value", "grad_output")
        options = [name for name in (*self.arrays, *self.options) if name not in tensors]
        return f"{self.dtype}, {self.regime}, scores {self.visible.shape}, {', '.join(options) or 'plain'}"

    @property
    def generic(self) -> bool:
        """True if the roundings are independent of each other."""
        return self.regime in REGIMES and self.regime not in STRUCTURED

    @property
    def work(self) -> type[numpy.floating]:
        """The type of scores, softmax and sums."""
        return numpy.float64 if self.dtype == "float64" else numpy.float32

    @property
    def result(self) -> numpy.dtype:
        """The dtype of the results."""
        return numpy.dtype(self.work) if self.unrounded else self.arrays["query"].dtype

    @property
    def scale(self) -> float:
        """The scale of the scores."""
        return self.options.get("scale", self.arrays["query"].shape[-1] ** -0.5)

    @property
    def group(self) -> int:
        """Number of query heads that read the same key/value head."""
        return self.arrays["query"].shape[1] // self.arrays["key"].shape[1]

    @cached_property
    def kept(self) -> numpy.ndarray | None:
        """The factor that dropout multiplies each weight by, in the type of the softmax."""
        if "dropout_mask" not in self.arrays:
            return None
        return self.arrays["dropout_mask"] * self.work(1 / (1 - self.options.get("dropout_rate", 0.0)))

    def working(self, name: str) -> Array:
        """Convert an input to the type of the softmax, with heads of key and value repeated; None if it is absent."""
        if name not in self.arrays:
            return None
        array = self.arrays[name].astype(self.work)
        return numpy.repeat(array, self.group, axis=1) if name in ("key", "value") else array

    def forward_arrays(self) -> dict[str, numpy.ndarray]:
        """Return the inputs of the forward call."""
        return {name: array for name, array in self.arrays.items() if not name.startswith("grad_")}

    def weight_arrays(self) -> dict[str, numpy.ndarray]:
        """Return the inputs of attention_weights."""
        return {name: x for name, x in self.forward_arrays().items() if name not in ("value", "dropout_mask")}

    def weight_options(self) -> dict[str, float]:
        """Return the options of attention_weights."""
        return {name: value for name, value in self.options.items() if name != "dropout_rate"}


def _normal(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    """Keep standard normal data: logits of deviation 1."""


def _contrast(factor: float) -> Callable[..., None]:
    def change(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
        x["query"] *= factor

    return change


def _shifted(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    x["value"] += 10


def _constant_value(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    x["value"][:] = x["value"][:, :, :1]


def _uniform_weights(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    x["query"][:] = 0


def _heavy_tails(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    for name in ("query", "key", "value", "grad_output"):
        x[name][:] = numpy.clip(rng.standard_t(2, x[name].shape), -30, 30)


def _outliers(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    for name in ("query", "key", "value"):
        x[name][rng.random(x[name].shape) < 0.01] *= 12


def _large_value(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    x["value"] *= 16 if dtype == "float16" else 1e3


def _small_value(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    x["value"] *= 1e-3


def _self_match(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
    length = min(x["query"].shape[2], x["key"].shape[2])
    x["key"][:, :, :length] = x["query"][:, : x["key"].shape[1], :length]


def _trend(of_keys: Callable[[numpy.ndarray], numpy.ndarray]) -> Callable[..., None]:
    """Add scores that depend on the position of the key, from 0 at the first key to 1 at the last."""

    def change(rng: numpy.random.Generator, x: dict[str, numpy.ndarray], dtype: str) -> None:
        x["query"][..., 0] = x["query"].shape[-1] ** 0.5
        x["key"][..., 0] = of_keys(numpy.linspace(0, 1, x["key"].shape[2]))

    return change


REGIMES: dict[str, Callable[..., None]] = {
    "normal": _normal,
    "contrast_4": _contrast(4.0),
    "contrast_16": _contrast(16.0),
    "shifted": _shifted,
    "constant_value": _constant_value,
    "uniform_weights": _uniform_weights,
    "heavy_tails": _heavy_tails,
    "outliers": _outliers,
    "large_value": _large_value,
    "small_value": _small_value,
    "self_match": _self_match,
}

TRENDS: dict[str, Callable[..., None]] = {
    "rising": _trend(lambda t: 40 * t - 20),
    "falling": _trend(lambda t: 20 - 40 * t),
    "waves": _trend(lambda t: 10 * numpy.sin(60 * t)),
}
"""Regimes whose largest score rises or falls from block to block, so that sums are scaled again and again."""


def stored(dtype: str) -> Any:
    """Return the dtype of arrays that are stored in a dtype of a run."""
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype


def draw(
    rng: numpy.random.Generator,
    dtype: str,
    *,
    plain: bool = False,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    regimes: Mapping[str, Callable[..., None]] = REGIMES,
) -> Problem:
    """Draw a regime and a shape, and, unless `plain`, each option with a probability of about a third."""
    batch, heads, kv_heads, q_len, kv_len, qk_dim, v_dim = shapes[rng.choice(len(shapes))]
    regime = str(rng.choice(list(regimes)))
    scores = (batch, heads, q_len, kv_len)
    x = {
        "query": rng.standard_normal((batch, heads, q_len, qk_dim)),
        "key": rng.standard_normal((batch, kv_heads, kv_len, qk_dim)),
        "value": rng.standard_normal((batch, kv_heads, kv_len, v_dim)),
        "grad_output": rng.standard_normal((batch, heads, q_len, v_dim)),
    }
    regimes[regime](rng, x, dtype)
    wide = "float64" if dtype == "float64" else "float32"
    arrays = {name: array.astype(stored(dtype)) for name, array in x.items()}
    options: dict[str, float] = {}
    visible = numpy.ones(scores, dtype=bool)
    if rng.random() < 0.6:
        visible = _visible(rng, scores)
        arrays["mask"] = visible
    if plain:
        return Problem(dtype, regime, arrays, options, visible)
    if rng.random() < 0.3:
        arrays["grad_lse"] = rng.standard_normal(scores[:3]).astype(wide)
    if rng.random() < 0.3:
        full = BIAS_SHAPES[rng.choice(len(BIAS_SHAPES))]
        shape = tuple(size if kept else 1 for size, kept in zip(scores, full, strict=True))
        arrays["bias"] = rng.standard_normal(shape).astype(wide)
    if rng.random() < 0.4:
        options["softcap"] = float(rng.choice([0.5, 5, 30, 50, 1000]))
    if rng.random() < 0.4:
        arrays["sinks"] = (2 * rng.standard_normal(heads) + rng.choice([0, 3, -20, 20])).astype(wide)
    if rng.random() < 0.3:
        options["dropout_rate"] = float(rng.choice([0.1, 0.5, 0.9]))
        arrays["dropout_mask"] = rng.random(scores) >= options["dropout_rate"]
    return Problem(dtype, regime, arrays, options, visible)


def _visible(rng: numpy.random.Generator, scores: tuple[int, ...]) -> numpy.ndarray:
    """Draw causal, padding, or random visibility, sometimes with empty rows."""
    batch, _, q_len, kv_len = scores
    kind = rng.choice(["causal", "padding", "random"])
    if kind == "causal":
        offset = rng.integers(-2, max(kv_len - q_len, 1) + 1)
        seen = numpy.arange(kv_len)[None, :] <= numpy.arange(q_len)[:, None] + offset
    elif kind == "padding":
        seen = numpy.arange(kv_len) < rng.integers(0, kv_len + 1, size=(batch, 1, 1, 1))
    else:
        seen = rng.random((batch, 1, q_len, kv_len)) < rng.choice([0.1, 0.7])
    return numpy.broadcast_to(seen, scores).copy()


def overflows(values: Mapping[str, numpy.ndarray], dtype: str) -> bool:
    """Return True if a value is too near the largest number of the dtype for a case to be admitted."""
    largest = precision(dtype).largest / 4
    return any(abs(array).max(initial=0.0) > largest for array in values.values())
