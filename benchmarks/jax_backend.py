"""mha_spec_jax against jax.nn and the direct formula: ratios of interleaved medians on the CPU, and memory by length.

Run it with `python -P benchmarks/jax_backend.py [NAME ...]`; a row past its limit fails the run.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy

import mha_spec_jax

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

attention: Callable[..., Any] = mha_spec_jax.attention
SECONDS = 3.0
"""How long each row is measured."""
LENGTHS = jnp.asarray([512, 448, 384, 320, 192, 128, 64, 1])
IDS = jnp.arange(4096)[None] // 256


@dataclass(frozen=True)
class Setting:
    """One kind of call: its sizes, our options, and the mask that says the same."""

    query: tuple[int, int, int, int]
    kv: tuple[int, int]
    """kv_heads and kv_len."""
    options: dict[str, Any] = field(default_factory=dict)
    mask: Callable[[], Array] | None = None
    native: tuple[float, float] | None = None
    """At most these parts of the time of jax.nn, forward and with the backward."""
    step: bool = False
    """A decode step, which has no backward."""

    def operands(self) -> list[Array]:
        """Query, key and value of standard normal numbers."""
        generator = numpy.random.default_rng(7)
        shapes = (self.query, *2 * [(self.query[0], *self.kv, self.query[3])])
        return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def near(length: int, left: int) -> Array:
    """The mask of a causal window."""
    distance = jnp.arange(length) - jnp.arange(length)[:, None]
    return ((distance <= 0) & (distance >= -left))[None, None]


SETTINGS = {
    "encoder": Setting((2, 8, 512, 64), (8, 512), native=(1.0, 1.0)),
    "long": Setting((1, 8, 2048, 64), (8, 2048), native=(1 / 3, 1 / 1.8)),
    "causal": Setting((1, 8, 2048, 64), (8, 2048), {"causal": True}, lambda: near(2048, 2048)),
    "decode": Setting((8, 32, 1, 128), (8, 2048), step=True),
    "cross": Setting((2, 8, 128, 64), (8, 1500)),
    "window": Setting((1, 8, 4096, 64), (8, 4096), {"window": (256, 0)}, lambda: near(4096, 256)),
    "padded": Setting(
        (8, 8, 512, 64),
        (8, 512),
        {"kv_lengths": LENGTHS},
        lambda: (jnp.arange(512) < LENGTHS[:, None])[:, None, None],
    ),
    "packed": Setting(
        (1, 8, 4096, 64),
        (8, 4096),
        {"q_segment_ids": IDS, "kv_segment_ids": IDS},
        lambda: IDS[:, None, :, None] == IDS[:, None, None, :],
    ),
    "multi-query": Setting((2, 8, 512, 64), (1, 512)),
}
FORMULA = 1 / 0.97


def direct(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Einsum, softmax, einsum; heads that share keys are grouped, which is faster than to repeat the keys."""
    batch, heads, length, size = query.shape
    if heads == key.shape[1]:
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) * size**-0.5
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), value)
    query = query.reshape(batch, key.shape[1], -1, length, size)
    scores = jnp.einsum("bkgqd,bkmd->bkgqm", query, key) * size**-0.5
    output = jnp.einsum("bkgqm,bkmd->bkgqd", jax.nn.softmax(scores, axis=-1), value)
    return output.reshape(batch, heads, length, size)


def native(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """The attention of jax.nn, whose axes are (batch, length, heads, size)."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(jax.nn.dot_product_attention(query, key, value, mask=mask), 1, 2)


def timed(function: Callable[[], object]) -> float:
    """Run once, in seconds."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """The median of the ratios of runs in turn, and both medians in ms."""
    pairs: list[tuple[float, float]] = []
    timed(ours)
    timed(theirs)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(pairs) < 5:
        pairs.append((timed(ours), timed(theirs)))
    mine, other = (statistics.median(one) * 1000 for one in zip(*pairs, strict=True))
    return statistics.median(a / b for a, b in pairs), mine, other


def report(name: str, limit: float | None, measured: tuple[float, float, float]) -> bool:
    """Print a row; whether it is within its limit."""
    found, mine, other = measured
    good = limit is None or found <= limit
    bound = "" if limit is None else f"  limit {limit:.2f} {'ok' if good else 'EXCEEDED'}"
    print(f"{name:45s} {mine:9.3f} ms against {other:9.3f} ms: {found:5.2f}{bound}", flush=True)
    return good


def trained(function: Callable[..., Array]) -> Callable[..., object]:
    """Forward and backward."""
    return jax.jit(jax.grad(lambda operands, *rest: jnp.sum(function(*operands, *rest) ** 2)))


def compare(name: str, setting: Setting) -> bool:
    """Every row of one setting."""
    operands, mask, good = setting.operands(), setting.mask() if setting.mask else None, True
    ours = partial(attention, **setting.options)
    for other, limits in ((native, setting.native), (direct, (FORMULA, FORMULA))):
        if limits is None:
            continue
        mine, theirs = partial(jax.jit(ours), *operands), partial(jax.jit(other), *operands, mask)
        good &= report(f"{name}, forward, {other.__name__}", limits[0], ratio(mine, theirs))
        if not setting.step:
            mine, theirs = partial(trained(ours), operands), partial(trained(other), operands, mask)
            good &= report(f"{name}, forward and backward, {other.__name__}", limits[1], ratio(mine, theirs))
    return good


def memory() -> bool:
    """What forward and backward hold beside inputs and outputs grows with the length, not with its square."""
    held = [temporary(length) for length in (4096, 8192, 16384)]
    print(f"memory at 4096, 8192, 16384: {', '.join(f'{one / 2**20:.0f} MiB' for one in held)}")
    return held[2] < 2.5 * held[1]


def temporary(length: int) -> int:
    """Bytes held by a causal training step of 8 heads of 64."""
    shape = jax.ShapeDtypeStruct((1, 8, length, 64), jnp.float32)
    program: Any = trained(partial(attention, causal=True))
    return program.lower([shape] * 3).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Print every row, or those of the settings named."""
    names = sys.argv[1:] or [*SETTINGS, "memory"]
    good = [memory() if name == "memory" else compare(name, SETTINGS[name]) for name in names]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
