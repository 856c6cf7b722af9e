"""The allowance of a layer's projection covers a sum that begins with its bias, as fused matrix products do."""

from __future__ import annotations

import numpy
import pytest
from layers import LayerProblem
from shares import share_of

import mha_spec
from mha_spec.parameters import AXES


def problem(seed: int) -> LayerProblem:
    """Return a layer over one token, whose output is small compared with its bias."""
    rng = numpy.random.default_rng(seed)
    shapes = {
        "query": (1, 1, 3),
        "w_q": (3, 2, 5),
        "w_k": (3, 2, 5),
        "w_v": (3, 2, 7),
        "w_o": (2, 7, 11),
        "b_o": (11,),
    }
    arrays = {name: rng.integers(-4, 5, shape).astype("float32") / 4 for name, shape in shapes.items()}
    arrays["w_o"] = (rng.standard_normal(shapes["w_o"]) / 1000).astype("float32")
    arrays |= {"key": arrays["query"], "value": arrays["query"]}
    return LayerProblem("float32", arrays, {})


def fused(p: LayerProblem) -> numpy.ndarray:
    """Add the products one by one to the bias, in float32; the value of the token is exact, because its weight is 1."""
    heads = numpy.einsum("ble,ehd->blhd", p.arrays["value"], p.arrays["w_v"]).reshape(-1)
    weight = p.arrays["w_o"].reshape(len(heads), -1)
    total = p.arrays["b_o"].copy()
    for component, row in zip(heads, weight, strict=True):
        total = total + component * row
    return total[None, None]


@pytest.mark.parametrize("seed", range(7))
def test_a_sum_may_begin_with_its_bias(seed: int) -> None:
    p = problem(seed)
    assert share_of(p)({"output": fused(p)}) <= 1


def test_an_output_without_its_bias_is_refused() -> None:
    p = problem(0)
    assert share_of(p)({"output": fused(p) - p.arrays["b_o"]}) > 1


def with_joint_norms(seed: int) -> LayerProblem:
    """Return a layer with norms over all heads."""
    rng = numpy.random.default_rng(seed)
    shapes = {
        "query": (2, 3, 7),
        "w_q": (7, 6, 5),
        "w_k": (7, 2, 5),
        "w_v": (7, 2, 3),
        "w_o": (6, 3, 11),
        "q_joint_norm": (6, 5),
        "k_joint_norm": (2, 5),
    }
    arrays = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    return LayerProblem("float32", arrays | {"key": arrays["query"], "value": arrays["query"]}, {})


@pytest.mark.parametrize("seed", range(7))
def test_norms_over_all_heads_have_an_allowance(seed: int) -> None:
    p = with_joint_norms(seed)
    params = {name: array for name, array in p.arrays.items() if name in AXES}
    x = p.arrays["query"]
    share = share_of(p)({"output": mha_spec.multi_head_attention(x, x, x, params)})
    assert 2**-16 < share <= 1
    moved = params | {"q_joint_norm": params["q_joint_norm"] * numpy.float32(1.001)}
    assert share_of(p)({"output": mha_spec.multi_head_attention(x, x, x, moved)}) > 1
