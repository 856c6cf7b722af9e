"""Packed and paged attention: each sequence is a separate call of attention (MHA-VARLEN-1 to MHA-VARLEN-12)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.comparisons import assert_equal, assert_near, assert_same
from support.libraries import MODULES, converted, with_float64
from support.numbers import numbers
from support.varlen import BLOCK_SIZE, HEADS, KV_HEADS, Q_LENGTHS, QK_DIM, V_DIM, cotangents, packed, paged, separate

import mha_spec
from mha_spec import ArgumentTypeError, ArgumentValueError, reference
from mha_spec.arrays import dtype_name
from mha_spec.varlen_checks import varlen_arguments
from mha_spec.varlen_sequences import sequences_of
from mha_spec_conformance.targets.conversion import to_library, to_numpy

if TYPE_CHECKING:
    from collections.abc import Iterator

    Call = dict[str, Any]

COMPILED = {
    "test_types_are_those_of_attention",
    "test_a_call_without_sequences_is_empty",
    "test_a_pool_without_blocks_is_legal",
    "test_nothing_crosses_sequences",
    "test_an_error_names_the_argument_and_the_fix",
    "test_wrong_cotangents_are_refused",
}
"""The tests that ask JAX too, which compiles a program for every choice of options in seconds."""

NAN, INF = numpy.nan, numpy.inf
INTEGERS = ("cu_seqlens_q", "cu_seqlens_kv", "block_table", "seqused_kv", "q_offset")
SINKS, SLOPES = numbers(HEADS, seed=8), abs(numbers(HEADS, seed=9))
SINKS[2] = -INF

OPTIONS: dict[str, Call] = {
    "plain": {},
    "causal": {"causal": True, "q_offset": "lower_right"},
    "upper_left": {"causal": True, "q_offset": "upper_left"},
    "one_offset": {"causal": True, "q_offset": 2},
    "offsets": {"causal": True, "q_offset": numpy.array([2, 0, -1, 8, 1], "int32")},
    "window": {"window": (2, 1), "q_offset": "lower_right"},
    "scale": {"scale": -0.7, "softcap": 1.3},
    "sinks": {"sinks": SINKS},
    "slopes": {"alibi_slopes": SLOPES, "q_offset": "lower_right"},
    "all": {
        "causal": True,
        "window": (4, None),
        "q_offset": "lower_right",
        "scale": 0.6,
        "softcap": 2.1,
        "sinks": SINKS,
        "alibi_slopes": SLOPES,
        "max_seqlen_q": 5,
        "max_seqlen_kv": 13,
    },
}


def equal() -> Call:
    """Return a call with sequences of equal lengths, three and then two, and tokens of no sequence."""
    return packed(cu_seqlens_q=numpy.array([0, 3, 6, 9, 10, 11]), cu_seqlens_kv=numpy.array([0, 5, 10, 15, 19, 23]))


def gaps() -> Call:
    """Return a call with sequences of equal lengths, between which lie keys that are not in use."""
    return equal() | {"seqused_kv": numpy.array([4, 4, 4, 4, 4])}


def full_before_unused() -> Call:
    """Return a call with sequences of equal lengths, the first of which uses all of its keys."""
    return equal() | {"cu_seqlens_kv": numpy.array([0, 3, 8, 10, 15, 20]), "seqused_kv": numpy.array([3, 3, 2, 4, 4])}


def whole() -> Call:
    """Return a call whose sequences all have equal lengths, and have every query."""
    call = packed(cu_seqlens_q=numpy.array([0, 5, 10, 15]), cu_seqlens_kv=numpy.array([0, 7, 14, 21]))
    return call | {"query": numbers(15, HEADS, QK_DIM)}


CALLS = {"packed": packed, "used": lambda: packed(seqused_kv=numpy.array([5, 1, 0, 9, 2])), "paged": paged}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the modules that a test asks."""
    if "module" in metafunc.fixturenames:
        modules = [name for name in MODULES if name != "mha_spec_jax" or metafunc.function.__name__ in COMPILED]
        metafunc.parametrize("module", modules, indirect=True)


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name a module that has the functions."""
    with with_float64(MODULES[request.param]):
        yield request.param


def call_of(module: str, call: Call, dtype: str = "float64", *, integers: str = "numpy") -> Any:
    """Call varlen_attention, or with cotangents varlen_attention_vjp too, and return all results."""
    functions, library = importlib.import_module(module), MODULES[module]
    arrays = {name: x for name, x in call.items() if isinstance(x, numpy.ndarray)}
    moved = converted({name: x for name, x in arrays.items() if name not in INTEGERS}, library, dtype)
    moved |= {name: to_library(x, integers) for name, x in arrays.items() if name in INTEGERS}
    arguments = call | moved
    cotangent = {name: arguments.pop(name) for name in ("grad_output", "grad_lse") if name in arguments}
    results = functions.varlen_attention(return_lse=True, **arguments)
    if not cotangent:
        return results
    *gradients, of_sinks = functions.varlen_attention_vjp(**cotangent, **arguments)
    return (*results, *gradients, *(() if of_sinks is None else (of_sinks,)))


def expected_of(module: str, call: Call) -> Any:
    return [converted(x, MODULES[module], "float64") for x in separate(call) if x is not None]


def check(module: str, call: Call) -> None:
    """Require the results of separate calls, nearer than those in float32."""
    assert_same(lambda dtype: call_of(module, call, dtype), expected_of(module, call))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_sequence_is_a_separate_call(module: str, layout: Any, options: Call) -> None:
    call = layout() | options
    check(module, call | cotangents(call))


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_sequences_may_have_the_same_number_of_queries(module: str, layout: Any) -> None:
    check(module, layout() | {"cu_seqlens_q": numpy.array([0, 2, 4, 6, 8, 10])} | OPTIONS["all"])


@pytest.mark.parametrize("options", ["plain", "causal", "sinks", "all"])
@pytest.mark.parametrize("layout", [equal, gaps, full_before_unused, whole])
def test_consecutive_sequences_may_have_equal_lengths(module: str, layout: Any, options: str) -> None:
    call = layout() | OPTIONS[options]
    check(module, call | cotangents(call))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_are_those_of_attention(module: str, dtype: str) -> None:
    call = paged() | OPTIONS["all"]
    output, lse, *gradients = call_of(module, call | cotangents(call), dtype)
    assert [dtype_name(x) for x in (output, lse, *gradients)] == [dtype, "float32", *[dtype] * 4]
    rounded = call | {
        name: to_numpy(x)
        for name, x in converted(
            {name: x for name, x in call.items() if isinstance(x, numpy.ndarray) and x.dtype == float}, "numpy", dtype
        ).items()
    }
    exact = separate(
        {
            name: x.astype(float) if isinstance(x, numpy.ndarray) and name not in INTEGERS else x
            for name, x in rounded.items()
        }
    )
    numpy.testing.assert_allclose(to_numpy(lse).astype(float), exact[1], rtol=1e-5, atol=1e-5)


def test_a_call_without_sequences_is_empty(module: str) -> None:
    call = packed(cu_seqlens_q=numpy.array([0]), cu_seqlens_kv=numpy.array([0]), sinks=SINKS)
    output, lse, *gradients = map(to_numpy, call_of(module, call | cotangents(call)))
    assert (output == 0).all()
    assert (lse == -INF).all()
    assert all((gradient == 0).all() for gradient in gradients)


def test_arrays_without_tokens_are_legal(module: str) -> None:
    call = packed(query=numbers(0, HEADS, QK_DIM), key=numbers(0, KV_HEADS, QK_DIM), value=numbers(0, KV_HEADS, V_DIM))
    call |= {"cu_seqlens_q": numpy.zeros(3, int), "cu_seqlens_kv": numpy.zeros(3, int)}
    check(module, call | cotangents(call))


def test_a_pool_without_blocks_is_legal(module: str) -> None:
    call = paged(
        lengths=(0,) * 5, key=numbers(0, BLOCK_SIZE, KV_HEADS, QK_DIM), value=numbers(0, BLOCK_SIZE, KV_HEADS, V_DIM)
    )
    check(module, call | {"sinks": SINKS} | cotangents(call))


@pytest.mark.parametrize("layout", [*CALLS.values(), equal], ids=[*CALLS, "equal"])
def test_nothing_crosses_sequences(module: str, layout: Any) -> None:
    call = layout() | {"causal": True, "q_offset": "lower_right"} | ({} if layout is equal else {"sinks": SINKS})
    if layout is paged:  # Sequence 0 shares a block with others.
        call["block_table"] = numpy.array([[1, 3, -1], *call["block_table"][1:].tolist()], "int32")
        call["key"], call["value"] = (numbers(*call[name].shape) for name in ("key", "value"))
    call |= cotangents(call)
    clean, rows = expected_of(module, call), slice(0, Q_LENGTHS[0])
    for name in ("query", "key", "value", "grad_output"):
        array = call[name] = call[name].copy()
        array[([1, 3],) if layout is paged and name in ("key", "value") else slice(0, 3)] = NAN
    poisoned = call_of(module, call)
    for index, (result, wanted) in enumerate(zip(poisoned[:5], clean[:5], strict=True)):
        own = (slice(None), rows) if index == 1 else [1, 3] if layout is paged and index in (3, 4) else slice(0, 5)
        others = [to_numpy(array).copy() for array in (result, wanted)]
        for array in others:
            array[own] = 0
        assert_near(*others)


def test_shared_and_repeated_blocks_have_the_sum_of_gradients(module: str) -> None:
    call = paged(lengths=(8, 4, 0, 12, 3))
    assert sorted(call["block_table"][[0, 3], 0]) == [6, 6]
    assert call["block_table"][3].tolist() == [6, 0, 0]
    check(module, call | cotangents(call))


def test_integers_of_the_library_are_clamped() -> None:
    torch = pytest.importorskip("torch")
    call = packed(seqused_kv=[9, -3, 0, 2**31 - 1, 1])
    clamped = packed(cu_seqlens_q=[0, 3, 3, 8, 15, 15], cu_seqlens_kv=[0, 5, 9, 9, 29, 29], seqused_kv=[5, 0, 0, 20, 0])
    wild = {"cu_seqlens_q": [-4, 3, 2, 8, 99, 1], "cu_seqlens_kv": [0, 5, 9, -9, 2**40, 3]}
    tensors = {name: torch.tensor(value) for name, value in (call | wild).items()}
    for name in ("query", "key", "value"):
        clamped[name] = numbers(*call[name].shape)
        tensors[name] = torch.tensor(clamped[name])
    assert_near(to_numpy(reference.varlen_attention(**tensors)), separate(clamped)[0])


@pytest.mark.parametrize(
    ("table", "clamped"),
    [
        (
            [[6, 99, -1], [5, 0, 0], [0, 0, 0], [-6, 0, 0], [2, 0, 0]],
            [[6, 7, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0], [2, 0, 0]],
        )
    ],
)
def test_blocks_of_the_library_are_clamped(table: Any, clamped: Any) -> None:
    torch = pytest.importorskip("torch")
    call = paged(key=numbers(8, BLOCK_SIZE, KV_HEADS, QK_DIM), value=numbers(8, BLOCK_SIZE, KV_HEADS, V_DIM))
    tensors = {name: x if x is None else torch.tensor(x) for name, x in (call | {"block_table": table}).items()}
    tensors["seqused_kv"] = torch.tensor([5, 1, -7, 99, 2])
    wanted = call | {"block_table": numpy.array(clamped), "seqused_kv": [5, 1, 0, 12, 2]}
    assert_near(to_numpy(reference.varlen_attention(**tensors)), separate(wanted)[0])


def test_a_hint_changes_nothing(module: str) -> None:
    call = packed(causal=True, q_offset="lower_right")
    results = call_of(module, call | {"max_seqlen_q": 5, "max_seqlen_kv": 10**6})
    assert_equal(results, call_of(module, call))
    assert_near(results, expected_of(module, call))


def test_equal_lengths_need_no_offset(module: str) -> None:
    bounds = packed()["cu_seqlens_q"]
    call = packed(cu_seqlens_kv=bounds.copy(), causal=True)
    results = call_of(module, call)
    assert_equal(results, call_of(module, call | {"q_offset": "lower_right"}))
    assert_near(results, expected_of(module, call))


def test_one_array_of_a_library_for_both_bounds_needs_no_offset() -> None:
    torch = pytest.importorskip("torch")
    call = {name: torch.tensor(packed()[name]) for name in ("query", "key", "value", "cu_seqlens_q")}
    bounds = call["cu_seqlens_q"]
    ours = reference.varlen_attention(**call, cu_seqlens_kv=bounds, causal=True)
    assert_near(to_numpy(ours), separate(packed(cu_seqlens_kv=bounds.numpy(), causal=True))[0])
    with pytest.raises(ArgumentValueError, match="MHA-VARLEN-5"):
        reference.varlen_attention(**call, cu_seqlens_kv=bounds.clone(), causal=True)


@pytest.mark.parametrize(
    ("layout", "changed", "error", "fragments"),
    [
        (packed, {"query": numbers(2, 3, 5, 7)}, ArgumentValueError, ["`query`", "rank 3", "(2, 3, 5, 7)", "VARLEN-1"]),
        (packed, {"key": numbers(29, 4, KV_HEADS, QK_DIM)}, ArgumentValueError, ["`key`", "rank 3", "VARLEN-1"]),
        (
            paged,
            {"key": numbers(29, KV_HEADS, QK_DIM)},
            ArgumentValueError,
            ["`key`", "rank 4", "block_table", "VARLEN-6"],
        ),
        (packed, {"value": numbers(28, KV_HEADS, V_DIM)}, ArgumentValueError, ["`value`", "(28, 3, 5)", "SHAPE-3"]),
        (packed, {"key": numbers(29, KV_HEADS, 8)}, ArgumentValueError, ["`key`", "qk_dim=7", "SHAPE-3"]),
        (
            packed,
            {"key": numbers(29, 4, QK_DIM), "value": numbers(29, 4, V_DIM)},
            ArgumentValueError,
            ["heads=6", "HEAD-2"],
        ),
        (
            packed,
            {"value": numbers(29, KV_HEADS, V_DIM).astype("float32")},
            ArgumentTypeError,
            ["`value`", "float64", "float32"],
        ),
        (packed, {"cu_seqlens_q": None}, ArgumentTypeError, ["`cu_seqlens_q`", "None", "VARLEN-2"]),
        (packed, {"cu_seqlens_q": 3}, ArgumentTypeError, ["`cu_seqlens_q`", "3 of type int", "VARLEN-2"]),
        (packed, {"cu_seqlens_q": []}, ArgumentValueError, ["`cu_seqlens_q`", "(0,)", "VARLEN-2"]),
        (
            packed,
            {"cu_seqlens_q": numpy.zeros((2, 3), int)},
            ArgumentValueError,
            ["`cu_seqlens_q`", "(2, 3)", "VARLEN-2"],
        ),
        (packed, {"cu_seqlens_q": numpy.zeros(6)}, ArgumentTypeError, ["`cu_seqlens_q`", "float64", "VARLEN-2"]),
        (packed, {"cu_seqlens_q": [1, 3, 3, 8, 9, 11]}, ArgumentValueError, ["cu_seqlens_q[0]=0", "=1", "VARLEN-2"]),
        (
            packed,
            {"cu_seqlens_q": [0, 3, 2, 8, 9, 11]},
            ArgumentValueError,
            ["cu_seqlens_q[2]>=cu_seqlens_q[1]=3", "=2"],
        ),
        (packed, {"cu_seqlens_q": [0, 3, 3, 8, 9, 16]}, ArgumentValueError, ["cu_seqlens_q[5]<=q_tokens=15", "=16"]),
        (
            packed,
            {"cu_seqlens_kv": [0, 5, 9, 9, 20, 30]},
            ArgumentValueError,
            ["cu_seqlens_kv[5]<=kv_tokens=29", "=30"],
        ),
        (
            paged,
            {"cu_seqlens_kv": [0, 5, 9, 9, 20, 10**30]},
            ArgumentValueError,
            ["cu_seqlens_kv[5]<=2**53", "=1000000", "VARLEN-2"],
        ),
        (packed, {"cu_seqlens_kv": [0, 5]}, ArgumentValueError, ["`cu_seqlens_kv`", "(6,)", "(2,)", "VARLEN-2"]),
        (packed, {"cu_seqlens_kv": None}, ArgumentTypeError, ["`cu_seqlens_kv`", "block_table", "VARLEN-2"]),
        (packed, {"seqused_kv": [5, 5, 0, 1, 1]}, ArgumentValueError, ["seqused_kv[1]<=4", "=5", "VARLEN-4"]),
        (packed, {"seqused_kv": [5, -1, 0, 1, 1]}, ArgumentValueError, ["seqused_kv[1]", "=-1", "VARLEN-4"]),
        (packed, {"seqused_kv": [5, 1]}, ArgumentValueError, ["`seqused_kv`", "(5,)", "(2,)", "VARLEN-4"]),
        (paged, {"seqused_kv": [5, 1, 0, 13, 2]}, ArgumentValueError, ["seqused_kv[3]<=12", "=13", "VARLEN-4"]),
        (
            paged,
            {"seqused_kv": None, "cu_seqlens_kv": [0, 5, 6, 6, 19, 20]},
            ArgumentValueError,
            ["`block_table`", "sequence 3", "=13"],
        ),
        (paged, {"seqused_kv": [5, 5, 0, 9, 2]}, ArgumentValueError, ["block_table[1, 1]<blocks=8", "-1", "VARLEN-6"]),
        (paged, {"block_table": numpy.zeros((5, 3))}, ArgumentTypeError, ["`block_table`", "float64", "VARLEN-6"]),
        (
            paged,
            {"block_table": numpy.zeros((4, 3), int)},
            ArgumentValueError,
            ["`block_table`", "(5, 3)", "(4, 3)", "VARLEN-6"],
        ),
        (paged, {"block_table": numpy.zeros(5, int)}, ArgumentValueError, ["`block_table`", "(5,)", "VARLEN-6"]),
        (paged, {"block_table": [[0]] * 5}, ArgumentTypeError, ["`block_table`", "list", "VARLEN-6"]),
        (
            paged,
            {"key": numbers(8, 0, KV_HEADS, QK_DIM), "value": numbers(8, 0, KV_HEADS, V_DIM)},
            ArgumentValueError,
            ["block_size>=1"],
        ),
        (packed, {"max_seqlen_q": 4}, ArgumentValueError, ["max_seqlen_q>=5", "=4", "VARLEN-10"]),
        (packed, {"max_seqlen_kv": 10}, ArgumentValueError, ["max_seqlen_kv>=11", "=10", "VARLEN-10"]),
        (packed, {"max_seqlen_q": 5.0}, ArgumentTypeError, ["`max_seqlen_q`", "5.0", "VARLEN-10"]),
        (
            packed,
            {"causal": True},
            ArgumentValueError,
            ["`q_offset`", "causal=True", "lower_right", "upper_left", "VARLEN-5"],
        ),
        (
            packed,
            {"window": (3, 3)},
            ArgumentValueError,
            ["`q_offset`", "window=(3, 3)", "3 queries and 5 keys of sequence 0"],
        ),
        (packed, {"alibi_slopes": SLOPES}, ArgumentValueError, ["`q_offset`", "alibi_slopes", "VARLEN-5"]),
        (packed, {"causal": True, "q_offset": "left"}, ArgumentValueError, ["`q_offset`", "'left'", "POS-2"]),
        (packed, {"causal": True, "q_offset": [1, 2]}, ArgumentValueError, ["`q_offset`", "(5,)", "(2,)", "VARLEN-5"]),
        (packed, {"causal": True, "q_offset": [0, 0, 0, 2**31, 0]}, ArgumentValueError, ["`q_offset`", "2**30"]),
        (
            packed,
            {"alibi_slopes": SLOPES[:3], "q_offset": 0},
            ArgumentValueError,
            ["`alibi_slopes`", "(6,)", "(3,)", "VARLEN-8"],
        ),
        (
            packed,
            {"alibi_slopes": numpy.arange(6), "q_offset": 0},
            ArgumentTypeError,
            ["`alibi_slopes`", "int64", "VARLEN-8"],
        ),
        (packed, {"sinks": SINKS[:3]}, ArgumentValueError, ["`sinks`", "(6,)", "(3,)", "SINK-1"]),
        (packed, {"softcap": 0.0}, ArgumentValueError, ["`softcap`", "ARG-2"]),
        (packed, {"window": 3}, ArgumentTypeError, ["`window`", "ARG-3"]),
        (packed, {"return_lse": 1}, ArgumentTypeError, ["`return_lse`", "ARG-2"]),
        (packed, {"mask": None}, ArgumentTypeError, ["`mask` is not an option of varlen_attention", "ARG-1"]),
        (packed, {"max_seqlen_k": 3}, ArgumentTypeError, ["`max_seqlen_k`", "Did you mean `max_seqlen_kv`?", "ARG-1"]),
    ],
)
def test_an_error_names_the_argument_and_the_fix(
    module: str, layout: Any, changed: Call, error: Any, fragments: list[str]
) -> None:
    call = layout() | changed
    library = MODULES[module]
    moved = {
        name: to_library(x, library) if isinstance(x, numpy.ndarray) and name not in INTEGERS else x
        for name, x in call.items()
    }
    with pytest.raises(error) as caught:
        importlib.import_module(module).varlen_attention(**moved)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"grad_output": numbers(15, HEADS, 4)}, "grad_output"),
        ({"grad_lse": numbers(15, HEADS)}, "grad_lse"),
        ({"return_lse": True}, "return_lse"),
    ],
)
def test_wrong_cotangents_are_refused(module: str, changed: Call, fragment: str) -> None:
    call = packed()
    arguments = call | cotangents(call) | changed
    moved = {
        name: to_library(x, MODULES[module]) if isinstance(x, numpy.ndarray) and name not in INTEGERS else x
        for name, x in arguments.items()
    }
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=fragment):
        importlib.import_module(module).varlen_attention_vjp(**moved)


def test_numpy_scalars_count_as_numbers(module: str) -> None:
    scalars = {
        "causal": numpy.bool_(True),
        "q_offset": numpy.int64(2),
        "scale": numpy.float64(0.3),
        "max_seqlen_q": numpy.int32(5),
    }
    plain = {"causal": True, "q_offset": 2, "scale": 0.3, "max_seqlen_q": 5}
    assert_equal(call_of(module, packed(**scalars), "float32"), call_of(module, packed(**plain), "float32"))
    check(module, packed(**scalars))


@pytest.mark.parametrize("name", ["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
@pytest.mark.parametrize("layout", [packed, paged])
def test_a_strict_library_of_the_array_api_has_the_same_results(name: str, layout: Any) -> None:
    xp = pytest.importorskip("array_api_strict")
    functions, call = importlib.import_module(name), layout() | OPTIONS["all"]
    expected = separate(call | cotangents(call))
    strict, cotangent = (
        {label: xp.asarray(x) if isinstance(x, numpy.ndarray) else x for label, x in arguments.items()}
        for arguments in (call, cotangents(call))
    )
    results = functions.varlen_attention(**strict, return_lse=True)
    results = (*results, *functions.varlen_attention_vjp(**cotangent, **strict))
    assert all(type(result) is type(strict["query"]) for result in results)
    assert_near([numpy.asarray(result) for result in results], expected)


def test_sequences_are_read_without_a_library() -> None:
    call = paged()
    tensors = [call[name] for name in ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")]
    options = {"block_table": call["block_table"], "seqused_kv": call["seqused_kv"].tolist(), "q_offset": "lower_right"}
    sequences = sequences_of(varlen_arguments("varlen_attention", options, *tensors))
    assert [len(sequence.queries) for sequence in sequences] == list(Q_LENGTHS)
    assert [sequence.offset for sequence in sequences] == [2, 1, -5, 8, 0]
    assert [sequence.block_numbers for sequence in sequences] == [[6, 2], [5], [], [6, 0, 0], [2]]


def test_inputs_are_not_written_to(module: str) -> None:
    call = paged() | OPTIONS["all"]
    call |= cotangents(call)
    before = {name: x.copy() for name, x in call.items() if isinstance(x, numpy.ndarray)}
    call_of(module, call)
    for name, array in before.items():
        assert numpy.array_equal(call[name], array, equal_nan=array.dtype.kind == "f")


def test_strides_do_not_matter(module: str) -> None:
    call = packed(**OPTIONS["all"])
    strided = {name: numpy.asfortranarray(call[name][::-1])[::-1] for name in ("query", "key", "value")}
    check(module, call | strided)


def test_the_public_functions_are_those_of_the_backend() -> None:
    assert {"varlen_attention", "varlen_attention_vjp"} <= set(mha_spec.__all__)
    call = paged() | OPTIONS["all"]
    arguments = call | {name: x for name, x in cotangents(call).items() if name == "grad_output"}
    module = importlib.import_module("mha_spec_numpy")
    assert_equal(mha_spec.varlen_attention(**call), module.varlen_attention(**call))
    assert_equal(mha_spec.varlen_attention_vjp(**arguments), module.varlen_attention_vjp(**arguments))
