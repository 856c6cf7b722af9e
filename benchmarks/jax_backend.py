"""Compare mha_spec_jax with jax.nn and the direct formula: ratios of interleaved medians on the CPU, and memory.

Run it with `python benchmarks/jax_backend.py [NAME ...]`; a row past its limit fails the run.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from measure import ratio, report
from settings import SETTINGS, Setting

import mha_spec_jax

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

attention: Callable[..., Any] = mha_spec_jax.attention
NATIVE = {"encoder": (1.0, 1.0), "long": (1 / 3, 1 / 1.8)}
"""The largest ratios to the time of jax.nn, forward, and forward with backward."""
FORMULA = 1 / 0.97


def direct(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Compute the formula; query heads that share keys are grouped, which is faster than repeating the keys."""
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
    """Call jax.nn, whose axes are (batch, length, heads, size)."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(jax.nn.dot_product_attention(query, key, value, mask=mask), 1, 2)


def trained(function: Callable[..., Array]) -> Callable[..., object]:
    """Compile forward and backward."""
    return jax.jit(jax.grad(lambda operands, *rest: jnp.sum(function(*operands, *rest) ** 2)))


def called(function: Callable[..., object], *operands: object) -> Callable[[], object]:
    """Make a call that waits for its result."""
    return lambda: jax.block_until_ready(function(*operands))


def compare(name: str, setting: Setting) -> bool:
    """Measure every row of a setting."""
    operands = [jnp.asarray(array) for array in setting.operands()]
    mask = None if setting.visible is None else jnp.asarray(setting.visible)
    ours, good = partial(attention, **setting.options(jnp.asarray)), True
    for rival, limits in ((native, NATIVE.get(name)), (direct, (FORMULA, FORMULA))):
        if limits is None:
            continue
        measured = ratio(called(jax.jit(ours), *operands), called(jax.jit(rival), *operands, mask))
        good &= report(f"{name}, forward, {rival.__name__}", limits[0], measured)
        if not setting.step:
            measured = ratio(called(trained(ours), operands), called(trained(rival), operands, mask))
            good &= report(f"{name}, forward and backward, {rival.__name__}", limits[1], measured)
    return good


def memory() -> bool:
    """Check that the temporary memory of forward and backward grows with the length, not with its square."""
    held = [temporary(length) for length in (4096, 8192, 16384)]
    print(f"memory at 4096, 8192, 16384: {', '.join(f'{size / 2**20:.0f} MiB' for size in held)}")
    return held[2] < 2.5 * held[1]


def temporary(length: int) -> int:
    """Return the bytes of temporary memory of a causal training step with 8 heads of 64."""
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
