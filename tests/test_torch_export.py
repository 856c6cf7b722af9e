"""mha_spec_torch in exported programs with symbolic batch and length, and in ONNX models made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import onnxruntime
import pytest
import torch
from support.comparisons import assert_near
from support.layers import EMBED
from support.torch_world import sized, tokens
from torch.export import Dim, export

import mha_spec_torch
from mha_spec_torch.operators import DECOMPOSITIONS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

attention: Callable[..., Any] = mha_spec_torch.attention
SIZES = (2, 5), (3, 17), (7, 2)
"""Batch and length of each call of a program, which is traced with the first pair."""


class Model(torch.nn.Module):
    """The layer with its weights, and attention alone with a window."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = sized(rotary={}, qk_norm=True)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        output, weights = self.layer.output_and_weights(x, causal=True, q_offset=0, kv_lengths=lengths)
        heads = x[:, None]
        return output, weights, attention(heads, heads, heads, window=(3, 1), q_offset="lower_right")


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens, and lengths of which the first is 0."""
    x = tokens(batch * length)[:1]
    return x.reshape(batch, length, EMBED), torch.arange(batch) % (length + 1)


def open_sizes() -> tuple[dict[int, Dim], dict[int, Dim]]:
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=4096)
    return {0: batch, 1: length}, {0: batch}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_no_guards_on_its_sizes(strict: bool) -> None:
    model = Model()
    program = export(model, inputs(*SIZES[0]), dynamic_shapes=open_sizes(), strict=strict).module()
    for sizes in SIZES:
        call = inputs(*sizes)
        assert_near(program(*call), model(*call))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("option", ["mask", "bias", "sinks"])
def test_arrays_of_numpy_are_constants_of_an_exported_program(option: str) -> None:
    constants = {
        "mask": numpy.tri(17, dtype=bool)[None, None],
        "bias": numpy.ones((1, 1, 1, 1)),
        "sinks": numpy.ones(1),
    }
    x = inputs(3, 17)[0][:, None]

    class Constant(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attention(x, x, x, **{option: constants[option]})

    expected = attention(x, x, x, **{option: torch.from_numpy(constants[option])})
    assert_near(export(Constant(), (x,), strict=False).module()(x), expected)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_an_onnx_model_gives_the_same_results(tmp_path: Path) -> None:
    model, path = Model().eval(), str(tmp_path / "model.onnx")
    program = torch.onnx.export(model, inputs(*SIZES[0]), dynamo=True, dynamic_shapes=open_sizes(), verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}  # The standard operators of ONNX.
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for sizes in SIZES:
        call = inputs(*sizes)
        names = [argument.name for argument in session.get_inputs()]
        results = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, call, strict=True)})
        assert_near(results, [expected.detach().numpy() for expected in model(*call)])


@pytest.mark.usefixtures("quiet")
def test_inductor_takes_the_operators_where_ci_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    heads = tokens(5)[:, None]
    torch.compiler.reset()
    compiled = torch.compile(lambda x: attention(2 * x, x, x), fullgraph=True, backend="inductor")
    assert_near(compiled(heads), attention(2 * heads, heads, heads))


@pytest.mark.usefixtures("quiet")
def test_an_exported_program_decomposes_into_standard_operators() -> None:
    model, call = Model(), inputs(*SIZES[0])
    program = export(model, call, dynamic_shapes=open_sizes()).run_decompositions(DECOMPOSITIONS)
    assert not [node for node in program.graph.nodes if "mha_spec" in str(node.target)]
    for sizes in SIZES:
        call = inputs(*sizes)
        assert_near(program.module()(*call), model(*call))
