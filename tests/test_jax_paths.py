"""The path of a call of mha_spec_jax, and its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from support.jax_world import operands

import mha_spec_jax
from mha_spec.arguments import Arguments
from mha_spec.errors import ArgumentTypeError
from mha_spec_jax import function, native, plan

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = dict[str, Any]
attention: Callable[..., Any] = mha_spec_jax.attention
SEED = 20261123


def steps(function: Callable[..., object], *operands: jax.Array) -> str:
    """Spell the operations that JAX traces of a call."""
    return str(jax.make_jaxpr(function)(*operands))


@pytest.mark.parametrize(
    ("path", "length", "options"),
    [
        ("plain", 5, {}),
        ("plain", 300, {"softcap": 2.0}),
        ("few", 5, {"causal": True}),
        ("few", 5, {"kv_lengths": [3, 4]}),
        ("many", 300, {"causal": True}),
        ("many", 300, {"kv_lengths": [3, 4]}),
    ],
)
def test_the_path_of_a_call(path: str, length: int, options: Answer) -> None:
    traced = steps(lambda *x: attention(*x, **options), *operands(length, length, "float32"))
    assert "custom_vjp_call" in traced
    assert ("is_finite" in traced) == (path != "plain")
    assert ("cond[" in traced) == (path == "many")


def test_the_path_of_weights() -> None:
    query, key, _ = operands(5, 7, "float32")
    assert "custom_vjp_call" not in steps(
        lambda *x: mha_spec_jax.attention_weights(*x, causal=True, q_offset=2), query, key
    )


def test_large_calls_have_more_than_one_block() -> None:
    def is_looped(length: int) -> bool:
        query = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
        return "scan[" in str(jax.make_jaxpr(lambda query: attention(query, query, query))(query))

    assert not is_looped(512)
    assert is_looped(4096)


@pytest.fixture
def cudnn_calls(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Record the calls of cuDNN, which XLA's kernel replaces, as if the machine had it."""
    calls: list[Answer] = []
    kernel = jax.nn.dot_product_attention

    def record(*operands: jax.Array, implementation: str, **options: Any) -> jax.Array:
        calls.append(options | {"implementation": implementation})
        return kernel(*operands, **options)

    monkeypatch.setattr(native, "has_kernel", lambda _: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls


def half(size: int = 16, kv_len: int = 8, v_dim: int = 16) -> list[jax.Array]:
    """Return query, key and value of bfloat16, 4 heads over 2."""
    generator = numpy.random.default_rng(SEED)
    shapes = ((2, 4, 8, size), (2, 2, kv_len, size), (2, 2, kv_len, v_dim))
    return [jnp.asarray(generator.standard_normal(shape), jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "scale": 0.5}])
def test_cudnn_is_called(cudnn_calls: list[Answer], options: Answer) -> None:
    jax.eval_shape(lambda *x: attention(*x, **options), *half())
    same = {"scale": options.get("scale"), "is_causal": options.get("causal", False)}
    assert cudnn_calls == [{"implementation": "cudnn", **same}]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {"return_lse": True}),
        ({}, {"scale": -0.5}),
        ({}, {"softcap": 3.0}),
        ({}, {"kv_lengths": [8, 7]}),
        ({}, {"dropout_rate": 0.5}),
        ({"kv_len": 5}, {"causal": True, "q_offset": 0}),
        ({"kv_len": 0}, {}),
        ({"v_dim": 8}, {}),
        ({"size": 7, "v_dim": 7}, {}),
        ({"size": 136, "v_dim": 136}, {}),
    ],
)
def test_cudnn_is_not_called_with_unsupported_options(
    cudnn_calls: list[Answer], sizes: dict[str, int], options: Answer
) -> None:
    key = jax.random.key(SEED)
    jax.eval_shape(lambda *x: attention(*x, **options, dropout_key=key), *half(**sizes))
    jax.eval_shape(attention, *(operand.astype(jnp.float32) for operand in half()))
    assert not cudnn_calls


def test_cudnn_is_not_called_where_it_is_missing() -> None:
    assert not native.has_kernel(half()[0])
    jax.jit(lambda query: attention(query, query, query))(half()[0])


@pytest.mark.usefixtures("cudnn_calls")
def test_the_output_of_cudnn_is_returned() -> None:
    query, key, value = half()

    def ours(query: jax.Array) -> jax.Array:
        return attention(query, key, value, causal=True)

    def theirs(query: jax.Array) -> jax.Array:
        moved = (jnp.swapaxes(operand, 1, 2) for operand in (query, key, value))
        output = jax.nn.dot_product_attention(*moved, is_causal=True, scale=None, implementation="xla")
        return jnp.swapaxes(output, 1, 2)

    gradient = jax.grad(lambda query: jnp.sum(ours(query)))
    assert (jax.jit(ours)(query) == jax.jit(theirs)(query)).all()
    assert (jax.jit(gradient)(query) == jax.jit(jax.grad(lambda query: jnp.sum(theirs(query))))(query)).all()
    with pytest.raises(ArgumentTypeError, match="no second derivatives"):
        jax.grad(lambda query: jnp.sum(gradient(query)))(query)
    with pytest.raises(ArgumentTypeError, match="no forward-mode derivative"):
        jax.jvp(ours, (query,), (query,))


def test_memory_grows_with_the_length() -> None:
    def temporary(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        gradient = jax.grad(lambda *x: jnp.sum(attention(*x)), (0, 1, 2))
        analysis: Any = jax.jit(gradient).lower(shape, shape, shape).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporary(16384) < 3 * temporary(8192)
    assert temporary(16384) < 2 * 16384 * 16384


def test_a_window_skips_keys() -> None:
    query = jnp.zeros((1, 8, 4096, 64), jnp.float32)
    cut, _ = plan.plan_of(Arguments(query, query, query, window=(256, 0)))
    assert sum(group.count * group.rows * group.keys for group in cut.groups) < 0.2 * 4096**2


def test_segments_on_the_host_skip_keys() -> None:
    query = jnp.zeros((1, 8, 4096, 64), jnp.float32)
    ids = numpy.arange(4096)[None] // 256
    cut, _ = plan.plan_of(Arguments(query, query, query, q_segment_ids=ids, kv_segment_ids=ids))
    assert sum(group.count * group.rows * group.keys for group in cut.groups) < 0.2 * 4096**2


def test_a_block_has_as_many_heads_as_fill_half_of_it() -> None:
    def heads(batch: int, heads: int, length: int) -> int | None:
        query = jnp.zeros((batch, heads, length, 8), jnp.float32)
        return plan.plan_of(Arguments(query, query, query))[0].heads

    assert [heads(2, 8, 512), heads(2, 9, 400), heads(1, 8, 2048), heads(1, 2, 512), heads(1, 1, 4096)] == [
        2,
        3,
        1,
        None,
        None,
    ]


def test_a_new_offset_seldom_compiles() -> None:
    query, key, value = operands(1, 64, "float32")
    program: Any = function.program
    programs = program._cache_size()
    for offset in range(64):
        attention(query, key, value, causal=True, q_offset=offset)
    assert program._cache_size() - programs <= plan.SIZES
