"""Vectors turned wrongly, and biases that fall wrongly with the distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import layer_checks, layer_steps
from mha_spec.arrays import dtype_name

from .layer import layered
from .mistake import ALIBI, LAYER, ROTARY

if TYPE_CHECKING:
    from mha_spec.layer_checks import Rotary

    Turns = tuple[numpy.ndarray, numpy.ndarray]

__all__ = ["POSITIONS"]

TURNING = (*LAYER, *ROTARY)


def other_pairs(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Take halves for neighbours and neighbours for halves."""
    return layer_steps.turn(x, turns, not interleaved)


def mixed_pairs(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Turn halves by the angles of neighbours: component c by angle c // 2."""
    pairs = turns[0].shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    half = numpy.concatenate([-turned[..., pairs:], turned[..., :pairs]], axis=-1)
    cosine, sine = (numpy.repeat(turn, 2, axis=-1) for turn in turns)
    return numpy.concatenate([(turned * cosine + half * sine).astype(x.dtype), rest], axis=-1)


def last_components(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Turn the last components in place of the first."""
    start = x.shape[-1] - 2 * turns[0].shape[-1]
    return numpy.concatenate([x[..., :start], layer_steps.turn(x[..., start:], turns, interleaved)], axis=-1)


def of_the_whole_size(rotary: dict[str, Any], size: int) -> Rotary:
    """Frequencies of the size in place of rotary_dim: base^(-2i / size)."""
    found = layer_checks.check_rotary(rotary, size)
    return found._replace(base=found.base ** ((found.rotary_dim or size) / size))


def at(change: Any) -> Any:
    """The turns of other positions."""
    return lambda positions, frequencies, like: layer_steps.turns(change(numpy.asarray(positions)), frequencies, like)


def narrow_turns(positions: Any, frequencies: numpy.ndarray, like: numpy.ndarray) -> Turns:
    """Angles in the dtype of the vectors."""
    angles = numpy.asarray(positions).astype(like.dtype)[..., None] * frequencies.astype(like.dtype)
    cosine, sine = numpy.cos(angles), numpy.sin(angles)
    return (cosine[:, None], sine[:, None]) if cosine.ndim == 3 else (cosine, sine)


def plain_slopes(heads: int, dtype: str) -> numpy.ndarray:
    """2^(-8 (h + 1) / heads) for any number of heads."""
    return (2.0 ** (-8 * (numpy.arange(heads) + 1) / heads)).astype(dtype)


def slopes_from_one(heads: int, dtype: str) -> numpy.ndarray:
    """2^(-8 h / heads)."""
    return (layer_steps.slopes(heads, "float64") * 2.0 ** (8 / 2 ** (heads.bit_length() - 1))).astype(dtype)


def signed(offset: Any, q_len: int, kv_len: int, like: Any, steps: Any) -> numpy.ndarray:
    """p - j, negative behind the query."""
    rows = numpy.reshape(offset, (-1, 1, 1, 1)) + numpy.arange(q_len)[:, None]
    return rows - numpy.arange(kv_len)


POSITIONS = (
    layered(
        "rotary-ignored",
        "takes rotary and does not rotate",
        "MHA-ROTARY-1",
        "MHA-LAYER-1",
        turn=lambda x, turns, interleaved: x,
        functions=TURNING,
    ),
    layered(
        "rotary-pairing-exchanged",
        "rotates neighbours where halves are the pairs, and halves where neighbours are",
        "MHA-ROTARY-1",
        "MHA-ROTARY-2",
        turn=other_pairs,
        functions=TURNING,
        bugs=("vllm-project/vllm-ascend PR#12780", "EleutherAI/gpt-neox#834"),
    ),
    layered(
        "rotary-interleaved-ignored",
        "rotates halves, whatever interleaved says",
        "MHA-ROTARY-2",
        turn=lambda x, turns, interleaved: layer_steps.turn(x, turns, False),
        functions=TURNING,
        bugs=("Dao-AILab/flash-attention PR#569",),
    ),
    layered(
        "rotary-always-interleaved",
        "rotates neighbours, whatever interleaved says",
        "MHA-ROTARY-1",
        turn=lambda x, turns, interleaved: layer_steps.turn(x, turns, True),
        functions=TURNING,
        bugs=("TransformerLensOrg/TransformerLens PR#365",),
    ),
    layered(
        "rotary-angles-of-the-other-pairing",
        "turns halves by the angles of neighbours",
        "MHA-ROTARY-1",
        turn=mixed_pairs,
        functions=TURNING,
        bugs=("raiyanyahya/how-to-train-your-gpt#6",),
    ),
    layered(
        "rotary-sine-inverted",
        "turns the other way round",
        "MHA-ROTARY-1",
        turn=lambda x, turns, interleaved: layer_steps.turn(x, (turns[0], -turns[1]), interleaved),
        functions=ROTARY,
    ),
    layered(
        "rotary-base-ignored",
        "uses the base 10000, whatever is given",
        "MHA-ROTARY-1",
        frequencies=lambda base, rotary_dim: layer_steps.frequencies(10000.0, rotary_dim),
        functions=TURNING,
    ),
    layered(
        "rotary-exponent-halved",
        "turns pair i by base^(-i / rotary_dim)",
        "MHA-ROTARY-1",
        frequencies=lambda base, rotary_dim: numpy.sqrt(layer_steps.frequencies(base, rotary_dim)),
        functions=TURNING,
    ),
    layered(
        "rotary-frequencies-of-the-whole-size",
        "takes the frequencies of the size where a part is rotated",
        "MHA-ROTARY-3",
        check_rotary=of_the_whole_size,
        functions=TURNING,
        bugs=("pie-project/pie#602",),
    ),
    layered(
        "rotary-dim-ignored",
        "rotates every component",
        "MHA-ROTARY-3",
        check_rotary=lambda rotary, size: layer_checks.check_rotary(rotary, size)._replace(rotary_dim=None),
        functions=TURNING,
        bugs=("AI-Hypercomputer/maxtext#4742",),
    ),
    layered(
        "rotary-of-the-last-components",
        "rotates the last components where a part is rotated",
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
        "takes negative positions as 0",
        "MHA-ROTARY-4",
        turns=at(lambda positions: numpy.maximum(positions, 0)),
        functions=TURNING,
        bugs=("fla-org/flash-linear-attention PR#902",),
    ),
    layered(
        "rotary-positions-whole",
        "cuts positions to whole numbers",
        "MHA-ROTARY-4",
        turns=at(numpy.floor),
        functions=ROTARY,
    ),
    layered(
        "rotary-positions-of-the-first-entry",
        "uses the positions of the first batch entry for all",
        "MHA-ROTARY-4",
        turns=at(lambda positions: positions[:1] if positions.ndim == 2 else positions),
        functions=TURNING,
        bugs=("unslothai/unsloth#3699", "rasbt/reasoning-from-scratch#33"),
    ),
    layered(
        "rotary-offset-ignored",
        "rotates queries and new keys from position 0 on",
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
        "takes 2^(-8 (h + 1) / heads) for every number of heads",
        "MHA-ALIBI-1",
        slopes=plain_slopes,
        functions=ALIBI[:1],
        bugs=("ml-explore/mlx#343", "NVIDIA/TensorRT-LLM PR#1611"),
    ),
    layered(
        "alibi-slopes-from-one",
        "gives head 0 the slope 1",
        "MHA-ALIBI-1",
        slopes=slopes_from_one,
        functions=ALIBI[:1],
        bugs=("paiml/aprender PR#2143",),
    ),
    layered(
        "alibi-sign-inverted",
        "lets the bias rise with the distance",
        "MHA-ALIBI-2",
        alibi=lambda slopes, distances: -layer_steps.alibi(slopes, distances),
        functions=ALIBI[1:],
        bugs=("meta-pytorch/attention-gym PR#86",),
    ),
    layered(
        "alibi-distance-signed",
        "takes p - j for the distance, so that later keys gain",
        "MHA-ALIBI-2",
        distances=signed,
        functions=ALIBI[1:],
    ),
    layered(
        "alibi-offset-ignored",
        "takes distances from the upper left",
        "MHA-ALIBI-2",
        distances=lambda offset, *rest: layer_steps.distances(0 * numpy.asarray(offset), *rest),
        functions=ALIBI[1:],
        bugs=("Dao-AILab/flash-attention#907",),
    ),
    layered(
        "alibi-in-the-dtype-of-the-slopes",
        "gives the bias in 16 bits",
        "MHA-ALIBI-3",
        alibi=lambda slopes, distances: layer_steps.alibi(slopes, distances).astype(dtype_name(slopes)),
        functions=ALIBI[1:],
        native=True,
    ),
)
