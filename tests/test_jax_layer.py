"""The layer in the worlds of JAX, judged by the goldens and by the reference."""

from __future__ import annotations

import pickle
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
import torch
from flax import nnx

import mha_spec
import mha_spec_jax
import mha_spec_jax.flax
from mha_spec import ArgumentValueError, KVCache
from mha_spec.parameters import AXES
from mha_spec.weights import read_safetensors, write_safetensors
from mha_spec_conformance.accuracy import allowances
from mha_spec_conformance.calls import arranged, joined, layer_answers
from mha_spec_conformance.cases import load
from mha_spec_conformance.compare import judge
from mha_spec_conformance.convert import to_library, to_numpy
from mha_spec_conformance.precision import precision
from mha_spec_jax import MultiHeadAttention, append_cache, empty_cache
from mha_spec_jax.layer import store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from jax import Array

    from mha_spec_conformance.cases import Case

reference: Any = mha_spec.reference
multi_head_attention: Callable[..., Any] = mha_spec_jax.multi_head_attention
BATCH, LENGTH, EMBED, HEADS, KV_HEADS, QK_DIM, V_DIM, OUT = 2, 11, 7, 6, 3, 4, 5, 13
FUNCTIONS = ("multi_head_attention", "multi_head_attention_weights", "rotary_embedding")
HOST = ("cache_lengths", "kv_lengths", "q_lengths", "q_offset", "positions")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Float64 is asked for in JAX; a program that runs once is not worth optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


# Goldens.


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    return tuple(case for case in load().cases if case.function in FUNCTIONS and case.expect == "values")


def chosen(*names: str) -> list[Case]:
    """For each name of an input or option, or for each that there is, a case of every function that has it."""
    found = {case.id: {*case.options, *case.input_names} for case in cases()}
    wanted = names or sorted(set().union(*found.values()))
    firsts = (
        next((case for case in cases() if case.function == function and name in found[case.id]), None)
        for name in wanted
        for function in FUNCTIONS
    )
    return list({case.id: case for case in firsts if case is not None}.values())


def arguments_of(case: Case, dtype: str, host: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments of a case, some of them as NumPy arrays, with its options."""
    options = {name: tuple(value) if name == "window" else value for name, value in case.options.items()}
    arrays = case.inputs(dtype).items()
    return {name: array if name in host else to_library(array, "jax") for name, array in arrays} | options


def traced(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call to which every array is an argument of the compiled program, and nothing else is."""

    def compiled(*operands: Any, **keywords: Any) -> Any:
        arrays = {name: one for name, one in keywords.items() if isinstance(one, (jax.Array, KVCache))}
        rest = {name: one for name, one in keywords.items() if name not in arrays}
        return jax.jit(partial(call, **rest))(*operands, **arrays)

    return compiled


def with_numbers_of_the_host(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of which tokens and parameters alone are arguments of the compiled program."""
    return lambda *operands, **keywords: jax.jit(partial(call, **keywords))(*operands)


def answered(case: Case, arguments: dict[str, Any], wrapped: Callable[..., Any] | None = None) -> dict[str, Any]:
    """The outputs of a case by name."""
    call = getattr(mha_spec_jax, case.function)
    asked = call if wrapped is None else wrapped(call)
    if case.function != "rotary_embedding":
        parts = layer_answers(asked, case.function, arguments)
        return joined([{name: to_numpy(one) for name, one in part.items()} for part in parts])
    operands, keywords = arranged(case.function, arguments)
    return {"output": to_numpy(asked(*operands, **keywords))}


def wrong(case: Case, dtype: str, outputs: Mapping[str, Any]) -> str | None:
    """What is wrong with the outputs of a case, if anything is."""
    allowed = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    judgement = judge(case, case.expected, outputs, allowed, precision(dtype))
    return None if judgement.passed else f"{case.id} {dtype}: {judgement.reason}"


def failures(some: Iterable[Case], ask: Callable[[Case, str], Mapping[str, Any]], *dtypes: str) -> list[str]:
    asked = [(case, dtype) for case in some for dtype in dtypes if dtype in case.dtypes]
    assert asked
    return [found for case, dtype in asked if (found := wrong(case, dtype, ask(case, dtype)))]


def test_goldens_under_jit() -> None:
    assert not failures(chosen(), lambda case, dtype: answered(case, arguments_of(case, dtype), traced), "float32")


def test_goldens_with_numbers_on_the_host() -> None:
    def ask(case: Case, dtype: str) -> dict[str, Any]:
        return answered(case, arguments_of(case, dtype, HOST), with_numbers_of_the_host)

    some = [case for case in chosen(*HOST) if case.function != "rotary_embedding"]
    assert not failures(some, ask, "float32")


def test_goldens_in_other_dtypes() -> None:
    def ask(case: Case, dtype: str) -> dict[str, Any]:
        return answered(case, arguments_of(case, dtype), traced)

    assert not failures(chosen("q_norm"), ask, "float64", "float16", "bfloat16")


# The reference.


def sized(**options: Any) -> Any:
    """A layer in which every size is another, with numbers in every parameter."""
    given: dict[str, Any] = {"kv_heads": KV_HEADS, "qk_dim": QK_DIM, "v_dim": V_DIM, "out": OUT, "dtype": "float64"}
    layer = MultiHeadAttention(EMBED, HEADS, key=jax.random.key(0), **given | options)
    return jax.tree.map(lambda one: numbers(*one.shape, seed=one.size) / 2, layer)


def numbers(*shape: int, seed: int = 5) -> Array:
    return jnp.asarray(numpy.random.default_rng([seed, *shape]).standard_normal(shape))


def pattern(*shape: int) -> Array:
    """Some True, in each row the first."""
    seen = numpy.random.default_rng(2).random(shape) < 0.6
    seen[..., 0] = True
    return jnp.asarray(seen)


def tokens(length: int = LENGTH, size: int = EMBED, seed: int = 5) -> Array:
    return numbers(BATCH, length, size, seed=seed)


def floats(tree: Any, dtype: str) -> Any:
    """Arrays of floats in another dtype, everything else as it is."""

    def converted(one: Any) -> Any:
        return one.astype(dtype) if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jnp.floating) else one

    return jax.tree.map(converted, tree)


def with_gradients(call: Callable[..., Any], *given: Any) -> list[Array]:
    """What a function gives, and the gradients of a sum in which every element counts differently."""
    outputs, pull = jax.vjp(call, *given)
    return jax.tree.leaves((outputs, pull(jax.tree.map(uneven, outputs))))


def uneven(one: Array) -> Array:
    return jnp.linspace(-1, 2, one.size, dtype=one.dtype).reshape(one.shape)


def assert_same(ours: Callable[[str], Any], theirs: Any) -> None:
    """In float64 ours is nearer to theirs than to ours in float32, which is off by roundings alone."""
    found, rounded, expected = (jax.tree.leaves(one) for one in (ours("float64"), ours("float32"), theirs))
    for one, lost, other in zip(found, rounded, expected, strict=True):
        assert (one.dtype, one.shape, one.devices()) == (jnp.float64, other.shape, other.devices())
        error, loss = (jnp.abs(one - x).max(initial=0.0) for x in (other, lost))
        assert error < loss or error == loss == 0


def assert_near(found: Array, expected: Array) -> None:
    """Results in float64 are nearer to each other than float32 could tell."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape) == (jnp.float64, found.shape)
    assert jnp.abs(found - expected).max() < jnp.finfo(jnp.float32).eps * jnp.abs(expected).max()


Options = dict[str, Any]
CROSS = {"k_embed": 3, "v_embed": 17}
OPTIONS: dict[str, tuple[Options, Callable[[], Options]]] = {
    "plain": ({"bias": False}, dict),
    "norms and halves": ({"qk_norm": True, "norm_epsilon": 0.25, "rotary": {}}, lambda: {"q_offset": [2, 5]}),
    "interleaved": ({"rotary": {"interleaved": True, "base": 7.0}}, lambda: {"q_offset": jnp.asarray([1, 3])}),
    "partial": ({"rotary": {"rotary_dim": 2}}, lambda: {"window": (4, 1), "q_offset": 3}),
    "cross": (CROSS, lambda: {"kv_lengths": [5, 8], "q_lengths": jnp.asarray([3, 2])}),
    "mask": ({}, lambda: {"mask": pattern(BATCH, 1, 3, 8), "scale": -0.7, "softcap": 1.9, "sinks": numbers(HEADS)}),
    "dropout": (
        {},
        lambda: {
            "bias": numbers(1, HEADS, 1, 8),
            "dropout_rate": 0.3,
            "dropout_mask": pattern(1, HEADS, 3, 8),
            "q_segment_ids": jnp.asarray([[0, 1, 1]] * 2),
            "kv_segment_ids": jnp.arange(16).reshape(2, 8) // 4,
        },
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_gradients_and_weights_are_those_of_the_reference(name: str) -> None:
    sizes, made = OPTIONS[name]
    layer, options = sized(**sizes), made()
    inputs = tokens(3), tokens(8, sizes.get("k_embed", EMBED)), tokens(8, sizes.get("v_embed", EMBED), seed=6)
    kept = {name for name in options if "dropout" not in name}

    def ours(dtype: str) -> list[Array]:
        own, given = floats((layer, options), dtype)

        def call(own: Any, *x: Array) -> tuple[Array, Array]:
            return own(*x, **given), own.weights(*x[:2], **{name: given[name] for name in kept})

        return jax.jit(partial(with_gradients, call))(own, *floats(inputs, dtype))

    assert_same(ours, by_reference(layer, inputs, options))


def by_reference(layer: Any, inputs: tuple[Array, ...], options: Options) -> list[Array]:
    """Output and weights of the reference, and the gradients that PyTorch takes of it."""
    fixed = {"rotary": layer.rotary, "norm_epsilon": layer.norm_epsilon}
    given = {name: torched(one) if isinstance(one, jax.Array) else one for name, one in options.items()}
    params, x = {name: torched(one) for name, one in layer.params.items()}, [torched(one) for one in inputs]
    leaves = [one.requires_grad_() for one in (*(params[name] for name in sorted(params)), *x)]
    of_weights = {name: one for name, one in given.items() if "dropout" not in name}
    weights = reference.multi_head_attention_weights(*x[:2], params, **fixed, **of_weights)
    outputs = [reference.multi_head_attention(*x, params, **fixed, **given), weights]
    total: Any = sum((one * torched(uneven(jnp.asarray(one.detach())))).sum() for one in outputs)
    return [jnp.asarray(one.detach().numpy()) for one in (*outputs, *torch.autograd.grad(total, leaves))]


def torched(one: Array) -> torch.Tensor:
    return torch.from_numpy(numpy.array(one))


def test_linear_biases_are_those_of_the_reference() -> None:
    for heads in (1, 5, 8, 12):
        slopes = mha_spec_jax.alibi_slopes(heads, dtype="float64")
        assert (slopes.dtype, type(slopes)) == (jnp.float64, type(jnp.zeros(1)))
        assert numpy.array_equal(slopes, reference.alibi_slopes(heads, dtype="float64"))
        for offset in (2, [1, -4], jnp.asarray([1, -4])):
            asked = jax.jit(lambda slopes, offset=offset: mha_spec_jax.alibi_bias(slopes, 3, 7, q_offset=offset))
            host = offset if isinstance(offset, int) else numpy.asarray(offset)
            assert numpy.array_equal(asked(slopes), reference.alibi_bias(numpy.asarray(slopes), 3, 7, q_offset=host))


def test_layers_and_caches_side_by_side_under_vmap() -> None:
    layers = [sized(rotary={}), jax.tree.map(lambda one: -one / 2, sized(rotary={}))]
    x = jnp.stack([tokens(4), tokens(4, seed=6)])

    def call(layer: Any, x: Array) -> tuple[Array, Array]:
        first, cache = layer(x[:, :3], causal=True, cache=layer.empty_cache(BATCH, 5))
        second, _ = layer(x[:, 3:], causal=True, cache=cache._replace(lengths=jnp.asarray(cache.lengths)))
        return first, second

    stacked = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    mapped, alone = jax.jit(jax.vmap(call))(stacked, x), jax.jit(call)
    for number, one in enumerate(layers):
        for all_of_them, expected in zip(mapped, alone(one, x[number]), strict=True):
            assert_near(all_of_them[number], expected)


# The pytree.


def test_the_layer_is_a_pytree_of_its_parameters() -> None:
    layer = sized(rotary={"base": 5.0, "interleaved": True}, qk_norm=True, dropout_rate=0.25)
    leaves, structure = jax.tree.flatten(layer)
    assert all(one is layer.params[name] for one, name in zip(leaves, sorted(AXES), strict=True))
    again = jax.tree.unflatten(structure, leaves)
    assert (repr(again), again.sizes) == (repr(layer), layer.sizes)
    assert numpy.array_equal(again(tokens()), layer(tokens()))
    other = sized(rotary={"interleaved": True, "base": 5.0}, qk_norm=True, dropout_rate=0.25)
    assert structure == jax.tree.structure(other)
    assert structure != jax.tree.structure(sized(rotary={"base": 5.0}, qk_norm=True, dropout_rate=0.25))
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)}
    assert paths == {f".params['{name}']" for name in AXES}


def test_a_step_of_training_is_a_map_of_trees() -> None:
    layer, x, goal = sized(), tokens(), numbers(BATCH, LENGTH, OUT, seed=9)

    @jax.jit
    def loss(layer: Any) -> Array:
        return jnp.mean((layer(x, causal=True) - goal) ** 2)

    gradient = jax.grad(loss)(layer)
    assert isinstance(gradient, MultiHeadAttention)
    assert loss(jax.tree.map(lambda one, slope: one - 0.01 * slope, layer, gradient)) < loss(layer)


def test_other_parameters_in_place() -> None:
    layer, x = sized(), tokens()
    moved = layer.replace(b_o=layer.params["b_o"] + 1)
    assert numpy.array_equal(moved.params["w_q"], layer.params["w_q"])
    assert_near(moved(x), layer(x) + 1)


def test_the_object_is_the_function_with_its_parameters() -> None:
    layer = sized(qk_norm=True, rotary={"base": 5.0}, norm_epsilon=0.5)
    x, key = tokens(), tokens(5, seed=7)
    options = {"rotary": {"base": 5.0}, "norm_epsilon": 0.5, "q_offset": 3, "causal": True}
    called, weighed = layer(x, key, causal=True, q_offset=3), layer.weights(x, key, causal=True, q_offset=3)
    assert numpy.array_equal(called, mha_spec.multi_head_attention(x, key, key, layer.params, **options))
    assert numpy.array_equal(weighed, mha_spec.multi_head_attention_weights(x, key, layer.params, **options))
    assert numpy.array_equal(layer(x), layer(x, x, x))


def test_parameters_go_out_and_in(tmp_path: Path) -> None:
    layer, other = sized(qk_norm=True), sized(qk_norm=True, dropout_rate=0.5)
    arrays = {name: numpy.asarray(one) for name, one in layer.params.items()}
    write_safetensors(tmp_path / "layer.safetensors", arrays)
    found = read_safetensors(tmp_path / "layer.safetensors")
    loaded = other.replace(**{name: jnp.asarray(one) for name, one in found.items()})
    assert numpy.array_equal(loaded(tokens()), layer(tokens()))
    copied = pickle.loads(pickle.dumps(layer))
    assert numpy.array_equal(copied(tokens()), layer(tokens()))


def new_layers(**options: Any) -> list[tuple[Any, dict[str, Array]]]:
    """A layer of each class, and its parameters."""
    tree = MultiHeadAttention(64, 4, key=jax.random.key(3), **options)
    module = mha_spec_jax.flax.MultiHeadAttention(64, 4, rngs=nnx.Rngs(3), **options)
    return [(tree, tree.params), (module, module.params)]


def test_weights_begin_as_in_the_paper() -> None:
    for _, params in new_layers(qk_dim=24, out=96, qk_norm=True):
        for name, fans in {"w_q": (64, 96), "w_k": (64, 96), "w_v": (64, 96), "w_o": (96, 96)}.items():
            drawn, bound = params[name], (6 / sum(fans)) ** 0.5
            assert drawn.dtype == jnp.float32
            assert bound * 0.99 < jnp.abs(drawn).max() <= bound
            assert abs(drawn.mean()) < 4 * bound / (3 * drawn.size) ** 0.5
        assert all((params[name] == 0).all() for name in ("b_q", "b_k", "b_v", "b_o"))
        assert all((params[name] == 1).all() for name in ("q_norm", "k_norm"))
        assert not numpy.array_equal(params["w_q"], params["w_k"])


def test_a_layer_says_what_it_is() -> None:
    for layer, _ in new_layers(kv_heads=2, rotary={"base": 5.0}, dropout_rate=0.1):
        assert repr(layer) == (
            "MultiHeadAttention(embed=64, heads=4, kv_heads=2, rotary={'base': 5.0}, dropout_rate=0.1)"
        )
    assert [repr(layer) for layer, _ in new_layers()] == ["MultiHeadAttention(embed=64, heads=4)"] * 2


def test_a_layer_keeps_its_rotation() -> None:
    rotary = {"base": 5.0}
    layers, x = [layer for layer, _ in new_layers(rotary=rotary)], tokens(5, 64).astype("float32")
    before = [layer(x) for layer in layers]
    rotary["base"] = 7.0
    assert all(numpy.array_equal(layer(x), one) for layer, one in zip(layers, before, strict=True))


def test_dropout_holds_with_a_key() -> None:
    layer, x = sized(dropout_rate=0.5), tokens()
    keys = jax.random.split(jax.random.key(1), 2)
    dropped = [layer(x, dropout_key=key) for key in (*keys, keys[0])]
    assert not numpy.array_equal(*dropped[:2])
    assert numpy.array_equal(dropped[0], dropped[2])
    assert numpy.array_equal(layer(x), layer(x, dropout_key=keys[0], dropout_rate=0.0))
    assert not numpy.array_equal(layer(x), dropped[0])
    with pytest.raises(ArgumentValueError, match="dropout_key"):
        layer(x, dropout_rate=0.5)


# The module of flax.


def module_of(**options: Any) -> Any:
    """The layer of `sized` as a module of nnx."""
    given: dict[str, Any] = {"kv_heads": KV_HEADS, "qk_dim": QK_DIM, "v_dim": V_DIM, "out": OUT}
    module = mha_spec_jax.flax.MultiHeadAttention(
        EMBED, HEADS, rngs=nnx.Rngs(0), param_dtype="float64", **given | options
    )
    shared = {name: one for name, one in options.items() if name != "dropout_rate"}
    nnx.update(module, nnx.State({name: nnx.Param(one) for name, one in sized(**shared).params.items()}))
    return module


def test_the_module_is_the_tree() -> None:
    options: Options = {"qk_norm": True, "rotary": {"base": 5.0}, "norm_epsilon": 0.5}
    module, tree, x = module_of(**options), sized(**options), tokens()
    assert numpy.array_equal(module(x, causal=True), tree(x, causal=True))
    assert numpy.array_equal(module.weights(x, causal=True), tree.weights(x, causal=True))
    for own, other in zip(
        module(x, cache=module.empty_cache(2, 12)), tree(x, cache=tree.empty_cache(2, 12)), strict=True
    ):
        assert jax.tree.all(jax.tree.map(numpy.array_equal, own, other))


def test_the_state_of_the_module_is_its_parameters() -> None:
    module, x = module_of(qk_norm=True), tokens()
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert {name: one.shape for name, one in state.items()} == module.sizes.shapes()
    graph, held = nnx.split(module)
    assert numpy.array_equal(nnx.merge(graph, held)(x), module(x))
    assert numpy.array_equal(
        jax.jit(lambda held, x: nnx.merge(graph, held)(x))(held, x), nnx.jit(module_call)(module, x)
    )
    fresh = module_of(qk_norm=True)
    fresh.w_q = nnx.Param(fresh.w_q[...] * 2)
    assert not numpy.array_equal(fresh(x), module(x))
    nnx.update(fresh, nnx.state(module))
    assert numpy.array_equal(fresh(x), module(x))


def module_call(module: Any, x: Array) -> Array:
    return module(x)


def test_gradients_of_the_module_are_those_of_the_tree() -> None:
    module, tree, x = module_of(), sized(), tokens()
    found = nnx.to_pure_dict(nnx.jit(nnx.grad(lambda module: jnp.sum(module(x) ** 2)))(module))
    expected = jax.grad(lambda tree: jnp.sum(tree(x) ** 2))(tree).params
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        if name != "b_k":
            assert_near(found[name], one)
    assert jnp.abs(found["b_k"]).max() < jnp.finfo(jnp.float32).eps * jnp.abs(found["b_q"]).max()


def test_dropout_of_the_module_is_for_training() -> None:
    module, plain, x = module_of(dropout_rate=0.5), module_of(), tokens()
    call = nnx.jit(module_call)
    assert not numpy.array_equal(module(x), module(x))
    assert not numpy.array_equal(call(module, x), call(module, x))
    key = jax.random.key(1)
    assert numpy.array_equal(module(x, dropout_key=key), module(x, dropout_key=key))
    assert numpy.array_equal(module(x, dropout_rate=0.0), plain(x))
    module.eval()
    assert numpy.array_equal(module(x), plain(x))
    module.train()
    assert not numpy.array_equal(module(x), plain(x))
    assert numpy.array_equal(plain(x), plain(x))


# Caches.

STEPS = {"token by token": [1] * LENGTH, "chunks": [3, 5, 1, 2], "at once": [LENGTH]}


def parts(x: Array, lengths: list[int]) -> list[Array]:
    return jnp.split(x, numpy.cumsum(lengths)[:-1].tolist(), axis=1)


@pytest.mark.parametrize(("steps", "compiled"), [("token by token", False), ("chunks", True), ("at once", True)])
def test_decoding_in_any_steps_is_one_call(steps: str, compiled: bool) -> None:
    layer, x = sized(qk_norm=True, rotary={}), tokens()

    def call(layer: Any, part: Array, cache: KVCache) -> tuple[Array, Array, KVCache]:
        output, new = layer(part, causal=True, cache=cache)
        return output, layer.weights(part, causal=True, cache=cache)[..., :LENGTH], new

    step = jax.jit(call) if compiled else call

    def ours(dtype: str) -> list[Array]:
        own, cache = floats(layer, dtype), floats(layer, dtype).empty_cache(BATCH, LENGTH + 2)
        outputs, weights = [], []
        for part in parts(x.astype(dtype), STEPS[steps]):
            output, seen, cache = step(own, part, cache)
            outputs.append(output)
            weights.append(seen)
        assert isinstance(cache.lengths, jax.Array if compiled else numpy.ndarray)
        assert numpy.array_equal(cache.lengths, [LENGTH] * BATCH)
        return [jnp.concatenate(outputs, 1), jnp.concatenate(weights, 2)]

    assert_same(ours, [layer(x, causal=True), layer.weights(x, causal=True)])


def test_one_program_serves_every_step() -> None:
    layer, x = sized(rotary={}), tokens()
    traces = []

    @jax.jit
    def step(cache: KVCache, token: Array) -> tuple[KVCache, Array]:
        traces.append(token)
        output, cache = layer(token[:, None], causal=True, cache=cache)
        return cache, output[:, 0]

    begun = layer.empty_cache(BATCH, LENGTH)._replace(lengths=jnp.zeros(BATCH, jnp.int32))
    cache, outputs = begun, []
    for token in jnp.moveaxis(x, 1, 0):
        cache, output = step(cache, token)
        outputs.append(output)
    assert len(traces) == 1
    scanned, in_scan = jax.lax.scan(step, begun, jnp.moveaxis(x, 1, 0))
    assert_near(jnp.stack(outputs, 1), layer(x, causal=True))
    assert_near(jnp.moveaxis(in_scan, 0, 1), layer(x, causal=True))
    assert numpy.array_equal(scanned.lengths, [LENGTH] * BATCH)


def test_gradients_go_through_a_cache() -> None:
    layer, x = sized(rotary={}), tokens()

    def decoded(layer: Any, x: Array) -> Array:
        cache, outputs = layer.empty_cache(BATCH, LENGTH), []
        for part in parts(x, [4, 4, 3]):
            output, cache = layer(part, causal=True, cache=cache)
            outputs.append(output)
        return jnp.concatenate(outputs, 1)

    def ours(dtype: str) -> list[Array]:
        return jax.jit(partial(with_gradients, decoded))(*floats((layer, x), dtype))

    assert_same(ours, jax.jit(partial(with_gradients, lambda layer, x: layer(x, causal=True)))(layer, x))


@pytest.mark.parametrize("host", [True, False], ids=["host", "array"])
def test_entries_of_other_lengths_decode_each_for_itself(host: bool) -> None:
    layer, x, given = sized(rotary={}), tokens(7), [3, 5]
    lengths = given if host else jnp.asarray(given)
    begun = layer.empty_cache(BATCH, LENGTH)
    begun = begun if host else begun._replace(lengths=jnp.asarray(begun.lengths))
    _, cache = layer(x.at[0, 3:].set(jnp.nan)[:, :5], causal=True, cache=begun, kv_lengths=lengths)
    output, after = layer(x[:, 5:], causal=True, cache=cache)
    assert numpy.array_equal(after.lengths, [5, 7])

    def ours(dtype: str) -> list[Array]:
        own, found = floats((layer, cache), dtype)
        return [own(x[:, 5:].astype(dtype), causal=True, cache=found)[0]]

    alone = [
        layer(jnp.concatenate([x[b : b + 1, :length], x[b : b + 1, 5:]], 1), causal=True)[:, length:]
        for b, length in enumerate(given)
    ]
    assert_same(ours, [jnp.concatenate(alone)])
    assert_near(output, jnp.concatenate(alone))


def heads(length: int, seed: int = 5) -> tuple[Array, Array]:
    return numbers(BATCH, KV_HEADS, length, QK_DIM, seed=seed), numbers(BATCH, KV_HEADS, length, V_DIM, seed=seed)


def test_an_old_cache_reads_as_before() -> None:
    caches = [empty_cache(BATCH, KV_HEADS, LENGTH, QK_DIM, V_DIM, like=jnp.zeros(1))]
    for seed in range(3):
        caches.append(append_cache(caches[-1], *heads(2, seed), [1, 2]))
    seen = [numpy.array(cache.key) for cache in caches]
    branch, expected = (one.append_cache(caches[1], *heads(3, seed=9)) for one in (mha_spec_jax, reference))
    assert all(numpy.array_equal(cache.key, before) for cache, before in zip(caches, seen, strict=True))
    assert all(numpy.array_equal(*pair) for pair in zip(branch, expected, strict=True))


def test_a_full_cache_is_an_error_on_the_host() -> None:
    layer = sized()
    _, cache = layer(tokens(8), cache=layer.empty_cache(BATCH, LENGTH))
    before = jax.tree.map(numpy.array, cache)
    with pytest.raises(ArgumentValueError, match=f"capacity={LENGTH}"):
        layer(tokens(4), cache=cache)
    assert jax.tree.all(jax.tree.map(numpy.array_equal, cache, before))
    assert layer(tokens(3), cache=cache)[1].lengths.tolist() == [LENGTH] * 2


def test_tokens_beyond_a_full_cache_are_dropped_and_counted() -> None:
    layer = sized(rotary={})
    _, cache = layer(tokens(9), cache=layer.empty_cache(BATCH, LENGTH), kv_lengths=[9, 4])
    after = jax.jit(lambda cache: layer(tokens(4, seed=6), causal=True, cache=cache)[1])(cache)
    assert numpy.array_equal(after.lengths, [13, 8])
    for before, now in zip(cache[:2], after[:2], strict=True):
        assert numpy.array_equal(now[0, :, :9], before[0, :, :9])
        assert numpy.array_equal(now[1, :, :4], before[1, :, :4])
        assert (now[0, :, 9:] != before[0, :, 9:]).all()
        assert numpy.array_equal(now[1, :, 8:], before[1, :, 8:])
    full = jax.jit(lambda cache: layer(tokens(2, seed=7), causal=True, cache=cache)[1])(after)
    assert numpy.array_equal(full.key[0], after.key[0])
    assert numpy.array_equal(full.lengths, [15, 10])


@pytest.mark.parametrize("start", [[3, 0], [3, 3], [9, 10], [11, 20], [-1, -2]])
def test_known_and_traced_starts_store_the_same(start: list[int]) -> None:
    buffer, new = jnp.zeros((BATCH, KV_HEADS, LENGTH, QK_DIM)), heads(3)[0]
    begin, end = numpy.asarray(start), numpy.asarray(start) + 3
    expected = numpy.zeros(buffer.shape)
    for b, i in numpy.ndindex(BATCH, 3):
        if 0 <= start[b] + i < LENGTH:
            expected[b, :, start[b] + i] = new[b, :, i]
    assert numpy.array_equal(jax.jit(store)(buffer, new, begin, end), expected)
    if min(start) >= 0 and max(start) + 3 <= LENGTH:
        assert numpy.array_equal(store(buffer, new, begin, end), expected)


def test_keys_cached_before_serve_cross_attention() -> None:
    layer, x, key, value = sized(**CROSS), tokens(), tokens(8, 3), tokens(8, 17)
    _, cache = layer(x[:, :1], key, value, cache=layer.empty_cache(BATCH, 8), q_offset=0)
    found, after = multi_head_attention(x, None, None, layer.params, cache=cache, q_offset=0)
    assert_near(found, layer(x, key, value))
    assert numpy.array_equal(after.lengths, cache.lengths)
