"""mha_spec_jax in the worlds of JAX: each judged by the goldens."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from jax.test_util import check_grads

import mha_spec_jax
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_conformance.accuracy import allowances
from mha_spec_conformance.cases import load
from mha_spec_conformance.compare import judge
from mha_spec_conformance.convert import to_library, to_numpy
from mha_spec_conformance.precision import precision
from mha_spec_jax import forward, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mha_spec_conformance.cases import Case

Answer = dict[str, Any]
attention: Callable[..., Any] = mha_spec_jax.attention
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
PER_ENTRY = ("q_offset", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids")
SEED = 20261123
MOST_ALIKE = 8
"""How many cases of one signature are chosen at most."""


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Float64 is asked for in JAX."""
    with jax.enable_x64(True):
        yield


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    return tuple(case for case in load().cases if case.expect == "values")


def chosen(function: str, *, at_least: int, without: frozenset[str] = frozenset()) -> list[Case]:
    """Some cases of a function: few signatures, for which programs are compiled, with every option among them."""
    found: dict[object, list[Case]] = {}
    for case in cases():
        if case.function == function and not without & names(case) and not empty(case):
            found.setdefault(case.signature, []).append(case)
    groups = sorted((group[:MOST_ALIKE] for group in found.values()), key=len)
    missing = {name for group in groups for name in names(group[0])}
    some: list[Case] = []
    while missing or len(some) < at_least:
        best = max(groups, key=lambda group: (len(names(group[0]) & missing), len(group)))
        groups.remove(best)
        some += best
        missing -= names(best[0])
    return some


def names(case: Case) -> set[str]:
    """Every argument of a case."""
    return {*case.options, *case.input_names}


def empty(case: Case) -> bool:
    """Whether a case has nothing to map over."""
    return 0 in case.inputs(case.dtypes[0])["query"].shape


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


def failures(some: Sequence[Case], ask: Callable[[Answer, Answer], Answer], *dtypes: str) -> list[str]:
    """What is wrong with the answers to some cases."""
    asked = [(case, dtype) for case in some for dtype in dtypes if dtype in case.dtypes]
    assert asked
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
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks, and look at its output before values are cleaned."""
    monkeypatch.setattr(plan, "SCORES", request.param)
    monkeypatch.setattr(plan, "LOWEST", 2)
    monkeypatch.setattr(plan, "HIGHEST", 2)
    monkeypatch.setattr(plan, "SIZES", 3)
    monkeypatch.setattr(forward, "FEW", 0)


@pytest.mark.usefixtures("cut")
def test_cut_into_blocks() -> None:
    assert not failures(chosen("attention", at_least=10), compiled(answered), "float32")


@pytest.mark.usefixtures("cut")
def test_poison_cut_into_blocks() -> None:
    poisoned = [case for case in cases() if case.function == "attention" and {"poison", "nonfinite"} & {*case.features}]
    alike: dict[object, list[Case]] = {}
    for case in poisoned:
        alike.setdefault(case.signature, []).append(case)
    largest = sorted(alike.values(), key=len)[-4:]
    assert not failures([case for group in largest for case in group], compiled(answered), "float32")


@pytest.mark.usefixtures("cut")
def test_gradients_cut_into_blocks() -> None:
    assert not failures(chosen("attention_vjp", at_least=8), compiled(differentiated), "float32")


def test_jit_with_every_array_traced() -> None:
    assert not failures(chosen("attention", at_least=50), compiled(answered), "float32")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_jit_in_other_types(dtype: str) -> None:
    assert not failures(chosen("attention", at_least=12), compiled(answered), dtype)


def test_grad() -> None:
    assert not failures(chosen("attention_vjp", at_least=50), differentiated, "float32")


def test_jit_of_grad() -> None:
    assert not failures(chosen("attention_vjp", at_least=50), compiled(differentiated), "float32")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_jit_of_grad_in_other_types(dtype: str) -> None:
    assert not failures(chosen("attention_vjp", at_least=10), compiled(differentiated), dtype)


def test_checkpoint() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        def again(**rest: Any) -> Any:
            traced = {name: rest.pop(name) for name in list(rest) if name in arrays}
            return jax.checkpoint(lambda traced: attention(**traced, **rest))(traced)

        return differentiated(arrays, options, again)

    assert not failures(chosen("attention_vjp", at_least=50), compiled(ask), "float32")


def each_entry(one: Callable[[Answer], Answer], arrays: Answer) -> Answer:
    """Ask about each batch entry apart, under vmap; what all entries share is not mapped."""
    batch = arrays["query"].shape[0]
    shared = {name: array for name, array in arrays.items() if name == "sinks" or (array.shape[0] == 1 and batch > 1)}
    mapped = {name: array for name, array in arrays.items() if name not in shared}
    found = jax.vmap(lambda mapped: one({name: array[None] for name, array in mapped.items()} | shared))(mapped)
    return {name: array.reshape(batch, *array.shape[2:]) for name, array in found.items()}


def test_vmap() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        return each_entry(lambda one: answered(one, options), arrays)

    assert not failures(chosen("attention", at_least=50), compiled(ask), "float32")


def test_vmap_of_grad() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        return each_entry(lambda one: differentiated(one, options), arrays)

    some = chosen("attention_vjp", at_least=12, without=frozenset({"bias", "sinks"}))
    assert not failures(some, compiled(ask), "float32")


def test_grad_of_vmap() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        def mapped(**rest: Any) -> Any:
            traced = {name: rest[name] for name in rest if name in arrays}
            found = each_entry(lambda one: answered(one, options), traced)
            return found["output"], found["lse"]

        return differentiated(arrays, options, mapped)

    assert not failures(chosen("attention_vjp", at_least=12), compiled(ask), "float32")


def test_what_lies_on_the_host_says_the_same() -> None:
    def ask(arrays: Answer, options: Answer) -> Answer:
        return answered({name: numpy.asarray(a) if name in PER_ENTRY else a for name, a in arrays.items()}, options)

    some = [case for case in chosen("attention", at_least=50) if names(case) & set(PER_ENTRY)]
    assert not failures(some, ask, "float32")


def test_without_float64() -> None:
    with jax.enable_x64(False):
        assert not failures(chosen("attention", at_least=8), answered, "float32")
        query = jnp.asarray(numpy.ones((1, 1, 2, 3)))
        assert [result.dtype for result in attention(query, query, query, return_lse=True)] == [jnp.float32] * 2


def test_merge_under_jit() -> None:
    @jax.jit
    def program(arrays: Answer) -> Answer:
        return dict(zip(("output", "lse"), mha_spec_jax.merge_attention(**arrays), strict=True))

    some = [case for case in cases() if case.function == "merge_attention"]
    assert not failures(some, lambda arrays, _: program(arrays), "float32", "bfloat16")


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


def test_second_derivatives() -> None:
    generator = numpy.random.default_rng(SEED)
    leaves = [*operands(), *(jnp.asarray(generator.standard_normal(shape)) for shape in ((2, 1, 5, 7), (6,)))]

    @jax.jit
    def both(query: Any, key: Any, value: Any, bias: Any, sinks: Any) -> Any:
        output, lse = attention(query, key, value, bias=bias, sinks=sinks, **everything(), return_lse=True)
        return jnp.sum(output**3), jnp.sum(jnp.sin(lse))

    check_grads(both, leaves, order=2, modes=["rev"])


def test_second_derivative_where_the_output_is_zero() -> None:
    query, key, value = operands()

    @jax.jit
    def mixed(value: jax.Array) -> jax.Array:
        return jax.grad(lambda query: jnp.sum(attention(query, key, value, window=(2, 1), q_offset=1)))(query)

    check_grads(mixed, (jnp.zeros_like(value),), order=1, modes=["rev"])


@pytest.mark.parametrize(
    "forward_mode",
    [
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
        lambda f, x: jax.jacfwd(f)(x),
        lambda f, x: jax.linearize(f, x)[1](x),
        lambda f, x: jax.hessian(lambda x: jnp.sum(f(x)))(x),
        lambda f, x: jax.jit(jax.hessian(jax.jit(lambda x: jnp.sum(f(x)))))(x),
        lambda f, x: jax.vmap(lambda x: jax.jvp(f, (x[None],), (x[None],)))(x),
    ],
    ids=["jvp", "jit", "jacfwd", "linearize", "hessian", "jit of hessian", "vmap"],
)
def test_forward_mode_is_refused(forward_mode: Callable[..., object]) -> None:
    query, key, value = operands()
    with pytest.raises(ArgumentTypeError, match="no forward-mode derivative"):
        forward_mode(lambda query: attention(query, key[: len(query)], value[: len(query)]), query)


HEAD_BY_HEAD = pytest.mark.parametrize("cut", [1], indirect=True)


@HEAD_BY_HEAD
@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("offset", [-9, 4, 40])
@pytest.mark.parametrize("constraint", [{"causal": True}, {"window": (2, None)}, {"window": (1, 2)}], ids=str)
def test_an_offset_on_the_host_says_what_a_traced_one_says(offset: int, constraint: Answer) -> None:
    query, key, value = operands(6, 9)
    host = attention(query, key, value, q_offset=offset, **constraint)
    traced = attention(query, key, value, q_offset=jnp.asarray([offset, offset]), **constraint)
    arrays = {name: numpy.asarray(array) for name, array in zip(DIFFERENTIABLE, (query, key, value), strict=False)}
    allowed = allowances("attention", arrays, {"q_offset": offset, **constraint}, precision("float64"))["output"]
    assert (numpy.abs(host - traced) <= 2 * allowed).all()


def test_lengths_beyond_the_buffer_and_of_small_types() -> None:
    query, key, value = operands(5, 300)
    whole = attention(query, key, value, kv_lengths=jnp.asarray([300, 300]))
    for lengths in (jnp.asarray([300, 2**40]), jnp.asarray([2**63, 301], jnp.uint64)):
        assert (attention(query, key, value, kv_lengths=lengths) == whole).all()
    none = attention(query, key, value, kv_lengths=jnp.asarray([100, 0]))
    for lengths in (jnp.asarray([100, -7], jnp.int8), jnp.asarray([100, 5 - 2**32])):
        assert (attention(query, key, value, kv_lengths=lengths) == none).all()


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


@pytest.mark.usefixtures("cut")
def test_every_block_draws_afresh() -> None:
    query, keys = jnp.zeros((1, 2, 4, 1)), jnp.zeros((1, 2, 100, 1))
    value = jnp.broadcast_to(jnp.eye(100), (1, 2, 100, 100))
    kept = attention(query, keys, value, dropout_rate=0.5, dropout_key=jax.random.key(SEED)) != 0
    assert len({row.tobytes() for row in numpy.asarray(kept).reshape(8, 100)}) == 8


def test_dropout_depends_on_its_key_alone() -> None:
    one, same, other = (drawn(jax.random.key(seed), 0.5) for seed in (SEED, SEED, SEED + 1))
    assert (one == same).all()
    assert (one != other).any()
    assert (drawn(jax.random.PRNGKey(SEED), 0.5) == drawn(jax.random.PRNGKey(SEED), 0.5)).all()


@HEAD_BY_HEAD
@pytest.mark.usefixtures("cut")
def test_the_backward_drops_what_the_forward_dropped() -> None:
    query, key, value = operands(3, 5)
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(SEED, impl="rbg"), "window": (3, 1), "q_offset": 1}
    check_grads(jax.jit(lambda *x: attention(*x, **options)), (query, key, value), order=1, modes=["rev"])


def test_dropout_needs_a_key() -> None:
    query, key, value = operands()
    with pytest.raises(ArgumentValueError, match="no global generator"):
        attention(query, key, value, dropout_rate=0.1)
    with pytest.raises(ArgumentTypeError, match="must be one key"):
        attention(query, key, value, dropout_rate=0.1, dropout_key=3)
    assert (attention(query, key, value, dropout_rate=0.0) == attention(query, key, value)).all()


def test_weights_have_gradients_beside_storage_that_no_pair_uses() -> None:
    query, key, _ = operands()
    lengths = {"kv_lengths": jnp.asarray([6, 5]), "q_lengths": jnp.asarray([5, 4])}

    def total(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(mha_spec_jax.attention_weights(query, key, **lengths)[:, :, :4] ** 2)

    clean = jax.grad(total, (0, 1))(query, key)
    poisoned = jax.grad(total, (0, 1))(query.at[1, :, 4].set(math.nan), key.at[:, :, 6].set(math.nan))
    assert all((one == other).all() for one, other in zip(clean, poisoned, strict=True))
