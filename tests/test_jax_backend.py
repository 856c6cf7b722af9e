"""mha_spec_jax in the worlds of JAX: each judged by the goldens."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import mha_spec_jax
import numpy
import pytest
from jax.test_util import check_grads
from mha_spec_jax import forward, function, native, plan
from mha_spec_jax.problem import problem_of

from mha_spec.arguments import Arguments
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_conformance.accuracy import allowances
from mha_spec_conformance.cases import load
from mha_spec_conformance.compare import judge
from mha_spec_conformance.convert import to_library, to_numpy
from mha_spec_conformance.precision import precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mha_spec_conformance.cases import Case

Answer = dict[str, Any]
attention: Callable[..., Any] = mha_spec_jax.attention
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
PER_ENTRY = ("q_offset", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids")
SEED = 20261123


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Float64 is asked for in JAX."""
    with jax.enable_x64(True):
        yield


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    return tuple(case for case in load().cases if case.expect == "values")


def chosen(function: str, *, signatures: int, each: int) -> list[Case]:
    """Some cases of a function: few of one signature, which share a program; every option is among them."""
    found: dict[object, list[Case]] = {}
    for case in cases():
        if case.function == function:
            found.setdefault(case.signature, []).append(case)
    groups = list(found.values())
    some = groups[:: max(1, len(groups) // signatures)]
    for name in sorted({name for group in groups for name in names(group[0])}):
        if not any(name in names(group[0]) for group in some):
            some.append(next(group for group in groups if name in names(group[0])))
    return [case for group in some for case in group[:each]]


def names(case: Case) -> set[str]:
    """Every argument of a case."""
    return {*case.options, *case.input_names}


def given(case: Case, dtype: str) -> tuple[Answer, Answer]:
    """The arrays of a case, and its options, which are no arrays."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in case.options.items()}
    return {name: to_library(array, "jax") for name, array in case.inputs(dtype).items()}, options


def judged(case: Case, dtype: str, outputs: Answer) -> str | None:
    """What is wrong with the outputs of a case, if anything is."""
    found = {name: to_numpy(value) for name, value in outputs.items()}
    allowed = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    wanted = {name: expected for name, expected in case.expected.items() if name in found or name != "lse"}
    judgement = judge(case, wanted, found, allowed, precision(dtype))
    return None if judgement.passed else f"{case.id} {dtype}: {judgement.reason}"


def failures(some: Sequence[Case], ask: Callable[[Answer, Answer], Answer], *dtypes: str, at_least: int) -> list[str]:
    """What is wrong with the answers to some cases."""
    asked = [(case, dtype) for case in some for dtype in dtypes if dtype in case.dtypes]
    assert len(asked) >= at_least
    found = [judged(case, dtype, ask(*given(case, dtype))) for case, dtype in asked]
    return [wrong for wrong in found if wrong is not None]


def answered(arrays: Answer, options: Answer) -> Answer:
    """Output and lse of a case of attention."""
    output, lse = attention(**arrays, **options, return_lse=True)
    return {"output": output, "lse": lse}


def differentiated(arrays: Answer, options: Answer, attention: Callable[..., Any] = attention) -> Answer:
    """The gradients that JAX takes of the forward."""
    leaves = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
    rest = {name: array for name, array in arrays.items() if name not in {*leaves, "grad_output", "grad_lse"}}
    (_, lse), pull = jax.vjp(lambda leaves: attention(**leaves, **rest, **options, return_lse=True), leaves)
    (found,) = pull((arrays["grad_output"], arrays.get("grad_lse", jnp.zeros_like(lse))))
    return {f"grad_{name}": gradient for name, gradient in found.items()}


def compiled(ask: Callable[[Answer, Answer], Answer]) -> Callable[[Answer, Answer], Answer]:
    """The same under jit, everything that is an array traced, lengths and offsets too."""

    @partial(jax.jit, static_argnums=1)
    def program(arrays: Answer, options: tuple[tuple[str, Any], ...]) -> Answer:
        return ask(arrays, dict(options))

    return lambda arrays, options: program(arrays, tuple(sorted(options.items())))


@pytest.fixture(params=[1, 2**40], ids=["head by head", "all heads at once"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut every call, however small, into blocks, and look at its output before values are cleaned."""
    monkeypatch.setattr(plan, "SCORES", request.param)
    monkeypatch.setattr(plan, "LOWEST", 2)
    monkeypatch.setattr(plan, "HIGHEST", 2)
    monkeypatch.setattr(plan, "SIZES", 3)
    monkeypatch.setattr(forward, "FEW", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("cut")
def test_goldens_cut_into_blocks() -> None:
    some = chosen("attention", signatures=20, each=5)
    assert not failures(some, answered, "float32", at_least=60)


@pytest.mark.usefixtures("cut")
def test_poison_cut_into_blocks() -> None:
    some = [case for case in cases() if case.function == "attention" and {"poison", "nonfinite"} & set(case.features)]
    assert not failures(some[::2], answered, "float32", at_least=20)


@pytest.mark.usefixtures("cut")
def test_gradients_cut_into_blocks() -> None:
    some = chosen("attention_vjp", signatures=12, each=7)
    assert not failures(some, differentiated, "float32", at_least=50)


def test_autodiff_gives_the_gradients() -> None:
    some = [case for case in cases() if case.function == "attention_vjp"]
    assert not failures(some, compiled(differentiated), "float32", at_least=140)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_jit(dtype: str) -> None:
    assert not failures(chosen("attention", signatures=16, each=4), compiled(answered), dtype, at_least=40)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_autodiff_in_other_types(dtype: str) -> None:
    some = chosen("attention_vjp", signatures=4, each=5)
    assert not failures(some, compiled(differentiated), dtype, at_least=12)


def test_checkpoint() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        def one(*, causal: bool = False, **rest: Any) -> Any:
            static = {name: rest.pop(name) for name in [*options, "return_lse"] if name in rest}
            return jax.checkpoint(lambda rest: attention(**rest, **static, causal=causal))(rest)

        return differentiated(arrays, options, one)

    some = chosen("attention_vjp", signatures=8, each=7)
    assert not failures(some, compiled(ask), "float32", at_least=50)


def each_entry(one: Callable[[Answer], Answer], arrays: Answer) -> Answer:
    """Ask about each batch entry apart, under vmap; what all entries share is not mapped."""
    batch = arrays["query"].shape[0]
    shared = {name: array for name, array in arrays.items() if name == "sinks" or (array.shape[0] == 1 and batch > 1)}
    mapped = {name: array for name, array in arrays.items() if name not in shared}
    return jax.vmap(lambda mapped: one({name: array[None] for name, array in mapped.items()} | shared))(mapped)


def joined(outputs: Answer) -> Answer:
    """(entry, 1, ...) to (batch, ...)."""
    return {name: array.reshape(array.shape[0], *array.shape[2:]) for name, array in outputs.items()}


def test_vmap() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        return joined(each_entry(lambda one: answered(one, options), arrays))

    some = [case for case in chosen("attention", signatures=28, each=4) if case.inputs("float32")["query"].shape[0]]
    assert not failures(some, compiled(ask), "float32", at_least=60)


def test_vmap_of_gradients() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        found = joined(each_entry(lambda one: differentiated(one, options), arrays))
        return {name: array for name, array in found.items() if name not in {"grad_bias", "grad_sinks"}}

    some = [case for case in chosen("attention_vjp", signatures=12, each=9) if not {"bias", "sinks"} & names(case)]
    assert not failures(some, compiled(ask), "float32", at_least=20)


def test_what_lies_on_the_host_says_the_same() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        return answered({name: numpy.asarray(a) if name in PER_ENTRY else a for name, a in arrays.items()}, options)

    some = [case for case in chosen("attention", signatures=60, each=2) if names(case) & set(PER_ENTRY)]
    assert not failures(some, ask, "float32", at_least=20)


def test_merge_under_jit() -> None:
    @jax.jit
    def program(arrays: Answer) -> Answer:
        return dict(zip(("output", "lse"), mha_spec_jax.merge_attention(**arrays), strict=True))

    some = [case for case in cases() if case.function == "merge_attention"]
    assert not failures(some, lambda arrays, _: program(arrays), "float32", "bfloat16", at_least=50)


def test_merging_an_empty_half_has_finite_gradients() -> None:
    lse = jnp.asarray([[[0.5, -math.inf, -math.inf]]])
    other = jnp.asarray([[[-math.inf, 0.25, -math.inf]]])
    output = jnp.ones((1, 1, 3, 2))
    gradients = jax.grad(lambda *halves: jnp.sum(mha_spec_jax.merge_attention(*halves)[0]), (0, 1, 2, 3))
    assert all(jnp.isfinite(gradient).all() for gradient in gradients(output, lse, output, other))


def operands(q_len: int = 5, kv_len: int = 7, dtype: str = "float64") -> list[jax.Array]:
    """Query, key and value of normal numbers, 2 x 6 heads over 3."""
    generator = numpy.random.default_rng(SEED)
    shapes = ((2, 6, q_len, 11), (2, 3, kv_len, 11), (2, 3, kv_len, 13))
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def everything() -> Answer:
    """Every option that is an array without a gradient, and every number."""
    generator = numpy.random.default_rng(SEED)
    return {
        "mask": jnp.asarray(generator.random((2, 6, 5, 7)) < 0.8),
        "window": (3, 2),
        "q_offset": jnp.asarray([1, 2]),
        "q_lengths": jnp.asarray([5, 3]),
        "kv_lengths": jnp.asarray([7, 5]),
        "q_segment_ids": jnp.asarray([[0, 0, 0, 1, 1], [3, 3, 3, 3, 3]]),
        "kv_segment_ids": jnp.asarray([[0, 0, 0, 0, 1, 1, 1], [3] * 7]),
        "softcap": 2.5,
        "scale": -0.7,
        "dropout_rate": 0.25,
        "dropout_mask": jnp.asarray(generator.random((2, 1, 5, 7)) < 0.75),
    }


@pytest.mark.usefixtures("cut")
def test_second_derivatives() -> None:
    generator = numpy.random.default_rng(SEED)
    leaves = [*operands(), *(jnp.asarray(generator.standard_normal(shape)) for shape in ((2, 1, 5, 7), (6,)))]

    def both(query: Any, key: Any, value: Any, bias: Any, sinks: Any) -> Any:
        options = everything() | {"bias": jnp.asarray(bias), "sinks": jnp.asarray(sinks)}
        output, lse = attention(*map(jnp.asarray, (query, key, value)), **options, return_lse=True)
        return jnp.sum(output**3), jnp.sum(jnp.sin(lse))

    check_grads(both, leaves, order=2, modes=["rev"])


def test_second_derivative_where_the_output_is_zero() -> None:
    query, key, value = operands()

    def mixed(value: jax.Array) -> jax.Array:
        options = {"window": (2, 1), "q_offset": 1}
        return jax.grad(lambda query: jnp.sum(attention(query, key, jnp.asarray(value), **options)))(query)

    check_grads(mixed, (jnp.zeros_like(value),), order=1, modes=["rev"])


@pytest.mark.parametrize(
    "forward_mode",
    [
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
        lambda f, x: jax.jacfwd(f)(x),
        lambda f, x: jax.linearize(f, x)[1](x),
        lambda f, x: jax.hessian(lambda x: jnp.sum(f(x)))(x),
    ],
    ids=["jvp", "jit", "jacfwd", "linearize", "hessian"],
)
def test_forward_mode_is_refused(forward_mode: Callable[..., object]) -> None:
    query, key, value = operands()
    with pytest.raises(ArgumentTypeError, match="no forward-mode derivative"):
        forward_mode(lambda query: attention(query, key, value), query)


def test_memory_grows_with_the_length() -> None:
    def temporary(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        gradient = jax.grad(lambda *x: jnp.sum(attention(*x, causal=True)), (0, 1, 2))
        analysis: Any = jax.jit(gradient).lower(shape, shape, shape).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporary(16384) < 3 * temporary(8192)
    assert temporary(16384) < 2 * 16384 * 16384


def test_a_window_leaves_keys_out() -> None:
    query = jnp.zeros((1, 8, 4096, 64), jnp.float32)
    found, _ = plan.plan_of(Arguments(query, query, query, window=(256, 0)))
    assert sum(group.count * group.rows * group.keys for group in found.groups) < 0.2 * 4096**2


def test_segments_on_the_host_leave_keys_out() -> None:
    query = jnp.zeros((1, 8, 4096, 64), jnp.float32)
    ids = numpy.arange(4096)[None] // 256
    found, _ = plan.plan_of(Arguments(query, query, query, q_segment_ids=ids, kv_segment_ids=ids))
    assert sum(group.count * group.rows * group.keys for group in found.groups) < 0.2 * 4096**2


def test_a_new_offset_seldom_compiles() -> None:
    query, key, value = operands(1, 64, "float32")
    program: Any = function.program
    programs = program._cache_size()
    for offset in range(64):
        attention(query, key, value, causal=True, q_offset=offset)
    assert program._cache_size() - programs <= plan.SIZES


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("offset", [-9, -3, 4, 40])
@pytest.mark.parametrize("constraint", [{"causal": True}, {"window": (2, None)}, {"window": (1, 2)}], ids=str)
def test_an_offset_on_the_host_says_what_a_traced_one_says(offset: int, constraint: Answer) -> None:
    query, key, value = operands(6, 9)
    host = attention(query, key, value, q_offset=offset, **constraint)
    traced = attention(query, key, value, q_offset=jnp.asarray([offset, offset]), **constraint)
    assert jnp.allclose(host, traced, rtol=0, atol=float(64 * jnp.finfo(host.dtype).eps))


def test_lengths_beyond_the_buffer_and_of_small_types() -> None:
    query, key, value = operands(5, 300)
    whole = attention(query, key, value)
    for lengths in (jnp.asarray([300, 2**40]), jnp.asarray([2**63, 301], jnp.uint64)):
        assert (attention(query, key, value, kv_lengths=lengths) == whole).all()
    small = attention(query, key, value, kv_lengths=jnp.asarray([100, -7], jnp.int8))
    assert (small == attention(query, key, value, kv_lengths=[100, 0])).all()


def test_ids_that_jax_would_cut_are_refused() -> None:
    ids = numpy.asarray([[0, 2**40, 1, 1, 1]] * 2)
    with jax.enable_x64(False):
        query, key, value = operands(5, 5, "float32")
        with pytest.raises(ArgumentValueError, match=r"`q_segment_ids` must fit int32"):
            attention(query, key, value, q_segment_ids=ids, kv_segment_ids=ids)


def test_arguments_are_checked_while_traced() -> None:
    query, key, value = operands()
    with pytest.raises(ArgumentValueError, match="MHA-LEN-3"):
        jax.jit(lambda lengths: attention(query, key, value, kv_lengths=lengths))(jnp.asarray([1, 2, 3]))
    with pytest.raises(ArgumentTypeError, match="MHA-ARG-2"):
        jax.jit(lambda scale: attention(query, key, value, scale=scale))(0.5)


def drawn(key: jax.Array, rate: float, shape: tuple[int, int, int, int] = (1, 2, 300, 500)) -> jax.Array:
    """Which weights a key keeps: with equal scores and values of 1, their share in each row."""
    query, keys, value = (jnp.zeros((*shape[:2], length, 1), jnp.float32) for length in (shape[2], shape[3], shape[3]))
    kept = attention(query, keys, value + 1, dropout_rate=rate, dropout_key=key)
    return jnp.round(kept[..., 0] * shape[3] * (1 - rate))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_as_many_as_it_says(rate: float) -> None:
    """7 standard deviations: a false alarm in 1 of 10^11 runs."""
    kept = drawn(jax.random.key(SEED), rate)
    number = kept.size * 500
    assert abs(float(kept.sum()) - number * (1 - rate)) < 7 * math.sqrt(number * rate * (1 - rate))
    variance = float(jnp.var(kept - 500 * (1 - rate)))
    assert abs(variance / (500 * rate * (1 - rate)) - 1) < 7 * math.sqrt(2 / kept.size)


def test_dropout_depends_on_its_key_alone() -> None:
    one, same, other = (drawn(jax.random.key(seed), 0.5) for seed in (SEED, SEED, SEED + 1))
    assert (one == same).all()
    assert (one != other).any()
    assert (drawn(jax.random.PRNGKey(SEED), 0.5) == drawn(jax.random.PRNGKey(SEED), 0.5)).all()


@pytest.mark.usefixtures("cut")
def test_the_backward_drops_what_the_forward_dropped() -> None:
    query, key, value = operands(3, 5)
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(SEED), "window": (3, 1), "q_offset": 1}
    check_grads(lambda *x: attention(*map(jnp.asarray, x), **options), (query, key, value), order=1, modes=["rev"])


def test_dropout_needs_a_key() -> None:
    query, key, value = operands()
    with pytest.raises(ArgumentValueError, match="no global generator"):
        attention(query, key, value, dropout_rate=0.1)
    with pytest.raises(ArgumentTypeError, match="must be one key"):
        attention(query, key, value, dropout_rate=0.1, dropout_key=3)
    assert (attention(query, key, value, dropout_rate=0.0) == attention(query, key, value)).all()


def test_cudnn_is_asked_only_where_it_has_this_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Arguments] = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(native, "attention", lambda a: asked.append(a) or a.query)
    query = jnp.ones((2, 4, 8, 16), jnp.bfloat16)
    key = jnp.ones((2, 2, 8, 16), jnp.bfloat16)

    attention(query, key, key)
    attention(query, key, key, causal=True, scale=0.5)
    assert len(asked) == 2
    attention(query, key, key, return_lse=True)
    attention(query, key, key, softcap=3.0)
    attention(query, key[:, :, :5], key[:, :, :5], causal=True, q_offset=0)
    attention(query, key, key[..., :8])
    attention(query[..., :7], key[..., :7], key[..., :7])
    attention(*(one.astype(jnp.float32) for one in (query, key, key)))
    attention(query, key[:, :, :0], key[:, :, :0])
    attention(query, key, key, kv_lengths=[8, 7])
    assert len(asked) == 2
    monkeypatch.undo()
    assert not native.answers(problem_arguments(query, key))


def problem_arguments(query: jax.Array, key: jax.Array) -> Arguments:
    arguments = Arguments(query, key, key)
    assert problem_of(arguments)[0].plan.groups
    return arguments
