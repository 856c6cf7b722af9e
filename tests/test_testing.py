"""The assertions for the tests of others: right implementations pass, planted errors are caught and described."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy
import pytest
from support.layouts import Kernel
from support.numbers import numbers

from mha_spec.arrays import FLOATING
from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec_conformance.judging.bounds import allowances, bounds, precision
from mha_spec_conformance.judging.indices import described_indices
from mha_spec_conformance.targets.conversion import to_library, to_numpy
from mha_spec_conformance.targets.layouts import Pages, Tokens
from mha_spec_conformance.testing import allowance, assert_attention, assert_attention_vjp, assert_rotary
from mha_spec_conformance.testing.columns import gradients_of_keys
from mha_spec_conformance.testing.problem import read_problem

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 131, 137, 11, 13
LARGE = 1031
"""A number of tokens from which rows are sampled."""


def drawn(*shape: int, dtype: str = "float32") -> numpy.ndarray:
    return numbers(*shape).astype(dtype)


def operands(q_len: int = Q_LEN, kv_len: int = KV_LEN, dtype: str = "float32") -> dict[str, Any]:
    return {
        "query": drawn(BATCH, HEADS, q_len, QK_DIM, dtype=dtype),
        "key": drawn(BATCH, KV_HEADS, kv_len, QK_DIM, dtype=dtype),
        "value": drawn(BATCH, KV_HEADS, kv_len, V_DIM, dtype=dtype),
    }


def mask_of(q_len: int = Q_LEN, kv_len: int = KV_LEN) -> numpy.ndarray:
    return numpy.random.default_rng(5).random((BATCH, 1, q_len, kv_len)) < 0.7


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": mask_of()},
    "causal": {"causal": True, "q_offset": "lower_right"},
    "window": {"window": (17, 3), "q_offset": [2, -5], "softcap": 3.0, "scale": 0.5},
    "lengths": {"q_lengths": [131, 64], "kv_lengths": [64, 0], "causal": True, "q_offset": 7},
    "prefix": {"causal": True, "q_offset": [3, -4], "prefix_lengths": [70, 101], "window": (40, None)},
    "chunk": {"causal": True, "q_offset": 5, "chunk": 29, "kv_starts": [67, 3]},
    "segments": {
        "q_segment_ids": numpy.arange(BATCH * Q_LEN).reshape(BATCH, Q_LEN) // 41,
        "kv_segment_ids": numpy.arange(BATCH * KV_LEN).reshape(BATCH, KV_LEN) // 43,
    },
    "bias and sinks": {"bias": drawn(1, HEADS, Q_LEN, KV_LEN), "sinks": drawn(HEADS)},
    "dropout": {"dropout_mask": mask_of(), "dropout_rate": 0.3},
}


def result(**arguments: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    output, lse = import_module("mha_spec_numpy").attention(**arguments, return_lse=True)
    return output.copy(), lse.copy()


def separated(arrays: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all arrays of a call, then its other options, as the bounds take them."""
    values = {name: numpy.asarray(value) if isinstance(value, list) else value for name, value in options.items()}
    further = {name: value for name, value in values.items() if isinstance(value, numpy.ndarray)}
    return arrays | further, {name: value for name, value in values.items() if name not in further}


def message(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_a_right_implementation_passes_in_every_dtype_and_layout(library: str, dtype: str) -> None:
    if library == "jax" and dtype == "float64":
        pytest.skip("jax has no float64 in this process")

    arrays = {
        name: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, array in operands().items()
    }
    placed = {name: to_library(array, library) for name, array in arrays.items()}
    output, lse = import_module(f"mha_spec_{library}").attention(**placed, causal=True, q_offset=6, return_lse=True)
    used = assert_attention(output, *placed.values(), lse=lse, causal=True, q_offset=6)
    assert 0 < used <= 1
    swapped = [array.swapaxes(1, 2) for array in (output, *placed.values())]
    assert assert_attention(*swapped, lse=lse, layout="bshd", causal=True, q_offset=6) == used


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_allowances_are_those_of_the_rule(options: dict[str, Any]) -> None:
    arrays = operands()
    converted = {
        n: numpy.asarray(x)
        if n.endswith(("lengths", "starts")) or (n == "q_offset" and not isinstance(x, (str, int)))
        else x
        for n, x in options.items()
    }
    expected = allowances(
        "attention",
        arrays | {n: x for n, x in converted.items() if isinstance(x, numpy.ndarray)},
        {n: x for n, x in converted.items() if not isinstance(x, numpy.ndarray)},
        precision("float32"),
    )
    output, lse = allowance(**arrays, **options, return_lse=True)
    assert output.shape == expected["output"].shape
    numpy.testing.assert_allclose(output, expected["output"], rtol=1e-9)
    numpy.testing.assert_allclose(lse, expected["lse"], rtol=1e-9)
    output, lse = result(**arrays, **options)
    assert 0 < assert_attention(output, *arrays.values(), lse=lse, **options) <= 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_right_gradients_pass_and_have_the_allowances_of_the_rule(options: dict[str, Any]) -> None:
    arrays, grad_output = operands(), drawn(BATCH, HEADS, Q_LEN, V_DIM)
    grad_lse = drawn(BATCH, HEADS, Q_LEN)
    gradients = import_module("mha_spec_numpy").attention_vjp(grad_output, **arrays, grad_lse=grad_lse, **options)
    assert 0 < assert_attention_vjp(gradients, grad_output, *arrays.values(), grad_lse=grad_lse, **options) <= 1

    tensors = {"grad_output": grad_output, **arrays}
    problem = read_problem(tensors, {**options, "grad_lse": grad_lse}, "bhsd", "attention_vjp")
    rule = bounds("attention_vjp", *separated(tensors | {"grad_lse": grad_lse}, options))
    keys = numpy.asarray([0, 5, 63, 64, 101, 136])
    _, values = gradients_of_keys(problem, 0, 1, keys, precision("float32"))
    for name, part in values.items():
        numpy.testing.assert_allclose(part.expected, rule.values[name][0, 1, keys], atol=1e-12)
        expected = rule.allowances(precision("float32"))[name][0, 1, keys]
        numpy.testing.assert_allclose(part.allowance, expected, rtol=1e-9)


def test_a_single_wrong_row_at_the_edge_of_a_tile_is_found_in_a_large_problem() -> None:
    arrays = {
        name: drawn(*shape)
        for name, shape in (
            ("query", (1, 4, LARGE, 16)),
            ("key", (1, 2, 4 * LARGE, 16)),
            ("value", (1, 2, 4 * LARGE, 8)),
        )
    }
    output, _ = result(**arrays)
    output[:, :, 64, 3] += 0.25
    text = message(assert_attention, output, *arrays.values())
    assert "row 64, component 3" in text
    assert "compared rows: batch entry 0, all compared heads, row 64" in text


def test_rows_that_are_not_finite_or_zero_are_always_compared() -> None:
    arrays = {name: drawn(1, 2, 8 * LARGE, 4) for name in ("query", "key", "value")}
    output = numpy.zeros_like(arrays["query"])
    output[...] = result(**arrays)[0]
    output[0, 1, 3571] = numpy.nan
    assert "head 1, row 3571" in message(assert_attention, output, *arrays.values())


def test_search_for_other_places_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong layout takes thousands of tokens for heads, so that there are thousands of places to compare with."""
    arrays = operands()
    output = result(**arrays)[0]
    output = output[:, [4, 1, 2, 3, 0, 5]]
    assert "right results of head 4" in message(assert_attention, output, *arrays.values())
    monkeypatch.setattr("mha_spec_conformance.testing.likeness.SECONDS", 0.0)
    text = message(assert_attention, output, *arrays.values())
    assert "heads 0, 4" in text
    assert "right results" not in text


PLANTED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "heads exchanged": (
        lambda o, lse: (o[:, [4, 1, 2, 3, 0, 5]], lse),
        ("heads 0, 4", "right results of head 4", "MHA-HEAD-1"),
    ),
    "entries exchanged": (lambda o, lse: (o[::-1], lse), ("right results of batch entry 1",)),
    "rows shifted": (lambda o, lse: (numpy.roll(o, 1, axis=2), lse), ("right results of the row 1 before",)),
    "lse in base 2": (lambda o, lse: (o, lse / numpy.float32(numpy.log(2))), ("lse-base-2", "MHA-LSE-1", "flashinfer")),
    "a factor": (lambda o, lse: (o * numpy.float32(1.0625), lse), ("1.0625 times the expected",)),
    "a shift of lse": (lambda o, lse: (o, lse + numpy.float32(2.5)), ("plus 2.5",)),
    "zeros": (lambda o, lse: (numpy.where(numpy.arange(Q_LEN)[:, None] < 64, o, 0), lse), ("rows from 64 on", "is 0")),
    "rounded": (lambda o, lse: (o.astype("float16").astype("float32"), lse), ("MHA-ACC-1", "rounds too much")),
}


@pytest.mark.parametrize(("plant", "fragments"), PLANTED.values(), ids=PLANTED)
def test_a_planted_error_is_described(plant: Any, fragments: tuple[str, ...]) -> None:
    arrays, mask = operands(), mask_of()
    output, lse = plant(*result(**arrays, mask=mask))
    text = message(assert_attention, output, *arrays.values(), lse=lse, mask=mask)
    for fragment in fragments:
        assert fragment in text
    assert "times the allowance" in text


MISTAKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mask inverted": ({"mask": ~mask_of()}, {"mask": mask_of()}, "mask-polarity-inverted"),
    "causal ignored": ({}, {"causal": True, "q_offset": 0}, "causal-ignored"),
    "lower right": ({"causal": True, "q_offset": "lower_right"}, {"causal": True, "q_offset": 0}, "causal-lower-right"),
    "scale ignored": ({}, {"scale": 0.7}, "scale-ignored"),
    "softcap ignored": ({}, {"softcap": 0.5}, "softcap-ignored"),
    "window exclusive": (
        {"window": (16, None), "q_offset": 0},
        {"window": (17, None), "q_offset": 0},
        "window-left-exclusive",
    ),
    "lengths ignored": ({}, {"kv_lengths": [64, 99]}, "kv-lengths-ignored"),
    "starts ignored": ({}, {"kv_starts": [64, 99]}, "starts-ignored"),
    "chunk of another size": ({"chunk": 30, "q_offset": 0}, {"chunk": 29, "q_offset": 0}, "chunk-plus-one"),
    "prefix without its last key": (
        {"causal": True, "q_offset": 0, "prefix_lengths": [63, 98]},
        {"causal": True, "q_offset": 0, "prefix_lengths": [64, 99]},
        "prefix-minus-one",
    ),
}


@pytest.mark.parametrize(("made", "asked", "name"), MISTAKEN.values(), ids=MISTAKEN)
def test_a_known_mistake_is_named(made: dict[str, Any], asked: dict[str, Any], name: str) -> None:
    arrays = operands()
    output, lse = result(**arrays, **made)
    text = message(assert_attention, output, *arrays.values(), lse=lse, **asked)
    assert f"It looks like the mistake {name}, which" in text


def test_the_arguments_are_not_written_to() -> None:
    arrays = operands()
    before = {name: array.copy() for name, array in arrays.items()}
    output, _ = result(**arrays)
    message(assert_attention, output + numpy.float32(1), *arrays.values())
    for name, array in arrays.items():
        assert array.tobytes() == before[name].tobytes()
        assert array.flags.writeable


def test_hidden_garbage_of_unused_storage_must_not_show() -> None:
    arrays = operands()
    for name in ("key", "value"):
        arrays[name][:, :, 100:] = numpy.nan
    output, lse = result(**arrays, kv_lengths=[100, 100])
    assert 0 < assert_attention(output, *arrays.values(), lse=lse, kv_lengths=[100, 100]) <= 1
    output[1, 2, 3] = numpy.nan
    assert "MHA-POISON-1" in message(assert_attention, output, *arrays.values(), kv_lengths=[100, 100])


@pytest.mark.parametrize("name", ["grad_query", "grad_key", "grad_value", "grad_bias", "grad_sinks"])
def test_a_wrong_gradient_is_named(name: str) -> None:
    options = OPTIONS["bias and sinks"]
    arrays, grad_output = operands(), drawn(BATCH, HEADS, Q_LEN, V_DIM)
    gradients = [
        array.copy() for array in import_module("mha_spec_numpy").attention_vjp(grad_output, **arrays, **options)
    ]
    names = ["grad_query", "grad_key", "grad_value", "grad_bias", "grad_sinks"]
    gradients[names.index(name)] *= numpy.float32(1.5)
    text = message(assert_attention_vjp, gradients, grad_output, *arrays.values(), **options)
    assert text.startswith(f"`{name}` is wrong in")
    assert "1.5 times the expected values" in text


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_rotary_embedding(dtype: str) -> None:
    x, positions = drawn(2, 3, 67, 16, dtype=dtype), numpy.arange(67) + 1000
    output = import_module("mha_spec_numpy").rotary_embedding(x, positions)
    assert assert_rotary(output, x, positions) <= 1
    text = message(assert_rotary, output, x, positions, interleaved=True)
    assert "MHA-ROTARY-" in text
    other = import_module("mha_spec_numpy").rotary_embedding(x, positions, rotary_dim=8)
    other[..., 9] = 0
    assert "must be exactly" in message(assert_rotary, other, x, positions, rotary_dim=8)


REFUSED: dict[str, tuple[dict[str, Any], type[MhaSpecError], str]] = {
    "shape": ({"output": drawn(2, 6, 131, 12)}, ArgumentValueError, "`output` must have shape"),
    "dtype": ({"output": drawn(2, 6, 131, 13, dtype="float64")}, ArgumentTypeError, "`output` must have dtype=float32"),
    "no array": ({"output": 3}, ArgumentTypeError, "`output` must be an array"),
    "rank": ({"query": drawn(2, 3)}, ArgumentValueError, "rank 4"),
    "lse in float64": ({"lse": drawn(2, 6, 131, dtype="float64")}, ArgumentTypeError, "`lse` must have dtype=float32"),
    "layout": ({"layout": "sbhd"}, ArgumentValueError, "`layout` must be one of"),
    "profile": ({"profile": "loose"}, ArgumentValueError, "`profile` must be one of"),
    "rows": ({"rows": [131]}, ArgumentValueError, "0<=row<q_len=131"),
    "option": ({"casual": True}, ArgumentTypeError, "Did you mean `causal`"),
    "offset": ({"causal": True}, ArgumentValueError, "`q_offset` must be given"),
    "dropout": ({"dropout_rate": 0.1}, ArgumentValueError, "`dropout_mask` must be given"),
}


@pytest.mark.parametrize(("changed", "error", "fragment"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_refused(changed: dict[str, Any], error: type[MhaSpecError], fragment: str) -> None:
    arguments = {"output": drawn(2, 6, 131, 13), **operands()} | changed
    with pytest.raises(error, match=fragment.replace("(", r"\(")):
        assert_attention(**arguments)


def test_places_are_described() -> None:
    assert described_indices([3], [0, 3, 4], "row") == "row 3"
    assert described_indices([0, 3, 4], [0, 3, 4], "head") == "all compared heads"
    assert described_indices([3, 4], [0, 3, 4], "row") == "rows from 3 on"
    assert described_indices([0, 3], [0, 3, 4], "row") == "rows up to 3"
    assert described_indices([64, 128], [0, 64, 128, 129], "row") == "rows 64 to 128"
    assert described_indices([0, 64, 128], [0, 1, 64, 65, 128], "row") == "rows 0 modulo 2"
    assert described_indices([1, 64], [0, 1, 2, 64, 65], "batch entry") == "batch entries 1, 64"


def test_the_import_needs_no_framework() -> None:
    names = ("torch", "jax", "tensorflow", "hypothesis")
    code = f"import sys, mha_spec_conformance.testing; print([n for n in {names} if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


def test_arrays_of_a_framework_are_read() -> None:
    arrays = {name: to_library(array, "torch") for name, array in operands().items()}
    output = import_module("mha_spec_torch").attention(**arrays)
    assert isinstance(to_numpy(output), numpy.ndarray)
    assert assert_attention(output.requires_grad_(), *arrays.values()) <= 1


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (1, 1, 1)])
def test_empty_and_tiny_problems_pass(shape: tuple[int, int, int]) -> None:
    batch, q_len, kv_len = shape
    arrays = {
        "query": drawn(batch, 2, q_len, 7),
        "key": drawn(batch, 2, kv_len, 7),
        "value": drawn(batch, 2, kv_len, 7),
    }
    output, lse = result(**arrays)
    assert assert_attention(output, *arrays.values(), lse=lse) <= 1
    assert assert_attention(output, *arrays.values(), rows=[]) == 0
    gradients = import_module("mha_spec_numpy").attention_vjp(arrays["query"], **arrays)
    assert assert_attention_vjp(gradients, arrays["query"], *arrays.values()) <= 1
    assert numpy.shape(allowance(**arrays)) == output.shape


LENGTHS = {"q": (7, 0, 131, 3), "kv": (13, 5, 97, 2)}
CAUSAL = {"causal": True, "q_offset": "lower_right"}


def packed(layout: str) -> tuple[dict[str, Any], dict[str, Any], Tokens]:
    """Return query, key, value and grad_output in a layout, its arguments, and the storage of the queries."""
    dense = {
        "query": drawn(4, HEADS, 131, QK_DIM),
        "key": drawn(4, KV_HEADS, 97, QK_DIM),
        "value": drawn(4, KV_HEADS, 97, V_DIM),
        "grad_output": drawn(4, HEADS, 131, V_DIM),
    }
    queries, tokens, pages = Tokens(LENGTHS["q"], 3), Tokens(LENGTHS["kv"], 5), Pages(LENGTHS["kv"], 16, seed=1)
    keys = tokens if layout == "thd" else pages
    arrays = {n: (keys if n in ("key", "value") else queries).store(array) for n, array in dense.items()}
    of_pages = {"block_table": pages.table, "kv_lengths": numpy.asarray(LENGTHS["kv"])}
    lengths = {"cu_seqlens_q": queries.bounds, **({"cu_seqlens_kv": tokens.bounds} if keys is tokens else of_pages)}
    return arrays, lengths, queries


@pytest.mark.parametrize("layout", ["thd", "paged"])
def test_packed_sequences_and_pages_are_compared_and_nothing_else(layout: str) -> None:
    arrays, lengths, queries = packed(layout)
    grad_output = arrays.pop("grad_output")
    sinks = drawn(HEADS)
    output, lse = Kernel().attention(**arrays, **lengths, causal=True, sinks=sinks, return_lse=True)
    options = {"layout": layout, **lengths, **CAUSAL, "sinks": sinks}
    assert numpy.isnan(output[-3:]).all()
    assert 0 < assert_attention(output, *arrays.values(), lse=lse, **options) <= 1
    assert 0 < assert_attention(output, *arrays.values(), rows=[0, 6, 130], **options) <= 1
    allowed, of_lse = allowance(**arrays, **options, return_lse=True)
    assert numpy.shape(allowed) == output.shape
    assert numpy.shape(of_lse) == lse.shape
    assert (allowed[: LENGTHS["q"][0]] > 0).all()
    assert (allowed[-3:] == 0).all()
    grad_lse = drawn(*lse.shape)
    gradients = Kernel().attention_vjp(grad_output, **arrays, **lengths, causal=True, sinks=sinks, grad_lse=grad_lse)
    gradients = [gradients[0], gradients[1], gradients[2], None, gradients[4].astype(sinks.dtype)]
    assert 0 < assert_attention_vjp(gradients, grad_output, *arrays.values(), grad_lse=grad_lse, **options) <= 1

    token = int(queries.bounds[2]) + 67
    output[token, 1] += 1
    assert "batch entry 2, head 1, row 67, all compared" in message(
        assert_attention, output, *arrays.values(), **options
    )
    key = int(lengths["cu_seqlens_kv"][3]) + 1 if layout == "thd" else (int(lengths["block_table"][3, 0]), 1)
    gradients[1][key] += 1
    text = message(assert_attention_vjp, gradients, grad_output, *arrays.values(), grad_lse=grad_lse, **options)
    assert "batch entry 3" in text
    assert "key 1" in text


def test_dense_queries_attend_to_pages() -> None:
    arrays, lengths, _ = packed("paged")
    query = drawn(4, 1, HEADS, QK_DIM)
    each = {**lengths, "cu_seqlens_q": numpy.arange(5, dtype=numpy.int32)}
    output = Kernel().attention(query[:, 0], arrays["key"], arrays["value"], **each)[:, None]
    del lengths["cu_seqlens_q"]
    assert 0 < assert_attention(output, query, arrays["key"], arrays["value"], layout="paged", **lengths) <= 1
    output[2, 0, 3, 0] += 1
    text = message(assert_attention, output, query, arrays["key"], arrays["value"], layout="paged", **lengths)
    assert "batch entry 2, head 3, row 0, component 0" in text


PACKED_REFUSED: dict[str, tuple[str, dict[str, Any], type[MhaSpecError], str]] = {
    "no bounds": ("thd", {"cu_seqlens_kv": None}, ArgumentTypeError, "`cu_seqlens_kv` must be given"),
    "bounds of another side": ("thd", {"cu_seqlens_kv": [0, 3, 4]}, ArgumentValueError, "must have 4 sequences"),
    "bounds that fall": ("thd", {"cu_seqlens_q": [0, 7, 3, 5, 9]}, ArgumentValueError, "never fall"),
    "bounds past the end": ("thd", {"cu_seqlens_q": [0, 7, 7, 138, 999]}, ArgumentValueError, "number of tokens, 144"),
    "floats": ("thd", {"cu_seqlens_q": numpy.zeros(5)}, ArgumentTypeError, "integers of rank 1"),
    "rows of different lengths": ("thd", {"cu_seqlens_q": [0, [1]]}, ArgumentTypeError, "integers of rank 1"),
    "mask": ("thd", {"mask": numpy.ones((4, 1, 1, 1), bool)}, ArgumentValueError, "`mask` must be None"),
    "lengths": ("thd", {"kv_lengths": [1, 1, 1, 1]}, ArgumentValueError, "`kv_lengths` must be None"),
    "value": ("thd", {"value": drawn(9, KV_HEADS, V_DIM)}, ArgumentValueError, "`value` must have"),
    "output": ("thd", {"output": drawn(9, HEADS, V_DIM)}, ArgumentValueError, "shape=.144, 6, 13."),
    "no table": ("paged", {"block_table": None}, ArgumentTypeError, "`block_table` must be given"),
    "table": ("paged", {"block_table": numpy.full((4, 9), 999)}, ArgumentValueError, "block<"),
    "long": ("paged", {"kv_lengths": [13, 5, 999, 2]}, ArgumentValueError, "slots of a row"),
    "key": ("paged", {"key": drawn(9, KV_HEADS, QK_DIM)}, ArgumentValueError, "`key` must be .blocks"),
    "a layout with bounds": ("bshd", {}, ArgumentTypeError, "cu_seqlens_q"),
}


@pytest.mark.parametrize(("layout", "changed", "error", "fragment"), PACKED_REFUSED.values(), ids=PACKED_REFUSED)
def test_a_wrong_argument_of_a_packed_layout_is_refused(
    layout: str, changed: dict[str, Any], error: type[MhaSpecError], fragment: str
) -> None:
    arrays, lengths, queries = packed(layout if layout == "paged" else "thd")
    del arrays["grad_output"]
    if layout == "bshd":
        arrays = {name: array[None] for name, array in arrays.items()}
    output = drawn(queries.bounds[-1] + 3, HEADS, V_DIM)
    with pytest.raises(error, match=fragment):
        assert_attention(**({"output": output, **arrays, **lengths} | changed), layout=layout)


def test_gradients_of_a_shared_page_are_refused() -> None:
    arrays, lengths, _ = packed("paged")
    grad_output = arrays.pop("grad_output")
    lengths["block_table"][1] = lengths["block_table"][0]
    gradients = (arrays["query"], arrays["key"], arrays["value"])
    with pytest.raises(ArgumentValueError, match="must not share a block"):
        assert_attention_vjp(gradients, grad_output, *arrays.values(), layout="paged", **lengths)
