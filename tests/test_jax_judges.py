"""The layers of flax and equinox as judges: with the same parameters, outputs, weights and gradients are equal.

docs/judges.md lists the differences in meaning; a test here shows each of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy
import pytest
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from support.comparisons import assert_equal, assert_near, assert_same
from support.jax_world import floats, tokens
from support.layers import BATCH, uneven
from support.numbers import numbers as plain_numbers
from support.numbers import pattern

import mha_spec_jax
from mha_spec import ArgumentValueError, KVCache
from mha_spec.weights import load_weights, save_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

Options = dict[str, Any]
multi_head_attention: Callable[..., Any] = mha_spec_jax.multi_head_attention
multi_head_attention_weights: Callable[..., Any] = mha_spec_jax.multi_head_attention_weights
pytestmark = pytest.mark.usefixtures("double", "unoptimized")


def numbers(*shape: int, seed: int = 5) -> Array:
    return jnp.asarray(plain_numbers(*shape, seed=seed))


def pulled(call: Callable[..., list[Array]], *arguments: Any) -> tuple[Any, ...]:
    """Return the outputs of a function, and the gradients of the first output."""
    outputs, pull = jax.vjp(call, *arguments)
    first, *rest = outputs
    cotangent = jnp.asarray(uneven(first.shape), first.dtype)
    return outputs, *pull([cotangent, *map(jnp.zeros_like, rest)])


Judge = tuple["Callable[..., list[Array]]", dict[str, Any], str]
"""A function of parameters and inputs, the parameters by name, and their layout."""


def filled(tree: Any) -> Any:
    """Fill the arrays of a layer with numbers."""
    return jax.tree.map(lambda array: numbers(*array.shape, seed=array.size) / 2, tree)


def nnx_layer(**options: Any) -> nnx.MultiHeadAttention:
    arguments: dict[str, Any] = {"decode": False, "out_features": 13} | options
    return nnx.MultiHeadAttention(6, 9, 24, param_dtype="float64", rngs=nnx.Rngs(0), **arguments)


def of_nnx(mask: Array | None = None, **options: Any) -> Judge:
    """Make a `flax.nnx.MultiHeadAttention`, which sows its weights."""
    graph, params, rest = nnx.split(nnx_layer(**options), nnx.Param, ...)

    def call(state: dict[str, Any], *x: Array) -> list[Array]:
        restored = nnx.State(jax.tree.map(nnx.Param, state))
        layer = nnx.capture(nnx.merge(graph, restored, rest), nnx.Intermediate)
        output, seen = layer(*x, mask=mask, sow_weights=True)
        return [output, *jax.tree.leaves(nnx.to_pure_dict(seen))]

    return call, filled(nnx.to_pure_dict(params)), "flax_nnx"


def linen_layer(**options: Any) -> flax.linen.MultiHeadDotProductAttention:
    arguments: dict[str, Any] = {"qkv_features": 24, "out_features": 13, "param_dtype": "float64"}
    return flax.linen.MultiHeadDotProductAttention(6, **arguments | options)


def of_linen(mask: Array | None = None, **options: Any) -> Judge:
    """Make a `flax.linen.MultiHeadDotProductAttention`, which sows its weights."""
    layer = linen_layer(**options)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 1, 9)))["params"]

    def call(state: dict[str, Any], *x: Array) -> list[Array]:
        output, seen = layer.apply({"params": state}, *x, mask=mask, sow_weights=True, mutable=["intermediates"])
        return [output, *jax.tree.leaves(seen)]

    return call, filled(params), "flax_linen"


EVERY_BIAS = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)
EQUINOX = ("query_proj", "key_proj", "value_proj", "output_proj")


def of_equinox(mask: Array | None = None, theta: float | None = None, **options: Any) -> Judge:
    """Make an `equinox.nn.MultiheadAttention`, which has no batch axis and returns no weights."""
    arguments: dict[str, Any] = {"qk_size": 4, "vo_size": 4, "output_size": 13, "dtype": "float64"} | options
    layer = equinox.nn.MultiheadAttention(6, 9, **arguments, key=jax.random.key(0))
    linear = {name: getattr(layer, name) for name in EQUINOX}
    state = {f"{name}.weight": module.weight for name, module in linear.items()}
    state |= {f"{name}.bias": module.bias for name, module in linear.items() if module.bias is not None}
    turn = equinox.nn.RotaryPositionalEmbedding(4, theta or 1.0, jnp.float64)

    def process_heads(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        query, key = (jax.vmap(turn, 1, 1)(array) for array in (query, key))
        return query, key, value

    def call(state: dict[str, Array], *x: Array) -> list[Array]:
        def parts(layer: equinox.nn.MultiheadAttention) -> list[Array]:
            return [getattr(getattr(layer, name), kind) for name, kind in (label.split(".") for label in state)]

        whole = equinox.tree_at(parts, layer, list(state.values()))
        process = None if theta is None else process_heads
        single_entry = partial(whole, mask=None if mask is None else mask[0], process_heads=process)
        return [jax.vmap(single_entry)(*x)]

    return call, filled(state), "equinox"


def masks(heads: int = 1) -> dict[str, Array]:
    return {"mask": jnp.asarray(pattern(1, heads, 5, 8))}


def causal() -> dict[str, Array]:
    return {"mask": jnp.tril(jnp.ones((1, 1, 5, 8), bool))}


SHARED: dict[str, tuple[Callable[[], Judge], tuple[int, int], Callable[[], Options]]] = {
    "nnx": (of_nnx, (9, 9), dict),
    "nnx no bias, mask": (lambda: of_nnx(**masks(), use_bias=False), (9, 9), masks),
    "nnx groups and sizes": (lambda: of_nnx(num_kv_heads=3, in_kv_features=3), (3, 3), dict),
    "nnx mask of heads": (lambda: of_nnx(**masks(6)), (9, 9), lambda: masks(6)),
    "nnx causal": (lambda: of_nnx(**causal()), (9, 9), lambda: {"causal": True, "q_offset": 0}),
    "linen": (of_linen, (9, 9), dict),
    "linen no bias, mask": (lambda: of_linen(**masks(), use_bias=False), (9, 9), masks),
    "linen causal": (lambda: of_linen(**causal()), (9, 9), lambda: {"causal": True, "q_offset": 0}),
    "equinox no bias, mask": (lambda: of_equinox(masks()["mask"][0]), (9, 9), masks),
    "equinox sizes": (lambda: of_equinox(**EVERY_BIAS, key_size=3, value_size=17, vo_size=5), (3, 17), dict),
    "equinox causal": (
        lambda: of_equinox(causal()["mask"][0], **EVERY_BIAS),
        (9, 9),
        lambda: {"causal": True, "q_offset": 0},
    ),
    "equinox rotary": (lambda: of_equinox(theta=50.0), (9, 9), lambda: {"base": 50.0, "q_offset": 0}),
}


@partial(jax.jit, static_argnames=("causal", "q_offset", "base"))
def own_gradients(
    params: dict[str, Array], x: list[Array], mask: Array | None = None, base: float | None = None, **options: Any
) -> tuple[list[Array], dict[str, Array], list[Array]]:
    """Return our output and weights, and the gradients of params and inputs, in one program for all judges."""
    rotary = None if base is None else {"base": base}

    def call(params: dict[str, Array], x: list[Array]) -> list[Array]:
        weights = multi_head_attention_weights(*x[:2], params, rotary=rotary, mask=mask, **options)
        return [multi_head_attention(*x, params, rotary=rotary, mask=mask, **options), weights]

    return pulled(call, params, x)


@pytest.mark.parametrize("name", SHARED)
def test_layers_of_other_libraries_have_the_same_outputs_weights_and_gradients(name: str) -> None:
    make, sizes, options_of = SHARED[name]
    (call, state, layout), options = make(), options_of()
    inputs = [tokens(5, 9), tokens(8, sizes[0]), tokens(8, sizes[1], seed=6)]

    def theirs(state: dict[str, Any], x: list[Array]) -> list[Array]:
        return call(state, *x)

    outputs, *expected = jax.jit(partial(pulled, theirs))(state, inputs)

    def ours(dtype: str) -> list[Any]:
        arguments = floats((load_weights(state, layout, heads=6), inputs), dtype)
        our_outputs, params, x = own_gradients(*arguments, **options)
        return [our_outputs[: len(outputs)], save_weights(params, layout), x]

    assert_same(ours, [outputs, *expected])


@pytest.mark.parametrize("linen", [False, True], ids=["nnx", "linen"])
def test_decoding_of_flax_gives_the_same_tokens(linen: bool) -> None:
    _, state, layout = of_linen() if linen else of_nnx()
    x = tokens(5, 9)
    if linen:
        layer = linen_layer(decode=True)
        held = layer.init(jax.random.key(0), x)["cache"]

        def step(held: Any, token: Array) -> tuple[Any, Array]:
            output, changed = layer.apply({"params": state, "cache": held}, token[:, None], mutable=["cache"])
            return changed["cache"], output[:, 0]
    else:
        module = nnx_layer(decode=True)
        module.init_cache((BATCH, 5, 9), jnp.float64)
        nnx.update(module, state)
        graph, held = nnx.split(module)

        def step(held: Any, token: Array) -> tuple[Any, Array]:
            layer = nnx.merge(graph, held)
            output = layer(token[:, None])
            return nnx.state(layer), output[:, 0]

    expected = jnp.moveaxis(jax.lax.scan(step, held, jnp.moveaxis(x, 1, 0))[1], 0, 1)

    def ours(dtype: str) -> list[Array]:
        params, converted = load_weights(floats(state, dtype), layout), x.astype(dtype)
        cache = KVCache.empty(BATCH, 6, 5, 4, like=converted)

        def step(cache: KVCache, token: Array) -> tuple[KVCache, Array]:
            output, cache = multi_head_attention(*[token[:, None]] * 3, params, cache=cache, causal=True)
            return cache, output[:, 0]

        cache = cache._replace(lengths=jnp.asarray(cache.lengths))
        return [jnp.moveaxis(jax.lax.scan(step, cache, jnp.moveaxis(converted, 1, 0))[1], 0, 1)]

    assert_same(ours, [expected])


def different(actual: Array, other: Array) -> bool:
    """Tell whether arrays differ by more than the rounding of float32."""
    return bool(jnp.abs(actual - other).max() > jnp.finfo(jnp.float32).eps * jnp.abs(other).max())


def test_a_row_without_keys_is_a_mean_in_flax_and_equinox() -> None:
    mask = jnp.ones((1, 1, 5, 8), bool).at[:, :, 2].set(False)
    inputs = tokens(5, 9), tokens(8, 9), tokens(8, 9, seed=6)
    for call, state, layout in (of_nnx(mask), of_linen(mask), of_equinox(mask[0])):
        params = load_weights(state, layout, heads=6)
        mean = multi_head_attention(*inputs, params | {"w_q": 0 * params["w_q"], "b_q": jnp.zeros((6, 4))})
        assert_near(call(state, *inputs)[0][:, 2], mean[:, 2])
        bias = jnp.broadcast_to(params.get("b_o", jnp.zeros(13)), (BATCH, 13))
        assert_equal(multi_head_attention(*inputs, params, mask=mask)[:, 2], bias)


def test_normalize_qk_of_flax_subtracts_the_mean() -> None:
    layer = nnx_layer(normalize_qk=True)
    with pytest.raises(ArgumentValueError, match="LayerNorm"):
        load_weights(nnx.to_pure_dict(nnx.state(layer, nnx.Param)), "flax_nnx")
    x, params = tokens(5, 9), filled(nnx.to_pure_dict(nnx.state(nnx_layer(), nnx.Param)))
    nnx.update(layer, params)
    ours = load_weights(params, "flax_nnx") | {"q_norm": jnp.ones(4), "k_norm": jnp.ones(4)}
    assert different(layer(x), multi_head_attention(x, x, x, ours))


def test_flax_drops_the_same_pairs_of_every_entry_and_head() -> None:
    assert nnx_layer(dropout_rate=0.5).broadcast_dropout
    query, key = numbers(BATCH, 5, 6, 4, seed=1), numbers(BATCH, 5, 6, 4, seed=2)
    options: Options = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.5}
    alike: Any = dot_product_attention_weights(query, key, **options) == 0
    assert alike.any()
    assert (alike == alike[:1, :1]).all()
    values = jnp.broadcast_to(jnp.eye(5), (BATCH, 6, 5, 5))
    query, key = query.swapaxes(1, 2), key.swapaxes(1, 2)
    ours: Any = mha_spec_jax.attention(query, key, values, dropout_rate=0.5, dropout_key=jax.random.key(0)) == 0
    assert not (ours == ours[:, :1]).all()
    assert not (ours == ours[:1]).all()


def test_the_cache_of_flax_is_changed_in_place_and_overwrites_its_end() -> None:
    module = nnx_layer(decode=True)
    module.init_cache((BATCH, 3, 9), jnp.float64)
    x = tokens(4, 9)
    held = module.cached_key
    before = held[...]
    for i in range(3):
        module(x[:, i : i + 1])
    full = held[...]
    assert not numpy.array_equal(before, full)
    module(x[:, 3:])
    assert not numpy.array_equal(held[...][:, 2], full[:, 2])
    with pytest.raises(ValueError, match="cache shape"):
        module(x)


def test_nnx_computes_the_softmax_of_float64_in_float32() -> None:
    module, x = nnx_layer(), tokens(5, 9)
    params = load_weights(nnx.to_pure_dict(nnx.state(module, nnx.Param)), "flax_nnx")
    exact = multi_head_attention(x, x, x, params)
    seen, _ = nnx.capture(module, nnx.Intermediate)(x, sow_weights=True)
    assert_near(seen, exact)
    assert jnp.abs(module(x) - exact).max() > 1000 * jnp.abs(seen - exact).max()


def test_equinox_needs_a_key_for_dropout_and_has_no_batch_axis() -> None:
    layer = equinox.nn.MultiheadAttention(6, 6, dropout_p=0.5, key=jax.random.key(0))
    x = numbers(5, 6)
    with pytest.raises(RuntimeError, match="key"):
        layer(x, x, x)
    with pytest.raises(ValueError, match="unpack"):
        layer(x[None], x[None], x[None])
    ours: Any = mha_spec_jax.MultiHeadAttention(6, 6, dropout_rate=0.5, key=jax.random.key(0), dtype="float64")
    assert ours(x[None]).shape == (1, 5, 6)


def test_weights_go_back_to_flax_and_equinox() -> None:
    inputs = tokens(5, 9), tokens(8, 9), tokens(8, 9, seed=6)
    for call, state, layout in (of_nnx(), of_linen(), of_equinox()):
        returned = save_weights(load_weights(state, layout, heads=6), layout)
        assert jax.tree.structure(returned) == jax.tree.structure(state)
        assert_equal(call(returned, *inputs)[0], call(state, *inputs)[0])
