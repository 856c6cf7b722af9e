"""Honest ways to compute a layer, and small mistakes of layers that the accuracy rule must refuse."""

from __future__ import annotations

from dataclasses import dataclass
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

__all__ = ["LayerProblem", "try_layers"]

SHAPES = (
    (2, 13, 24, 4, 2, 8, 6, 10),
    (1, 31, 64, 4, 4, 16, 16, 64),
    (2, 7, 96, 6, 3, 32, 24, 40),
    (1, 37, 64, 2, 1, 64, 64, 32),
)
"""(batch, length, embed, heads, kv_heads, qk_dim, v_dim, out)."""


@dataclass(frozen=True)
class LayerProblem(SharedProblem):
    """One causal self-attention."""

    function: str = "multi_head_attention"

    @property
    def rotation(self) -> dict[str, Any]:
        """The options of the rotation."""
        return {"base": 10000.0, "interleaved": False, "attention_factor": 1.0, **self.options.get("rotary", {})}

    def frequencies(self, pairs: int) -> numpy.ndarray:
        """Return the frequencies of the pairs in float32, those of the options or those of the base."""
        if "frequencies" in self.rotation:
            return numpy.array(self.rotation["frequencies"], numpy.float32)
        return 1 / numpy.float32(self.rotation["base"]) ** (numpy.arange(pairs, dtype=numpy.float32) / pairs)

    def working(self, name: str) -> numpy.ndarray:
        """Convert an input to float32."""
        return self.arrays[name].astype(numpy.float32)


def draw_layer(rng: numpy.random.Generator, dtype: str) -> LayerProblem:
    """Draw sizes, weights that keep the size of vectors, and sometimes biases, norms and a rotation."""
    batch, length, embed, heads, kv_heads, qk_dim, v_dim, out = SHAPES[rng.choice(len(SHAPES))]
    shapes = {"q": (heads, qk_dim), "k": (kv_heads, qk_dim), "v": (kv_heads, v_dim)}
    contrast = {"q": float(rng.choice([1, 1, 4])), "k": 1.0, "v": 1.0}
    x: dict[str, numpy.ndarray] = {"query": rng.standard_normal((batch, length, embed))}
    for side, shape in shapes.items():
        x[f"w_{side}"] = contrast[side] * rng.standard_normal((embed, *shape)) / numpy.sqrt(embed)
        if rng.random() < 0.5:
            x[f"b_{side}"] = rng.standard_normal(shape)
        if side != "v" and rng.random() < 0.4:
            x[f"{side}_norm"] = 1 + 0.2 * rng.standard_normal(qk_dim)
    x["w_o"] = rng.standard_normal((heads, v_dim, out)) / numpy.sqrt(heads * v_dim)
    if rng.random() < 0.5:
        x["b_o"] = rng.standard_normal(out)
    arrays = {name: array.astype(stored(dtype)) for name, array in x.items()}
    options: dict[str, Any] = {"causal": True}
    if rng.random() < 0.6:
        options["rotary"] = draw_rotation(rng, qk_dim // 2)
    return LayerProblem(dtype, {**arrays, "key": arrays["query"], "value": arrays["query"]}, options)


def draw_rotation(rng: numpy.random.Generator, pairs: int) -> dict[str, Any]:
    """Draw a pairing and either a base, or frequencies of which the last may be 0; sometimes an attention factor."""
    rotation: dict[str, Any] = {"interleaved": bool(rng.random() < 0.5)}
    if rng.random() < 0.5:
        rotation["base"] = float(rng.choice([100.0, 10000.0]))
    else:
        rotation["frequencies"] = [*rng.uniform(0.001, 2, pairs - 1).tolist(), float(rng.choice([0.0, 0.5]))]
    if rng.random() < 0.5:
        rotation["attention_factor"] = float(rng.choice([0.5, 1.1386, 1.2079]))
    return rotation


@dataclass(frozen=True)
class Plain:
    """The layer in NumPy, in float32; if `stored`, the result of each step is rounded to the dtype."""

    stored: bool = True
    scale: float = 1.0
    forgotten: str | None = None
    other_pairs: bool = False
    narrow_sums: bool = False

    def __call__(self, p: LayerProblem) -> dict[str, numpy.ndarray]:
        """Return the output."""
        q, k, v = (self._heads(p, side) for side in "qkv")
        group = q.shape[1] // k.shape[1]
        k, v = (numpy.repeat(x, group, axis=1) for x in (k, v))
        scores = numpy.float32(self.scale / numpy.sqrt(q.shape[3])) * (q @ k.swapaxes(2, 3))
        scores = numpy.where(numpy.tri(scores.shape[2], dtype=bool), scores, -numpy.inf)
        powers = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = self._store(p, powers / powers.sum(axis=-1, keepdims=True))
        attended = self._store(p, weights @ v).swapaxes(1, 2)
        flat = attended.reshape(*attended.shape[:2], -1)
        output = self._store(p, self._product(p, flat, p.working("w_o").reshape(flat.shape[2], -1)))
        if "b_o" in p.arrays and self.forgotten != "b_o":
            output = output + p.working("b_o")
        return {"output": output.astype(p.arrays["query"].dtype)}

    def _store(self, p: LayerProblem, x: numpy.ndarray) -> numpy.ndarray:
        return x.astype(p.arrays["query"].dtype).astype(numpy.float32) if self.stored else x

    def _product(self, p: LayerProblem, x: numpy.ndarray, weight: numpy.ndarray) -> numpy.ndarray:
        if not self.narrow_sums:
            return x @ weight
        narrow = half(p.dtype)
        total = numpy.zeros((*x.shape[:2], weight.shape[1]), numpy.float32)
        for start in range(0, x.shape[2], 2):
            total = total + x[..., start : start + 2] @ weight[start : start + 2]
            total = total.astype(narrow).astype(numpy.float32)
        return total

    def _heads(self, p: LayerProblem, side: str) -> numpy.ndarray:
        weight = p.working(f"w_{side}")
        x = self._product(p, p.working("query"), weight.reshape(weight.shape[0], -1))
        x = self._store(p, x).reshape(*x.shape[:2], *weight.shape[1:]).swapaxes(1, 2)
        if f"b_{side}" in p.arrays and self.forgotten != f"b_{side}":
            x = self._store(p, x + p.working(f"b_{side}")[:, None])
        if f"{side}_norm" in p.arrays:
            root = numpy.sqrt((x * x).mean(axis=-1, keepdims=True) + numpy.float32(1e-6))
            x = self._store(p, x / root * p.working(f"{side}_norm"))
        return x if side == "v" or "rotary" not in p.options else self._store(p, self.rotate(p, x))

    def rotate(self, p: LayerProblem, x: numpy.ndarray) -> numpy.ndarray:
        """Rotate heads, by the pairing of the problem or by the other one."""
        pairs = x.shape[3] // 2
        angles = numpy.arange(x.shape[2], dtype=numpy.float32)[:, None] * p.frequencies(pairs)
        factor = numpy.float32(p.rotation["attention_factor"])
        cosine, sine = factor * numpy.cos(angles), factor * numpy.sin(angles)
        neighbours = p.rotation["interleaved"] != self.other_pairs
        a, b = (x[..., 0::2], x[..., 1::2]) if neighbours else (x[..., :pairs], x[..., pairs:])
        parts = (a * cosine - b * sine, b * cosine + a * sine)
        return numpy.stack(parts, axis=-1).reshape(x.shape) if neighbours else numpy.concatenate(parts, axis=-1)


def by_torch(p: LayerProblem) -> dict[str, numpy.ndarray]:
    """Compute the layer with PyTorch in the dtype: linear maps, its norm, a rotation by complex numbers, SDPA."""
    x = {name: to_torch(array) for name, array in p.arrays.items()}

    def heads(side: str) -> torch.Tensor:
        y = torch.einsum("ble,ehd->bhld", x["query"], x[f"w_{side}"])
        y = y + x[f"b_{side}"][:, None] if f"b_{side}" in x else y
        if f"{side}_norm" in x:
            y = torch.nn.functional.rms_norm(y, y.shape[3:], x[f"{side}_norm"], 1e-6)
        return y if side == "v" or "rotary" not in p.options else _rotated_by_torch(p, y)

    q, k, v = (heads(side) for side in "qkv")
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    output = torch.einsum("bhlc,hco->blo", attended, x["w_o"])
    return {"output": from_torch(output + x["b_o"] if "b_o" in x else output)}


def _rotated_by_torch(p: LayerProblem, x: torch.Tensor) -> torch.Tensor:
    pairs = x.shape[3] // 2
    if "frequencies" in p.rotation:
        frequencies = torch.tensor(p.rotation["frequencies"])
    else:
        frequencies = torch.exp(torch.arange(pairs) * (-torch.log(torch.tensor(p.rotation["base"])) / pairs))
    size = torch.tensor(p.rotation["attention_factor"])
    turns = torch.polar(size, torch.outer(torch.arange(x.shape[2]).float(), frequencies))
    if p.rotation["interleaved"]:
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:3], pairs, 2)) * turns
        return torch.view_as_real(turned).reshape(x.shape).to(x.dtype)
    turned = torch.complex(x[..., :pairs].float(), x[..., pairs:].float()) * turns
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def by_jax(p: LayerProblem) -> dict[str, numpy.ndarray]:
    """Compute the layer with JAX, with sums in float32, rounded after each map."""
    x = {name: jnp.asarray(array) for name, array in p.arrays.items()}
    dtype, wide = x["query"].dtype, jnp.float32

    def heads(side: str) -> Any:
        y = jnp.einsum("ble,ehd->bhld", x["query"].astype(wide), x[f"w_{side}"].astype(wide)).astype(dtype)
        y = y + x[f"b_{side}"][:, None] if f"b_{side}" in x else y
        if f"{side}_norm" in x:
            square = jnp.mean(y.astype(wide) ** 2, axis=-1, keepdims=True)
            y = (y * jnp.reciprocal(jnp.sqrt(square + 1e-6)) * x[f"{side}_norm"]).astype(dtype)
        if side == "v" or "rotary" not in p.options:
            return y.astype(wide)
        return jnp.asarray(Plain().rotate(p, numpy.asarray(y.astype(wide)))).astype(dtype).astype(wide)

    q, k, v = (heads(side) for side in "qkv")
    k, v = (jnp.repeat(y, q.shape[1] // k.shape[1], axis=1) for y in (k, v))
    scores = jnp.einsum("bhid,bhjd->bhij", q, k) / jnp.sqrt(jnp.asarray(q.shape[3], wide))
    scores = jnp.where(jnp.tri(scores.shape[2], dtype=bool), scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    attended = jnp.einsum("bhij,bhjc->bhic", weights / weights.sum(axis=-1, keepdims=True), v).astype(dtype)
    output = jnp.einsum("bhic,hco->bio", attended.astype(wide), x["w_o"].astype(wide)).astype(dtype)
    return {"output": numpy.asarray(output + x["b_o"] if "b_o" in x else output)}


HONEST = {
    "NumPy, rounded after each step": Implementation(Plain()),
    "NumPy, rounded at the end": Implementation(Plain(stored=False)),
    "PyTorch in the dtype": Implementation(by_torch),
    "JAX, sums in float32": Implementation(by_jax),
}

PLANTED: dict[str, dict[str, Callable[[LayerProblem], dict[str, numpy.ndarray]]]] = {
    "plain": {"scale +1 %": Plain(scale=1.01)},
    "turned": {"b_v forgotten": Plain(forgotten="b_v"), "the other pairing": Plain(other_pairs=True)},
    "wide": {"projections summed in 16 bits": Plain(narrow_sums=True)},
}
"""Mistakes by name, by the kind of layer in which they are planted."""


def try_layers(dtype: str, first: int, count: int) -> Shares:
    """Ask every implementation `count` random problems of a dtype, and plant each mistake in some problems."""
    shares = Shares("a layer")
    try_each(shares, dtype, range(first, first + count), draw_layer, HONEST)
    for number in range(first, first + PLANTED_PROBLEMS):
        for kind, mistakes in PLANTED.items():
            shares.plant(planted_problem(number, dtype, kind), mistakes)
    return shares


def planted_problem(seed: int, dtype: str, kind: str) -> LayerProblem:
    """Draw one small head, "turned" with a bias and a rotation, or "wide" with values that are long positive sums."""
    rng = numpy.random.default_rng(seed)
    embed, heads, size = 1024 if kind == "wide" else 8, 1, 4 if kind == "turned" else 2
    x = {"query": rng.standard_normal((1, 64, embed))}
    for side in "qkv":
        x[f"w_{side}"] = rng.standard_normal((embed, heads, size)) / numpy.sqrt(embed)
    x["w_q"] = 2 * x["w_q"]
    if kind == "wide":
        x["query"], x["w_v"] = abs(x["query"]), abs(x["w_v"])
    if kind == "turned":
        x["b_v"] = rng.standard_normal((heads, size))
    x["w_o"] = rng.standard_normal((heads, size, 8)) / numpy.sqrt(heads * size)
    arrays = {name: array.astype(stored(dtype)) for name, array in x.items()}
    arrays |= {"key": arrays["query"], "value": arrays["query"]}
    return LayerProblem(dtype, arrays, {"causal": True} | ({"rotary": {}} if kind == "turned" else {}))
