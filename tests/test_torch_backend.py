"""mha_spec_torch in the worlds of PyTorch: each judged by the goldens, and by which kernel really ran."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mha_spec_torch
from mha_spec.arguments import OPTIONS
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.accuracy import allowances
from mha_spec_conformance.cases import load
from mha_spec_conformance.compare import judge
from mha_spec_conformance.convert import to_library, to_numpy
from mha_spec_conformance.precision import precision
from mha_spec_torch import fused, tasks, visibility

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from mha_spec_conformance.cases import Case

attention: Callable[..., Any] = mha_spec_torch.attention
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
pulled: Callable[..., Any] = torch.func.vjp
pushed: Callable[..., Any] = torch.func.jvp
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
GENERATOR_SEED = 20261123


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    return tuple(case for case in load().cases if case.expect == "values")


def chosen(function: str, *, at_least: int, without: Sequence[str] = ()) -> list[Case]:
    """Some cases of a function, evenly spread; every option of the function is among them."""
    found = [case for case in cases() if case.function == function and not set(without) & set(case.features)]
    some = found[:: max(1, len(found) // at_least)]
    assert len(some) >= min(at_least, len(found))
    asked = {name for case in found for name in (*case.options, *case.input_names)}
    given = {name for case in some for name in (*case.options, *case.input_names)}
    return [
        *some,
        *(next(case for case in found if name in (*case.options, *case.input_names)) for name in sorted(asked - given)),
    ]


def alike(function: str, *, signatures: int, each: int) -> list[list[Case]]:
    """Some cases of a function, in each list of one signature and thus one graph; all options are among them."""
    groups: dict[object, list[Case]] = {}
    for case in cases():
        if case.function == function:
            groups.setdefault(case.signature, []).append(case)
    found = list(groups.values())
    some = found[:: max(1, len(found) // signatures)]
    asked = {name for group in found for name in names(group[0])}
    given = {name for group in some for name in names(group[0])}
    some += [next(group for group in found if name in names(group[0])) for name in sorted(asked - given)]
    return [group[:each] for group in some]


def names(case: Case) -> set[str]:
    """The inputs and options of a case."""
    return {*case.options, *case.input_names}


def tensors(case: Case, dtype: str) -> dict[str, Any]:
    """The arguments of a case, with its options."""
    options = {name: tuple(value) if name == "window" else value for name, value in case.options.items()}
    return {name: to_library(array, "torch") for name, array in case.inputs(dtype).items()} | options


def judged(case: Case, dtype: str, outputs: dict[str, Tensor | None]) -> str | None:
    """What is wrong with the outputs of a case, if anything is."""
    found = {name: to_numpy(value) for name, value in outputs.items() if value is not None}
    allowed = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    wanted = {name: expected for name, expected in case.expected.items() if name in found or name != "lse"}
    judgement = judge(case, wanted, found, allowed, precision(dtype))
    return None if judgement.passed else f"{case.id} {dtype}: {judgement.reason}"


def answered(arguments: dict[str, Any], attention: Callable[..., Any] = mha_spec_torch.attention) -> dict[str, Tensor]:
    """Output and lse of a case of attention."""
    output, lse = attention(**arguments, return_lse=True)
    return {"output": output, "lse": lse}


def differentiated(
    arguments: dict[str, Any], attention: Callable[..., Any] = mha_spec_torch.attention
) -> dict[str, Tensor]:
    """The gradients that autograd gives of the forward."""
    grad_output, grad_lse = arguments.pop("grad_output"), arguments.pop("grad_lse", None)
    given = {name: arguments[name].requires_grad_() for name in DIFFERENTIABLE if name in arguments}
    output, lse = attention(**arguments, return_lse=True)
    results = (output,) if grad_lse is None else (output, lse)
    found = torch.autograd.grad(
        results, list(given.values()), (grad_output, grad_lse)[: len(results)], materialize_grads=True
    )
    return {f"grad_{name}": gradient for name, gradient in zip(given, found, strict=True)}


def failures(some: Sequence[Case], ask: Callable[[dict[str, Any]], dict[str, Tensor]], *dtypes: str) -> list[str]:
    """What is wrong with the answers to some cases."""
    return [
        wrong
        for case in some
        for dtype in dtypes
        if dtype in case.dtypes and (wrong := judged(case, dtype, ask(tensors(case, dtype)))) is not None
    ]


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into all its tasks and pieces."""
    monkeypatch.setattr(visibility, "COST_OF_TASK", -(2**40))
    monkeypatch.setattr(visibility, "ROWS", (2, 3))
    monkeypatch.setattr(visibility, "SHORTEST_RUN", 2)
    monkeypatch.setattr(tasks, "SCORES", 64)
    monkeypatch.setattr(tasks, "ROWS", 3)


@pytest.fixture
def quiet() -> Any:
    """What torch's own compiler warns of is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("cut")
def test_every_golden_cut_into_tasks() -> None:
    some = [case for case in cases() if case.function == "attention"]
    assert not failures(some, answered, "float32")


@pytest.mark.usefixtures("cut")
def test_every_gradient_cut_into_tasks() -> None:
    some = [case for case in cases() if case.function == "attention_vjp"]
    assert not failures(some, differentiated, "float32")


def test_autograd_gives_the_gradients() -> None:
    assert not failures(chosen("attention_vjp", at_least=80), differentiated, "float64", "float16", "bfloat16")


def test_lengths_on_the_host_say_the_same() -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, Tensor]:
        integers = ("q_offset", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids")
        host = {name: arguments[name].numpy() for name in integers if isinstance(arguments.get(name), torch.Tensor)}
        return answered(arguments | host)

    some = [
        case
        for case in cases()
        if case.function == "attention" and {"kv_lengths", "segments", "offset"} & set(case.features)
    ]
    assert not failures(some[::4], ask, "float32")


@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_the_path_of_cuda_leaves_no_row_empty(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the kernels of the CPU can tell: all but NaN in pairs that are not visible, which may reach a tile."""

    def ask(arguments: dict[str, Any]) -> dict[str, Tensor]:
        if function == "attention_vjp":
            return differentiated(arguments, lambda **given: (attention(**given | {"return_lse": False}), None))
        return {"output": attention(**arguments)}

    taken = 0

    def counted(*call: Any) -> Tensor:
        nonlocal taken
        taken += 1
        return attend(*call)

    attend = fused.attend
    monkeypatch.setattr(fused, "attend", counted)
    monkeypatch.setattr(fused, "on_cuda", lambda _: True)
    monkeypatch.setattr(mha_spec_torch, "_direct", lambda *_: False)
    monkeypatch.setattr(mha_spec_torch, "readable", lambda _: False)
    some = [
        case
        for case in cases()
        if case.function == function
        and "grad_lse" not in case.input_names
        and "nonfinite" not in case.features
        and "MHA-POISON-2" not in case.clauses
    ]
    assert not failures(some, ask, "float32")
    assert taken >= 50


@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_nothing_is_read_on_an_accelerator(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, Tensor]:
        with monkeypatch.context() as blind:
            blind.setattr(mha_spec_torch, "readable", lambda _: False)
            for name in ("tolist", "item", "numpy", "__bool__"):
                blind.setattr(torch.Tensor, name, None)
            return answered(arguments) if function == "attention" else differentiated(arguments)

    assert not failures(chosen(function, at_least=60), ask, "float32", "float16")


def compiled_failures(
    groups: Sequence[Sequence[Case]], ask: Callable[..., dict[str, Tensor]], backend: str, dtype: str
) -> list[str]:
    """What is wrong with the answers of one graph for each group."""
    found: list[str] = []
    for group in groups:
        torch.compiler.reset()
        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        found += failures(group, partial(ask, attention=compiled), dtype)
    return found


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("backend", "dtype"), [("aot_eager", "float32"), ("inductor", "bfloat16")])
def test_compiled_without_a_break(backend: str, dtype: str) -> None:
    groups = alike("attention", signatures=20, each=4)
    assert sum(map(len, groups)) >= 50
    assert not compiled_failures(groups, answered, backend, dtype)


@pytest.mark.usefixtures("quiet")
def test_gradients_of_a_compiled_call() -> None:
    groups = alike("attention_vjp", signatures=12, each=6)
    assert sum(map(len, groups)) >= 50
    assert not compiled_failures(groups, differentiated, "aot_eager", "float32")


@pytest.mark.usefixtures("quiet")
def test_the_native_path_has_no_graph_break() -> None:
    operands = sized()
    torch.compiler.reset()
    compiled = torch.compile(lambda *operands: attention(*operands).sum(), backend="inductor")
    explained = torch._dynamo.explain(lambda *operands: attention(*operands).sum())(*operands)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch.testing.assert_close(compiled(*operands), attention(*operands).sum())
    assert FLASH in recorded(lambda: compiled(*operands))


def test_mapped_over_a_new_axis() -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, Tensor]:
        arrays = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        options = {name: value for name, value in arguments.items() if name not in arrays}
        doubled = {name: torch.stack([value.flip(0), value]) for name, value in arrays.items()}
        mapped = torch.func.vmap(lambda given: attention(**given, **options, return_lse=True))
        output, lse = mapped(doubled)
        return {"output": output[1], "lse": lse[1]}

    assert not failures(chosen("attention", at_least=60), ask, "float32", "float16")


def test_differentiated_by_a_transform() -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, Tensor]:
        grad_output, grad_lse = arguments.pop("grad_output"), arguments.pop("grad_lse", None)
        given = {name: arguments.pop(name) for name in DIFFERENTIABLE if name in arguments}

        def product(given: dict[str, Tensor]) -> Tensor:
            output, lse = attention(**given, **arguments, return_lse=True)
            total = (output * grad_output).sum()
            return total if grad_lse is None else total + (lse * grad_lse).sum()

        return {f"grad_{name}": gradient for name, gradient in torch.func.grad(product)(given).items()}

    assert not failures(chosen("attention_vjp", at_least=60), ask, "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_converts_and_keeps_the_softmax_exact(dtype: torch.dtype) -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, Tensor]:
        wide = {name: arguments[name].float() for name in ("query", "key", "value")}
        with torch.autocast("cpu", dtype=dtype):
            return answered(arguments | wide)

    name = str(dtype).rpartition(".")[2]
    assert not failures(chosen("attention", at_least=60), ask, name)


def test_autocast_gradients() -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return differentiated(arguments)

    assert not failures(chosen("attention_vjp", at_least=50), ask, "bfloat16")


@pytest.mark.usefixtures("quiet")
def test_forward_mode_agrees_with_the_gradients() -> None:
    torch.manual_seed(GENERATOR_SEED)
    q, k, v = (torch.randn(2, heads, 7, 5, dtype=torch.float64) for heads in (4, 2, 2))
    given = (q, k, v, torch.randn(1, 4, 1, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64))

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, bias=bias, sinks=sinks, causal=True, softcap=3.0, return_lse=True)

    tangents = tuple(torch.randn_like(one) for one in given)
    results, moved = pushed(call, given, tangents)
    cotangents = tuple(torch.randn_like(one) for one in results)
    _, pull = pulled(call, *given)
    forward = sum((a * b).sum() for a, b in zip(moved, cotangents, strict=True))
    reverse = sum((a * b).sum() for a, b in zip(pull(cotangents), tangents, strict=True))
    torch.testing.assert_close(forward, reverse)


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


def test_merging_has_gradients_where_halves_are_empty() -> None:
    outputs = [torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [
        torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
        for numbers in ([[[0.5, -math.inf, -math.inf]]], [[[0.25, 1.5, -math.inf]]])
    ]
    output, lse = mha_spec_torch.merge_attention(outputs[0], lses[0], outputs[1], lses[1])
    found = torch.autograd.grad(output.sum() + lse[..., :2].sum(), [*outputs, *lses])
    assert all(bool(one.isfinite().all()) for one in found)
    assert found[0][..., 1:, :].eq(0).all()


def recorded(call: Callable[[], object]) -> set[str]:
    """The names of torch's operations that a call ran."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return {str(event.key) for event in found.key_averages()}


def ran(*arguments: Tensor, backward: bool = False, **options: Any) -> set[str]:
    """The names of torch's operations that attention ran."""
    leaves = [one.requires_grad_(backward) for one in arguments]

    def call() -> None:
        output = attention(*leaves, **options)
        if backward:
            output.sum().backward()

    return recorded(call)


def sized(q_len: int = 32, kv_len: int = 32, qk_dim: int = 8, v_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, q_len, qk_dim), torch.randn(2, 2, kv_len, qk_dim), torch.randn(2, 2, kv_len, v_dim)


DIRECT = "aten::scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("path", "sizes", "options"),
    [
        ("direct", {}, {}),
        ("direct", {}, {"scale": -0.5}),
        ("direct", {"kv_len": 16}, {}),
        ("formula", {"kv_len": 15}, {}),
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
    names = ran(*sized(**sizes), **options)
    assert (DIRECT in names) == (path == "direct")
    assert (FLASH in names) == (path in {"direct", "flash"})


def test_the_path_of_a_backward() -> None:
    backward = f"{FLASH}_backward"
    assert backward in ran(*sized(), backward=True)
    assert backward in ran(*sized(), backward=True, bias=torch.zeros(1, 1, 32, 32))
    assert backward not in ran(*sized(), backward=True, bias=torch.zeros(1, 1, 32, 32, requires_grad=True))
    assert backward not in ran(*sized(), backward=True, softcap=2.0)
    assert DIRECT not in ran(*sized(), backward=True)


def test_what_is_hidden_sends_a_task_to_the_formula_only_when_it_is_not_finite() -> None:
    query, key, value = sized()
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 0, 3] = False
    assert "aten::bmm" not in ran(query, key, value, mask=mask)
    value[0, 0, 3] = math.nan
    assert "aten::bmm" in ran(query, key, value, mask=mask)


def test_tasks_leave_out_what_is_not_seen() -> None:
    query, key, value = (torch.randn(1, 2, 4096, 16) for _ in range(3))
    ids = torch.arange(4096)[None] // 256
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        attention(query, key, value, q_segment_ids=ids, kv_segment_ids=ids)
    shapes = [event.input_shapes for event in found.events() or () if event.name == FLASH]
    assert [shape[1][2] for shape in shapes] == [256] * 16


def test_options_that_are_none_are_not_given() -> None:
    operands = sized()
    without = {name: None for name in OPTIONS if name not in {"causal", "dropout_rate"}}
    assert torch.equal(attention(*operands, **without), attention(*operands))


def test_errors_are_ours() -> None:
    query, key, value = sized(q_len=3)
    with pytest.raises(MhaSpecError, match="q_offset"):
        attention(query, key, value, causal=True)
