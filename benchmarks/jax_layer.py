"""Compare the layer of mha_spec_jax with those of flax.nnx and equinox: ratios of processor time on the CPU, jitted.

Run it with `python benchmarks/jax_layer.py`; a row past its limit, or too slow a mean of all, fails the run.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import equinox
import jax
import jax.numpy as jnp
import numpy
from flax import nnx
from measure import ratio

import mha_spec_jax
from mha_spec.weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

BATCH, LENGTH, EMBED, HEADS, CAPACITY = 2, 512, 512, 8, 1024
LIMIT, MEAN_LIMIT = 1 / 0.97, 1 / 1.15
"""The largest ratio of a row, and the largest geometric mean of all rows."""
LINEAR = ("query_proj", "key_proj", "value_proj", "output_proj")


def report(name: str, limit: float, measured: tuple[float, float, float]) -> float:
    """Print a row, and return its ratio."""
    measured_ratio, mine, rival = measured
    verdict = "ok" if measured_ratio <= limit else "EXCEEDED"
    print(
        f"{name:45s} {mine:9.3f} ms against {rival:9.3f} ms: {measured_ratio:5.2f}  limit {limit:.2f} {verdict}",
        flush=True,
    )
    return measured_ratio


def processor_time(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Return the ratio of the times of two functions, and their times in ms, until their results are ready."""
    runs = (lambda: jax.block_until_ready(ours()), lambda: jax.block_until_ready(theirs()))
    return ratio(*runs, clock=time.process_time)


def trained(call: Callable[..., Array]) -> Callable[..., Any]:
    """Compile the gradients of parameters and tokens."""
    return jax.jit(jax.grad(lambda params, x: jnp.sum(call(params, x) ** 2), argnums=(0, 1)))


def of_nnx() -> tuple[Callable[..., Array], Any, dict[str, Array]]:
    """Return the layer of flax as a pure function, its state, and its weights in our layout."""
    layer = nnx.MultiHeadAttention(HEADS, EMBED, decode=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    params = load_weights(nnx.to_pure_dict(state), "flax_nnx")
    return lambda state, x: nnx.merge(graph, state)(x), state, params


def of_equinox() -> tuple[Callable[..., Array], Any, dict[str, Array]]:
    """Return the layer of equinox as a pure function, its arrays, and its weights in our layout."""
    names = ("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias")
    layer = equinox.nn.MultiheadAttention(HEADS, EMBED, **dict.fromkeys(names, True), key=jax.random.key(0))
    arrays, fixed = equinox.partition(layer, equinox.is_array)
    state = {f"{name}.{kind}": getattr(getattr(layer, name), kind) for name in LINEAR for kind in ("weight", "bias")}

    def call(arrays: Any, x: Array) -> Array:
        whole = equinox.combine(arrays, fixed)
        return jax.vmap(lambda tokens: whole(tokens, tokens, tokens))(x)

    return call, arrays, load_weights(state, "equinox", heads=HEADS)


def whole_sequences() -> list[float]:
    """Measure self-attention, forward, and forward with backward."""
    x = jnp.asarray(numpy.random.default_rng(7).standard_normal((BATCH, LENGTH, EMBED)), jnp.float32)
    ratios: list[float] = []

    def ours(params: dict[str, Array], x: Array) -> Any:
        return mha_spec_jax.multi_head_attention(x, x, x, params)

    for make in (of_nnx, of_equinox):
        call, state, params = make()
        name = make.__name__.removeprefix("of_")
        for kind, compiled in (("forward", jax.jit), ("forward and backward", trained)):
            mine, theirs = partial(compiled(ours), params, x), partial(compiled(call), state, x)
            ratios.append(report(f"{name}, {kind}", LIMIT, processor_time(mine, theirs)))
    return ratios


def decode_step() -> float:
    """Measure a token at half of the capacity against `decode=True`; both take and return their cache."""
    layer = nnx.MultiHeadAttention(HEADS, EMBED, decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((BATCH, CAPACITY, EMBED), jnp.float32)
    params = load_weights(nnx.to_pure_dict(nnx.state(layer, nnx.Param)), "flax_nnx")
    layer.cache_index = nnx.Cache(jnp.asarray(CAPACITY // 2, jnp.int32))
    graph, weights, held = nnx.split(layer, nnx.Param, ...)
    token = jnp.asarray(numpy.random.default_rng(7).standard_normal((BATCH, 1, EMBED)), jnp.float32)
    cache = mha_spec_jax.empty_cache(BATCH, HEADS, CAPACITY, EMBED // HEADS, like=token)
    cache = cache._replace(lengths=jnp.full(BATCH, CAPACITY // 2, jnp.int32))

    @jax.jit
    def theirs(weights: Any, held: Any, token: Array) -> tuple[Array, Any]:
        layer = nnx.merge(graph, weights, held)
        return layer(token), nnx.state(layer, nnx.Cache)

    @jax.jit
    def ours(params: dict[str, Array], cache: mha_spec_jax.KVCache, token: Array) -> Any:
        return mha_spec_jax.multi_head_attention(token, token, token, params, causal=True, cache=cache)

    measured = processor_time(partial(ours, params, cache, token), partial(theirs, weights, held, token))
    return report("nnx, decode step at 1024", 1.0, measured)


def main() -> None:
    """Print every row and the mean."""
    ratios = whole_sequences()
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    step = decode_step()
    print(f"geometric mean: {1 / mean:.2f}x")
    sys.exit(max(ratios) > LIMIT or mean > MEAN_LIMIT or step > 1)


if __name__ == "__main__":
    main()
