"""The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017), on every backend of mha_spec.

The model is written once, over `mha_spec.multi_head_attention` and the functions of the library of its parameters, so
the same numbers pass through NumPy, PyTorch, JAX and TensorFlow. A `Style` describes the blocks of later models, which
normalise first (GPT-2, ViT, Whisper) or use GELU (BERT). Parameters are a nested mapping of arrays:

    embedding (symbols, embed), shared by both sides and the output, as in section 3.4 of the paper
    encoder: a list of {attention, norm_1, w_1, b_1, w_2, b_2, norm_2}
    decoder: a list of {attention, norm_1, cross, norm_2, w_1, b_1, w_2, b_2, norm_3}
    norm_encoder, norm_decoder: optional norms of the output of each stack, which `torch.nn.Transformer` adds
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy

import mha_spec
from mha_spec.arrays import library_of, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "PAPER",
    "Blocks",
    "Memory",
    "Style",
    "cross_weights",
    "decode",
    "decode_cached",
    "embed",
    "encode",
    "functions",
    "gelu",
    "greedy",
    "initial",
    "layer_norm",
    "logits",
    "relu",
    "start",
]

Array: TypeAlias = Any
Parameters: TypeAlias = "Mapping[str, Any]"
Blocks: TypeAlias = "tuple[tuple[mha_spec.KVCache, mha_spec.KVCache], ...]"
"""For each block of the decoder: the cache of the decoder's tokens, and that of the encoder's."""

EPSILON = 1e-5
"""Added to the variance in layer normalisation, as PyTorch does."""


def functions(x: Array) -> Any:
    """Return the functions of the Python array API for `x`; TensorFlow has the needed ones in its NumPy module."""
    if library_of(x) == "tensorflow":
        return import_module("tensorflow.experimental.numpy")
    return namespace_of(x)


def relu(x: Array) -> Array:
    """Compute max(0, x)."""
    xp = functions(x)
    return xp.maximum(x, xp.zeros_like(x))


_ERF = {"torch": "torch", "jax": "jax.scipy.special", "tensorflow": "tensorflow.math", "numpy": "scipy.special"}
"""The module of each library that has `erf`, which the array API lacks."""


def gelu(x: Array) -> Array:
    """Compute x times the probability that a standard normal variable is less than x."""
    erf = import_module(_ERF[library_of(x) or "numpy"]).erf
    return x * (1 + erf(x / 2**0.5)) / 2


class Style(NamedTuple):
    """Describes how a block adds each of its parts: x + part(norm(x)) if `norm_first`, else norm(x + part(x))."""

    norm_first: bool = False
    activation: Callable[[Array], Array] = relu
    epsilon: float = EPSILON


PAPER = Style()
"""The blocks of the paper."""


class Memory(NamedTuple):
    """The states of the encoder (batch, source length, embed), and the lengths of the sources (batch,), or None."""

    states: Array
    lengths: Array | None


def initial(
    rng: numpy.random.Generator, symbols: int, embed: int, heads: int, feed: int, blocks: int
) -> dict[str, Any]:
    """Make initial parameters in float32: uniform matrices as in Xavier initialisation, zero biases, unit gains."""

    def uniform(shape: tuple[int, ...], inputs: int, outputs: int) -> numpy.ndarray:
        limit = (6 / (inputs + outputs)) ** 0.5
        return rng.uniform(-limit, limit, shape).astype("float32")

    def attention() -> dict[str, numpy.ndarray]:
        size = embed // heads
        into = {f"w_{name}": uniform((embed, heads, size), embed, embed) for name in "qkv"}
        biases = {f"b_{name}": numpy.zeros((heads, size), "float32") for name in "qkv"}
        return {**into, **biases, "w_o": uniform((heads, size, embed), embed, embed), "b_o": zeros(embed)}

    def zeros(size: int) -> numpy.ndarray:
        return numpy.zeros(size, "float32")

    def block(*names: str) -> dict[str, Any]:
        norms = {f"norm_{number + 1}": (zeros(embed) + 1, zeros(embed)) for number in range(len(names) + 1)}
        feeding = {"w_1": uniform((embed, feed), embed, feed), "b_1": zeros(feed)}
        back = {"w_2": uniform((feed, embed), feed, embed), "b_2": zeros(embed)}
        return {name: attention() for name in names} | norms | feeding | back

    return {
        "embedding": (rng.standard_normal((symbols, embed)) / embed**0.5).astype("float32"),
        "encoder": [block("attention") for _ in range(blocks)],
        "decoder": [block("attention", "cross") for _ in range(blocks)],
    }


def encode(params: Parameters, x: Array, lengths: Array | None = None, style: Style = PAPER) -> Memory:
    """Encode embedded tokens (batch, source length, embed), of which the first `lengths` are not padding."""
    for block in params["encoder"]:
        attend = partial(_attend_to_itself, params=block["attention"], kv_lengths=lengths)
        x = _add(x, attend, block["norm_1"], style)
        x = _add(x, partial(_feed_forward, block=block, style=style), block["norm_2"], style)
    return Memory(layer_norm(x, params.get("norm_encoder"), style.epsilon), lengths)


def decode(
    params: Parameters, x: Array, memory: Memory, memory_mask: Array | None = None, style: Style = PAPER
) -> Array:
    """Decode all embedded tokens at once; input and output are (batch, target length, embed).

    `memory_mask` (batch or 1, 1, target length, source length) restricts further which source tokens each token sees.
    """
    states, lengths = memory
    for block in params["decoder"]:
        attend = partial(_attend_to_itself, params=block["attention"], causal=True)
        cross = partial(
            mha_spec.multi_head_attention,
            key=states,
            value=states,
            params=block["cross"],
            kv_lengths=lengths,
            mask=memory_mask,
        )
        x = _decode_block(x, attend, cross, block, style)
    return layer_norm(x, params.get("norm_decoder"), style.epsilon)


def _decode_block(
    x: Array,
    attend: Callable[[Array], Array],
    cross: Callable[[Array], Array],
    block: Parameters,
    style: Style,
) -> Array:
    x = _add(x, attend, block["norm_1"], style)
    x = _add(x, cross, block["norm_2"], style)
    return _add(x, partial(_feed_forward, block=block, style=style), block["norm_3"], style)


def _add(x: Array, part: Callable[[Array], Array], norm: Sequence[Array], style: Style) -> Array:
    if style.norm_first:
        return x + part(layer_norm(x, norm, style.epsilon))
    return layer_norm(x + part(x), norm, style.epsilon)


def _attend_to_itself(x: Array, params: Parameters, **options: Any) -> Any:
    return mha_spec.multi_head_attention(x, x, x, params, **options)


def cross_weights(params: Parameters, x: Array, memory: Memory, style: Style = PAPER) -> Array:
    """Return the cross-attention weights of the decoder's last block: (batch, heads, target length, source length)."""
    *before, last = params["decoder"]
    x = decode({**params, "decoder": before, "norm_decoder": None}, x, memory, style=style)
    x = _add(x, partial(_attend_to_itself, params=last["attention"], causal=True), last["norm_1"], style)
    if style.norm_first:
        x = layer_norm(x, last["norm_2"], style.epsilon)
    return mha_spec.multi_head_attention_weights(x, memory.states, last["cross"], kv_lengths=memory.lengths)


def start(params: Parameters, memory: Memory, capacity: int) -> Blocks:
    """Make caches for `decode_cached`: room for `capacity` tokens, and the encoder's keys and values, computed once."""
    return tuple(_start_block(block, memory, capacity) for block in params["decoder"])


def _start_block(block: Parameters, memory: Memory, capacity: int) -> tuple[mha_spec.KVCache, mha_spec.KVCache]:
    states, lengths = memory
    batch, length, _ = states.shape
    _, heads, size = block["attention"]["w_k"].shape
    decoded = mha_spec.KVCache.empty(batch, heads, capacity, size, like=states)
    cross = mha_spec.KVCache.empty(batch, heads, length, size, like=states)
    no_query = states[:, :0]
    _, cross = mha_spec.multi_head_attention(no_query, states, states, block["cross"], kv_lengths=lengths, cache=cross)
    return decoded, cross


def decode_cached(params: Parameters, x: Array, caches: Blocks, style: Style = PAPER) -> tuple[Array, Blocks]:
    """Decode new tokens; `caches` holds the tokens before them."""
    new_caches: list[tuple[mha_spec.KVCache, mha_spec.KVCache]] = []
    for block, (decoded, cross) in zip(params["decoder"], caches, strict=True):
        x, new = _decode_block_cached(x, decoded, cross, block, style)
        new_caches.append(new)
    return layer_norm(x, params.get("norm_decoder"), style.epsilon), tuple(new_caches)


def _decode_block_cached(
    x: Array, decoded: mha_spec.KVCache, cross: mha_spec.KVCache, block: Parameters, style: Style
) -> tuple[Array, tuple[mha_spec.KVCache, mha_spec.KVCache]]:
    def attend(x: Array) -> Array:
        nonlocal decoded
        output, decoded = mha_spec.multi_head_attention(x, x, x, block["attention"], causal=True, cache=decoded)
        return output

    def attend_to_memory(x: Array) -> Array:
        return mha_spec.multi_head_attention(x, None, None, block["cross"], cache=cross)[0]

    return _decode_block(x, attend, attend_to_memory, block, style), (decoded, cross)


def embed(params: Parameters, tokens: Array, first: int = 0) -> Array:
    """Embed tokens (batch, length) at positions from `first` on, as in sections 3.4 and 3.5 of the paper."""
    table = params["embedding"]
    xp = functions(table)
    size = table.shape[1]
    rows = xp.take(table, xp.reshape(tokens, (-1,)), axis=0)
    at = _sinusoids(first, tokens.shape[1], size)
    return xp.reshape(rows, (*tokens.shape, size)) * size**0.5 + xp.asarray(at, dtype=table.dtype)


def logits(params: Parameters, x: Array) -> Array:
    """Score every symbol of the vocabulary: (batch, length, embed) to (batch, length, symbols)."""
    return functions(x).tensordot(x, params["embedding"], axes=((2,), (1,)))


def greedy(
    params: Parameters,
    memory: Memory,
    begin: int,
    length: int,
    *,
    embed: Callable[[Parameters, Array, int], Array] = embed,
    style: Style = PAPER,
) -> numpy.ndarray:
    """Decode token by token, always taking the most likely symbol; return (batch, length)."""
    caches = start(params, memory, length)
    xp = functions(memory.states)
    tokens = xp.zeros_like(memory.states[:, :1, 0], dtype=xp.int32) + begin
    decoded: list[numpy.ndarray] = []
    for step in range(length):
        x, caches = decode_cached(params, embed(params, tokens, step), caches, style)
        tokens = xp.asarray(xp.argmax(logits(params, x), axis=-1), dtype=xp.int32)
        decoded.append(numpy.asarray(tokens))
    return numpy.concatenate(decoded, axis=1)


def layer_norm(x: Array, norm: Sequence[Array] | None, epsilon: float = EPSILON) -> Array:
    """Normalise x with a gain and a bias; None leaves x unchanged."""
    if norm is None:
        return x
    xp, (gain, bias) = functions(x), norm
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return centred / xp.sqrt(variance + epsilon) * gain + bias


def _feed_forward(x: Array, block: Parameters, style: Style) -> Array:
    """Compute activation(x w_1 + b_1) w_2 + b_2, as in section 3.3 of the paper."""
    xp = functions(x)
    hidden = style.activation(xp.matmul(x, block["w_1"]) + block["b_1"])
    return xp.matmul(hidden, block["w_2"]) + block["b_2"]


def _sinusoids(first: int, length: int, size: int) -> numpy.ndarray:
    """Alternate sine and cosine of position / 10000^(2i / embed), as in section 3.5 of the paper."""
    angles = numpy.arange(first, first + length)[:, None] / 10000 ** (numpy.arange(0, size, 2) / size)
    return numpy.stack([numpy.sin(angles), numpy.cos(angles)], axis=-1).reshape(length, size)
