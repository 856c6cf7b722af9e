"""PyTorch's layer with a cache: steps of any length equal a single call, and older caches do not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow
import torch
from support.comparisons import assert_equal, assert_near, assert_same
from support.layers import BATCH, KV_HEADS, LENGTH, QK_DIM, STEPS, V_DIM
from support.torch_world import heads, sized, tokens, with_gradients

from mha_spec import KVCache, PagedKVCache, WindowKVCache, reference
from mha_spec.arrays import dtype_name
from mha_spec_torch import append_cache, empty_cache

if TYPE_CHECKING:
    from torch import Tensor


def read(cache: KVCache) -> list[Tensor]:
    """Return the tokens of a cache."""
    entries = enumerate(numpy.asarray(cache.lengths).tolist())
    return [buffer[entry, :, :length].clone() for entry, length in entries for buffer in (cache.key, cache.value)]


@pytest.mark.parametrize("lengths", [None, [1, 2]])
@pytest.mark.parametrize("differentiable", [False, True])
def test_appending_does_not_change_an_older_cache(lengths: list[int] | None, differentiable: bool) -> None:
    caches = [empty_cache(BATCH, KV_HEADS, LENGTH, QK_DIM, V_DIM, like=torch.zeros(1, dtype=torch.float64))]
    for seed in range(3):
        key, value = heads(2, seed)
        caches.append(append_cache(caches[-1], key.requires_grad_(differentiable), value, lengths))
    assert (caches[1].key.data_ptr() == caches[3].key.data_ptr()) != differentiable
    before = [read(cache) for cache in caches]
    branch = append_cache(caches[1], *heads(3, seed=9))
    append_cache(caches[3], *heads(3, seed=10))
    append_cache(branch, *heads(1, seed=11))
    assert_equal([read(cache) for cache in caches], before)
    assert_equal(read(branch), read(reference.append_cache(caches[1], *heads(3, seed=9))))


def test_arrays_of_the_caller_are_not_written_to() -> None:
    key, value = heads(LENGTH)
    cache = KVCache(key, value, numpy.asarray([2, 3]))
    before = key.clone(), value.clone()
    append_cache(cache, *heads(1, seed=7))
    assert_equal([key, value], before)


def test_writing_in_place_keeps_tensors_saved_by_autograd() -> None:
    layer = sized().requires_grad_(False)
    layer.w_q.requires_grad_()
    _, cache = layer(tokens(5), cache=layer.empty_cache(BATCH, LENGTH))
    output, cache = layer(tokens(2), cache=cache)
    expected = with_gradients([output], [layer.w_q])
    output, after = layer(tokens(2), cache=cache._replace(lengths=cache.lengths - 2))
    output, cache = layer(tokens(2), cache=cache)
    _, later = layer(tokens(1), cache=cache)
    assert cache.key.data_ptr() == later.key.data_ptr() != after.key.data_ptr()
    assert len(with_gradients([output], [layer.w_q])) == len(expected)


def test_inference_tensors_are_not_written_to_outside_inference_mode() -> None:
    layer = sized()
    with torch.inference_mode():
        _, cache = layer(tokens(3), cache=layer.empty_cache(BATCH, LENGTH))
    _, later = layer(tokens(1), cache=cache)
    with torch.inference_mode():
        _, again = layer(tokens(1), cache=later)
    assert [state.lengths.tolist() for state in (cache, later, again)] == [[3, 3], [4, 4], [5, 5]]


@pytest.mark.parametrize("traced", [False, True], ids=["host", "tensor"])
@pytest.mark.parametrize("steps", STEPS)
def test_decoding_in_steps_equals_a_single_call(steps: str, traced: bool) -> None:
    def ours(dtype: str) -> list[Tensor]:
        layer = sized(dtype, qk_norm=True, rotary={})
        cache, outputs, weights = layer.empty_cache(BATCH, LENGTH + 2), [], []
        cache = cache._replace(lengths=torch.as_tensor(cache.lengths)) if traced else cache
        with torch.no_grad():
            for part in tokens(dtype=dtype).split(STEPS[steps], dim=1):
                weights.append(layer.attention_weights(part, causal=True, cache=cache)[..., :LENGTH])
                output, cache = layer(part, causal=True, cache=cache)
                outputs.append(output)
        assert isinstance(cache.lengths, torch.Tensor) == traced
        assert numpy.array_equal(cache.lengths, [LENGTH] * BATCH)
        return [torch.cat(outputs, 1), torch.cat(weights, 2)]

    layer, x = sized(qk_norm=True, rotary={}), tokens()
    assert_same(ours, [layer(x, causal=True), layer.attention_weights(x, causal=True)])


def test_gradients_through_a_cache() -> None:
    def ours(dtype: str) -> list[Tensor]:
        layer, x = sized(dtype, rotary={}), tokens(dtype=dtype).requires_grad_()
        cache, outputs = layer.empty_cache(BATCH, LENGTH), []
        for part in x.split(4, dim=1):
            output, cache = layer(part, causal=True, cache=cache)
            outputs.append(output)
        return with_gradients([torch.cat(outputs, 1)], [x, *layer.parameters()])

    layer, x = sized(rotary={}), tokens().requires_grad_()
    assert_same(ours, with_gradients([layer(x, causal=True)], [x, *layer.parameters()]))


@pytest.mark.usefixtures("quiet")
def test_all_steps_share_a_graph() -> None:
    layer, x = sized(rotary={}), tokens()
    graphs: list[Any] = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(layer, fullgraph=True, backend=counting)
    cache, by_step = layer.empty_cache(BATCH, LENGTH), []
    cache = cache._replace(lengths=torch.as_tensor(cache.lengths))
    with torch.no_grad():
        for part in x.split(1, dim=1):
            output, cache = step(part, causal=True, cache=cache)
            by_step.append(output)
        assert_near(torch.cat(by_step, 1), layer(x, causal=True))
    assert len(graphs) == 1


@pytest.mark.usefixtures("quiet")
def test_a_compiled_step_accepts_lengths_on_the_host() -> None:
    layer, x = sized(), tokens()
    torch.compiler.reset()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    _, cache = layer(x[:, :4], cache=layer.empty_cache(BATCH, LENGTH))
    expected, _ = layer(x[:, 4:5], cache=cache)
    output, after = step(x[:, 4:5], cache=cache)
    assert_near(output, expected)
    assert after.lengths.tolist() == [5, 5]


@pytest.mark.usefixtures("quiet")
def test_a_compiled_function_makes_its_own_cache() -> None:
    dtype_name(tensorflow.constant(0.0))  # A trace cannot hash dtypes of TensorFlow that earlier calls have left.
    layer, x = sized(rotary={}), tokens()
    table = torch.arange(BATCH).flip(0)[:, None]

    def generate(x: Tensor, kind: str) -> Tensor:
        batch, length, _ = x.shape
        options = {"causal": True, "window": (length - 1, 0)} if kind == "window" else {"causal": True}
        if kind == "paged":
            cache = PagedKVCache.empty(table, batch, length, KV_HEADS, QK_DIM, V_DIM, like=x)
        elif kind == "window":
            cache = WindowKVCache.empty(batch, KV_HEADS, length, QK_DIM, V_DIM, like=x)
        else:
            cache = layer.empty_cache(batch, length)
        first, cache = layer(x[:, :3], cache=cache, **options)
        return torch.cat([first, layer(x[:, 3:], cache=cache, **options)[0]], 1)

    torch.compiler.reset()
    compiled = torch.compile(generate, fullgraph=True, backend="aot_eager", dynamic=True)
    for kind in ("layer", "window", "paged"):
        for length in (LENGTH, LENGTH - 2):
            assert_near(compiled(x[:, :length], kind), layer(x[:, :length], causal=True))
