"""Two halves of a softmax joined wrongly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.conventions import Convention

from .mistake import MERGE, Mistake, replacing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MERGING"]


def in_base_2(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """log2(2^a + 2^b)."""
    return steps.merge_lse(lse_a * math.log(2), lse_b * math.log(2)) / math.log(2)


def share_in_base_2(lse_half: numpy.ndarray, lse: numpy.ndarray) -> numpy.ndarray:
    """2^(a - lse)."""
    return steps.merge_share(lse_half * math.log(2), lse * math.log(2))


def without_maximum(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """ln(exp a + exp b) as written, which overflows and underflows."""
    return numpy.log(numpy.exp(lse_a) + numpy.exp(lse_b))


def from_plain_maximum(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """m + ln(exp(a - m) + exp(b - m)), NaN where m is -inf."""
    maximum = numpy.maximum(lse_a, lse_b)
    return maximum + numpy.log(numpy.exp(lse_a - maximum) + numpy.exp(lse_b - maximum))


def without_nan(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """Take a NaN as an empty half."""
    return steps.merge_lse(*(numpy.where(numpy.isnan(lse), -math.inf, lse) for lse in (lse_a, lse_b)))


def mistake(
    name: str,
    title: str,
    *clauses: str,
    bugs: tuple[str, ...] = (),
    native: bool = False,
    **replaced: Callable[..., object],
) -> Mistake:
    """A mistake of merge_attention."""
    return Mistake(name, title, clauses, replacing(**replaced), functions=MERGE, bugs=bugs, native=native)


MERGING = (
    Mistake(
        "merge-base-2",
        "takes the lse of the halves as logarithms to base 2",
        ("MHA-MERGE-1",),
        replacing(merge_lse=in_base_2, merge_share=share_in_base_2),
        functions=MERGE,
        convention=Convention("lse_base", "2"),
        bugs=("vllm-project/vllm PR#28840", "vllm-project/vllm PR#47079", "sgl-project/sglang#40903"),
    ),
    mistake(
        "merge-shares-exchanged",
        "weights each half with the share of the other",
        "MHA-MERGE-1",
        merge_share=lambda lse_half, lse: 1 - steps.merge_share(lse_half, lse),
    ),
    mistake(
        "merge-shares-equal",
        "takes the mean of the halves",
        "MHA-MERGE-1",
        merge_share=lambda lse_half, lse: 0.5 + 0 * steps.merge_share(lse_half, lse),
    ),
    mistake(
        "merge-shares-missing",
        "adds the halves without weights",
        "MHA-MERGE-1",
        merge_part=lambda lse_half, share, output: steps.merge_part(lse_half, 1 + 0 * share, output),
    ),
    mistake(
        "merge-lse-of-the-larger",
        "gives the larger lse in place of their log-sum-exp",
        "MHA-MERGE-1",
        merge_lse=numpy.maximum,
    ),
    mistake(
        "merge-lse-added",
        "adds the lse of the halves",
        "MHA-MERGE-1",
        merge_lse=lambda lse_a, lse_b: lse_a + lse_b,
        native=True,
    ),
    mistake(
        "merge-without-maximum",
        "takes exp of each lse as it is, which overflows",
        "MHA-MERGE-1",
        merge_lse=without_maximum,
        native=True,
    ),
    mistake(
        "merge-of-two-empty-nan",
        "gives NaN for two halves that see nothing",
        "MHA-MERGE-3",
        merge_lse=from_plain_maximum,
        merge_share=lambda lse_half, lse: numpy.exp(lse_half - lse),
        merge_part=lambda lse_half, share, output: share * output,
        bugs=("vllm-project/vllm PR#39148", "sgl-project/sglang PR#33353"),
    ),
    mistake(
        "merge-empty-half-leaks",
        "multiplies the output of an empty half with 0, so that a NaN there stays",
        "MHA-MERGE-2",
        merge_part=lambda lse_half, share, output: share * output,
    ),
    mistake(
        "merge-nan-scrubbed",
        "takes a half whose lse is NaN as empty",
        "MHA-MERGE-3",
        merge_lse=without_nan,
        merge_share=lambda lse_half, lse: steps.merge_share(
            numpy.where(numpy.isnan(lse_half), -math.inf, lse_half), lse
        ),
    ),
)
