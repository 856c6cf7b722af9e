"""Mistakes in the tables of rotary embedding: rounded, scaled or clamped positions, frequencies, cosines and sines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy

from mha_spec import layer_steps, rotary_checks

from .layer import layered
from .mistake import ROTARY
from .precision import narrowing
from .rotary import TURNING, at

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.rotary_checks import Rotary

    from .mistake import Mistake
    from .rotary import Turns

__all__ = ["TABLES"]

LAST = (1023, 2047, 4095, 8191)
"""The last positions of tables in use."""


def changed(change: Callable[[numpy.ndarray], numpy.ndarray]) -> Callable[..., Turns]:
    """Change the cosines and sines."""

    def turns(positions: Any, frequencies: numpy.ndarray, like: numpy.ndarray) -> Turns:
        cosine, sine = layer_steps.turns(positions, frequencies, like)
        return change(cosine), change(sine)

    return turns


def of_frequencies(change: Callable[[numpy.ndarray], numpy.ndarray]) -> Callable[..., numpy.ndarray]:
    """Change the frequencies."""
    return lambda base, rotary_dim: change(numpy.array(layer_steps.frequencies(base, rotary_dim)))


def attention_factor(factor: float) -> float:
    """Return the factor of YaRN for positions that are scaled by 1 / factor."""
    return 0.1 * math.log(factor) + 1


def position_type(dtype: type[Any]) -> Callable[..., Turns]:
    """Store positions in another type."""

    def change(positions: numpy.ndarray) -> numpy.ndarray:
        with numpy.errstate(all="ignore"):
            return positions.astype(numpy.float64).astype(dtype).astype(numpy.float64)

    return at(change)


def rounded_when_far(positions: numpy.ndarray) -> numpy.ndarray:
    """Round positions from 2^18 on to multiples of 32."""
    return numpy.where(abs(positions) >= 2**18, numpy.round(positions / 32) * 32, positions)


def over_the_whole_size(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Pair the components of the whole size, and do not turn the pairs that have no frequency."""
    missing = x.shape[-1] // 2 - turns[0].shape[-1]
    widths = [(0, 0)] * (turns[0].ndim - 1) + [(0, missing)]
    cosine, sine = numpy.pad(turns[0], widths, constant_values=1.0), numpy.pad(turns[1], widths)
    return layer_steps.turn(x, (cosine, sine), interleaved)


def squared_share(rotary: dict[str, Any], size: int, _: object = None) -> Rotary:
    """Apply the share rotary_dim / size twice."""
    checked = rotary_checks.check_rotary(rotary, size)
    turned = checked.rotary_dim or size
    return checked._replace(rotary_dim=max(turned * turned // size // 2 * 2, 2))


def table(
    name: str, title: str, clause: str, *bugs: str, functions: tuple[str, ...] = TURNING, **steps: Any
) -> Mistake:
    """Return a mistake of a table."""
    return layered(name, title, clause, functions=functions, bugs=bugs, **steps)


TABLES = (
    *(
        table(
            f"rotary-turns-in-{dtype.__name__}",
            f"rounds cosines and sines to {dtype.__name__}",
            "MHA-ROTARY-5",
            "KellerJordan/modded-nanogpt#39",
            turns=changed(narrowing(dtype)),
        )
        for dtype in (numpy.float16, ml_dtypes.bfloat16)
    ),
    *(
        table(
            f"rotary-frequencies-in-{dtype.__name__}",
            f"rounds frequencies to {dtype.__name__}",
            "MHA-ROTARY-5",
            "huggingface/transformers#29285",
            frequencies=of_frequencies(narrowing(dtype)),
        )
        for dtype in (numpy.float16, ml_dtypes.bfloat16)
    ),
    *(
        table(
            f"rotary-attention-factor-of-{factor}",
            f"multiplies cosines and sines by 0.1 ln {factor} + 1, as YaRN does for longer contexts",
            "MHA-ROTARY-1",
            "NVIDIA/TensorRT-LLM#16379",
            "ml-explore/mlx-lm#1507",
            turns=changed(lambda turn, factor=factor: turn * turn.dtype.type(attention_factor(factor))),
        )
        for factor in (4, 8, 16, 32, 40)
    ),
    *(
        table(
            f"rotary-positions-times-{slug}",
            f"multiplies positions by {scale:g}",
            "MHA-ROTARY-4",
            "ml-explore/mlx-vlm#1709",
            "ollama/ollama#13452",
            turns=at(lambda positions, scale=scale: positions * scale),
        )
        for slug, scale in (("2", 2.0), ("a-half", 0.5), ("a-quarter", 0.25), ("an-eighth", 0.125))
    ),
    *(
        table(
            f"rotary-positions-clamped-at-{last}",
            f"uses the angles of position {last} for later positions, as the last row of a table",
            "MHA-ROTARY-4",
            turns=at(lambda positions, last=last: numpy.minimum(positions, last)),
        )
        for last in LAST
    ),
    *(
        table(
            f"rotary-positions-in-{dtype.__name__}",
            f"stores positions in {dtype.__name__}",
            "MHA-ROTARY-5",
            *bugs,
            turns=position_type(dtype),
        )
        for dtype, bugs in (
            (numpy.int16, ("ml-explore/mlx#3360",)),
            (numpy.float16, ("huggingface/transformers#29285",)),
            (ml_dtypes.bfloat16, ("EleutherAI/gpt-neox#1003",)),
        )
    ),
    table(
        "rotary-far-positions-rounded",
        "rounds positions from 262144 on to multiples of 32",
        "MHA-ROTARY-5",
        "ml-explore/mlx-lm#1076",
        turns=at(rounded_when_far),
    ),
    table(
        "rotary-pairs-over-the-whole-size",
        "pairs component i with i + size/2, and does not turn the pairs past rotary_dim/2",
        "MHA-ROTARY-3",
        turn=over_the_whole_size,
    ),
    table(
        "rotary-dim-squared",
        "applies the share rotary_dim / size of the components twice",
        "MHA-ROTARY-3",
        check_rotary=squared_share,
    ),
    table(
        "rotary-turns-not-squared-to-1",
        "uses 1 - |sine| as the cosine, so that turns change lengths",
        "MHA-ROTARY-1",
        functions=ROTARY,
        turns=lambda *operands: (
            1 - abs(layer_steps.turns(*operands)[1]),
            layer_steps.turns(*operands)[1],
        ),
    ),
)
