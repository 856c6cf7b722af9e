"""The norm over all heads of a token, on every backend and in the layer as an object."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.comparisons import assert_same
from support.libraries import converted, with_float64
from support.numbers import numbers

import mha_spec
from mha_spec import ArgumentValueError, reference
from mha_spec.layer_object import LayerSettings
from mha_spec_conformance.targets.conversion import to_library
from mha_spec_numpy import MultiHeadAttention

if TYPE_CHECKING:
    from collections.abc import Callable

    Params = dict[str, numpy.ndarray]

BATCH, LENGTH, EMBED, HEADS, KV_HEADS, QK_DIM, V_DIM, OUT, EPSILON = 2, 5, 7, 6, 3, 4, 11, 13, 0.25
SETTINGS = LayerSettings.of(
    EMBED, HEADS, kv_heads=KV_HEADS, qk_dim=QK_DIM, v_dim=V_DIM, out=OUT, bias=False, qk_norm="joint"
)
OPTIONS: dict[str, Any] = {"norm_epsilon": EPSILON, "causal": True}
LIBRARIES = ["numpy", "torch", "jax", "tensorflow"]


def parameters() -> Params:
    return {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(SETTINGS.shapes().items())}


def flat_norm(projected: numpy.ndarray, gain: numpy.ndarray) -> numpy.ndarray:
    """Normalise the merged heads, (batch, length, heads, size), as OLMo 2 does before it splits them."""
    merged = projected.reshape(*projected.shape[:2], -1)
    root = numpy.sqrt((merged**2).sum(-1, keepdims=True) / merged.shape[-1] + EPSILON)
    return (merged / root * gain.reshape(-1)).reshape(projected.shape)


def by_hand(x: numpy.ndarray, params: Params) -> numpy.ndarray:
    """Compute the layer by the formula of each head."""
    q, k, v = (numpy.einsum("ble,ehd->blhd", x, params[f"w_{name}"]) for name in "qkv")
    q, k = flat_norm(q, params["q_joint_norm"]), flat_norm(k, params["k_joint_norm"])
    output = numpy.zeros((*x.shape[:2], OUT))
    for h in range(HEADS):
        scores = numpy.einsum("bid,bjd->bij", q[:, :, h], k[:, :, h // 2]) / math.sqrt(QK_DIM)
        weights = numpy.exp(scores) * numpy.tri(x.shape[1])
        attended = weights / weights.sum(-1, keepdims=True) @ v[:, :, h // 2]
        output += attended @ params["w_o"][h]
    return output


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_mean_is_over_all_heads(library: str) -> None:
    pytest.importorskip(library)
    x = numbers(BATCH, LENGTH, EMBED)

    def ours(dtype: str) -> Any:
        tokens, params = converted(x, library, dtype), converted(parameters(), library, dtype)
        return mha_spec.multi_head_attention(tokens, tokens, tokens, params, **OPTIONS)

    with with_float64(library):
        assert_same(ours, to_library(by_hand(x, parameters()), library))


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_cache_holds_keys_that_are_normalised_jointly(library: str) -> None:
    pytest.importorskip(library)
    x = numbers(BATCH, LENGTH, EMBED)

    def ours(dtype: str) -> Any:
        params, outputs = converted(parameters(), library, dtype), []
        cache = mha_spec.KVCache.empty(BATCH, KV_HEADS, LENGTH, QK_DIM, V_DIM, like=params["w_k"])
        for start, stop in ((0, 3), (3, 4), (4, 5)):
            tokens = converted(x[:, start:stop], library, dtype)
            output, cache = mha_spec.multi_head_attention(tokens, tokens, tokens, params, cache=cache, **OPTIONS)
            outputs.append(output)
        return outputs

    expected = by_hand(x, parameters())
    with with_float64(library):
        assert_same(ours, [to_library(expected[:, start:stop], library) for start, stop in ((0, 3), (3, 4), (4, 5))])


@pytest.mark.parametrize("function", [reference.multi_head_attention, mha_spec.multi_head_attention])
def test_with_a_single_head_it_is_the_norm_per_head(function: Callable[..., numpy.ndarray]) -> None:
    x, params = numbers(BATCH, LENGTH, EMBED), parameters()
    shared = {
        "w_q": params["w_q"][:, :1],
        "w_k": params["w_k"][:, :1],
        "w_v": params["w_v"][:, :1],
        "w_o": params["w_o"][:1],
    }
    joint = {name: params[name][:1] for name in ("q_joint_norm", "k_joint_norm")}
    single = {name.replace("_joint", ""): gain[0] for name, gain in joint.items()}
    results = [function(x, x, x, shared | norms, **OPTIONS) for norms in (joint, single)]
    assert abs(results[0] - results[1]).max() <= 64 * numpy.finfo(float).eps * abs(results[1]).max()


def test_the_weights_and_a_norm_of_queries_alone() -> None:
    x, params = numbers(BATCH, LENGTH, EMBED), parameters()
    weights = mha_spec.multi_head_attention_weights(x, x, params, **OPTIONS)
    expected = reference.multi_head_attention_weights(x, x, params, **OPTIONS)
    assert abs(weights - expected).max() <= 64 * numpy.finfo(float).eps
    mixed = {name: array for name, array in params.items() if name != "k_joint_norm"} | {"k_norm": numbers(QK_DIM)}
    results = [module.multi_head_attention(x, x, x, mixed, **OPTIONS) for module in (mha_spec, reference)]
    assert abs(results[0] - results[1]).max() <= 64 * numpy.finfo(float).eps * abs(results[1]).max()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"q_norm": (QK_DIM,)}, "q_joint_norm, whose mean is over all heads, received both"),
        ({"k_norm": (QK_DIM,)}, "k_joint_norm, whose mean is over all heads, received both"),
        ({"q_joint_norm": (QK_DIM,)}, "`params['q_joint_norm']` must have shape (heads, qk_dim)"),
        ({"q_joint_norm": (HEADS * QK_DIM,)}, "`params['q_joint_norm']` must have shape (heads, qk_dim)"),
        ({"k_joint_norm": (HEADS, QK_DIM)}, "`params['k_joint_norm']` must have shape (kv_heads, qk_dim)"),
    ],
)
def test_wrong_gains_are_refused(library: str, change: dict[str, tuple[int, ...]], part: str) -> None:
    pytest.importorskip(library)
    params = parameters() | {name: numbers(*shape) for name, shape in change.items()}
    x, tensors = (converted(tree, library, "float32") for tree in (numbers(BATCH, LENGTH, EMBED), params))
    with pytest.raises(ArgumentValueError) as caught:
        mha_spec.multi_head_attention(x, x, x, tensors, **OPTIONS)
    assert part in str(caught.value)


def test_the_object_has_gains_of_all_heads() -> None:
    made = MultiHeadAttention(EMBED, HEADS, kv_heads=KV_HEADS, qk_dim=QK_DIM, qk_norm="joint", dtype="float64", rng=3)
    assert {name: array.shape for name, array in made.params.items() if "norm" in name} == {
        "q_joint_norm": (HEADS, QK_DIM),
        "k_joint_norm": (KV_HEADS, QK_DIM),
    }
    assert all((made.params[name] == 1).all() for name in ("q_joint_norm", "k_joint_norm"))
    x = numbers(BATCH, LENGTH, EMBED)
    expected = mha_spec.multi_head_attention(x, x, x, made.params)
    assert numpy.array_equal(made(x), expected)
