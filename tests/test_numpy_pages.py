"""Keys in blocks of the NumPy backend: gathered a few blocks at a time, for sequences that are computed as a batch."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
import pytest
from support.comparisons import assert_equal, assert_near, assert_same
from support.numbers import numbers

import mha_spec_numpy
from mha_spec import reference
from mha_spec.varlen_checks import varlen_arguments
from mha_spec.varlen_sequences import sequences_of
from mha_spec_numpy import paged, pages
from mha_spec_numpy.paged import batches
from mha_spec_numpy.pages import Pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    Call = dict[str, Any]

HEADS, KV_HEADS, QK_DIM, V_DIM, BLOCK_SIZE = 6, 3, 5, 7, 11
LENGTHS = [0, 1, 10, 11, 12, 21, 22, 23, 43, 44, 45, 61]
"""Lengths around the borders of blocks and of the keys that are gathered at a time."""
QUERIES = {"1": [1] * 12, "2": [2] * 12, "mixed": [2, 1, 1, 2, 0, 2, 2, 40, 0, 2, 2, 5]}
OPTIONS: dict[str, Call] = {
    "plain": {},
    "causal": {"causal": True, "q_offset": "lower_right"},
    "upper left": {"causal": True, "q_offset": "upper_left"},
    "offsets": {"causal": True, "q_offset": [0, 3, -2, 5, 40, 7, 20, 21, 22, -9, 43, 1]},
    "left": {"window": (13, None), "q_offset": "lower_right"},
    "both": {"window": (24, 2), "causal": True, "q_offset": "lower_right", "softcap": 2.1, "scale": -0.7},
    "sinks": {"sinks": numbers(HEADS, seed=8)},
    "slopes": {"alibi_slopes": abs(numbers(HEADS, seed=9)), "q_offset": "lower_right"},
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gather two blocks of values in float64 at a time, and compute two queries of five sequences at a time."""
    monkeypatch.setattr(pages, "BYTES", 2 * BLOCK_SIZE * KV_HEADS * V_DIM * 8)
    monkeypatch.setattr(paged, "SCORES", 5 * HEADS * 2 * max(LENGTHS))


def call_of(queries: Sequence[int], lengths: Sequence[int] = LENGTHS, **options: Any) -> Call:
    """Return a call with blocks in any order; slots and blocks that no sequence uses hold NaN, or infinite values."""
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    order = numpy.random.default_rng(5).permutation(sum(counts) + 4).tolist()
    table = numpy.full((len(lengths), max(counts) + 1), 10**6)
    key = numpy.full((len(order), BLOCK_SIZE, KV_HEADS, QK_DIM), numpy.nan)
    value = numpy.full((len(order), BLOCK_SIZE, KV_HEADS, V_DIM), numpy.inf)
    for row, length, count in zip(table, lengths, counts, strict=True):
        row[:count] = [order.pop() for _ in range(count)]
        for position in range(length):
            slot = row[position // BLOCK_SIZE], position % BLOCK_SIZE
            key[slot], value[slot] = numbers(KV_HEADS, QK_DIM, seed=slot[0]), numbers(KV_HEADS, V_DIM, seed=position)
    query = numbers(sum(queries) + 2, HEADS, QK_DIM)
    query[-2:] = numpy.nan
    ends = numpy.cumsum([0, *queries])
    call = {"query": query, "key": key, "value": value, "cu_seqlens_q": ends, "cu_seqlens_kv": None}
    return call | {"block_table": table, "seqused_kv": numpy.array(lengths), "return_lse": True, **options}


def results_of(call: Call, dtype: str = "float64") -> Any:
    """Call the backend with operands in a type."""
    names = ("query", "key", "value", "sinks", "alibi_slopes")
    return mha_spec_numpy.varlen_attention(
        **{name: x.astype(dtype) if name in names else x for name, x in call.items()}
    )


def check(call: Call) -> None:
    """Require the results of the reference."""
    assert_same(lambda dtype: results_of(call, dtype), reference.varlen_attention(**call))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("queries", QUERIES.values(), ids=QUERIES)
def test_any_lengths_have_the_results_of_the_reference(queries: list[int], options: Call) -> None:
    check(call_of(queries, **options))


def test_the_strides_of_the_blocks_do_not_matter() -> None:
    call = call_of([2] * 12)
    strided = {name: numpy.asfortranarray(call[name]) for name in ("query", "key", "value")}
    interleaved = {name: numpy.stack([call[name]] * 2, axis=1)[:, 1] for name in ("key", "value")}
    for changed in (strided, interleaved):
        assert not changed["key"].flags.c_contiguous
        assert_equal(results_of(call | changed), results_of(call))


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("number", [numpy.nan, numpy.inf])
def test_a_number_that_is_not_finite_reaches_the_rows_that_see_it(name: str, number: float) -> None:
    call = call_of([3] * 12, causal=True, q_offset="lower_right")
    clean = reference.varlen_attention(**call)
    position, sequence = LENGTHS[8] - 2, 8  # The first query of the sequence does not see it.
    slot = call["block_table"][sequence, position // BLOCK_SIZE], position % BLOCK_SIZE
    call[name][(*slot, 1, 2)] = number if name == "value" else numpy.nan
    output, lse = results_of(call)
    touched = numpy.zeros(output.shape, bool)
    rows = slice(3 * sequence + 1, 3 * sequence + 3)
    touched[rows, 2:4, 2 if name == "value" else slice(None)] = True
    assert not numpy.isfinite(output[touched]).any()
    assert_near(numpy.where(touched, 0.0, output), numpy.where(touched, 0.0, clean[0]))
    assert numpy.isnan(lse).sum() == (0 if name == "value" else 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_blocks_in_16_bits_are_gathered_in_the_type_of_the_softmax(dtype: str) -> None:
    narrow = "float16" if dtype == "float16" else ml_dtypes.bfloat16
    call = call_of([2] * 12, causal=True, q_offset="lower_right")
    for name in ("query", "key", "value"):
        call[name] = call[name].astype(narrow)
    output, lse = mha_spec_numpy.varlen_attention(**call)
    assert (output.dtype, lse.dtype) == (call["query"].dtype, numpy.float32)
    wide = {name: call[name].astype("float32") for name in ("query", "key", "value")}
    exact = mha_spec_numpy.varlen_attention(**call | wide)
    assert_equal(output, exact[0].astype(narrow))
    assert_equal(lse, exact[1])


def test_a_block_is_gathered_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    gathered = pages.gathered

    def spy(pool: numpy.ndarray, blocks: numpy.ndarray, memory: Any) -> numpy.ndarray:
        seen.extend((pool.shape[3], block) for block in blocks.tolist())
        return gathered(pool, blocks, memory)

    monkeypatch.setattr(pages, "gathered", spy)
    call = call_of([1] * 12, window=(13, None), q_offset="lower_right")
    mha_spec_numpy.varlen_attention(**call)
    visible = {
        int(call["block_table"][sequence, position // BLOCK_SIZE])
        for sequence, length in enumerate(LENGTHS)
        for position in range(max(0, length - 14), length)
    }
    assert len(visible) < sum(-(-length // BLOCK_SIZE) for length in LENGTHS)
    assert sorted(seen) == sorted((size, block) for block in visible for size in (QK_DIM, V_DIM))


def test_a_step_does_not_copy_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "BYTES", 2**16)
    lengths = [13_001, 12_007]
    call = call_of([1, 1], lengths)
    tracemalloc.start()
    mha_spec_numpy.varlen_attention(**call)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    scores = HEADS * max(lengths) * 8
    assert peak < 3 * scores < call["key"].nbytes


def test_many_queries_are_no_batch() -> None:
    call = call_of([1, 1, 33, 32, 32, 0, 2], LENGTHS[-7:])
    operands = [call.pop(name) for name in ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")]
    del call["return_lse"]
    a = varlen_arguments("varlen_attention", call, *operands)
    joined = list(batches(a, sequences_of(a)))
    assert [(type(part).__name__, len(part.queries)) for part in joined] == [
        ("Batch", 2),
        ("PackedSequence", 33),
        ("Batch", 64),
        ("Batch", 2),
    ]
    assert isinstance(joined[0].pages_of(a.key, numpy.dtype("float64")), Pages)  # pyright: ignore[reportAttributeAccessIssue]
