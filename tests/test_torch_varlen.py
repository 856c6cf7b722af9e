"""Packed and paged attention of PyTorch under autograd, torch.compile and torch.func."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_equal, assert_near
from support.numbers import numbers
from support.varlen import HEADS, QK_DIM, cotangents, packed, paged

import mha_spec_torch
from mha_spec import ArgumentTypeError, ArgumentValueError
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


def recorded(function: Any, call: Call, cotangent: Call, **graph: Any) -> list[torch.Tensor]:
    """Return output, lse, and the gradients of autograd."""
    leaves = {name: call[name].clone().requires_grad_() for name in OPERANDS if name in call}
    output, lse = function(**call | leaves, return_lse=True)
    gradients = torch.autograd.grad((output, lse), list(leaves.values()), tuple(cotangent.values()), **graph)
    return [output.detach(), lse.detach(), *gradients]


def in_closed_form(call: Call, cotangent: Call) -> list[torch.Tensor]:
    output, lse = mha_spec_torch.varlen_attention(**call, return_lse=True)
    gradients = mha_spec_torch.varlen_attention_vjp(**cotangent, **call)
    return [output, lse, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_autograd_has_the_gradients_of_the_vjp(layout: Any, options: Call) -> None:
    call, cotangent = call_of(layout, **options)
    assert_near(recorded(mha_spec_torch.varlen_attention, call, cotangent), in_closed_form(call, cotangent))


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_differentiable_gradient_is_the_same(layout: Any) -> None:
    call, cotangent = call_of(layout, **OPTIONS)
    ours = recorded(mha_spec_torch.varlen_attention, call, cotangent, create_graph=True)
    assert_near([x.detach() for x in ours], in_closed_form(call, cotangent))
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
    assert_near([*results, *pull(tuple(cotangent.values()))], in_closed_form(call, cotangent))
    stacked = [torch.stack([operand, operand]) for operand in operands]
    for results in torch.func.vmap(function)(*stacked):
        assert_near(results[1], in_closed_form(call, cotangent)[0 if results.ndim == 4 else 1])


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_compiled_call_is_one_graph_for_all_lengths(layout: Any) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mha_spec_torch.varlen_attention, backend=count, fullgraph=True, dynamic=True)
    for size in (1, 2):
        call, _ = call_of(layout, **OPTIONS)
        call["query"] = torch.cat([call["query"]] * size)
        if layout is packed:
            call["cu_seqlens_kv"] = call["cu_seqlens_kv"] // size
        else:
            call["seqused_kv"] = call["seqused_kv"] // size
        assert_near(compiled(**call, return_lse=True), mha_spec_torch.varlen_attention(**call, return_lse=True))
    assert len(graphs) == 1


@pytest.mark.parametrize("layout", CALLS.values(), ids=CALLS)
def test_a_compiled_call_has_gradients(layout: Any) -> None:
    torch.compiler.reset()
    call, cotangent = call_of(layout, **OPTIONS)
    compiled = torch.compile(mha_spec_torch.varlen_attention, backend="aot_eager", fullgraph=True)
    assert_near(recorded(compiled, call, cotangent), in_closed_form(call, cotangent))
    vjp = torch.compile(mha_spec_torch.varlen_attention_vjp, backend="aot_eager", fullgraph=True)
    assert_near(vjp(**cotangent, **call), mha_spec_torch.varlen_attention_vjp(**cotangent, **call))


def test_a_compiled_call_takes_one_tensor_for_both_bounds_and_refuses_two() -> None:
    torch.compiler.reset()
    call, _ = call_of(packed, causal=True)
    compiled = torch.compile(mha_spec_torch.varlen_attention, backend="eager", fullgraph=True)
    bounds = call["cu_seqlens_q"]
    wanted = mha_spec_torch.varlen_attention(**call | {"cu_seqlens_kv": bounds})
    assert_equal(compiled(**call | {"cu_seqlens_kv": bounds}), wanted)
    with pytest.raises(Exception, match="MHA-VARLEN-5"):
        compiled(**call | {"cu_seqlens_kv": bounds.clone()})
    with pytest.raises(ArgumentValueError, match="MHA-VARLEN-5"):
        mha_spec_torch.varlen_attention(**call | {"cu_seqlens_kv": bounds.clone()})


def test_a_compiled_call_takes_changing_numbers_in_equal_bounds() -> None:
    torch.compiler.reset()
    query = torch.tensor(numbers(12, HEADS, QK_DIM))

    def attend(length: int) -> Any:
        bounds = [0, length, 12]
        return mha_spec_torch.varlen_attention(query, query, query, bounds, list(bounds), causal=True)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for length in (5, 6, 7):
        assert_equal(compiled(length), attend(length))


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
