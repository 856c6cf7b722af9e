"""The node tests that ONNX ships for `Attention` (opsets 23 to 25), asked of the reference and of the NumPy backend.

They are an outside judge: the expected values come from ONNX's own implementation, and a result passes where ONNX's own
test runner passes it, with the tolerances that each test carries (rtol 1e-3, atol 1e-7; the runner widens rtol to 2**-6
for bfloat16). `Node` reads one of them as our call.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
import onnx
import pytest
from onnx.backend.test.runner import Runner

import mha_spec
from mha_spec import reference
from mha_spec.arguments import Arguments
from mha_spec.arrays import FLOATING, dtype_name

if TYPE_CHECKING:
    from types import ModuleType

    from onnx.backend.test.case.test_case import TestCase


ROUNDED_ON_THE_WAY = (
    "test_attention_4d_causal_bf16",
    "test_attention_4d_padded_kv_bf16",
    "test_attention_4d_causal_padded_kv_bf16",
    "test_attention_4d_attn_mask_causal_bf16",
    "test_attention_3d_causal_bf16",
)
"""Tests whose expected values were rounded to bfloat16 at every step; MHA-SOFTMAX-2 computes scores and softmax in
float32, and MHA-DTYPE-1 rounds once. The values are up to 1.7 units in the last place off. The tolerance of the tests,
rtol 1e-3, therefore refuses every correctly rounded result; the wider one of the runner for bfloat16 admits it."""


def _collect() -> dict[str, TestCase]:
    """Return every node test by name, without the expansions of the same nodes into primitive operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases("Attention")
    return {case.name: case for case in cases if not case.name.endswith("_expanded")}


CASES = _collect()


@dataclass(frozen=True)
class Node:
    """One ONNX `Attention` node with its data, in the terms of our call."""

    attributes: dict[str, Any]
    inputs: dict[str, numpy.ndarray]
    expected: dict[str, numpy.ndarray]
    rtol: float
    atol: float

    @classmethod
    def read(cls, case: TestCase) -> Node:
        """Name inputs, outputs and attributes as the operator's schema does."""
        assert case.model is not None
        assert case.data_sets is not None
        schema = onnx.defs.get_schema("Attention", case.model.opset_import[0].version)
        node = case.model.graph.node[0]
        ((inputs, outputs),) = case.data_sets
        return cls(
            attributes={item.name: onnx.helper.get_attribute_value(item) for item in node.attribute},
            inputs=_by_name(schema.inputs, node.input, inputs),
            expected=_by_name(schema.outputs, node.output, outputs),
            rtol=case.rtol,
            atol=case.atol,
        )

    def converted(self, dtype: type[numpy.floating]) -> Node:
        """The same node with every floating input in another dtype."""
        floating = {name for name, array in self.inputs.items() if dtype_name(array) in FLOATING}
        inputs = {name: array.astype(dtype) if name in floating else array for name, array in self.inputs.items()}
        return replace(self, inputs=inputs)

    def heads_apart(self, name: str, heads: str) -> numpy.ndarray:
        """Return an input with the axes (batch, heads, length, size); ONNX also takes (batch, length, heads * size)."""
        array = self.inputs[name]
        if array.ndim == 4:
            return array
        return array.reshape(*array.shape[:2], self.attributes[heads], -1).swapaxes(1, 2)

    def tensors(self) -> dict[str, numpy.ndarray]:
        """Query, and key and value behind those of the cache."""
        key, value = self.heads_apart("K", "kv_num_heads"), self.heads_apart("V", "kv_num_heads")
        if "past_key" in self.inputs:
            key = numpy.concatenate((self.inputs["past_key"], key), axis=2)
            value = numpy.concatenate((self.inputs["past_value"], value), axis=2)
        return {"query": self.heads_apart("Q", "q_num_heads"), "key": key, "value": value}

    def options(self, q_len: int, kv_len: int) -> dict[str, Any]:
        """Our options; ONNX aligns causal and window to the cache, and has 0 for no softcap and -1 for no bound."""
        attributes = self.attributes
        options: dict[str, Any] = {"scale": attributes.get("scale"), "softcap": attributes.get("softcap") or None}
        options["causal"] = bool(attributes.get("is_causal", 0))
        sides = (attributes.get("left_window_size", -1), attributes.get("right_window_size", -1))
        options["window"] = tuple(None if side == -1 else side for side in sides)
        options["kv_lengths"] = lengths = self.inputs.get("nonpad_kv_seqlen")
        past = self.inputs["past_key"].shape[2] if "past_key" in self.inputs else 0
        options["q_offset"] = past if lengths is None else lengths - q_len
        if "attn_mask" in self.inputs:
            mask = _padded(self.inputs["attn_mask"], kv_len)
            options["mask" if mask.dtype == bool else "bias"] = mask
        return options


def _by_name(formal: Any, names: Any, arrays: Any) -> dict[str, numpy.ndarray]:
    present = [parameter.name for parameter, name in zip(formal, names, strict=False) if name]
    return dict(zip(present, arrays, strict=True))


def _padded(mask: numpy.ndarray, kv_len: int) -> numpy.ndarray:
    """A mask of rank 1 to 4 broadcasts from the right; one that is too short hides the keys that it does not reach."""
    hidden = False if mask.dtype == bool else -numpy.inf
    missing = [(0, 0)] * (mask.ndim - 1) + [(0, kv_len - mask.shape[-1])]
    padded = numpy.pad(mask, missing, constant_values=hidden)
    return padded.reshape((1,) * (4 - mask.ndim) + padded.shape)


def _scores(node: Node, tensors: dict[str, numpy.ndarray], options: dict[str, Any]) -> numpy.ndarray:
    """The scores that ONNX gives in modes 0 to 2: plain, capped, or with bias and what is hidden at -inf."""
    mode = node.attributes.get("qk_matmul_output_mode", 0)
    chosen = options if mode == 2 else {"softcap": options["softcap"] if mode == 1 else None, "scale": options["scale"]}
    trace = reference.Reference().trace(Arguments(**tensors, **chosen))
    scores = numpy.where(trace.visible, trace.logits, -numpy.inf)
    return scores.astype(tensors["query"].dtype)


def _answer(node: Node, module: ModuleType, **changes: Any) -> dict[str, numpy.ndarray]:
    """Every output that the node names, as `module` gives it; `changes` replace our options."""
    tensors = node.tensors()
    options = node.options(tensors["query"].shape[2], tensors["key"].shape[2]) | changes
    output = module.attention(**tensors, **options)
    if node.inputs["Q"].ndim == 3:
        output = output.swapaxes(1, 2).reshape(*node.inputs["Q"].shape[:2], -1)
    answer = {"Y": output, "present_key": tensors["key"], "present_value": tensors["value"]}
    if "qk_matmul_output" in node.expected:
        weights = node.attributes.get("qk_matmul_output_mode", 0) == 3
        options_of_weights = {"query": tensors["query"], "key": tensors["key"], **options}
        answer["qk_matmul_output"] = (
            module.attention_weights(**options_of_weights) if weights else _scores(node, tensors, options)
        )
    return {name: answer[name] for name in node.expected}


def _judge(node: Node, answer: dict[str, numpy.ndarray]) -> None:
    """Raise AssertionError unless ONNX's own rule passes the answer."""
    Runner.assert_similar_outputs(list(node.expected.values()), list(answer.values()), node.rtol, node.atol)


@pytest.fixture(params=["reference", "numpy"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    """The reference, and the NumPy backend."""
    return reference if request.param == "reference" else mha_spec.backend("numpy")


def test_every_node_test_is_here() -> None:
    assert len(CASES) == 93


@pytest.mark.parametrize("name", CASES)
def test_node(name: str, module: ModuleType) -> None:
    node = Node.read(CASES[name])
    _judge(node, _answer(node, module))


@pytest.mark.parametrize("name", ROUNDED_ON_THE_WAY)
def test_written_tolerance_refuses_the_correctly_rounded_result(name: str) -> None:
    node = Node.read(CASES[name])
    exact = _answer(node.converted(numpy.float64), reference)["Y"]
    rounded = exact.astype(ml_dtypes.bfloat16).astype(numpy.float64)
    expected = node.expected["Y"].astype(numpy.float64)
    assert not numpy.allclose(rounded, expected, rtol=node.rtol, atol=node.atol)
    assert abs(rounded - exact).max() < abs(expected - exact).max()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test_attention_4d_scaled", {"scale": None}),
        ("test_attention_4d_causal", {"causal": False}),
        ("test_attention_4d_causal_with_past_and_present", {"q_offset": 0}),
        ("test_attention_4d_gqa_causal_nonpad_decode", {"q_offset": 0}),
        ("test_attention_4d_softcap", {"softcap": None}),
        ("test_attention_bidirectional_window", {"window": (1, 1)}),
        ("test_attention_4d_gqa_attn_mask", {"bias": None}),
        ("test_attention_causal_boolmask_nan_robustness", {"mask": None}),
    ],
)
def test_a_wrong_call_is_refused(name: str, changes: dict[str, Any], module: ModuleType) -> None:
    node = Node.read(CASES[name])
    with pytest.raises(AssertionError):
        _judge(node, _answer(node, module, **changes))
