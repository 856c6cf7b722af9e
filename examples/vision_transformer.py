"""The Vision Transformer (Dosovitskiy et al. 2021), on every backend of mha_spec.

The model is written once, over the encoder of `transformer.py` and the functions of the library of its parameters.
Images are (batch, height, width, channels). Each patch, a square of pixels, becomes a token; a learned class token
comes first, and its state after the last block is classified. Parameters are a nested mapping of arrays:

    patch: (patch * patch * channels, embed) and (embed,), the projection of a patch
    class_token (embed,)
    positions (1 + patches, embed), which are learned
    encoder, norm_encoder: the blocks of `transformer.py`, and the norm of their output
    head: (embed, classes) and (classes,), the projection of the class token
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
import transformer
from transformer import Style, functions, gelu, layer_norm

import mha_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["STYLE", "class_attention", "embed", "initial", "logits"]

Array: TypeAlias = Any
Parameters: TypeAlias = "Mapping[str, Any]"

STYLE = Style(norm_first=True, activation=gelu, epsilon=1e-6)


def initial(
    rng: numpy.random.Generator,
    patch: int,
    patches: int,
    classes: int,
    *,
    embed: int,
    heads: int,
    feed: int,
    blocks: int,
    channels: int = 1,
) -> dict[str, Any]:
    """Make initial parameters in float32; the head begins at 0, so that every class is equally likely."""

    def normal(*shape: int, deviation: float) -> numpy.ndarray:
        return (deviation * rng.standard_normal(shape)).astype("float32")

    def zeros(*shape: int) -> numpy.ndarray:
        return numpy.zeros(shape, "float32")

    pixels = patch * patch * channels
    return {
        "patch": (normal(pixels, embed, deviation=pixels**-0.5), zeros(embed)),
        "class_token": normal(embed, deviation=0.02),
        "positions": normal(1 + patches, embed, deviation=0.3),
        "encoder": transformer.initial(rng, 0, embed, heads, feed, blocks)["encoder"],
        "norm_encoder": (zeros(embed) + 1, zeros(embed)),
        "head": (zeros(embed, classes), zeros(classes)),
    }


def embed(params: Parameters, images: Array) -> Array:
    """Return the tokens of images, the class token first: (batch, 1 + patches, embed)."""
    xp, (weight, _) = functions(images), params["patch"]
    batch, height, width, channels = images.shape
    size = round((weight.shape[0] / channels) ** 0.5)
    squares = xp.reshape(images, (batch, height // size, size, width // size, size * channels))
    flat = xp.reshape(xp.moveaxis(squares, 3, 2), (batch, -1, size * size * channels))
    first = xp.broadcast_to(params["class_token"], (batch, 1, weight.shape[1]))
    return xp.concatenate([first, _projected(flat, params["patch"])], axis=1) + params["positions"]


def logits(params: Parameters, images: Array) -> Array:
    """Score every class: (batch, classes)."""
    states, _ = transformer.encode(params, embed(params, images), style=STYLE)
    return _projected(states[:, 0], params["head"])


def class_attention(params: Parameters, images: Array) -> Array:
    """Return the weights of the class token over the patches in the last block: (batch, heads, patches).

    The class token also attends to itself, so the weights of the patches sum to less than 1.
    """
    *before, last = params["encoder"]
    states, _ = transformer.encode({"encoder": before}, embed(params, images), style=STYLE)
    states = layer_norm(states, last["norm_1"], STYLE.epsilon)
    return mha_spec.multi_head_attention_weights(states[:, :1], states, last["attention"])[:, :, 0, 1:]


def _projected(x: Array, projection: Sequence[Array]) -> Array:
    weight, bias = projection
    return functions(x).matmul(x, weight) + bias
