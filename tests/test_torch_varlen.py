"""Packed and paged attention of PyTorch under autograd, torch.compile and torch.func."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_near
from support.numbers import numbers
from support.varlen import HEADS, QK_DIM, V_DIM, cotangents, packed, paged, separate

import mha_spec_torch
from mha_spec import ArgumentTypeError, ArgumentValueError, reference
from mha_spec_torch import decoding
from mha_spec_torch.calls import varlen_arguments_of
from mha_spec_torch.packing import Packed

if TYPE_CHECKING:
    Call = dict[str, Any]

pytestmark = pytest.mark.usefixtures("quiet")

OPERANDS = ("query", "key", "value", "sinks")
CALLS = {"packed": packed, "paged": paged}
OPTIONS: Call = {
    "causal": True,
    "window": (6, None),
    "q_offset": "lower_right",
    "softcap": 2.3,
    "sinks": numbers(HEADS, seed=8),
    "alibi_slopes": abs(numbers(HEADS, seed=9)),
}


def moved(call: Call) -> Call:
    return {name: torch.tensor(x) if isinstance(x, numpy.ndarray) else x for name, x in call.items()}


def call_of(layout: Any, **options: Any) -> tuple[Call, Call]:
    """Return a call with options whose integers are tensors, and its cotangents."""
    call = layout() | options
    return moved(call), moved(cotangents(call))


def expected_of(layout: Any, **options: Any) -> list[torch.Tensor]:
    """Return output, lse and gradients by separate calls of the reference."""
    call = layout() | options
    return [torch.tensor(x) for x in separate(call | cotangents(call)) if x is not None]


def recorded(function: Any, call: Call, cotangent: Call, **graph: Any) -> list[torch.Tensor]:
    """Return output, lse, and the gradients of autograd."""
    leaves = {name: call[name].clone().requires_grad_() for name in OPERANDS if name in call}
    output, lse = function(**call | leaves, return_lse=True)
    gradients = torch.autograd.grad((output, lse), list(leaves.values()), tuple(cotangent.values()), **graph)
    return [output.detach(), lse.detach(), *gradients]


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_autograd_has_the_gradients_of_separate_calls(layout: Any, options: Call) -> None:
    call, cotangent = call_of(layout, **options)
    assert_near(recorded(mha_spec_torch.varlen_attention, call, cotangent), expected_of(layout, **options))


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_differentiable_gradient_is_the_same(layout: Any) -> None:
    call, cotangent = call_of(layout, **OPTIONS)
    ours = recorded(mha_spec_torch.varlen_attention, call, cotangent, create_graph=True)
    assert_near([x.detach() for x in ours], expected_of(layout, **OPTIONS))
    with torch.enable_grad():
        leaf = call["query"].clone().requires_grad_()
        first = mha_spec_torch.varlen_attention_vjp(cotangent["grad_output"], **call | {"query": leaf})[0]
        second = torch.autograd.grad(first.nansum(), leaf)[0]
    assert bool((second[: int(call["cu_seqlens_q"][-1])] != 0).any())


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_transforms_of_torch_func_have_the_same_results(layout: Any) -> None:
    call, cotangent = call_of(layout, **OPTIONS)

    def function(*operands: torch.Tensor) -> Any:
        return mha_spec_torch.varlen_attention(**call | dict(zip(OPERANDS, operands, strict=True)), return_lse=True)

    operands = [call[name] for name in OPERANDS]
    results, pull = torch.func.vjp(function, *operands)[:2]
    expected = expected_of(layout, **OPTIONS)
    assert_near([*results, *pull(tuple(cotangent.values()))], expected)
    stacked = [torch.stack([operand, operand]) for operand in operands]
    assert_near([results[1] for results in torch.func.vmap(function)(*stacked)], expected[:2])


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_compiled_call_is_one_graph_for_all_lengths(layout: Any) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mha_spec_torch.varlen_attention, backend=count, fullgraph=True, dynamic=True)
    for size in (1, 2):
        call = layout() | OPTIONS
        name = "cu_seqlens_kv" if layout is packed else "seqused_kv"
        call |= {"query": numpy.concatenate([call["query"]] * size), name: call[name] // size}
        assert_near(compiled(**moved(call), return_lse=True), [torch.tensor(x) for x in separate(call)])
    assert len(graphs) == 1


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_compiled_call_has_gradients(layout: Any) -> None:
    torch.compiler.reset()
    call, cotangent = call_of(layout, **OPTIONS)
    compiled = torch.compile(mha_spec_torch.varlen_attention, backend="aot_eager", fullgraph=True)
    expected = expected_of(layout, **OPTIONS)
    assert_near(recorded(compiled, call, cotangent), expected)
    vjp = torch.compile(mha_spec_torch.varlen_attention_vjp, backend="aot_eager", fullgraph=True)
    assert_near(vjp(**cotangent, **call), expected[2:])


def test_a_compiled_call_takes_one_tensor_for_both_bounds_and_refuses_two() -> None:
    torch.compiler.reset()
    call, _ = call_of(packed, causal=True)
    compiled = torch.compile(mha_spec_torch.varlen_attention, backend="eager", fullgraph=True)
    bounds = call["cu_seqlens_q"]
    expected = separate(packed(causal=True, cu_seqlens_kv=bounds.numpy()))[0]
    assert_near(compiled(**call | {"cu_seqlens_kv": bounds}), torch.tensor(expected))
    with pytest.raises(Exception, match="MHA-VARLEN-5"):
        compiled(**call | {"cu_seqlens_kv": bounds.clone()})
    with pytest.raises(ArgumentValueError, match="MHA-VARLEN-5"):
        mha_spec_torch.varlen_attention(**call | {"cu_seqlens_kv": bounds.clone()})


def test_a_compiled_call_takes_changing_numbers_in_equal_bounds() -> None:
    torch.compiler.reset()
    x, value = numbers(12, HEADS, QK_DIM), numbers(12, HEADS, V_DIM)
    query, values = torch.tensor(x), torch.tensor(value)

    def attend(length: int) -> Any:
        bounds = [0, length, 12]
        return mha_spec_torch.varlen_attention(query, query, values, bounds, list(bounds), causal=True)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for length in (5, 6, 7):
        bounds = [0, length, 12]
        call = {"query": x, "key": x, "value": value, "cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "causal": True}
        expected = separate(call)[0]
        assert_near(compiled(length), torch.tensor(expected))


def test_a_transform_in_a_graph_is_refused() -> None:
    torch.compiler.reset()
    call, _ = call_of(packed)

    def attend(query: torch.Tensor) -> Any:
        output: Any = mha_spec_torch.varlen_attention(**call | {"query": query})
        return output.nansum()

    compiled = torch.compile(torch.func.grad(attend), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"`query` of varlen_attention must not be transformed by torch\.func"):
        compiled(call["query"])


def test_integers_that_vmap_maps_are_refused() -> None:
    call, _ = call_of(packed)
    bounds = torch.stack([call["cu_seqlens_q"]] * 2)
    with pytest.raises(ArgumentTypeError, match="`cu_seqlens_q` of varlen_attention must be the same for all entries"):
        torch.func.vmap(lambda x: mha_spec_torch.varlen_attention(**call | {"cu_seqlens_q": x}))(bounds)


def test_the_operators_have_the_shapes_that_they_promise() -> None:
    call, _ = call_of(paged, **OPTIONS)
    leaves = call | {name: call[name].clone().requires_grad_() for name in OPERANDS}
    order = ("query", "key", "value", "sinks", "cu_seqlens_q", "cu_seqlens_kv", "block_table", "seqused_kv")
    options = (None, call["alibi_slopes"], "lower_right", True, 6, None, None, 2.3)
    arguments = (*(leaves[name] for name in order), *options)
    torch.library.opcheck(torch.ops.mha_spec_torch.varlen_attend.default, arguments)


def test_autocast_casts_the_operands() -> None:
    call, _ = call_of(packed, q_offset="lower_right", causal=True)
    call = {name: x.float() if name in OPERANDS else x for name, x in call.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output, lse = mha_spec_torch.varlen_attention(**call, return_lse=True)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_a_linear_bias_is_never_held_for_all_pairs() -> None:
    tokens, heads = 3000, 2
    query, key = torch.randn(tokens, heads, 3), torch.randn(tokens, heads, 3)
    bounds = [0, tokens]
    options: Call = {"alibi_slopes": torch.rand(heads), "q_offset": 0}
    problem = Packed.of(varlen_arguments_of("varlen_attention", options, query, key, key, bounds, bounds)).problem
    assert max(task.pairs for task in problem.visibility.tasks) <= 2**21 < heads * tokens**2


def test_packed_tokens_need_no_pair_of_different_sequences() -> None:
    lengths = [40, 7, 1, 60]
    bounds = numpy.cumsum([0, *lengths])
    x = torch.randn(int(bounds[-1]), 2, 8)
    problem = Packed.of(varlen_arguments_of("varlen_attention", {}, x, x, x, bounds, bounds)).problem
    assert sum(task.pairs for task in problem.visibility.tasks) == 2 * sum(length**2 for length in lengths)


# Blocks 3 and 8 are shared, the rows of the table see other numbers of keys, and their last entries name no block.
ROWS = {"even": ([0, 2, 4, 6], [8, 8, 8]), "ragged": ([0, 3, 4, 7], [8, 3, 5])}
CHOICES: dict[str, Call] = {
    "plain": {},
    "causal": {"causal": True, "q_offset": "lower_right"},
    "hidden rows": {"causal": True, "q_offset": -1},
    "all": {"window": (4, 1), "q_offset": [5, 2, -3], "softcap": 1.3, "scale": 0.7, "sinks": numbers(6, seed=4)},
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("is_broken", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("tile", [1, 2, 4, 8, 1000])
def test_a_few_queries_read_blocks_where_they_are(
    monkeypatch: pytest.MonkeyPatch, options: Call, rows: tuple[list[int], list[int]], is_broken: bool, tile: int
) -> None:
    monkeypatch.setattr(decoding, "TILE", tile * 3 * 5 * 8)  # Keys of three heads of 5 numbers in float64.
    results: list[Any] = []
    attend = decoding.attend

    def spy(*arguments: Any, needs_lse: bool) -> Any:
        results.append(attend(*arguments, needs_lse=needs_lse))
        return results[-1]

    monkeypatch.setattr(decoding, "attend", spy)
    ends, lengths = rows
    query, key, value = numbers(8, 6, 5), numbers(11, 3, 3, 5, seed=2), numbers(11, 3, 3, 7, seed=3)
    key[1], value[7] = numpy.nan, numpy.nan  # Blocks of no sequence.
    value[3, 1, 2, 4] = numpy.nan if is_broken else 1.0
    table = numpy.array([[3, 8, 0, -5], [3, 8, 9, 99], [10, 2, 8, 4]])
    call: Call = {"query": query, "key": key, "value": value, "cu_seqlens_q": ends, "cu_seqlens_kv": None}
    call |= {"block_table": table, "seqused_kv": lengths, "return_lse": True, **options}
    expected: Any = reference.varlen_attention(**call)
    ours: Any = mha_spec_torch.varlen_attention(**moved(call))
    assert (results[0] is None) == bool(numpy.isnan(expected[0]).any())
    without_lse: Any = mha_spec_torch.varlen_attention(**moved({**call, "return_lse": False}))
    assert torch.equal(without_lse.nan_to_num(), ours[0].nan_to_num())
    for result, wanted in zip(ours, expected, strict=True):
        assert numpy.array_equal(numpy.isnan(result), numpy.isnan(wanted))
        assert numpy.array_equal(numpy.isinf(result), numpy.isinf(wanted))
        assert_near(*(numpy.nan_to_num(x, posinf=0.0, neginf=0.0) for x in (result, wanted)))


@pytest.mark.parametrize("changed", ["query", "pages", "block_table", "seqused_kv", "window", "nothing"])
def test_the_pairs_of_the_call_before_serve_equal_calls_only(changed: str) -> None:
    ends, lengths = ROWS["even"]
    query, pages, values = numbers(6, 6, 5), numbers(11, 3, 3, 5, seed=2), numbers(11, 3, 3, 7, seed=3)
    table = numpy.array([[3, 8, 0], [3, 8, 9], [10, 2, 8]])
    call: Call = {"query": query, "key": pages, "value": values, "cu_seqlens_q": ends, "cu_seqlens_kv": None}
    call |= {"block_table": table, "seqused_kv": lengths, "window": (6, 6), "q_offset": 1, "return_lse": True}
    tensors = {**moved(call), "seqused_kv": torch.tensor(lengths)}
    decoding._pairs.cache_clear()
    mha_spec_torch.varlen_attention(**tensors)
    # In place, because the call must not be known by its tensors.
    if changed == "query":
        call["query"] = tensors["query"].mul_(-2).numpy()
    elif changed == "pages":
        call["key"] = tensors["key"].mul_(-2).numpy()
        tensors["key"], tensors["value"] = (torch.cat([x, x]) for x in (tensors["key"], tensors["value"]))
    elif changed == "block_table":
        call["block_table"] = tensors["block_table"].sub_(1).clamp_(0).numpy()
    elif changed == "seqused_kv":
        call["seqused_kv"] = tensors["seqused_kv"].sub_(3).numpy()
    elif changed == "window":
        call["window"] = tensors["window"] = (3, 2)
    assert_near(mha_spec_torch.varlen_attention(**tensors), moved(dict(enumerate(reference.varlen_attention(**call)))))
    hits = decoding._pairs.cache_info().hits
    assert hits == (changed in ("query", "nothing")), "equal calls share their pairs, others do not"


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_few_queries_ignore_the_default_device(rows: tuple[list[int], list[int]]) -> None:
    ends, lengths = rows
    operands = (torch.tensor(x) for x in (numbers(8, 6, 5), numbers(11, 3, 3, 5, seed=2), numbers(11, 3, 3, 7, seed=3)))
    query, key, value = operands
    options: Call = {"block_table": numpy.array([[3, 8, 0], [3, 8, 9], [10, 2, 8]]), "seqused_kv": lengths}
    call = (query, key, value, ends, None)
    expected = mha_spec_torch.varlen_attention(*call, **options, return_lse=True)
    decoding._accept_sparse_tensors.cache_clear()
    with torch.device("meta"):
        assert_near(mha_spec_torch.varlen_attention(*call, **options, return_lse=True), expected)


def test_the_weights_of_large_scores_sum_to_1() -> None:
    query, pages, keys = torch.full((3, 2, 5), 7.0), torch.full((4, 3, 2, 5), 1013.0), 11
    pages += torch.linspace(0, 1e-3, 4)[:, None, None, None]
    call: Call = {"block_table": torch.tensor([[2, 0, 3, 1]]), "seqused_kv": [keys]}
    output: Any = mha_spec_torch.varlen_attention(query, pages, torch.ones(4, 3, 2, 1), [0, 3], None, **call)
    # Each of the weights and each of their sums is rounded once.
    assert float(abs(output - 1).max()) <= keys * torch.finfo(output.dtype).eps


@pytest.mark.parametrize(("blocks", "dtype"), [(2**18 - 1, numpy.int32), (2**18, numpy.int64)])
def test_the_indices_of_a_large_pool_are_int64(blocks: int, dtype: type) -> None:
    small, pool = torch.empty(blocks, 16, 8, 3, device="meta"), torch.empty(blocks, 16, 8, 64, device="meta")
    for key, value in ((pool, small), (small, pool)):
        call: Any = SimpleNamespace(a=SimpleNamespace(heads=8, key=key, value=value), parts=[])
        assert decoding._index_dtype(call) is dtype


def test_other_calls_copy_their_blocks() -> None:
    query, pages = torch.ones(3, 2, 5), torch.ones(4, 3, 2, 5)
    table = numpy.array([[0, 1, 2, 3]])

    def attended(query: torch.Tensor, pages: torch.Tensor, table: numpy.ndarray = table, **options: Any) -> Any:
        operands, ends = (query, pages, pages), [0, query.shape[0]]
        a = varlen_arguments_of("varlen_attention", {"block_table": table, **options}, *operands, ends, [0, 12])
        return decoding.attend(Packed.of(a), *operands, None, needs_lse=False)

    assert attended(query, pages) is not None
    assert attended(query.repeat(4, 1, 1), pages) is None, "many queries"
    assert attended(query.bfloat16(), pages.bfloat16()) is None
    assert attended(query, pages.transpose(0, 1).contiguous().transpose(0, 1)) is None
    assert attended(query, pages, alibi_slopes=torch.ones(2), q_offset=0) is None
    assert attended(query, pages[:1, :1], numpy.zeros((1, 12), int)) is None, "a key is read several times by a row"
