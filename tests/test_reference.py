"""The reference: on every library, under every option, and with replaced steps."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.budget import affordable
from support.goldens import alike
from support.numbers import numbers
from support.subject import Subject

from mha_spec import reference
from mha_spec.arguments import OPTIONS
from mha_spec.arrays import dtype_name, library_of
from mha_spec.steps import Steps
from mha_spec_conformance.judging.bounds import allowances, precision
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.conversion import to_library, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from mha_spec_conformance.suite.cases import Case, Suite

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 5, 7, 11, 13


LIBRARIES = ("array_api_strict", "torch", "jax")


def converter(library: str) -> Callable[[numpy.ndarray], Any]:
    """Return the function that converts arrays of NumPy to the library."""
    xp = pytest.importorskip(library)
    return xp.asarray if library == "array_api_strict" else lambda array: to_library(array, library)


@contextlib.contextmanager
def set_up(library: str) -> Iterator[None]:
    """Let JAX hold float64, and compile quickly without optimising."""
    if library != "jax":
        yield
        return
    jax = pytest.importorskip("jax")
    flags = {"jax_enable_x64": True, "jax_disable_most_optimizations": True}
    before = {name: jax.config.values[name] for name in flags}
    for name, value in flags.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def compiled(function: Callable[..., Any], library: str) -> Callable[..., Any]:
    """Return the function over arrays and static options; JAX compiles it once for each signature."""
    if library != "jax":
        return function
    import jax

    programs: dict[str, Callable[..., Any]] = {}

    def call(*operands: Any, options: dict[str, Any], **arrays: Any) -> Any:
        program = jax.jit(functools.partial(function, options=options))
        return programs.setdefault(repr(sorted(options.items())), program)(*operands, **arrays)

    return call


def through(library: str, name: str) -> Callable[..., Any]:
    """Call a function of the reference on arrays of another library, of which its results must be, on its device."""
    convert = converter(library)
    call = compiled(
        lambda *operands, options, **arrays: getattr(reference, name)(*operands, **arrays, **options), library
    )

    def result(*operands: numpy.ndarray, **keywords: Any) -> Any:
        arrays = {key: convert(value) for key, value in keywords.items() if isinstance(value, numpy.ndarray)}
        options = {key: value for key, value in keywords.items() if key not in arrays}
        converted = [convert(operand) if isinstance(operand, numpy.ndarray) else operand for operand in operands]
        results = call(*converted, options=options, **arrays)
        return tuple(map(back, results)) if isinstance(results, tuple) else back(results)

    def back(result: Any) -> numpy.ndarray | None:
        if result is None:
            return None
        assert library_of(result) == library
        assert str(result.device) == str(convert(numpy.zeros(1)).device)
        return to_numpy(result).copy()

    return result


OF_ATTENTION = ("attention", "attention_weights", "attention_vjp", "merge_attention")
"""The functions of attention; test_layer.py tests the layer, whose parameters are mappings of arrays."""


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_reference_passes_the_suite_on_every_library(library: str, suite: Suite) -> None:
    # JAX compiles every operation for each shape, so that it is asked cases of few shapes.
    few = [case for function in OF_ATTENTION for case in alike(function, 100)]
    asked = few if library == "jax" else affordable(suite.cases, one_in=23)
    cases = [case for case in asked if case.function in OF_ATTENTION and not lacks_dtype_of(library, case)]
    assert len(cases) > (250 if library == "jax" else 600)
    assert not faults(library, cases, "float64")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_reference_passes_in_float32_on_every_library(library: str) -> None:
    assert not faults(library, [case for function in OF_ATTENTION for case in alike(function)], "float32")


def faults(library: str, cases: Iterable[Case], dtype: str) -> list[tuple[str, str, str | None]]:
    """List the cases that the reference does not pass on a library, with the reasons."""
    with set_up(library):
        subject = Subject({name: through(library, name) for name in OF_ATTENTION})
        results = [subject.outcome(case, dtype) for case in cases if dtype in case.dtypes]
    return [(result.ask.case.id, result.outcome, result.reason) for result in results if result.outcome != "pass"]


def lacks_dtype_of(library: str, case: Case) -> bool:
    """Return True if an error case has an input of 16 bits, which array-api-strict cannot hold."""
    dtypes = {dtype_name(array) for array in case.inputs("float64").values()}
    return library == "array_api_strict" and case.expect == "error" and bool(dtypes & {"float16", "bfloat16"})


def tensors() -> dict[str, numpy.ndarray]:
    return {
        "query": numbers(BATCH, HEADS, Q_LEN, QK_DIM),
        "key": numbers(BATCH, KV_HEADS, KV_LEN, QK_DIM),
        "value": numbers(BATCH, KV_HEADS, KV_LEN, V_DIM),
    }


def every_option() -> dict[str, Any]:
    draw = numpy.random.default_rng(11)
    return {
        "mask": draw.random((BATCH, 1, Q_LEN, KV_LEN)) < 0.8,
        "bias": numbers(1, HEADS, 1, KV_LEN),
        "causal": True,
        "q_offset": numpy.asarray([2, 3]),
        "window": (4, 1),
        "chunk": 5,
        "prefix_lengths": numpy.asarray([4, 5]),
        "q_lengths": numpy.asarray([5, 4]),
        "kv_lengths": numpy.asarray([6, 7]),
        "kv_starts": numpy.asarray([1, 0]),
        "q_segment_ids": draw.integers(0, 2, (BATCH, Q_LEN)),
        "kv_segment_ids": draw.integers(0, 2, (BATCH, KV_LEN)),
        "scale": -0.7,
        "softcap": 1.9,
        "sinks": numbers(HEADS),
        "dropout_rate": 0.3,
        "dropout_mask": draw.random((1, HEADS, Q_LEN, KV_LEN)) < 0.7,
    }


def test_every_option_is_listed() -> None:
    assert set(every_option()) == set(OPTIONS) - {"dropout_key"}


PLAIN = {"scale": -0.7, "bias": numbers(BATCH, 1, Q_LEN, KV_LEN)}


DIFFERENTIATED = [
    pytest.param(operand, options, id=f"{operand} with {name}")
    for name, options in (("no option", {}), ("scale and bias", PLAIN), ("every option", every_option()))
    for operand in ("query", "key", "value", "bias", "sinks")
    if operand in tensors() | options
]


@pytest.mark.parametrize(("operand", "options"), DIFFERENTIATED)
def test_gradients_are_those_of_finite_differences(operand: str, options: dict[str, Any]) -> None:
    """A central difference has an error of the square of its step, which two steps show, and of rounding."""
    arguments = tensors() | options
    grad_output, grad_lse = numbers(BATCH, HEADS, Q_LEN, V_DIM, seed=5), numbers(BATCH, HEADS, Q_LEN, seed=7)
    gradients = reference.attention_vjp(grad_output, **arguments, grad_lse=grad_lse)
    gradient = gradients[("query", "key", "value", "bias", "sinks").index(operand)]
    direction = numbers(*arguments[operand].shape, seed=13)

    def terms(step: float) -> numpy.ndarray:
        output, lse = reference.attention(
            **arguments | {operand: arguments[operand] + step * direction}, return_lse=True
        )
        return numpy.concat(
            [(output * grad_output).ravel(), (numpy.where(lse == -numpy.inf, 0.0, lse) * grad_lse).ravel()]
        )

    steps = 2.0**-10, 2.0**-11
    coarse, fine = ((terms(step) - terms(-step)).sum() / (2 * step) for step in steps)
    extrapolated = (4 * fine - coarse) / 3
    rounding = numpy.finfo(float).eps * abs(terms(0.0)).sum() / steps[1]
    assert abs(coarse - extrapolated) + rounding < 1e-3 * abs(extrapolated)
    assert abs((gradient * direction).sum() - extrapolated) <= abs(coarse - extrapolated) + rounding


def test_a_future_key_changes_no_bit_of_a_causal_row() -> None:
    arguments = tensors() | {"causal": True, "q_offset": 1}
    before, lse_before = reference.attention(**arguments, return_lse=True)
    for name in ("key", "value"):
        arguments[name] = arguments[name].copy()
        arguments[name][:, :, 4:] = 17 * numbers(BATCH, KV_HEADS, KV_LEN - 4, arguments[name].shape[3])
    after, lse_after = reference.attention(**arguments, return_lse=True)
    assert numpy.array_equal(before[:, :, :3], after[:, :, :3])
    assert numpy.array_equal(lse_before[:, :, :3], lse_after[:, :, :3])
    assert not numpy.array_equal(before[:, :, 3:], after[:, :, 3:])


@pytest.mark.parametrize("garbage", [numpy.nan, numpy.inf, 1e300])
def test_the_contents_of_hidden_pairs_change_no_bit(garbage: float) -> None:
    arguments = tensors() | every_option()
    grad_output = numbers(BATCH, HEADS, Q_LEN, V_DIM, seed=5)
    before = (*reference.attention(**arguments, return_lse=True), *reference.attention_vjp(grad_output, **arguments))
    spoilt = {name: array.copy() if isinstance(array, numpy.ndarray) else array for name, array in arguments.items()}
    spoilt["key"][0, :, 6:] = spoilt["value"][0, :, 6:] = garbage
    spoilt["query"][1, :, 4:] = grad_output[1, :, 4:] = garbage
    after = (*reference.attention(**spoilt, return_lse=True), *reference.attention_vjp(grad_output, **spoilt))
    for result, other in zip(before, after, strict=True):
        assert numpy.array_equal(result, other)


def within(name: str, arguments: Mapping[str, Any], **moved: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """Compute the allowances of a call in float64."""
    arrays = {key: value for key, value in arguments.items() if isinstance(value, numpy.ndarray)} | moved
    options = {key: value for key, value in arguments.items() if key not in arrays}
    return allowances(name, arrays, options, precision("float64"))


def test_the_order_of_the_keys_does_not_matter() -> None:
    order = numpy.random.default_rng(19).permutation(KV_LEN)
    arguments = tensors() | {
        "bias": numbers(1, HEADS, Q_LEN, KV_LEN),
        "mask": numpy.random.default_rng(23).random((BATCH, 1, Q_LEN, KV_LEN)) < 0.8,
    }
    moved = {name: arguments[name][:, :, order] for name in ("key", "value")} | {
        name: arguments[name][..., order] for name in ("bias", "mask")
    }
    allowed = within("attention", arguments)
    for name, result, other in zip(
        ("output", "lse"),
        reference.attention(**arguments, return_lse=True),
        reference.attention(**arguments | moved, return_lse=True),
        strict=True,
    ):
        assert (abs(result - other) <= 2 * allowed[name]).all()


def test_halves_merge_to_the_whole() -> None:
    arguments = tensors() | {"mask": numpy.random.default_rng(29).random((BATCH, HEADS, Q_LEN, KV_LEN)) < 0.7}
    keys = (slice(3), slice(3, None))
    halves = [
        arguments
        | {
            "key": arguments["key"][:, :, part],
            "value": arguments["value"][:, :, part],
            "mask": arguments["mask"][..., part],
        }
        for part in keys
    ]
    (output_a, lse_a), (output_b, lse_b) = (reference.attention(**half, return_lse=True) for half in halves)
    merged = reference.merge_attention(output_a, lse_a, output_b, lse_b)
    operands = dict(zip(FUNCTIONS["merge_attention"].operands, (output_a, lse_a, output_b, lse_b), strict=True))
    bounds = [
        within("attention", arguments),
        *(within("attention", half) for half in halves),
        within("merge_attention", operands),
    ]
    lse_error = numpy.sum([bound["lse"] for bound in bounds], axis=0)
    output_error = numpy.sum([bound["output"] for bound in bounds], axis=0)
    output_error += (abs(output_a) + abs(output_b)) * numpy.expm1(lse_error)[..., None]
    output, lse = reference.attention(**arguments, return_lse=True)
    assert (abs(merged[0] - output) <= output_error).all()
    assert (abs(merged[1] - lse)[lse != merged[1]] <= lse_error[lse != merged[1]]).all()


def test_weights_are_those_of_the_output() -> None:
    arguments = tensors() | {name: value for name, value in every_option().items() if "dropout" not in name}
    weights = reference.attention_weights(**{name: value for name, value in arguments.items() if name != "value"})
    output = weights @ numpy.repeat(arguments["value"], HEADS // KV_HEADS, axis=1)
    assert (abs(output - reference.attention(**arguments)) <= 2 * within("attention", arguments)["output"]).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_results_have_the_dtypes_of_their_operands(dtype: str) -> None:
    import ml_dtypes

    stored_dtype = numpy.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arguments = {name: array.astype(stored_dtype) for name, array in tensors().items()}
    options = {"bias": numbers(1, HEADS, Q_LEN, 1), "sinks": numbers(HEADS).astype("float32")}
    output, lse = reference.attention(**arguments, **options, return_lse=True)
    gradients = reference.attention_vjp(output, **arguments, **options)
    assert dtype_name(output) == dtype
    assert dtype_name(lse) == ("float64" if dtype == "float64" else "float32")
    assert [dtype_name(gradient) for gradient in gradients] == [dtype, dtype, dtype, "float64", "float32"]
    operands = (*arguments.values(), *options.values())
    assert [gradient.shape for gradient in gradients] == [operand.shape for operand in operands]


def test_steps_can_be_replaced_by_name() -> None:
    arguments, mask = tensors(), numpy.tri(Q_LEN, KV_LEN, dtype=bool)[None, None]
    inverted = reference.Reference(replace(Steps(), see_mask=lambda mask: ~mask))
    assert numpy.array_equal(inverted.attention(**arguments, mask=mask), reference.attention(**arguments, mask=~mask))
    assert not numpy.array_equal(
        inverted.attention(**arguments, mask=mask), reference.attention(**arguments, mask=mask)
    )


@pytest.mark.parametrize("library", ["numpy", *LIBRARIES])
@pytest.mark.parametrize(
    ("q_ids", "kv_ids", "equal"),
    [
        (numpy.uint32(2**32 - 1), numpy.int32(-1), False),
        (numpy.uint32(2**32 - 1), numpy.int64(2**32 - 1), True),
        (numpy.int8(-1), numpy.uint32(2**32 - 1), False),
        (numpy.uint64(2**64 - 1), numpy.int64(-1), False),
        (numpy.uint8(255), numpy.int8(-1), False),
        (numpy.uint8(200), numpy.int16(200), True),
        (numpy.int64(2**32), numpy.int64(0), False),
        (numpy.uint64(2**63), numpy.uint64(2**63), True),
    ],
    ids=str,
)
def test_segment_ids_are_equal_by_value(library: str, q_ids: numpy.integer, kv_ids: numpy.integer, equal: bool) -> None:
    convert = (lambda array: array) if library == "numpy" else converter(library)
    tokens = numbers(BATCH, 1, Q_LEN, QK_DIM).astype("float32")
    with set_up(library):
        x = convert(tokens)
        for of_queries, of_keys in ((True, True), (True, False), (False, True)):
            q_segment_ids, kv_segment_ids = (
                convert(numpy.full((BATCH, Q_LEN), value)) if is_array else numpy.full((BATCH, Q_LEN), value)
                for value, is_array in ((q_ids, of_queries), (kv_ids, of_keys))
            )
            output = reference.attention(x, x, x, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids)
            assert to_numpy(output).any() == equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_bias_hides_by_its_value_after_the_conversion(dtype: str) -> None:
    import ml_dtypes

    stored_dtype = numpy.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arguments = {name: array.astype(stored_dtype) for name, array in tensors().items()}
    bias = numpy.zeros((1, 1, 1, KV_LEN))
    bias[..., 2] = -1e300
    hides = dtype != "float64"
    weights = reference.attention_weights(arguments["query"], arguments["key"], bias=bias)
    alone = reference.attention_weights(arguments["query"], arguments["key"], bias=numpy.full_like(bias, -1e300))
    assert not weights[..., 2].any()
    assert alone.astype("float64").any() != hides


def test_a_bias_that_converts_to_minus_infinity_hides() -> None:
    arguments = {name: array.astype("float32") for name, array in tensors().items()}
    arguments["value"][:, :, 2] = arguments["key"][:, :, 2] = numpy.nan
    bias = numpy.zeros((1, 1, 1, KV_LEN))
    bias[..., 2] = -1e300
    hidden = reference.attention(**arguments, bias=numpy.where(bias < 0, -numpy.inf, bias))
    assert numpy.isfinite(hidden).all()
    assert numpy.array_equal(reference.attention(**arguments, bias=bias), hidden)
