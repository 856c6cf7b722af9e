"""mha_spec_jax under the transformations of JAX, compared with the goldens."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from jax.test_util import check_grads
from support.goldens import DIFFERENTIABLE, PER_ENTRY, alike, cases, compiled, failures, names, split_arguments
from support.jax_world import operands

import mha_spec.reference
import mha_spec_jax
from mha_spec.arguments import Arguments
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_conformance.judging.bounds import allowances, precision
from mha_spec_jax import forward, plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

    from mha_spec_conformance.suite.cases import Case

Answer = dict[str, Any]
attention: Callable[..., Any] = mha_spec_jax.attention
SEED = 20261123

pytestmark = pytest.mark.usefixtures("double")


def answered(call: Callable[..., Any] = attention, **arguments: Any) -> Answer:
    """Return output and lse of a case of attention."""
    output, lse = call(**arguments, return_lse=True)
    return {"output": output, "lse": lse}


def differentiated(
    call: Callable[..., Any] = attention, *, grad_output: Array, grad_lse: Array | None = None, **arguments: Any
) -> Answer:
    """Return the gradients that jax.vjp takes of attention."""
    leaves = {name: arguments.pop(name) for name in DIFFERENTIABLE if name in arguments}
    (_, lse), pull = jax.vjp(lambda leaves: call(**leaves, **arguments, return_lse=True), leaves)
    (results,) = pull((grad_output, jnp.zeros_like(lse) if grad_lse is None else grad_lse))
    return {f"grad_{name}": gradient for name, gradient in results.items()}


@pytest.fixture(params=[1, 2**40], ids=["head by head", "all heads at once"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call into blocks, and check its output before values are cleaned."""
    monkeypatch.setattr(plan, "SCORES", request.param)
    monkeypatch.setattr(plan, "LOWEST", 2)
    monkeypatch.setattr(plan, "HIGHEST", 2)
    monkeypatch.setattr(plan, "SIZES", 3)
    monkeypatch.setattr(forward, "FEW", 0)


@pytest.mark.usefixtures("cut", "unoptimized")
def test_cut_into_blocks() -> None:
    assert not failures("jax", alike("attention", 10), compiled(jax.jit, answered), "float32")


@pytest.mark.usefixtures("cut", "unoptimized")
def test_poison_cut_into_blocks() -> None:
    poisoned = [case for case in cases("attention") if {"poison", "nonfinite"} & {*case.features}]
    groups: dict[object, list[Case]] = {}
    for case in poisoned:
        groups.setdefault(case.signature, []).append(case)
    largest = sorted(groups.values(), key=len)[-4:]
    some = [case for group in largest for case in group]
    assert not failures("jax", some, compiled(jax.jit, answered), "float32")


@pytest.mark.usefixtures("cut", "unoptimized")
def test_gradients_cut_into_blocks() -> None:
    assert not failures("jax", alike("attention_vjp", 8), compiled(jax.jit, differentiated), "float32")


def test_jit_with_every_array_traced() -> None:
    assert not failures("jax", alike("attention"), compiled(jax.jit, answered), "float32")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_jit_in_other_types(dtype: str) -> None:
    assert not failures("jax", alike("attention", 12), compiled(jax.jit, answered), dtype)


@pytest.mark.usefixtures("unoptimized")
def test_grad() -> None:
    assert not failures("jax", alike("attention_vjp"), differentiated, "float32")


def test_jit_of_grad() -> None:
    assert not failures("jax", alike("attention_vjp"), compiled(jax.jit, differentiated), "float32")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_jit_of_grad_in_other_types(dtype: str) -> None:
    assert not failures("jax", alike("attention_vjp", 10), compiled(jax.jit, differentiated), dtype)


def test_checkpoint() -> None:
    def again(**arguments: Any) -> Any:
        arrays, rest = split_arguments(arguments)
        return jax.checkpoint(lambda arrays: attention(**arrays, **rest))(arrays)

    compiled_call = compiled(jax.jit, partial(differentiated, again))
    assert not failures("jax", alike("attention_vjp", 12), compiled_call, "float32")


def each_entry(call: Callable[..., Answer], **arguments: Any) -> Answer:
    """Call each batch entry under vmap; arrays that all entries share are not mapped."""
    (arrays, rest), batch = split_arguments(arguments), arguments["query"].shape[0]
    shared = {name: array for name, array in arrays.items() if name == "sinks" or (array.shape[0] == 1 and batch > 1)}
    mapped = {name: array for name, array in arrays.items() if name not in shared}

    def single_entry(mapped: Answer) -> Answer:
        return call(**{name: array[None] for name, array in mapped.items()}, **shared, **rest)

    results = jax.vmap(single_entry)(mapped)
    return {name: array.reshape(batch, *array.shape[2:]) for name, array in results.items()}


def test_vmap() -> None:
    compiled_call = compiled(jax.jit, partial(each_entry, answered))
    assert not failures("jax", alike("attention"), compiled_call, "float32")


def test_vmap_of_grad() -> None:
    some = alike("attention_vjp", 12, without=("bias", "sinks"))
    assert not failures("jax", some, compiled(jax.jit, partial(each_entry, differentiated)), "float32")


def test_grad_of_vmap() -> None:
    def mapped(*, return_lse: bool, **arguments: Any) -> Any:
        assert return_lse
        results = each_entry(answered, **arguments)
        return results["output"], results["lse"]

    compiled_call = compiled(jax.jit, partial(differentiated, mapped))
    assert not failures("jax", alike("attention_vjp", 12), compiled_call, "float32")


@pytest.mark.usefixtures("unoptimized")
def test_integers_on_the_host_give_the_same_results() -> None:
    some = [case for case in alike("attention") if names(case).intersection(PER_ENTRY)]
    assert not failures("jax", some, answered, "float32", host=PER_ENTRY)


def test_without_float64() -> None:
    with jax.enable_x64(False):
        assert not failures("jax", alike("attention", 8), answered, "float32")
        query = jnp.asarray(numpy.ones((1, 1, 2, 3)))
        assert [result.dtype for result in attention(query, query, query, return_lse=True)] == [jnp.float32] * 2


def test_merge_under_jit() -> None:
    def ask(**arguments: Any) -> Answer:
        return dict(zip(("output", "lse"), mha_spec_jax.merge_attention(**arguments), strict=True))

    assert not failures("jax", cases("merge_attention"), compiled(jax.jit, ask), "float32", "bfloat16")


def everything() -> Answer:
    """Return every option that is a number or an array without a gradient."""
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


@pytest.mark.usefixtures("unoptimized")
def test_second_derivatives() -> None:
    generator = numpy.random.default_rng(SEED)
    leaves = [*operands(), *(jnp.asarray(generator.standard_normal(shape)) for shape in ((2, 1, 5, 7), (6,)))]

    @jax.jit
    def output_and_lse_sums(query: Any, key: Any, value: Any, bias: Any, sinks: Any) -> Any:
        output, lse = attention(query, key, value, bias=bias, sinks=sinks, **everything(), return_lse=True)
        return jnp.sum(output**3), jnp.sum(jnp.sin(lse))

    check_grads(output_and_lse_sums, leaves, order=2, modes=["rev"])


@pytest.mark.usefixtures("unoptimized")
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
    with pytest.raises(ArgumentTypeError, match=r"^attention .* no forward-mode derivative.* jax\.jacrev\(jax\.jacrev"):
        forward_mode(lambda query: attention(query, key[: len(query)], value[: len(query)]), query)


HEAD_BY_HEAD = pytest.mark.parametrize("cut", [1], indirect=True)


@HEAD_BY_HEAD
@pytest.mark.usefixtures("cut", "unoptimized")
@pytest.mark.parametrize("offset", [-9, 4, 40])
@pytest.mark.parametrize("constraint", [{"causal": True}, {"window": (2, None)}, {"window": (1, 2)}], ids=str)
def test_an_offset_on_the_host_gives_the_same_output_as_a_traced_offset(offset: int, constraint: Answer) -> None:
    query, key, value = operands(6, 9)
    host = attention(query, key, value, q_offset=offset, **constraint)
    traced = attention(query, key, value, q_offset=jnp.asarray([offset, offset]), **constraint)
    arrays = {name: numpy.asarray(array) for name, array in zip(DIFFERENTIABLE, (query, key, value), strict=False)}
    allowed = allowances("attention", arrays, {"q_offset": offset, **constraint}, precision("float64"))["output"]
    assert (numpy.abs(host - traced) <= 2 * allowed).all()


@pytest.mark.usefixtures("unoptimized")
def test_lengths_beyond_the_buffer_and_of_narrow_types_are_clamped() -> None:
    query, key, value = operands(5, 300)
    whole = attention(query, key, value, kv_lengths=jnp.asarray([300, 300]))
    for lengths in (jnp.asarray([300, 2**40]), jnp.asarray([2**63, 301], jnp.uint64)):
        assert (attention(query, key, value, kv_lengths=lengths) == whole).all()
    none = attention(query, key, value, kv_lengths=jnp.asarray([100, 0]))
    for lengths in (jnp.asarray([100, -7], jnp.int8), jnp.asarray([100, 5 - 2**32])):
        assert (attention(query, key, value, kv_lengths=lengths) == none).all()


def test_arguments_are_checked_while_traced() -> None:
    query, key, value = operands()
    with pytest.raises(ArgumentValueError, match="MHA-LEN-3"):
        jax.jit(lambda lengths: attention(query, key, value, kv_lengths=lengths))(jnp.asarray([1, 2, 3]))
    with pytest.raises(ArgumentTypeError, match="MHA-ARG-2"):
        jax.jit(lambda scale: attention(query, key, value, scale=scale))(0.5)


def kept_counts(key: jax.Array, rate: float, shape: tuple[int, int, int, int] = (1, 2, 300, 500)) -> jax.Array:
    """Count the weights of each row that dropout keeps, by equal scores and values of 1."""
    query, keys, value = (jnp.zeros((*shape[:2], length, 1), jnp.float32) for length in (shape[2], shape[3], shape[3]))
    kept = attention(query, keys, value + 1, dropout_rate=rate, dropout_key=key)
    return jnp.round(kept[..., 0] * shape[3] * (1 - rate))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expected_number_of_weights(rate: float) -> None:
    """The bound is 7 standard deviations, a false alarm in 1 of 10^11 runs."""
    kept = kept_counts(jax.random.key(SEED), rate)
    number = kept.size * 500
    assert abs(float(kept.sum()) - number * (1 - rate)) < 7 * math.sqrt(number * rate * (1 - rate))
    variance = float(jnp.var(kept - 500 * (1 - rate)))
    assert abs(variance / (500 * rate * (1 - rate)) - 1) < 7 * math.sqrt(2 / kept.size)


@pytest.mark.usefixtures("cut", "unoptimized")
def test_every_block_draws_another_mask() -> None:
    query, keys = jnp.zeros((1, 2, 4, 1)), jnp.zeros((1, 2, 100, 1))
    value = jnp.broadcast_to(jnp.eye(100), (1, 2, 100, 100))
    kept = attention(query, keys, value, dropout_rate=0.5, dropout_key=jax.random.key(SEED)) != 0
    assert len({row.tobytes() for row in numpy.asarray(kept).reshape(8, 100)}) == 8


def test_dropout_depends_on_its_key_alone() -> None:
    first, same, other = (kept_counts(jax.random.key(seed), 0.5) for seed in (SEED, SEED, SEED + 1))
    assert (first == same).all()
    assert (first != other).any()
    assert (kept_counts(jax.random.PRNGKey(SEED), 0.5) == kept_counts(jax.random.PRNGKey(SEED), 0.5)).all()


TWO_OF_FOUR_HEADS = pytest.mark.parametrize("cut", [30], indirect=True)


def four_heads() -> dict[str, numpy.ndarray]:
    """Return operands and cotangents of 3 x 4 heads with different masks, biases and sinks."""
    generator = numpy.random.default_rng(SEED)
    shapes = {"query": (3, 4, 5, 11), "key": (3, 4, 3, 11), "value": (3, 4, 3, 13), "bias": (3, 4, 5, 3), "sinks": (4,)}
    shapes |= {"grad_output": (3, 4, 5, 13), "grad_lse": (3, 4, 5)}
    arrays = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    return arrays | {"mask": generator.random((3, 4, 5, 3)) < 0.8}


@TWO_OF_FOUR_HEADS
@pytest.mark.usefixtures("cut", "unoptimized")
def test_two_of_four_heads_at_once() -> None:
    arrays = four_heads()
    results = jax.jit(differentiated)(**{name: jnp.asarray(array) for name, array in arrays.items()})
    expected = mha_spec.reference.attention_vjp(**arrays)
    allowed = allowances("attention_vjp", arrays, {}, precision("float64"))
    assert plan.plan_of(Arguments(*(arrays[name] for name in DIFFERENTIABLE[:3])))[0].heads == 2
    for name, gradient in zip(DIFFERENTIABLE, expected, strict=True):
        assert (numpy.abs(results[f"grad_{name}"] - gradient) <= 2 * allowed[f"grad_{name}"]).all()


@pytest.mark.parametrize("cut", [1, 30], indirect=True)
@pytest.mark.usefixtures("cut", "unoptimized")
def test_the_backward_drops_what_the_forward_dropped() -> None:
    query, key, value = (jnp.asarray(four_heads()[name]) for name in DIFFERENTIABLE[:3])
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(SEED, impl="rbg"), "window": (3, 1), "q_offset": 1}
    check_grads(jax.jit(lambda *x: attention(*x, **options)), (query, key, value), order=1, modes=["rev"])


@pytest.mark.usefixtures("unoptimized")
def test_dropout_needs_a_key() -> None:
    query, key, value = operands()
    with pytest.raises(ArgumentValueError, match="no global generator"):
        attention(query, key, value, dropout_rate=0.1)
    with pytest.raises(ArgumentTypeError, match="must be a single key"):
        attention(query, key, value, dropout_rate=0.1, dropout_key=3)
    numbers = jax.random.key_data(jax.random.key(SEED, impl="rbg"))
    with pytest.raises(ArgumentTypeError, match="or numbers of uint32"):
        attention(query, key, value, dropout_rate=0.1, dropout_key=numbers)
    assert (attention(query, key, value, dropout_rate=0.0) == attention(query, key, value)).all()


@pytest.mark.usefixtures("unoptimized")
def test_weights_have_gradients_where_unused_storage_is_nan() -> None:
    query, key, _ = operands()
    lengths = {"kv_lengths": jnp.asarray([6, 5]), "q_lengths": jnp.asarray([5, 4])}

    def total(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(mha_spec_jax.attention_weights(query, key, **lengths)[:, :, :4] ** 2)

    clean = jax.grad(total, (0, 1))(query, key)
    poisoned = jax.grad(total, (0, 1))(query.at[1, :, 4].set(math.nan), key.at[:, :, 6].set(math.nan))
    assert all((first == other).all() for first, other in zip(clean, poisoned, strict=True))
