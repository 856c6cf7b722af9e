"""Honest ways to turn pairs by given frequencies, and mistakes of a rotation that the accuracy rule must refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy
import torch
from frameworks import from_torch, to_torch
from planted import half
from problems import stored
from shares import PLANTED_PROBLEMS, Implementation, SharedProblem, Shares, try_each

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RotationProblem", "try_rotations"]

SIZES = ((8, 8), (64, 64), (12, 6), (80, 20), (2, 2))
"""(size, rotary_dim)."""

FARTHEST = (10, 1000, 100_000)
"""Largest positions: an angle in float32 is uncertain by 0.06 radians at the last."""


@dataclass(frozen=True)
class RotationProblem(SharedProblem):
    """One call with frequencies and an attention factor."""

    function: str = "rotary_embedding"

    @property
    def turning(self) -> numpy.ndarray:
        """The components that turn, in float32."""
        return self.arrays["x"][..., : self.options["rotary_dim"]].astype(numpy.float32)

    def angles(self, work: Any = numpy.float32) -> numpy.ndarray:
        """Return the angle of each token and pair, over (batch, 1, length, pairs)."""
        frequencies = numpy.array(self.options["frequencies"], work)
        return (self.arrays["positions"].astype(work)[..., None] * frequencies)[:, None]

    def pairs(self, x: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Split vectors into the two components of each pair."""
        half = x.shape[-1] // 2
        return (x[..., 0::2], x[..., 1::2]) if self.options["interleaved"] else (x[..., :half], x[..., half:])

    def output(self, first: numpy.ndarray, second: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """Join the components of the pairs, and append the components that do not turn."""
        x, interleaved = self.arrays["x"], self.options["interleaved"]
        joined = numpy.stack([first, second], axis=-1) if interleaved else numpy.concatenate([first, second], axis=-1)
        turned = joined.reshape(*x.shape[:-1], self.options["rotary_dim"]).astype(x.dtype)
        return {"output": numpy.concatenate([turned, x[..., self.options["rotary_dim"] :]], axis=-1)}


def draw_rotation(rng: numpy.random.Generator, dtype: str) -> RotationProblem:
    """Draw vectors at near or far positions, and frequencies that fall, sometimes to 0, and an attention factor."""
    size, rotary_dim = SIZES[rng.choice(len(SIZES))]
    x = rng.standard_normal((2, 3, 17, size)) * rng.choice([1, 1, 30])
    farthest = FARTHEST[rng.choice(len(FARTHEST))]
    arrays = {"x": x.astype(stored(dtype)), "positions": rng.integers(-farthest, farthest, (2, 17))}
    pairs = rotary_dim // 2
    frequencies = rng.uniform(0.2, 1.8) * rng.uniform(0.3, 1.1) ** numpy.arange(pairs)
    if rng.random() < 0.3:
        frequencies[rng.integers(pairs) :] = 0
    options = {
        "rotary_dim": rotary_dim,
        "interleaved": bool(rng.random() < 0.5),
        "frequencies": frequencies.tolist(),
        "attention_factor": float(rng.choice([1.0, 0.5, 1.1386, 1.2079, 4.0])),
    }
    return RotationProblem(dtype, arrays, options)


def turned(
    p: RotationProblem, cosine: numpy.ndarray, sine: numpy.ndarray, factor: float = 1.0
) -> dict[str, numpy.ndarray]:
    """Turn the pairs in float32 by these cosines and sines, and multiply the result by a factor."""
    (a, b), rounded = p.pairs(p.turning), numpy.float32(factor)
    return p.output(rounded * (a * cosine - b * sine), rounded * (b * cosine + a * sine))


def on_the_table(p: RotationProblem, work: Any = numpy.float32) -> dict[str, numpy.ndarray]:
    """Multiply cosine and sine by the factor, as models do that keep a table."""
    angles, factor = p.angles(work), work(p.options["attention_factor"])
    table = (factor * numpy.cos(angles), factor * numpy.sin(angles))
    return turned(p, *(part.astype(numpy.float32) for part in table))


def on_the_result(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Multiply the turned components by the factor."""
    return turned(p, numpy.cos(p.angles()), numpy.sin(p.angles()), p.options["attention_factor"])


def from_float64(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Compute the table in float64, and turn in float32."""
    return on_the_table(p, numpy.float64)


def by_torch(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Multiply complex numbers of PyTorch, as Llama does, with the factor as their size."""
    size = torch.tensor(p.options["attention_factor"])
    turns = torch.polar(size, torch.from_numpy(p.angles()))
    a, b = (to_torch(numpy.ascontiguousarray(part)) for part in p.pairs(p.turning))
    result = torch.complex(a, b) * turns
    return p.output(from_torch(result.real), from_torch(result.imag))


def by_jax(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Compute angles, table and turn with JAX in float32."""
    angles, factor = jnp.asarray(p.angles()), jnp.float32(p.options["attention_factor"])
    cosine, sine = factor * jnp.cos(angles), factor * jnp.sin(angles)
    a, b = (jnp.asarray(part) for part in p.pairs(p.turning))
    return p.output(numpy.asarray(a * cosine - b * sine), numpy.asarray(b * cosine + a * sine))


HONEST = {
    "NumPy, factor on the table": Implementation(on_the_table),
    "NumPy, factor on the result": Implementation(on_the_result),
    "NumPy, table in float64": Implementation(from_float64),
    "PyTorch, complex numbers": Implementation(by_torch),
    "JAX, factor on the table": Implementation(by_jax),
}


def changed(p: RotationProblem, **options: Any) -> dict[str, numpy.ndarray]:
    """Answer a call with other options."""
    return on_the_table(replace(p, options={**p.options, **options}))


def factor_forgotten(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Turn without the factor."""
    return changed(p, attention_factor=1.0)


def factor_applied_twice(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Turn with the square of the factor."""
    return changed(p, attention_factor=p.options["attention_factor"] ** 2)


def factor_on_every_component(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Multiply the components that do not turn, too."""
    output, dtype = on_the_table(p)["output"].astype(numpy.float32), p.arrays["x"].dtype
    output[..., p.options["rotary_dim"] :] *= numpy.float32(p.options["attention_factor"])
    return {"output": output.astype(dtype)}


def frequencies_in_16_bits(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Round the frequencies to 16 bits."""
    narrow = numpy.array(p.options["frequencies"]).astype(half(p.dtype)).astype(float)
    return changed(p, frequencies=narrow.tolist())


def angles_in_16_bits(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Round the angles to 16 bits."""
    angles = p.angles().astype(half(p.dtype)).astype(numpy.float32)
    factor = numpy.float32(p.options["attention_factor"])
    return turned(p, factor * numpy.cos(angles), factor * numpy.sin(angles))


def next_frequency(p: RotationProblem) -> dict[str, numpy.ndarray]:
    """Turn each pair by the frequency of the next one."""
    return changed(p, frequencies=numpy.roll(p.options["frequencies"], -1).tolist())


PLANTED: dict[str, Callable[[RotationProblem], dict[str, numpy.ndarray]]] = {
    "attention factor forgotten": factor_forgotten,
    "attention factor twice": factor_applied_twice,
    "attention factor on every component": factor_on_every_component,
    "frequencies in 16 bits": frequencies_in_16_bits,
    "angles in 16 bits": angles_in_16_bits,
    "frequencies of the next pairs": next_frequency,
}


def try_rotations(dtype: str, first: int, count: int) -> Shares:
    """Ask every implementation `count` random problems of a dtype, and plant each mistake in some problems."""
    shares = Shares("a rotation")
    try_each(shares, dtype, range(first, first + count), draw_rotation, HONEST)
    for number in range(first, first + PLANTED_PROBLEMS):
        shares.plant(planted_problem(number, dtype), PLANTED)
    return shares


def planted_problem(seed: int, dtype: str) -> RotationProblem:
    """Draw a call at positions below 1,000, of whose components some do not turn."""
    rng = numpy.random.default_rng(seed)
    x = rng.standard_normal((1, 2, 17, 12)).astype(stored(dtype))
    frequencies = (0.9 * 0.4 ** numpy.arange(3)).tolist()
    options = {"rotary_dim": 6, "interleaved": False, "frequencies": frequencies, "attention_factor": 1.1386}
    return RotationProblem(dtype, {"x": x, "positions": rng.integers(0, 1000, (1, 17))}, options)
