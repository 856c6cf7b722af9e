"""timm's vision transformers, with random weights of small sizes, compared with ours.

The weights of its layer give its outputs in our layer on every backend; the weights of its model give its logits in the
example's model; and its own model gives the same logits and gradients with our layer as its attention.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
import vision_transformer
from support.comparisons import assert_equal, assert_near, assert_same, largest_difference
from support.libraries import converted, with_float64
from support.numbers import numbers, pattern
from support.timm_modules import layers, models
from support.torch_world import filled, with_gradients

import mha_spec
import mha_spec_torch
from mha_spec import ArgumentValueError
from mha_spec.arrays import library_of
from mha_spec.weights import load_weights, save_weights
from mha_spec_conformance.targets.conversion import LIBRARIES, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Options = dict[str, Any]
BATCH, LENGTH, EMBED, HEADS, SIZE, OUT = 2, 11, 7, 3, 5, 13
IMAGE, PATCH, CHANNELS, CLASSES, WIDTH = (6, 10), 2, 3, 11, 21

LAYERS: dict[str, tuple[Options, Options, Options]] = {
    "plain": ({}, {}, {}),
    "no biases": ({"qkv_bias": False, "proj_bias": False}, {}, {}),
    "RMS normalisation": ({"qk_norm": True, "norm_layer": layers.RmsNorm}, {}, {}),
    "boolean mask": (
        {},
        {"attn_mask": pattern(BATCH, 1, LENGTH, LENGTH)},
        {"mask": pattern(BATCH, 1, LENGTH, LENGTH)},
    ),
    "bias": (
        {},
        {"attn_mask": numbers(BATCH, HEADS, LENGTH, LENGTH)},
        {"bias": numbers(BATCH, HEADS, LENGTH, LENGTH)},
    ),
    "causal": ({}, {"is_causal": True}, {"causal": True}),
}
"""The arguments of timm's constructor, those of its call, and the equivalent options of ours."""


def timm_layer(**arguments: Any) -> Any:
    """Create timm's layer with numbers in every parameter."""
    sizes = {"attn_head_dim": SIZE, "dim_out": OUT, "qkv_bias": True}
    return filled(layers.Attention(EMBED, HEADS, **sizes | arguments, dtype=torch.float64)).eval()


def loaded(layer: Any) -> dict[str, numpy.ndarray]:
    """Load the weights of timm's layer; the gains of RMS normalisation, of which the names are ambiguous, by hand."""
    state = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    gains = {name: state.pop(f"{name}.weight") for name in ("q_norm", "k_norm") if f"{name}.weight" in state}
    return load_weights(state, "vit_timm", heads=HEADS) | gains


def arrays(options: Options, library: str, dtype: str) -> Options:
    """Convert the arrays of options to a library."""
    return {name: x if isinstance(x, bool) else converted(x, library, dtype) for name, x in options.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["formula", "SDPA"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_weights_of_the_layer_give_its_output(name: str, library: str, fused: bool) -> None:
    arguments, theirs, options = LAYERS[name]
    layer, x = timm_layer(**arguments), numbers(BATCH, LENGTH, EMBED)
    layer.fused_attn = fused
    with torch.no_grad():
        judged = layer(torch.from_numpy(x), **arrays(theirs, "torch", "float64"))

    def ours(dtype: str) -> numpy.ndarray:
        with with_float64(library):
            params, tokens = converted((loaded(layer), x), library, dtype)
            output = mha_spec.multi_head_attention(tokens, tokens, tokens, params, **arrays(options, library, dtype))
            assert library_of(output) == library
            return to_numpy(output)

    assert_same(ours, judged.numpy())


def test_a_row_without_keys_is_nan_in_the_formula_of_timm() -> None:
    layer, x = timm_layer(), torch.from_numpy(numbers(BATCH, LENGTH, EMBED))
    mask = torch.from_numpy(pattern(LENGTH, LENGTH))[None, None]
    mask[:, :, 2] = False
    output: Any = mha_spec.multi_head_attention(x, x, x, converted(loaded(layer), "torch", "float64"), mask=mask)
    for fused in (True, False):
        layer.fused_attn = fused
        with torch.no_grad():
            judged = layer(x, attn_mask=mask)
        assert_near(judged[:, 3], output[:, 3])
        if fused:
            assert_equal(output[:, 2], layer.proj.bias.expand(BATCH, -1))
            assert_equal(judged[:, 2], output[:, 2])
        else:
            assert judged[:, 2].isnan().all()


def test_timm_loads_the_saved_weights() -> None:
    layer, other = timm_layer(), timm_layer()
    params = load_weights(dict(layer.named_parameters()), "vit_timm", heads=HEADS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(save_weights(params, "vit_timm"))
    assert_equal(dict(other.named_parameters()), dict(layer.named_parameters()))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"qk_norm": True, "norm_layer": layers.LayerNorm}, "LayerNorm"),
        ({"scale_norm": True, "norm_layer": layers.LayerNorm}, "scale_norm"),
        ({"gated": True}, "gated"),
    ],
)
def test_weights_without_a_place_are_refused(arguments: Options, reason: str) -> None:
    with pytest.raises(ArgumentValueError, match=reason):
        load_weights(dict(timm_layer(**arguments).named_parameters()), "vit_timm", heads=HEADS)


def timm_model() -> Any:
    """Create timm's vision transformer, with numbers in every parameter."""
    model = models.VisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        in_chans=CHANNELS,
        num_classes=CLASSES,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        mlp_ratio=2,
        dtype=torch.float64,
    )
    return filled(model).eval()


def parameters(model: Any) -> dict[str, Any]:
    """Return the weights of timm's model under the names of the example."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def linear(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        return numpy.ascontiguousarray(state[f"{name}.weight"].T), state[f"{name}.bias"]

    def norm(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def block(name: str) -> dict[str, Any]:
        (w_1, b_1), (w_2, b_2) = linear(f"{name}.mlp.fc1"), linear(f"{name}.mlp.fc2")
        attention = load_weights(state, "vit_timm", heads=HEADS, prefix=f"{name}.attn")
        norms = {"norm_1": norm(f"{name}.norm1"), "norm_2": norm(f"{name}.norm2")}
        return {"attention": attention, **norms, "w_1": w_1, "b_1": b_1, "w_2": w_2, "b_2": b_2}

    squares = state["patch_embed.proj.weight"]
    return {
        "patch": (squares.transpose(2, 3, 1, 0).reshape(-1, WIDTH), state["patch_embed.proj.bias"]),
        "class_token": state["cls_token"][0, 0],
        "positions": state["pos_embed"][0],
        "encoder": [block(f"blocks.{number}") for number in range(2)],
        "norm_encoder": norm("norm"),
        "head": linear("head"),
    }


def images(dtype: str = "float64") -> Tensor:
    """Return images as timm takes them, (batch, channels, height, width)."""
    return torch.from_numpy(numbers(BATCH, CHANNELS, *IMAGE)).to(getattr(torch, dtype))


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_weights_of_the_model_give_its_logits_in_the_example(library: str) -> None:
    model = timm_model()
    with torch.no_grad():
        judged = model(images())

    def ours(dtype: str) -> numpy.ndarray:
        with with_float64(library):
            channels_last = images().movedim(1, 3).numpy()
            scores = vision_transformer.logits(*converted((parameters(model), channels_last), library, dtype))
            assert library_of(scores) == library
            return to_numpy(scores)

    assert_same(ours, judged.numpy())


class Ours(torch.nn.Module):
    """Our layer, with the weights of timm's attention, called as timm's is."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        embed, heads, dtype = attention.qkv.in_features, attention.num_heads, attention.qkv.weight.dtype
        self.layer = mha_spec_torch.MultiHeadAttention(embed, heads, dtype=dtype)
        self.layer.load_state_dict(load_weights(dict(attention.state_dict()), "vit_timm", heads=heads))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        return self.layer(x, mask=attn_mask, causal=is_causal)


def replaced(model: Any) -> Any:
    """Return a copy of timm's model with our layer as the attention of each block."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn = Ours(block.attn)
    return model


def logits(model: Any, dtype: str) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).to(getattr(torch, dtype))(images(dtype))


def logits_and_gradients(model: Any, dtype: str) -> dict[str, Tensor]:
    """Compute the logits, and the gradients of the images and of every parameter under timm's names."""
    model, pixels = copy.deepcopy(model).to(getattr(torch, dtype)), images(dtype).requires_grad_()
    parameters = dict(model.named_parameters())
    scores, of_images, *gradients = with_gradients([model(pixels)], [pixels, *parameters.values()])
    named = dict(zip(parameters, gradients, strict=True))
    for number, block in enumerate(model.blocks):
        if isinstance(block.attn, Ours):
            prefix = f"blocks.{number}.attn"
            params = {name: named.pop(f"{prefix}.layer.{name}") for name in block.attn.layer.params}
            named |= save_weights(params, "vit_timm", prefix=prefix)
    return {"logits": scores, "images": of_images, **named}


def test_the_model_has_the_same_logits_and_gradients_with_our_layer() -> None:
    model = timm_model()
    ours = replaced(model)
    assert not any(isinstance(module, layers.Attention) for module in ours.modules())
    judged = logits_and_gradients(model, "float64")
    assert logits_and_gradients(ours, "float64").keys() == judged.keys()
    assert_same(lambda dtype: logits_and_gradients(ours, dtype), judged)


MISTAKES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "heads in another order": lambda params: {"w_q": params["w_q"].flip(1)},
    "keys and values exchanged": lambda params: {"w_k": params["w_v"], "w_v": params["w_k"]},
    "no bias of the values": lambda params: {"b_v": torch.zeros_like(params["b_v"])},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_exceeds_the_tolerance(mistake: str) -> None:
    model = timm_model()
    ours, wrong = replaced(model), replaced(model)
    layer = wrong.blocks[1].attn.layer
    params = dict(layer.params)
    layer.load_state_dict(params | MISTAKES[mistake](params))
    lost = largest_difference(logits(ours, "float32"), logits(ours, "float64"))
    assert largest_difference(logits(wrong, "float64"), logits(model, "float64")) > lost
