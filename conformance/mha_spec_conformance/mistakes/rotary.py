"""Mistakes in rotary embedding and ALiBi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import layer_steps, rotary_checks
from mha_spec.arrays import dtype_name

from .layer import layered
from .mistake import ALIBI, LAYER, ROTARY

if TYPE_CHECKING:
    from mha_spec.rotary_checks import Rotary

Turns = tuple[numpy.ndarray, numpy.ndarray]

__all__ = ["POSITIONS", "TURNING", "Turns", "at"]

TURNING = (*LAYER, *ROTARY)


def other_pairs(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Exchange both pairings."""
    return layer_steps.turn(x, turns, not interleaved)


def mixed_pairs(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Rotate the pairs of the half pairing by the angles of the interleaved pairing: component c by angle c // 2."""
    pairs = turns[0].shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    half = numpy.concatenate([-turned[..., pairs:], turned[..., :pairs]], axis=-1)
    cosine, sine = (numpy.repeat(turn, 2, axis=-1) for turn in turns)
    return numpy.concatenate([(turned * cosine + half * sine).astype(x.dtype), rest], axis=-1)


def last_components(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Rotate the last components instead of the first."""
    start = x.shape[-1] - 2 * turns[0].shape[-1]
    return numpy.concatenate([x[..., :start], layer_steps.turn(x[..., start:], turns, interleaved)], axis=-1)


def of_the_whole_size(rotary: dict[str, Any], size: int, _: object = None) -> Rotary:
    """Use the frequencies of the whole size instead of rotary_dim: base^(-2i / size)."""
    checked = rotary_checks.check_rotary(rotary, size)
    return checked._replace(base=checked.base ** ((checked.rotary_dim or size) / size))


def at(change: Any) -> Any:
    """Compute the turns at other positions."""
    return lambda positions, frequencies, like: layer_steps.turns(change(numpy.asarray(positions)), frequencies, like)


def narrow_turns(positions: Any, frequencies: numpy.ndarray, like: numpy.ndarray) -> Turns:
    """Compute the angles in the dtype of the vectors."""
    angles = layer_steps.for_each_pair(numpy.asarray(positions).astype(like.dtype)) * frequencies.astype(like.dtype)
    cosine, sine = numpy.cos(angles), numpy.sin(angles)
    return (cosine[:, None], sine[:, None]) if cosine.ndim == 3 else (cosine, sine)


def plain_slopes(heads: int, dtype: str) -> numpy.ndarray:
    """Return 2^(-8 (h + 1) / heads) for any number of heads."""
    return (2.0 ** (-8 * (numpy.arange(heads) + 1) / heads)).astype(dtype)


def slopes_from_one(heads: int, dtype: str) -> numpy.ndarray:
    """Return 2^(-8 h / heads)."""
    return (layer_steps.slopes(heads, "float64") * 2.0 ** (8 / 2 ** (heads.bit_length() - 1))).astype(dtype)


def signed(offset: Any, q_len: int, kv_len: int, like: Any, steps: Any) -> numpy.ndarray:
    """Return p - j, which is negative for keys after the query."""
    rows = numpy.reshape(offset, (-1, 1, 1, 1)) + numpy.arange(q_len)[:, None]
    return rows - numpy.arange(kv_len)


def from_the_last_query(offset: Any, q_len: int, kv_len: int, like: Any, steps: Any) -> numpy.ndarray:
    """Return kv_len - 1 - j in every row."""
    apart = layer_steps.distances(offset, q_len, kv_len, like, steps)
    return numpy.broadcast_to(kv_len - 1 - numpy.arange(kv_len), apart.shape)


POSITIONS = (
    layered(
        "rotary-ignored",
        "accepts rotary and does not rotate",
        "MHA-ROTARY-1",
        "MHA-LAYER-1",
        turn=lambda x, turns, interleaved: x,
        functions=TURNING,
    ),
    layered(
        "rotary-pairing-exchanged",
        "exchanges the pairings of interleaved=True and interleaved=False",
        "MHA-ROTARY-1",
        "MHA-ROTARY-2",
        turn=other_pairs,
        functions=TURNING,
        bugs=("vllm-project/vllm-ascend PR#12780", "EleutherAI/gpt-neox#834"),
    ),
    layered(
        "rotary-interleaved-ignored",
        "uses the pairing of interleaved=False, whatever interleaved is",
        "MHA-ROTARY-2",
        turn=lambda x, turns, interleaved: layer_steps.turn(x, turns, False),
        functions=TURNING,
        bugs=("Dao-AILab/flash-attention PR#569",),
    ),
    layered(
        "rotary-always-interleaved",
        "uses the pairing of interleaved=True, whatever interleaved is",
        "MHA-ROTARY-1",
        turn=lambda x, turns, interleaved: layer_steps.turn(x, turns, True),
        functions=TURNING,
        bugs=("TransformerLensOrg/TransformerLens PR#365",),
    ),
    layered(
        "rotary-angles-of-the-other-pairing",
        "uses the pairing of interleaved=False with the angles of interleaved=True",
        "MHA-ROTARY-1",
        turn=mixed_pairs,
        functions=TURNING,
        bugs=("raiyanyahya/how-to-train-your-gpt#6",),
    ),
    layered(
        "rotary-sine-inverted",
        "rotates in the opposite direction",
        "MHA-ROTARY-1",
        turn=lambda x, turns, interleaved: layer_steps.turn(x, (turns[0], -turns[1]), interleaved),
        functions=ROTARY,
    ),
    layered(
        "rotary-base-ignored",
        "uses the base 10000, whatever base is",
        "MHA-ROTARY-1",
        frequencies=lambda base, rotary_dim: layer_steps.frequencies(10000.0, rotary_dim),
        functions=TURNING,
    ),
    layered(
        "rotary-exponent-halved",
        "rotates pair i at the frequency base^(-i / rotary_dim)",
        "MHA-ROTARY-1",
        frequencies=lambda base, rotary_dim: numpy.sqrt(layer_steps.frequencies(base, rotary_dim)),
        functions=TURNING,
    ),
    layered(
        "rotary-frequencies-of-the-whole-size",
        "computes the frequencies from the whole size instead of rotary_dim",
        "MHA-ROTARY-3",
        check_rotary=of_the_whole_size,
        functions=TURNING,
        bugs=("pie-project/pie#602",),
    ),
    layered(
        "rotary-dim-ignored",
        "rotates every component, whatever rotary_dim is",
        "MHA-ROTARY-3",
        check_rotary=lambda rotary, size, _: rotary_checks.check_rotary(rotary, size)._replace(rotary_dim=None),
        functions=TURNING,
        bugs=("AI-Hypercomputer/maxtext#4742",),
    ),
    layered(
        "rotary-of-the-last-components",
        "rotates the last rotary_dim components instead of the first",
        "MHA-ROTARY-3",
        turn=last_components,
        functions=TURNING,
    ),
    layered(
        "rotary-positions-plus-one",
        "counts positions from 1",
        "MHA-ROTARY-4",
        turns=at(lambda positions: positions + 1),
        functions=ROTARY,
    ),
    layered(
        "rotary-positions-never-negative",
        "treats negative positions as 0",
        "MHA-ROTARY-4",
        turns=at(lambda positions: numpy.maximum(positions, 0)),
        functions=TURNING,
        bugs=("fla-org/flash-linear-attention PR#902",),
    ),
    layered(
        "rotary-positions-whole",
        "rounds positions down to whole numbers",
        "MHA-ROTARY-4",
        turns=at(numpy.floor),
        functions=ROTARY,
    ),
    layered(
        "rotary-positions-of-the-first-entry",
        "uses the positions of the first batch entry for all",
        "MHA-ROTARY-4",
        turns=at(lambda positions: positions if positions.ndim == 1 else positions[:1]),
        functions=TURNING,
        bugs=("unslothai/unsloth#3699", "rasbt/reasoning-from-scratch#33"),
    ),
    layered(
        "rotary-positions-of-the-longest-entry",
        "uses the positions of the batch entry with the most tokens for all",
        "MHA-ROTARY-4",
        turns=at(lambda positions: positions if positions.ndim == 1 else positions.max(axis=0, keepdims=True)),
        functions=TURNING,
        bugs=("huggingface/transformers#22161",),
    ),
    layered(
        "rotary-offset-ignored",
        "rotates queries and new keys as if the first had position 0",
        "MHA-ROTARY-4",
        "MHA-CACHE-2",
        positions=lambda offset, length, like: layer_steps.positions(0, length, like),
        needs=("rotary",),
        bugs=("mlfoundations/open_lm PR#74", "huggingface/transformers#22161"),
    ),
    layered(
        "rotary-behind-the-new-tokens",
        "rotates new tokens at the lengths of the new cache",
        "MHA-ROTARY-4",
        "MHA-CACHE-2",
        positions=lambda offset, length, like: layer_steps.positions(numpy.asarray(offset) + length, length, like),
        needs=("rotary", "cache_lengths"),
    ),
    layered(
        "rotary-angles-in-16-bits",
        "computes angles in the dtype of the vectors",
        "MHA-ROTARY-5",
        turns=narrow_turns,
        functions=TURNING,
        native=True,
        bugs=("EleutherAI/gpt-neox#1003", "huggingface/transformers#29285", "huggingface/candle#3520"),
    ),
    layered(
        "alibi-slopes-plain",
        "returns the slopes 2^(-8 (h + 1) / heads) for every number of heads",
        "MHA-ALIBI-1",
        slopes=plain_slopes,
        functions=ALIBI[:1],
        bugs=("ml-explore/mlx#343", "NVIDIA/TensorRT-LLM PR#1611"),
    ),
    layered(
        "alibi-slopes-from-one",
        "returns the slope 1 for head 0",
        "MHA-ALIBI-1",
        slopes=slopes_from_one,
        functions=ALIBI[:1],
        bugs=("paiml/aprender PR#2143",),
    ),
    layered(
        "alibi-sign-inverted",
        "returns a bias that grows with the distance",
        "MHA-ALIBI-2",
        alibi=lambda slopes, distances: -layer_steps.alibi(slopes, distances),
        functions=ALIBI[1:],
        bugs=("meta-pytorch/attention-gym PR#86",),
    ),
    layered(
        "alibi-distance-signed",
        "uses p - j as the distance, so that keys after the query have a positive bias",
        "MHA-ALIBI-2",
        distances=signed,
        functions=ALIBI[1:],
    ),
    layered(
        "alibi-row-of-the-last-query",
        "returns the distances of the last of kv_len queries in every row",
        "MHA-ALIBI-2",
        distances=from_the_last_query,
        functions=ALIBI[1:],
        bugs=("mosaicml/llm-foundry#186", "vllm-project/vllm#1009"),
    ),
    layered(
        "alibi-offset-ignored",
        "computes distances at the upper left, whatever q_offset is",
        "MHA-ALIBI-2",
        distances=lambda offset, *rest: layer_steps.distances(0 * numpy.asarray(offset), *rest),
        functions=ALIBI[1:],
        bugs=("Dao-AILab/flash-attention#907",),
    ),
    layered(
        "alibi-in-the-dtype-of-the-slopes",
        "returns the bias in the dtype of the slopes",
        "MHA-ALIBI-3",
        alibi=lambda slopes, distances: layer_steps.alibi(slopes, distances).astype(dtype_name(slopes)),
        functions=ALIBI[1:],
        native=True,
    ),
)
