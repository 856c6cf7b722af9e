"""Prefixes, chunks and padding on the left are equal to the mask that a loop over all pairs makes of their clauses."""

from __future__ import annotations

import importlib
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import array_api_strict
import jax
import numpy
import pytest
import tensorflow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparisons import assert_near
from support.libraries import converted, with_float64
from support.random_calls import ask

import mha_spec
import mha_spec_jax.plan as jax_plan
import mha_spec_numpy
import mha_spec_tensorflow.plan as tensorflow_plan
import mha_spec_torch
import mha_spec_torch.layer as torch_layer
import mha_spec_torch.visibility as torch_visibility
from mha_spec import reference
from mha_spec.arguments import Arguments
from mha_spec.checks import check
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_conformance.targets.conversion import to_numpy
from mha_spec_numpy.plan import plan_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

BATCH, KV_HEADS, GROUP, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 2, 3, 7, 11, 5, 3
FUNCTIONS = ("attention", "attention_weights", "attention_vjp")
PER_ENTRY = ("q_offset", "prefix_lengths", "kv_starts", "q_lengths", "kv_lengths", "window", "chunk", "causal")
POSITIONAL = ("causal", "window", "chunk", "prefix_lengths", "kv_starts", "q_lengths", "kv_lengths")


def floor_of(numerator: int, denominator: int) -> int:
    """Divide and round down, by subtraction alone."""
    quotient = 0
    while numerator < 0:
        numerator, quotient = numerator + denominator, quotient - 1
    while numerator >= denominator:
        numerator, quotient = numerator - denominator, quotient + 1
    return quotient


def sees(options: dict[str, Any], b: int, i: int, j: int) -> bool:
    """Decide about a single pair by the clauses (MHA-CAUSAL-1, -2, MHA-WINDOW-1 to -3, MHA-LEN-1, -2, -4)."""

    def entry(name: str, default: int) -> int:
        return default if options.get(name) is None else int(numpy.broadcast_to(options[name], BATCH)[b])

    position, start = entry("q_offset", 0) + i, entry("kv_starts", 0)
    if i >= entry("q_lengths", Q_LEN) or not start <= j < entry("kv_lengths", KV_LEN):
        return False
    if options.get("causal") and j > position and j >= entry("prefix_lengths", 0):
        return False
    left, right = options.get("window") or (None, None)
    if (left is not None and j < position - left) or (right is not None and j > position + right):
        return False
    chunk = options.get("chunk")
    return chunk is None or floor_of(position - start, chunk) == floor_of(j - start, chunk)


def equal_mask(options: dict[str, Any], q_len: int = Q_LEN, kv_len: int = KV_LEN) -> numpy.ndarray:
    pairs = [[[sees(options, b, i, j) for j in range(kv_len)] for i in range(q_len)] for b in range(BATCH)]
    return numpy.asarray(pairs, bool).reshape(BATCH, 1, q_len, kv_len)


def with_mask(options: dict[str, Any]) -> dict[str, Any]:
    """Replace all options that compare positions or indices by their mask; another mask holds, too."""
    rest = {name: x for name, x in options.items() if name not in (*POSITIONAL, "q_offset")}
    return rest | {"mask": equal_mask(options) & options.get("mask", True)}


def arrays(seed: int = 3) -> dict[str, numpy.ndarray]:
    draw = numpy.random.default_rng(seed)
    shapes = {
        "query": (BATCH, KV_HEADS * GROUP, Q_LEN, QK_DIM),
        "key": (BATCH, KV_HEADS, KV_LEN, QK_DIM),
        "value": (BATCH, KV_HEADS, KV_LEN, V_DIM),
        "grad_output": (BATCH, KV_HEADS * GROUP, Q_LEN, V_DIM),
        "grad_lse": (BATCH, KV_HEADS * GROUP, Q_LEN),
    }
    return {name: draw.standard_normal(shape) for name, shape in shapes.items()}


def per_entry(low: int, high: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(low, high), min_size=BATCH, max_size=BATCH)


@st.composite
def structures(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a call with at least one of the structured options, and any of those that they meet."""
    maybe: dict[str, st.SearchStrategy[Any]] = {
        "window": st.tuples(*[st.none() | st.integers(0, 9)] * 2),
        "chunk": st.integers(1, 13),
        "prefix_lengths": per_entry(0, KV_LEN),
        "kv_starts": per_entry(0, KV_LEN),
        "q_lengths": per_entry(0, Q_LEN),
        "kv_lengths": per_entry(0, KV_LEN),
    }
    names = draw(st.sets(st.sampled_from(sorted(maybe))))
    names |= {draw(st.sampled_from(["chunk", "prefix_lengths", "kv_starts"]))}
    options = {name: draw(maybe[name]) for name in sorted(names)}
    causal = draw(st.booleans()) or "prefix_lengths" in options
    options |= {"causal": causal, "q_offset": draw(st.integers(-6, 9) | per_entry(-6, 9))}
    if "prefix_lengths" in options and options.get("window", (0, 1))[1] == 0:
        options["window"] = (options["window"][0], None)
    return options


EXAMPLES: dict[str, dict[str, Any]] = {
    "prefix": {"causal": True, "q_offset": 0, "prefix_lengths": [5, 2]},
    "prefix and window": {"causal": True, "q_offset": 2, "prefix_lengths": [5, 9], "window": (2, None)},
    "chunk": {"chunk": 4, "q_offset": [-2, 3]},
    "causal chunk": {"chunk": 3, "causal": True, "q_offset": 1},
    "starts": {"kv_starts": [4, 0], "causal": True, "q_offset": 3},
    "starts alone": {"kv_starts": [4, 11]},
    "chunk and starts": {"chunk": 3, "causal": True, "q_offset": 2, "kv_starts": [2, 5]},
    "all": {
        "causal": True,
        "q_offset": [1, 4],
        "window": (5, 3),
        "chunk": 6,
        "prefix_lengths": [4, 9],
        "kv_starts": [2, 1],
        "q_lengths": [7, 5],
        "kv_lengths": [10, 11],
    },
}
MODULES = ["mha_spec.reference", "mha_spec_numpy"]
EAGER = ("torch", "tensorflow")
LIBRARIES = (*EAGER, "jax")
COMPILED = [
    ("jax", "attention", "chunk"),
    ("jax", "attention", "chunk and starts"),
    ("jax", "attention", "prefix and window"),
    ("jax", "attention", "starts alone"),
    ("jax", "attention_vjp", "all"),
]
"""JAX compiles a program for each of these calls, so that they are fewer."""


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def ask_library(library: str, function: str, call: dict[str, Any]) -> list[numpy.ndarray]:
    """Return the results of the backend of a library in float64; integers stay host data."""
    with with_float64(library):
        moved = {name: x if name in PER_ENTRY else converted(x, library, "float64") for name, x in call.items()}
        return [to_numpy(x) for x in ask(importlib.import_module(f"mha_spec_{library}"), function, moved).values()]


def results(module: ModuleType, function: str, options: dict[str, Any]) -> dict[str, Any]:
    return ask(module, function, arrays() | options)


def visible(options: dict[str, Any]) -> numpy.ndarray:
    a = arrays()
    arguments = Arguments(a["query"], a["key"], a["value"], **options)
    reference.Reference().steps.check(arguments)
    return numpy.broadcast_to(reference.Reference().visible(arguments), (BATCH, 1, Q_LEN, KV_LEN))


@settings(max_examples=150, deadline=None)
@given(structures())
def test_the_reference_sees_the_pairs_of_the_clauses(options: dict[str, Any]) -> None:
    numpy.testing.assert_array_equal(visible(options), equal_mask(options))


@pytest.mark.parametrize("options", EXAMPLES.values(), ids=EXAMPLES)
def test_each_structured_option_of_an_example_matters(options: dict[str, Any]) -> None:
    for name in ("chunk", "prefix_lengths", "kv_starts"):
        if name in options:
            rest = {key: x for key, x in options.items() if key != name}
            assert not numpy.array_equal(equal_mask(options), equal_mask(rest)), name


@pytest.mark.parametrize("options", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_results_are_those_of_the_mask(module: ModuleType, function: str, options: dict[str, Any]) -> None:
    expected = results(reference, function, with_mask(options))
    assert_near(list(results(module, function, options).values()), list(expected.values()))


@settings(max_examples=30, deadline=None)
@given(structures(), st.booleans(), st.booleans())
def test_the_results_of_random_calls_are_those_of_the_mask(
    options: dict[str, Any], segmented: bool, masked: bool
) -> None:
    draw = numpy.random.default_rng(7)
    if segmented:
        options = options | {"q_segment_ids": draw.integers(0, 2, (BATCH, Q_LEN))}
        options |= {"kv_segment_ids": draw.integers(0, 2, (BATCH, KV_LEN))}
    if masked:
        options = options | {"mask": draw.random((BATCH, KV_HEADS * GROUP, Q_LEN, KV_LEN)) < 0.7}
    for function in FUNCTIONS:
        expected = list(results(reference, function, with_mask(options)).values())
        assert_near(list(results(mha_spec_numpy, function, options).values()), expected)
        for library in EAGER:
            assert_near(ask_library(library, function, arrays() | options), expected)


@pytest.mark.parametrize(("library", "function", "name"), [*product(EAGER, FUNCTIONS, EXAMPLES), *COMPILED])
def test_the_results_of_a_library_are_those_of_the_mask(library: str, function: str, name: str) -> None:
    options = EXAMPLES[name]
    expected = list(results(reference, function, with_mask(options)).values())
    assert_near(ask_library(library, function, arrays() | options), expected)


@pytest.mark.parametrize(("library", "numbers"), [*product(EAGER, ([-3, 100], [5, 2**30])), ("jax", [-3, 2**30])])
@pytest.mark.parametrize("name", ["kv_starts", "prefix_lengths"])
def test_numbers_of_a_library_are_clamped_in_a_trace_and_without(library: str, name: str, numbers: list[int]) -> None:
    options, offsets = {"causal": True, "chunk": 4, "window": (5, None)}, [2, 5]
    clamped = [min(max(number, 0), KV_LEN) for number in numbers]
    host = options | {"q_offset": offsets, name: clamped}
    expected = list(results(reference, "attention_vjp", host).values())
    attention_vjp = importlib.import_module(f"mha_spec_{library}").attention_vjp

    def call(operands: dict[str, Any], offsets: Any, numbers: Any) -> list[Any]:
        return attention_vjp(**operands, **options, q_offset=offsets, **{name: numbers})[:3]

    with with_float64(library):
        operands = {operand: converted(x, library, "float64") for operand, x in arrays().items()}
        unread = [converted(numpy.asarray(x, "int32"), library, "int32") for x in (offsets, numbers)]
        got = [*traced(library, call)(operands, *unread), *call(operands, *unread), *call(operands, offsets, unread[1])]
    assert_near([to_numpy(x) for x in got], expected * 3)


def traced(library: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of arrays by the means of their library."""
    if library == "torch":
        return torch.compile(function, backend="eager", fullgraph=True)
    return jax.jit(function) if library == "jax" else tensorflow.function(function)


@pytest.mark.parametrize(("name", "on_host"), [("all", True), ("all", False), ("chunk and starts", False)])
def test_a_graph_of_unknown_sizes_has_the_same_results(name: str, on_host: bool) -> None:
    options = {**EXAMPLES[name]}
    expected = list(results(reference, "attention", options).values())
    integers = {key: x for key, x in options.items() if isinstance(x, list) and not on_host}
    rest = {key: x for key, x in options.items() if key not in integers}
    shapes = [tensorflow.TensorSpec((None, x, None, y), "float64") for x, y in ((6, 5), (2, 5), (2, 3))]
    specs = {key: tensorflow.TensorSpec((None,), "int32") for key in integers}

    def attend(query: Any, key: Any, value: Any, integers: dict[str, Any]) -> Any:
        return importlib.import_module("mha_spec_tensorflow").attention(
            query, key, value, **rest, **integers, return_lse=True
        )

    graph: Any = tensorflow.function(attend, input_signature=[*shapes, specs])
    tensors = [tensorflow.constant(arrays()[operand]) for operand in ("query", "key", "value")]
    got = graph(*tensors, {key: tensorflow.constant(x, "int32") for key, x in integers.items()})
    assert_near([x.numpy() for x in got], expected)


def test_padding_on_the_left_changes_no_result(module: ModuleType) -> None:
    """Prepending padding to queries and keys gives the same rows, ends of chunks included (MHA-LEN-4, MHA-WINDOW-3)."""
    padding, a = 4, arrays()
    options = {"causal": True, "window": (6, None), "chunk": 5, "q_offset": 3}
    expected = module.attention(a["query"], a["key"], a["value"], **options, prefix_lengths=[4, 6])
    padded = [
        numpy.concatenate([numpy.full((*x.shape[:2], padding, x.shape[3]), numpy.nan), x], axis=2)
        for x in (a["query"], a["key"], a["value"])
    ]
    starts = {"kv_starts": [padding] * BATCH, "prefix_lengths": [4 + padding, 6 + padding]}
    output = module.attention(*padded, **options, **starts)
    assert_near(output[:, :, padding:], expected)


def test_keys_before_the_start_reach_no_result(module: ModuleType) -> None:
    a, options = arrays(), EXAMPLES["chunk and starts"]
    expected = module.attention(a["query"], a["key"], a["value"], **options)
    for name in ("key", "value"):
        for b, start in enumerate(options["kv_starts"]):
            a[name][b, :, :start] = numpy.nan
    output = module.attention(a["query"], a["key"], a["value"], **options)
    numpy.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("name", ["kv_starts", "prefix_lengths"])
@pytest.mark.parametrize("numbers", [[-3, 100], [5, 2**30]])
def test_numbers_that_cannot_be_read_are_clamped(module: ModuleType, name: str, numbers: list[int]) -> None:
    options = {"causal": True, "q_offset": 2, "chunk": 4, "window": (5, None)}
    a = arrays()
    clamped = [min(max(number, 0), KV_LEN) for number in numbers]
    expected = reference.attention(a["query"], a["key"], a["value"], **options, **{name: clamped})
    tensors = [array_api_strict.asarray(a[operand]) for operand in ("query", "key", "value")]
    output = module.attention(*tensors, **options, **{name: array_api_strict.asarray(numbers)})
    assert_near(numpy.asarray(output), expected)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "chunk of 0": ({"chunk": 0, "q_offset": 0}, ArgumentValueError, "MHA-WINDOW-3"),
    "chunk beyond positions": ({"chunk": 2**30 + 1, "q_offset": 0}, ArgumentValueError, "MHA-WINDOW-3"),
    "huge chunk": ({"chunk": 10**400, "q_offset": 0}, ArgumentValueError, "MHA-WINDOW-3"),
    "chunk of a fraction": ({"chunk": 4.0, "q_offset": 0}, ArgumentTypeError, "MHA-WINDOW-3"),
    "chunk of a bool": ({"chunk": True, "q_offset": 0}, ArgumentTypeError, "MHA-WINDOW-3"),
    "chunk of an array": ({"chunk": numpy.asarray([4]), "q_offset": 0}, ArgumentTypeError, "MHA-WINDOW-3"),
    "chunk without offset": ({"chunk": 4}, ArgumentValueError, "MHA-POS-2"),
    "starts beyond": ({"kv_starts": [0, KV_LEN + 1]}, ArgumentValueError, "MHA-LEN-5"),
    "starts below": ({"kv_starts": [-1, 0]}, ArgumentValueError, "MHA-LEN-5"),
    "starts of one number": ({"kv_starts": 3}, ArgumentTypeError, "MHA-LEN-5"),
    "starts of fractions": ({"kv_starts": [1.0, 2.0]}, ArgumentTypeError, "MHA-LEN-5"),
    "starts of another batch": ({"kv_starts": [1, 2, 3]}, ArgumentValueError, "MHA-LEN-5"),
    "prefix beyond": ({"prefix_lengths": [0, 12], "causal": True, "q_offset": 0}, ArgumentValueError, "MHA-LEN-5"),
    "prefix without causal": ({"prefix_lengths": [3, 4]}, ArgumentValueError, "MHA-CAUSAL-2"),
    "prefix with window": (
        {"prefix_lengths": [3, 4], "causal": True, "q_offset": 0, "window": (4, 0)},
        ArgumentValueError,
        "MHA-CAUSAL-2",
    ),
}


@pytest.mark.parametrize(("options", "error", "clause"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused(
    module: ModuleType, options: dict[str, Any], error: type[Exception], clause: str
) -> None:
    a = arrays()
    with pytest.raises(error, match=clause):
        module.attention(a["query"], a["key"], a["value"], **options)


def test_a_numpy_integer_is_a_chunk(module: ModuleType) -> None:
    a = arrays()
    outputs = [module.attention(a["query"], a["key"], a["value"], chunk=n, q_offset=0) for n in (4, numpy.int32(4))]
    numpy.testing.assert_array_equal(*outputs)


THREE: dict[str, dict[str, Any]] = {
    "window and starts": {"window": (2, 3), "q_offset": [1, 0, 4], "kv_starts": [3, 0, 8]},
    "chunk and starts": {"chunk": 4, "q_offset": 2, "kv_starts": [3, 1, 2], "causal": True},
    "chunk and offsets": {"chunk": 3, "q_offset": [2, -1, 5], "kv_lengths": [9, 11, 7]},
    "prefix and offsets": {"causal": True, "q_offset": [0, -4, 3], "prefix_lengths": [4, 0, 9], "kv_starts": [1, 2, 0]},
    "prefix and offset": {"causal": True, "q_offset": 1, "prefix_lengths": [4, 0, 9], "q_lengths": [7, 3, 5]},
}


@pytest.mark.parametrize(
    ("library", "name"),
    [*product(["numpy", *EAGER], THREE), ("jax", "window and starts"), ("jax", "prefix and offsets")],
)
def test_a_batch_of_three_has_the_results_of_the_reference(library: str, name: str) -> None:
    """Two entries are as many as the least and the greatest number of a batch, and hide a confusion of both."""
    call = {key: x for key, x in arrays().items() if not key.startswith("grad")}
    call = {key: numpy.concatenate([x, x[:1] + 0.5]) for key, x in call.items()} | THREE[name]
    expected = list(ask(reference, "attention", call).values())
    assert_near(ask_library(library, "attention", call), expected)


@pytest.mark.parametrize("library", ["numpy", *LIBRARIES])
def test_the_layer_decodes_a_batch_that_is_padded_on_the_left(library: str) -> None:
    """Prefill in one call and decode token by token, as one call without a cache; the capacity is larger."""
    draw, length, prefill, embed = numpy.random.default_rng(2), 9, 6, 5
    shapes = {"w_q": (embed, 6, 7), "w_k": (embed, 2, 7), "w_v": (embed, 2, 3), "w_o": (6, 3, embed)}
    params = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
    x = draw.standard_normal((BATCH, length, embed))
    options = {"causal": True, "chunk": 4, "kv_starts": [3, 1], "prefix_lengths": [5, 3], "window": (3, None)}
    expected = reference.multi_head_attention(x, x, x, params, q_offset=0, **options, rotary={"rotary_dim": 6})
    with with_float64(library):
        x, params = converted(x, library, "float64"), converted(params, library, "float64")
        cache = mha_spec.KVCache.empty(BATCH, 2, 13, 7, 3, like=x)
        outputs = []
        for start, stop in ((0, prefill), *((i, i + 1) for i in range(prefill, length))):
            new = x[:, start:stop]
            output, cache = mha_spec.multi_head_attention(
                new, new, new, params, **options, rotary={"rotary_dim": 6}, cache=cache
            )
            outputs.append(to_numpy(output))
    assert_near(numpy.concatenate(outputs, axis=1), expected)


def test_decoding_in_torch_reads_no_free_slot_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts and prefixes past the tokens of a cache, but not past its slots, act as the number of tokens."""
    shapes = {"w_q": (5, 2, 4), "w_k": (5, 2, 4), "w_v": (5, 2, 3), "w_o": (2, 3, 5)}
    params = {name: torch.from_numpy(numpy.random.default_rng(1).standard_normal(x)) for name, x in shapes.items()}
    x = torch.from_numpy(numpy.random.default_rng(2).standard_normal((BATCH, 3, 5)))
    options = {
        "causal": True,
        "chunk": 2,
        "kv_starts": [1, 7],
        "prefix_lengths": [2, 9],
        "q_offset": numpy.asarray([0, 0]),
    }
    keys: list[int] = []

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        keys.append(key.shape[2])
        return mha_spec_torch.attention(query, key, value, **options)

    def call(lengths: Any) -> numpy.ndarray:
        cache = mha_spec.KVCache.empty(BATCH, 2, 9, 4, 3, like=x)
        cache = mha_spec.KVCache(cache.key, cache.value, lengths)
        return mha_spec.multi_head_attention(x, x, x, params, **options, cache=cache)[0].numpy()

    monkeypatch.setattr(torch_layer, "attention", attention)
    results = [call(lengths) for lengths in (numpy.asarray([0, 0]), torch.tensor([0, 0]))]
    assert keys == [3, 9]
    assert_near(results[:1], results[1:])
    options["kv_starts"] = [1, 10]
    with pytest.raises(ArgumentValueError, match="MHA-LEN-5"):
        call(numpy.asarray([0, 0]))


LONG: dict[str, dict[str, Any]] = {
    "prefix": {"causal": True, "q_offset": [700, 650], "prefix_lengths": [900, 1100]},
    "prefix and window": {"causal": True, "q_offset": 640, "prefix_lengths": [1000, 1040], "window": (400, None)},
    "causal chunk": {"chunk": 257, "causal": True, "q_offset": 500},
    "chunk and starts": {"chunk": 130, "q_offset": 350, "kv_starts": [411, 67]},
    "starts": {"kv_starts": [1030, 4], "causal": True, "q_offset": 600},
}


@pytest.mark.parametrize(
    ("library", "name"), [*product(["numpy", *EAGER], LONG), ("jax", "prefix and window"), ("jax", "chunk and starts")]
)
def test_long_calls_are_cut_into_blocks_that_are_right(library: str, name: str) -> None:
    options = LONG[name]
    q_len, kv_len, draw = 641, 1283, numpy.random.default_rng(5)
    call = {
        "query": draw.standard_normal((BATCH, 2, q_len, 3)),
        "key": draw.standard_normal((BATCH, 1, kv_len, 3)),
        "value": draw.standard_normal((BATCH, 1, kv_len, 2)),
        "grad_output": draw.standard_normal((BATCH, 2, q_len, 2)),
        "grad_lse": draw.standard_normal((BATCH, 2, q_len)),
    }
    mask = reference.Reference().visible(Arguments(call["query"], call["key"], call["value"], **options))
    functions = FUNCTIONS if library != "jax" else FUNCTIONS[-1:] if "prefix_lengths" in options else FUNCTIONS[:1]
    for function in functions:
        expected = ask(reference, function, call | {"mask": numpy.broadcast_to(mask, (BATCH, 1, q_len, kv_len))})
        assert_near(ask_library(library, function, call | options), list(expected.values()))


def share_of(library: str, options: dict[str, Any], length: int = 4096) -> float:
    """Return the share of the scores that a backend computes in a call of `length` queries and keys."""
    x = converted(numpy.zeros((1, 1, length, 2)), library, "float32")
    a = check(Arguments(x, x, x, **options))
    if library == "numpy":
        plan = plan_of("attention", x, x, x, options)
        tiles = [(tile, plan.visibility.key_blocks(tile, 1024)) for tile in plan.tiles]
        scores = sum(len(tile.queries) * sum(map(len, keys)) for tile, keys in tiles)
    elif library == "torch":
        scores = sum(task.pairs for task in torch_visibility.Visibility(a, torch.float32, host=True).tasks)
    elif library == "jax":
        scores = sum(group.count * group.rows * group.keys for group in jax_plan.plan_of(a)[0].groups)
    else:
        scores = sum(run.scores for run in tensorflow_plan.plan_of(tensorflow_plan.Known(a)))
    return scores / length**2


@pytest.mark.parametrize("library", ["numpy", *LIBRARIES])
@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"causal": True, "chunk": 512}, 1 / 8),
        ({"chunk": 300}, 1 / 6),
        ({"causal": True, "prefix_lengths": [1024]}, 5 / 8),
        ({"causal": True, "prefix_lengths": [1024], "window": (200, None)}, 1 / 4),
        ({"kv_starts": [3000]}, 1 / 2),
    ],
)
def test_blocks_that_no_row_sees_are_skipped(library: str, options: dict[str, Any], share: float) -> None:
    """The visible shares are 1/16, 0.072, 0.53, 0.079 and 0.27; blocks of JAX have few sizes."""
    assert share_of(library, options) <= share


@pytest.mark.parametrize("title", ["A prefix-LM", "Chunks of Llama 4", "Padding on the left"])
def test_the_examples_of_the_page_run(title: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "masks.md").read_text(encoding="utf-8")
    exec(page.partition(f"## {title}\n")[2].partition("```python\n")[2].partition("```")[0], {})
