"""The kernel of CUDA for packed tokens is asked for what a call means; a stand-in computes what it documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.numbers import numbers

from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_torch import flash_varlen, varlen_attention, varlen_attention_vjp

if TYPE_CHECKING:
    from torch import Tensor

SIZE, HEADS, KV_HEADS = 8, 6, 2
Q_ENDS, KV_ENDS = [0, 5, 5, 12, 15], [0, 11, 13, 20, 23]
"""Cumulative lengths: 5 queries and 11 keys, 2 keys without a query, 7 and 7, 3 and 3; further tokens follow."""
USED = [7, 2, 7, 0]
"""Keys in use, none of the last sequence."""
TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True, "q_offset": "lower_right"},
    "in use": {"causal": True, "q_offset": "lower_right", "seqused_kv": USED},
    "window": {"window": (6, 2), "q_offset": "lower_right"},
    "causal window": {"causal": True, "window": (8, None), "q_offset": "lower_right"},
    "far bounds": {"window": (2**30, 2**30), "q_offset": "lower_right"},
    "a tensor of bounds": {"cu_seqlens_kv": torch.tensor(KV_ENDS)},
}
REFUSED: dict[str, dict[str, Any]] = {
    "another diagonal": {"causal": True, "q_offset": "upper_left"},
    "keys that no query sees": {"window": (3, 0), "q_offset": "lower_right"},
    "softcap": {"softcap": 2.3},
    "sinks": {"sinks": torch.tensor(numbers(HEADS, seed=8))},
    "slopes": {"alibi_slopes": torch.tensor(abs(numbers(HEADS, seed=9))), "q_offset": "lower_right"},
    "a negative scale": {"scale": -0.3},
}


def kernel(
    query: Tensor, key: Tensor, value: Tensor, q_ends: Tensor, kv_ends: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute what the kernel documents: it leaves NaN in other rows here, and a row without keys has the lse +inf."""
    max_q, max_k, dropout, is_causal, debug = rest
    left, right = options["window_size_left"], options["window_size_right"]
    used = options["seqused_k"]
    lengths = kv_ends.diff() if used is None else used
    assert (max_q, max_k) == (q_ends.diff().max(), lengths.max())
    assert (dropout, debug, is_causal) == (0.0, False, (left, right) == (-1, 0))
    assert {x.dtype for x in (q_ends, kv_ends, lengths)} == {torch.int32}
    assert max(left, right) < len(query) + len(key)
    assert {x.stride(-1) for x in (query, key, value)} == {1}
    output, lse = torch.full_like(query, torch.nan), torch.full((HEADS, query.shape[0]), torch.nan)
    places = (x.tolist() for x in (q_ends[:-1], q_ends[1:], kv_ends[:-1], lengths))
    for first, last, start, length in zip(*places, strict=True):
        keys, values = (x[start : start + length].float().repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
        scores = torch.einsum("qhc,khc->hqk", query[first:last].float(), keys) * options["scale"]
        distances = torch.arange(length) - torch.arange(last - first)[:, None] - (length - last + first)
        hidden = ((distances > right) & (right >= 0)) | ((distances < -left) & (left >= 0))
        scores = scores.masked_fill(hidden, -torch.inf)
        weights = torch.where(hidden.all(-1, keepdim=True), 0.0, torch.softmax(scores, -1))
        output[first:last] = torch.einsum("hqk,khc->qhc", weights, values).to(query.dtype)
        rows = torch.logsumexp(scores, -1)
        lse[:, first:last] = torch.where(rows == -torch.inf, torch.inf, rows)
    return output, lse


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Replace the kernel by the stand-in, and return the windows for which it is asked."""
    windows: list[tuple[int, int]] = []

    def call(*arguments: Any, **options: Any) -> Any:
        windows.append((options["window_size_left"], options["window_size_right"]))
        return kernel(*arguments, **options)

    monkeypatch.setattr(flash_varlen, "has_kernel", lambda _: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", call)
    return windows


def tokens(dtype: torch.dtype, size: int = SIZE) -> dict[str, Any]:
    """Return the operands of a packed call, with tokens behind the last sequence."""
    shapes = {"query": (17, HEADS, size), "key": (29, KV_HEADS, size), "value": (29, KV_HEADS, size)}
    operands = {
        name: torch.tensor(numbers(*shape, seed=place)).to(dtype) for place, (name, shape) in enumerate(shapes.items())
    }
    return {**operands, "cu_seqlens_q": Q_ENDS, "cu_seqlens_kv": KV_ENDS}


def assert_right(call: dict[str, Any], results: dict[str, Tensor], function: str = "varlen_attention") -> None:
    """Require the results of a call within the allowance."""
    arrays = {
        name: x.double().numpy() if x.is_floating_point() else x.numpy()
        for name, x in call.items()
        if isinstance(x, torch.Tensor)
    }
    options = {name: x for name, x in call.items() if name not in arrays}
    dtype = str(call["query"].dtype).removeprefix("torch.")
    expected = bounds(function, arrays, options)
    allowances = expected.allowances(precision(dtype))
    for name, result in results.items():
        wanted = expected.values[name]
        assert result.shape == wanted.shape
        assert result.dtype == (torch.float32 if name == "lse" else call["query"].dtype)
        values = result.double().numpy()
        distance = numpy.subtract(values, wanted, out=numpy.zeros_like(values), where=values != wanted)
        assert (abs(distance) <= allowances[name]).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN)
def test_the_kernel_is_asked_for_the_meaning_of_a_call(
    options: dict[str, Any], dtype: torch.dtype, windows: list[tuple[int, int]]
) -> None:
    call = tokens(dtype) | options
    output, lse = varlen_attention(**call, return_lse=True)
    assert len(windows) == 1
    assert_right(call, {"output": output, "lse": lse})
    grad_output = call["query"].flip(0)
    names = ("grad_query", "grad_key", "grad_value")
    gradients = dict(zip(names, varlen_attention_vjp(grad_output, **call), strict=False))
    assert_right(call | {"grad_output": grad_output}, gradients, "varlen_attention_vjp")
    assert len(windows) == 2


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_another_path_takes_what_the_kernel_means_differently(
    options: dict[str, Any], windows: list[tuple[int, int]]
) -> None:
    call = tokens(torch.float16) | options
    assert_right(call, {"output": varlen_attention(**call)})
    assert windows == []


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, SIZE), (torch.float16, 12), (torch.float16, 264)])
def test_another_path_takes_other_types_and_sizes(
    dtype: torch.dtype, size: int, windows: list[tuple[int, int]]
) -> None:
    call = tokens(dtype, size)
    assert_right(call, {"output": varlen_attention(**call)})
    assert windows == []


def test_components_that_are_apart_are_copied(windows: list[tuple[int, int]]) -> None:
    call = tokens(torch.float16)
    call["key"] = call["key"].transpose(0, 2).contiguous().transpose(0, 2)
    assert_right(call, {"output": varlen_attention(**call)})
    assert len(windows) == 1
