"""Mistakes in rotary embedding with frequencies of the caller, and in its attention factor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy

from mha_spec import layer_steps
from mha_spec.rotary_scaling import rotary_frequencies

from .layer import layered
from .rotary import TURNING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .mistake import Mistake
    from .rotary import Turns

__all__ = ["FREQUENCIES", "TABLES"]

SIZE = 16
"""The number of components that turn in the cases with the table of a scaling."""

IGNORED = ("lablup/mlxcel#1355", "jmaczan/tiny-vllm#1", "felafax/felafax#59")


def frequency(name: str, title: str, change: Callable[[numpy.ndarray], numpy.ndarray], *bugs: str) -> Mistake:
    """Return a mistake that changes the frequencies of the caller."""

    def explicit_frequencies(frequencies: tuple[float, ...]) -> numpy.ndarray:
        with numpy.errstate(all="ignore"):
            return change(numpy.asarray(frequencies, dtype=numpy.float64))

    return layered(
        name,
        title,
        "MHA-ROTARY-7",
        needs=("frequencies",),
        functions=TURNING,
        bugs=bugs,
        explicit_frequencies=explicit_frequencies,
    )


def factor(name: str, title: str, magnify: Callable[[Turns, float], Turns], *bugs: str, **steps: Any) -> Mistake:
    """Return a mistake in the attention factor."""
    return layered(
        name,
        title,
        "MHA-ROTARY-8",
        needs=("attention_factor",),
        functions=TURNING,
        bugs=bugs,
        magnify=magnify,
        **steps,
    )


def of_the_base(frequencies: numpy.ndarray) -> numpy.ndarray:
    """Return the frequencies of the default base."""
    return numpy.array(layer_steps.frequencies(10000.0, 2 * len(frequencies)))


def inverted(frequencies: numpy.ndarray) -> numpy.ndarray:
    """Return 1 / frequency, and 0 for 0."""
    return numpy.where(frequencies == 0, 0.0, 1 / frequencies)


def times(change: Callable[[float], float]) -> Callable[[Turns, float], Turns]:
    """Multiply cosines and sines by another factor."""
    return lambda turns, factor: layer_steps.magnify(turns, change(factor))


def also_the_rest(x: numpy.ndarray, turns: Turns, interleaved: bool) -> numpy.ndarray:
    """Multiply the components that do not turn by the factor, too, which is the length of cosine and sine."""
    turned = layer_steps.turn(x, turns, interleaved)
    rest = slice(2 * turns[0].shape[-1], None)
    length = numpy.hypot(turns[0], turns[1])[..., :1]
    return numpy.concatenate([turned[..., : rest.start], (x[..., rest] * length).astype(x.dtype)], axis=-1)


def scaled(scaling: Mapping[str, Any], **keys: Any) -> numpy.ndarray:
    """Return the table of a scaling, as models have it in their configs."""
    return rotary_frequencies(scaling, SIZE, **keys)[0].astype(numpy.float64)


def confused(table: numpy.ndarray, other: numpy.ndarray) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Replace a table by another, and leave other frequencies unchanged."""
    return lambda frequencies: other if numpy.array_equal(frequencies, table) else frequencies


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.0, 1.0625, 1.25, 1.5, 1.75, 2.0, 2.0],
    "long_factor": [1.0, 1.25, 1.75, 2.5, 3.5, 5.0, 8.0, 11.0],
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
DEFAULT = scaled({})
TABLES: dict[str, numpy.ndarray] = {
    "linear": scaled({"rope_type": "linear", "factor": 4.0}),
    "dynamic": scaled(DYNAMIC, max_position_embeddings=64, seq_len=1024),
    "yarn": scaled(YARN),
    "longrope": scaled(LONGROPE, seq_len=256),
    "llama3": scaled(LLAMA3),
    "proportional": scaled({"rope_type": "proportional", "partial_rotary_factor": 0.5}),
}
"""The tables of the cases, by the name of the scaling."""


def with_bounds_exchanged() -> numpy.ndarray:
    """Return YaRN's table with the share of the scaled frequencies for that of the unscaled ones."""
    return DEFAULT + DEFAULT / YARN["factor"] - TABLES["yarn"]


def without_a_mixed_band() -> numpy.ndarray:
    """Return the table of Llama 3 that divides every frequency whose wave is longer than the shortest bound."""
    longest_kept = LLAMA3["original_max_position_embeddings"] / LLAMA3["high_freq_factor"]
    return numpy.where(2 * math.pi / DEFAULT < longest_kept, DEFAULT, DEFAULT / LLAMA3["factor"])


FREQUENCIES = (
    frequency(
        "rotary-explicit-frequencies-ignored", "accepts frequencies and uses those of the base", of_the_base, *IGNORED
    ),
    frequency(
        "rotary-explicit-frequencies-inverted", "uses 1 / frequency, a scaled wavelength, as the frequency", inverted
    ),
    frequency(
        "rotary-explicit-frequencies-as-turns",
        "multiplies frequencies by 2 pi, as if they counted whole turns",
        lambda frequencies: frequencies * (2 * math.pi),
    ),
    frequency("rotary-explicit-frequencies-reversed", "reads the frequencies from the last to the first", numpy.flip),
    frequency(
        "rotary-explicit-frequencies-of-zero-ignored",
        "uses the frequency of the base for each pair whose frequency is 0",
        lambda frequencies: numpy.where(frequencies == 0, of_the_base(frequencies), frequencies),
    ),
    *(
        frequency(
            f"rotary-explicit-frequencies-in-{dtype.__name__}",
            f"rounds the frequencies of the caller to {dtype.__name__}",
            lambda frequencies, dtype=dtype: frequencies.astype(dtype).astype(numpy.float64),
            "huggingface/candle#3698",
        )
        for dtype in (numpy.float16, ml_dtypes.bfloat16)
    ),
    factor(
        "rotary-attention-factor-ignored",
        "accepts attention_factor and does not multiply by it",
        times(lambda factor: 1.0),
        "ml-explore/mlx-lm#1507",
        "vllm-project/vllm#48351",
    ),
    factor(
        "rotary-attention-factor-twice",
        "multiplies cosines and sines by the factor twice",
        times(lambda factor: factor * factor),
        "sgl-project/sglang#33558",
    ),
    factor(
        "rotary-attention-factor-root",
        "multiplies cosines and sines by the square root of the factor",
        times(math.sqrt),
    ),
    factor("rotary-attention-factor-divides", "divides by the factor", times(lambda factor: 1 / factor)),
    factor(
        "rotary-attention-factor-of-cosines",
        "multiplies only the cosines by the factor",
        lambda turns, factor: (turns[0] * factor, turns[1]),
    ),
    factor(
        "rotary-attention-factor-of-sines",
        "multiplies only the sines by the factor",
        lambda turns, factor: (turns[0], turns[1] * factor),
    ),
    factor(
        "rotary-attention-factor-of-all-components",
        "multiplies the components that do not turn by the factor, too",
        layer_steps.magnify,
        turn=also_the_rest,
    ),
    frequency(
        "rotary-linear-multiplied",
        "multiplies frequencies by the factor of linear scaling",
        confused(TABLES["linear"], DEFAULT * 4),
    ),
    frequency(
        "rotary-dynamic-without-the-length",
        "raises the base of dynamic scaling by the factor alone, for every length",
        confused(TABLES["dynamic"], scaled({}, base=10000.0 * 2.0 ** (SIZE / (SIZE - 2)))),
        "vllm-project/vllm#41236",
    ),
    frequency(
        "rotary-yarn-bounds-exchanged",
        "exchanges the frequencies that YaRN keeps and those that it divides",
        confused(TABLES["yarn"], with_bounds_exchanged()),
        "pytorch/torchtitan#3787",
    ),
    frequency(
        "rotary-longrope-short",
        "uses the short factors of LongRoPE for long sequences",
        confused(TABLES["longrope"], scaled(LONGROPE, seq_len=64)),
        "ggml-org/llama.cpp#24823",
        "unslothai/unsloth#10681",
    ),
    frequency(
        "rotary-llama3-without-a-mixed-band",
        "divides frequencies between both bounds of Llama 3, as those of the longest waves",
        confused(TABLES["llama3"], without_a_mixed_band()),
    ),
    frequency(
        "rotary-proportional-of-the-part",
        "computes the exponents of proportional scaling from the pairs that turn",
        confused(TABLES["proportional"], numpy.append(layer_steps.frequencies(10000.0, SIZE // 2), numpy.zeros(4))),
        "NVIDIA-NeMo/Megatron-Bridge#4195",
        "pegainfer-project/pegainfer#820",
    ),
)
