"""Compare mha_spec_torch with the goldens, eager, compiled and transformed, and check which kernel runs."""

from __future__ import annotations

import math
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_equal, assert_near
from support.goldens import DIFFERENTIABLE, ENOUGH, PER_ENTRY, alike, cases, failures, split_arguments, spread
from support.torch_world import cut_into_tasks, forget_calls, operands
from torch.profiler import ProfilerActivity, profile

import mha_spec_torch
from mha_spec.arguments import OPTIONS
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_torch import calls, fused

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

attention: Callable[..., Any] = mha_spec_torch.attention
vjp: Callable[..., Any] = torch.func.vjp
jvp: Callable[..., Any] = torch.func.jvp
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
GENERATOR_SEED = 20261123


def output_and_lse(call: Callable[..., Any] = attention, **arguments: Any) -> dict[str, Tensor]:
    """Return output and lse of a case of attention."""
    output, lse = call(**arguments, return_lse=True)
    return {"output": output, "lse": lse}


def gradients(
    call: Callable[..., Any] = attention, *, grad_output: Tensor, grad_lse: Tensor | None = None, **arguments: Any
) -> dict[str, Tensor]:
    """Return the gradients of the forward by autograd."""
    leaves = {name: arguments[name].requires_grad_() for name in DIFFERENTIABLE if name in arguments}
    output, lse = call(**arguments, return_lse=True)
    results = (output,) if grad_lse is None else (output, lse)
    cotangents = (grad_output, grad_lse)[: len(results)]
    grads = torch.autograd.grad(results, list(leaves.values()), cotangents, materialize_grads=True)
    return {f"grad_{name}": gradient for name, gradient in zip(leaves, grads, strict=True)}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into all its tasks and pieces."""
    cut_into_tasks(monkeypatch)


@pytest.mark.usefixtures("cut")
def test_every_golden_cut_into_tasks() -> None:
    assert not failures("torch", cases("attention"), output_and_lse, "float32")


@pytest.mark.usefixtures("cut")
def test_every_gradient_cut_into_tasks() -> None:
    assert not failures("torch", cases("attention_vjp"), gradients, "float32")


def test_gradients_by_autograd() -> None:
    selected = spread("attention_vjp")
    assert not failures("torch", selected, gradients, "float64", "float16", "bfloat16")


def test_lengths_on_the_host_give_the_same_results() -> None:
    selected = [case for case in cases("attention") if {"kv_lengths", "segments", "offset"} & set(case.features)]
    assert not failures("torch", selected[::4], output_and_lse, "float32", host=PER_ENTRY)


@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_the_path_of_cuda_gives_the_same_results_on_the_cpu(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases with NaN in hidden pairs are left out, because the kernels of the CPU may let it through."""

    def ask(**arguments: Any) -> dict[str, Any]:
        if function == "attention_vjp":
            return gradients(lambda **keywords: (attention(**keywords | {"return_lse": False}), None), **arguments)
        return {"output": attention(**arguments)}

    count = 0

    def counting(*call: Any) -> Tensor:
        nonlocal count
        count += 1
        return attend(*call)

    attend = fused.attend
    forget_calls(monkeypatch)
    monkeypatch.setattr(fused, "attend", counting)
    monkeypatch.setattr(fused, "on_cuda", lambda _: True)
    monkeypatch.setattr(calls, "readable", lambda _: False)
    selected = [
        case
        for case in cases(function)
        if "grad_lse" not in case.input_names
        and "nonfinite" not in case.features
        and "MHA-POISON-2" not in case.clauses
    ]
    assert not failures("torch", selected, ask, "float32")
    assert count >= ENOUGH


@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_nothing_is_read_on_an_accelerator(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(**arguments: Any) -> dict[str, Tensor]:
        with monkeypatch.context() as patched:
            forget_calls(patched)
            patched.setattr(calls, "readable", lambda _: False)
            for name in ("tolist", "item", "numpy", "__bool__"):
                patched.setattr(torch.Tensor, name, None)
            return output_and_lse(**arguments) if function == "attention" else gradients(**arguments)

    assert not failures("torch", spread(function), ask, "float32", "float16")


def compiled_failures(function: str, ask: Callable[..., dict[str, Tensor]], backend: str, dtype: str) -> list[str]:
    """Compile a graph for each signature, and return the faults of its results."""
    wrong: list[str] = []
    for _, same_signature in groupby(alike(function, 90), key=lambda case: case.signature):
        torch.compiler.reset()
        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        wrong += failures("torch", same_signature, partial(ask, compiled), dtype)
    return wrong


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("backend", "dtype"), [("aot_eager", "float32"), ("inductor", "bfloat16")])
def test_compiled_without_a_graph_break(backend: str, dtype: str) -> None:
    assert not compiled_failures("attention", output_and_lse, backend, dtype)


@pytest.mark.usefixtures("quiet")
def test_gradients_of_a_compiled_call() -> None:
    assert not compiled_failures("attention_vjp", gradients, "aot_eager", "float32")


@pytest.mark.usefixtures("quiet")
def test_the_native_path_has_no_graph_break() -> None:
    arguments = operands()
    torch.compiler.reset()
    compiled = torch.compile(lambda *operands: attention(*operands).sum(), backend="inductor")
    explained = torch._dynamo.explain(lambda *operands: attention(*operands).sum())(*arguments)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch.testing.assert_close(compiled(*arguments), attention(*arguments).sum())
    assert FLASH in operations(lambda: compiled(*arguments))


def test_mapped_over_a_new_axis() -> None:
    def ask(**arguments: Any) -> dict[str, Tensor]:
        arrays, options = split_arguments(arguments)
        doubled = {name: torch.stack([value.flip(0), value]) for name, value in arrays.items()}
        over_both = torch.func.vmap(lambda mapped: attention(**mapped, **options, return_lse=True))
        output, lse = over_both(doubled)
        return {"output": output[1], "lse": lse[1]}

    assert not failures("torch", spread("attention"), ask, "float32", "float16")


def gradients_by_a_transform(
    *, grad_output: Tensor, grad_lse: Tensor | None = None, **arguments: Any
) -> dict[str, Tensor]:
    """Return the gradients of the forward by torch.func.grad."""
    leaves = {name: arguments.pop(name) for name in DIFFERENTIABLE if name in arguments}

    def product(leaves: dict[str, Tensor]) -> Tensor:
        output, lse = attention(**leaves, **arguments, return_lse=True)
        total = (output * grad_output).sum()
        return total if grad_lse is None else total + (lse * grad_lse).sum()

    return {f"grad_{name}": gradient for name, gradient in torch.func.grad(product)(leaves).items()}


def test_gradients_by_a_transform() -> None:
    assert not failures("torch", spread("attention_vjp"), gradients_by_a_transform, "float32")


def test_gradients_of_output_and_lse_by_a_transform_may_cancel() -> None:
    cancelling = [case for case in cases("attention_vjp") if case.id.endswith("/cancelling")]
    assert cancelling
    assert not failures("torch", cancelling, gradients_by_a_transform, "float32", "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_converts_and_keeps_the_softmax_exact(dtype: str) -> None:
    def ask(**arguments: Any) -> dict[str, Tensor]:
        wide = {name: arguments[name].float() for name in ("query", "key", "value")}
        with torch.autocast("cpu", dtype=getattr(torch, dtype)):
            return output_and_lse(**arguments | wide)

    assert not failures("torch", spread("attention"), ask, dtype)


def test_autocast_gradients() -> None:
    def ask(**arguments: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(**arguments)

    assert not failures("torch", spread("attention_vjp"), ask, "bfloat16")


@pytest.mark.usefixtures("quiet")
def test_forward_mode_agrees_with_the_gradients() -> None:
    torch.manual_seed(GENERATOR_SEED)
    q, k, v = (torch.randn(2, heads, 7, 5, dtype=torch.float64) for heads in (4, 2, 2))
    arguments = (q, k, v, torch.randn(1, 4, 1, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64))

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, bias=bias, sinks=sinks, causal=True, softcap=3.0, return_lse=True)

    tangents = tuple(torch.randn_like(argument) for argument in arguments)
    results, result_tangents = jvp(call, arguments, tangents)
    cotangents = tuple(torch.randn_like(result) for result in results)
    _, pull = vjp(call, *arguments)
    forward = sum((a * b).sum() for a, b in zip(result_tangents, cotangents, strict=True))
    reverse = sum((a * b).sum() for a, b in zip(pull(cotangents), tangents, strict=True))
    assert_near(forward, reverse)


@pytest.mark.parametrize("length", [7, 17])
def test_second_derivatives(length: int) -> None:
    torch.manual_seed(GENERATOR_SEED)
    q, k, v = (torch.randn(1, heads, length, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, sinks=sinks, window=(3, 1), kv_lengths=[length - 1], q_offset=0, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, sinks), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v, sinks), fast_mode=True)


def test_an_operand_that_depends_on_another_is_counted_once() -> None:
    torch.manual_seed(GENERATOR_SEED)
    x = torch.randn(1, 1, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: attention(x, 2 * x, x * x), (x,))


def test_gradients_of_merging_empty_halves_are_finite() -> None:
    outputs = [torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [
        torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
        for numbers in ([[[0.5, -math.inf, -math.inf]]], [[[0.25, 1.5, -math.inf]]])
    ]
    output, lse = mha_spec_torch.merge_attention(outputs[0], lses[0], outputs[1], lses[1])
    grads = torch.autograd.grad(output.sum() + lse[..., :2].sum(), [*outputs, *lses])
    assert all(bool(gradient.isfinite().all()) for gradient in grads)
    assert grads[0][..., 1:, :].eq(0).all()


def operations(call: Callable[[], object]) -> set[str]:
    """Return the names of torch's operations in a call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {str(event.key) for event in profiler.key_averages()}


def operations_of_attention(*arguments: Tensor, backward: bool = False, **options: Any) -> set[str]:
    """Return the names of torch's operations in a call of attention."""
    leaves = [operand.requires_grad_(backward) for operand in arguments]

    def call() -> None:
        output = attention(*leaves, **options)
        if backward:
            output.sum().backward()

    return operations(call)


@pytest.mark.parametrize(
    ("path", "sizes", "options"),
    [
        ("flash", {}, {}),
        ("flash", {}, {"scale": -0.5}),
        ("flash", {"kv_len": 15}, {}),
        ("flash", {"v_dim": 6}, {}),
        ("flash", {}, {"return_lse": True}),
        ("flash", {}, {"causal": True}),
        ("flash", {}, {"causal": True, "scale": -0.5}),
        ("flash", {}, {"window": (3, 2)}),
        ("flash", {}, {"kv_lengths": [20, 32]}),
        ("flash", {}, {"q_lengths": torch.tensor([20, 32])}),
        ("flash", {}, {"mask": torch.ones(1, 1, 32, 32, dtype=torch.bool)}),
        ("flash", {}, {"bias": torch.zeros(1, 1, 32, 32)}),
        ("flash", {}, {"sinks": torch.zeros(4)}),
        ("formula", {}, {"softcap": 2.0}),
        ("formula", {}, {"dropout_mask": torch.ones(1, 1, 32, 32, dtype=torch.bool)}),
        ("formula", {}, {"dropout_rate": 0.5}),
    ],
)
def test_the_path_of_a_call(path: str, sizes: dict[str, int], options: dict[str, Any]) -> None:
    arguments = operands(**sizes)
    for _ in range(2):  # The second call is prepared.
        names = operations_of_attention(*arguments, **options)
        assert (FLASH in names) == (path == "flash")
        assert ("aten::bmm" in names) == (path == "formula")


def test_the_path_of_a_backward() -> None:
    backward = f"{FLASH}_backward"
    assert backward in operations_of_attention(*operands(), backward=True)
    assert backward in operations_of_attention(*operands(), backward=True, bias=torch.zeros(1, 1, 32, 32))
    assert backward not in operations_of_attention(
        *operands(), backward=True, bias=torch.zeros(1, 1, 32, 32, requires_grad=True)
    )
    assert backward not in operations_of_attention(*operands(), backward=True, softcap=2.0)


def test_a_hidden_nan_sends_a_task_to_the_formula() -> None:
    query, key, value = operands()
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 0, 3] = False
    assert "aten::bmm" not in operations_of_attention(query, key, value, mask=mask)
    value[0, 0, 3] = math.nan
    assert "aten::bmm" in operations_of_attention(query, key, value, mask=mask)


@pytest.mark.parametrize("scale", [0.0, 1e-50])
@pytest.mark.parametrize("options", [{"q_lengths": [23, 0]}, {"mask": torch.arange(32)[:, None] < 23}])
def test_cotangents_of_empty_rows_reach_no_gradient_with_a_scale_of_0(scale: float, options: dict[str, Any]) -> None:
    options = {name: value[None, None] if name == "mask" else value for name, value in options.items()}
    tensors = [tensor.requires_grad_() for tensor in operands()]
    output = attention(*tensors, scale=scale, **options)
    cotangent = torch.ones_like(output)
    expected = torch.autograd.grad(output, tensors, cotangent, retain_graph=True)
    cotangent[1, :, 23:] = math.nan
    assert_equal(torch.autograd.grad(output, tensors, cotangent), expected)


@pytest.mark.parametrize("size", [math.nan, 1e30])
def test_few_keys_go_to_the_kernel_unless_a_score_may_be_nan(size: float) -> None:
    query, key, value = operands(kv_len=5)
    options: list[dict[str, Any]] = [{}, {"kv_lengths": [3, 4]}]
    for keywords in options:
        assert "aten::bmm" not in operations_of_attention(query, key, value, **keywords)
    query[0, 1, 2], key[0, 0, 0] = size, 1e30
    for keywords in options:
        assert attention(query, key, value, **keywords)[0, 1, 2].isnan().all()


@pytest.mark.parametrize("score", [60.0, 300.0, -300.0])
@pytest.mark.parametrize(("dtype", "gap"), [("float32", 13.0), ("float64", 33.0)])
def test_a_small_weight_of_a_sink_is_kept_where_scores_are_large(dtype: str, gap: float, score: float) -> None:
    ones = numpy.ones((1, 1, 1, 1), dtype)
    arrays = {"query": score * ones, "key": ones, "value": ones, "sinks": numpy.array([score - gap], dtype)}
    expected = bounds("attention", arrays, {"scale": 1.0})
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    output = attention(**tensors, scale=1.0).double().numpy()
    assert (abs(output - expected.values["output"]) <= expected.allowances(precision(dtype))["output"]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_output_with_sinks_is_rounded_once(dtype: torch.dtype) -> None:
    query, key = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 2, 3)
    value = torch.randn(1, 1, 2, 127, generator=torch.Generator().manual_seed(GENERATOR_SEED)).to(dtype)
    sinks = torch.tensor([0.5])
    output = attention(query.to(dtype), key.to(dtype), value, sinks=sinks)
    assert_equal(output, attention(query.double(), key.double(), value.double(), sinks=sinks).to(dtype))


def test_tasks_leave_out_hidden_keys() -> None:
    query, key, value = (torch.randn(1, 2, 4096, 16) for _ in range(3))
    ids = torch.arange(4096)[None] // 256
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        attention(query, key, value, q_segment_ids=ids, kv_segment_ids=ids)
    shapes = [event.input_shapes for event in profiler.events() or () if event.name == FLASH]
    assert [shape[1][2] for shape in shapes] == [256] * 16


def test_an_option_of_none_has_no_effect() -> None:
    arguments = operands()
    without = {name: None for name in OPTIONS if name not in {"causal", "dropout_rate"}}
    assert torch.equal(attention(*arguments, **without), attention(*arguments))


def test_errors_are_raised_by_the_checks() -> None:
    query, key, value = operands(q_len=3)
    with pytest.raises(MhaSpecError, match="q_offset"):
        attention(query, key, value, causal=True)
