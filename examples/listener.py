"""The model of Whisper (Radford et al. 2022), on every backend of mha_spec.

The model is written once, over the blocks of `transformer.py` and the functions of the library of its parameters.
Two convolutions, the second of stride 2, turn the frames of a recording into the tokens of the encoder; the decoder
attends to what it has written, and to the encoder. Parameters are a nested mapping of arrays:

    conv_1: (3 * mels, embed) and (embed,); conv_2: (3 * embed, embed) and (embed,): three frames side by side
    encoder, norm_encoder, decoder, norm_decoder: the blocks of `transformer.py`, and the norms of their outputs
    embedding (symbols, embed), shared by the decoder's input and output; positions (longest, embed), which are learned
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
import transformer
from transformer import Memory, Style, functions, gelu

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "STYLE",
    "Memory",
    "cross_weights",
    "decode",
    "decode_cached",
    "embed",
    "encode",
    "greedy",
    "initial",
    "logits",
]

Array: TypeAlias = Any
Parameters: TypeAlias = "Mapping[str, Any]"

STYLE = Style(norm_first=True, activation=gelu)

decode = partial(transformer.decode, style=STYLE)
decode_cached = partial(transformer.decode_cached, style=STYLE)
cross_weights = partial(transformer.cross_weights, style=STYLE)
logits = transformer.logits


def initial(
    rng: numpy.random.Generator,
    mels: int,
    symbols: int,
    longest: int,
    *,
    embed: int,
    heads: int,
    feed: int,
    blocks: int,
) -> dict[str, Any]:
    """Make initial parameters in float32; a key has no bias, as in Whisper, because a softmax would ignore it."""

    def normal(*shape: int) -> numpy.ndarray:
        return (shape[0] ** -0.5 * rng.standard_normal(shape)).astype("float32")

    def norm() -> tuple[numpy.ndarray, numpy.ndarray]:
        return numpy.ones(embed, "float32"), numpy.zeros(embed, "float32")

    stacks = transformer.initial(rng, symbols, embed, heads, feed, blocks)
    for block in stacks["encoder"] + stacks["decoder"]:
        for name in {"attention", "cross"} & block.keys():
            del block[name]["b_k"]
    return {
        **stacks,
        "conv_1": (normal(3 * mels, embed), norm()[1]),
        "conv_2": (normal(3 * embed, embed), norm()[1]),
        "norm_encoder": norm(),
        "norm_decoder": norm(),
        "positions": (0.02 * rng.standard_normal((longest, embed))).astype("float32"),
    }


def encode(params: Parameters, frames: Array, lengths: Array | None = None) -> Memory:
    """Encode frames (batch, frames, mels), of which the first `lengths` are not padding."""
    x = gelu(_convolved(frames, params["conv_1"]))
    x = gelu(_convolved(x, params["conv_2"], stride=2))
    xp = functions(x)
    x = x + xp.asarray(_sinusoids(*x.shape[1:]), dtype=x.dtype)
    return transformer.encode(params, x, None if lengths is None else (lengths + 1) // 2, STYLE)


def _convolved(x: Array, convolution: Sequence[Array], stride: int = 1) -> Array:
    """Multiply each frame and its two neighbours, side by side, by the matrix of a convolution of width 3."""
    xp, (weight, bias) = functions(x), convolution
    silence = xp.zeros_like(x[:, :1])
    padded, length = xp.concatenate([silence, x, silence], axis=1), x.shape[1]
    neighbours = xp.concatenate([padded[:, shift : shift + length : stride] for shift in range(3)], axis=-1)
    return xp.matmul(neighbours, weight) + bias


def _sinusoids(length: int, size: int) -> numpy.ndarray:
    """Sines, then cosines, of position / 10000^(i / (size / 2 - 1))."""
    angles = numpy.arange(length)[:, None] / 10000 ** (numpy.arange(size // 2) / (size // 2 - 1))
    return numpy.concatenate([numpy.sin(angles), numpy.cos(angles)], axis=-1)


def embed(params: Parameters, tokens: Array, first: int = 0) -> Array:
    """Embed the tokens (batch, length) of the decoder at positions from `first` on."""
    table = params["embedding"]
    xp, length = functions(table), tokens.shape[1]
    rows = xp.take(table, xp.reshape(tokens, (-1,)), axis=0)
    return xp.reshape(rows, (*tokens.shape, table.shape[1])) + params["positions"][first : first + length]


def greedy(params: Parameters, memory: Memory, begin: int, length: int) -> numpy.ndarray:
    """Write recordings down token by token with a cache, always the most likely token: (batch, length)."""
    return transformer.greedy(params, memory, begin, length, embed=embed, style=STYLE)
