"""Mistakes in merging two halves of a softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.conventions import Convention
from mha_spec_conformance.suite.joined import Joined

from .mistake import MERGE, MERGE_VJP, Mistake, Sizes, replacing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MERGING"]


def in_base_2(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """Return log2(2^a + 2^b)."""
    return steps.merge_lse(lse_a * math.log(2), lse_b * math.log(2)) / math.log(2)


def share_in_base_2(lse_half: numpy.ndarray, lse: numpy.ndarray) -> numpy.ndarray:
    """Return 2^(a - lse)."""
    return steps.merge_share(lse_half * math.log(2), lse * math.log(2))


def as_if_in_base_2(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """Return the log-sum-exp of lse times log2(e)."""
    return steps.merge_lse(lse_a / math.log(2), lse_b / math.log(2))


def share_as_if_in_base_2(lse_half: numpy.ndarray, lse: numpy.ndarray) -> numpy.ndarray:
    """Return e^(a log2(e) - lse)."""
    return steps.merge_share(lse_half / math.log(2), lse)


def without_maximum(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """Return ln(exp a + exp b) without a maximum, which overflows and underflows."""
    return numpy.log(numpy.exp(lse_a) + numpy.exp(lse_b))


def from_plain_maximum(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """Return m + ln(exp(a - m) + exp(b - m)), which is NaN where m is -inf."""
    maximum = numpy.maximum(lse_a, lse_b)
    return maximum + numpy.log(numpy.exp(lse_a - maximum) + numpy.exp(lse_b - maximum))


def without_nan(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """Treat a half with a NaN lse as empty."""
    return steps.merge_lse(*(numpy.where(numpy.isnan(lse), -math.inf, lse) for lse in (lse_a, lse_b)))


def infinite_as_empty(lse: numpy.ndarray) -> numpy.ndarray:
    """Replace +inf by -inf."""
    return numpy.where(lse == math.inf, -math.inf, lse)


def infinite_wins(lse_half: numpy.ndarray, lse: numpy.ndarray) -> numpy.ndarray:
    """Give a half with an lse of +inf the share 1, and the other half the share 0."""
    share = numpy.where(lse_half == math.inf, 1.0, 0.0)
    return numpy.where(lse == math.inf, share, steps.merge_share(lse_half, lse))


def without_lost_halves(lse_half: numpy.ndarray, share: numpy.ndarray, output: numpy.ndarray) -> numpy.ndarray:
    """Leave out a half whose share is 0."""
    return numpy.where(share == 0, 0.0, steps.merge_part(lse_half, share, output))


def of_the_first(lse_a: numpy.ndarray, lse_b: numpy.ndarray) -> numpy.ndarray:
    """Return the lse of the first half."""
    return lse_a


def whole_or_nothing(lse_half: numpy.ndarray, lse: numpy.ndarray) -> numpy.ndarray:
    """Return the share 1 for a half with the joint lse, and 0 for another."""
    return numpy.where(lse_half == lse, 1.0, 0.0)


def mistake(
    name: str,
    title: str,
    *clauses: str,
    bugs: tuple[str, ...] = (),
    native: bool = False,
    **replaced: Callable[..., object],
) -> Mistake:
    """Return a mistake of merge_attention."""
    return Mistake(name, title, clauses, replacing(**replaced), functions=MERGE, bugs=bugs, native=native)


def of_shares(name: str, title: str, made: steps.Steps, bugs: tuple[str, ...]) -> Mistake:
    """Return a mistake of merge_attention in the output alone."""
    wrong = Joined(steps.Steps(), made, 0, ("output",))
    return Mistake(name, title, ("MHA-MERGE-1",), wrong, functions=MERGE, bugs=bugs, native=True)


def of_gradients(
    name: str, title: str, *clauses: str, needs: tuple[str, ...] = (), **replaced: Callable[..., object]
) -> Mistake:
    """Return a mistake of merge_attention_vjp."""
    return Mistake(name, title, clauses, replacing(**replaced), functions=MERGE_VJP, needs=needs)


MERGING = (
    Mistake(
        "merge-base-2",
        "reads the lse of the halves as logarithms to base 2",
        ("MHA-MERGE-1",),
        replacing(merge_lse=in_base_2, merge_share=share_in_base_2),
        functions=MERGE,
        convention=Convention("lse_base", "2"),
        bugs=("vllm-project/vllm PR#28840", "vllm-project/vllm PR#47079", "sgl-project/sglang#40903"),
        native=True,
    ),
    of_shares(
        "merge-shares-in-base-2",
        "computes the shares of the halves with powers of 2, and the lse with powers of e",
        replacing(merge_lse=in_base_2, merge_share=share_in_base_2),
        bugs=("sgl-project/sglang#33064",),
    ),
    of_shares(
        "merge-shares-of-converted-lse",
        "multiplies lse by log2(e) before it computes the shares with powers of e",
        replacing(merge_lse=as_if_in_base_2, merge_share=share_as_if_in_base_2),
        bugs=("vllm-project/vllm PR#28840", "sgl-project/sglang PR#35045"),
    ),
    mistake(
        "merge-shares-exchanged",
        "multiplies each half by the share of the other",
        "MHA-MERGE-1",
        merge_share=lambda lse_half, lse: 1 - steps.merge_share(lse_half, lse),
    ),
    mistake(
        "merge-shares-equal",
        "returns the mean of the halves",
        "MHA-MERGE-1",
        merge_share=lambda lse_half, lse: 0.5 + 0 * steps.merge_share(lse_half, lse),
    ),
    mistake(
        "merge-shares-missing",
        "adds the halves without multiplying by their shares",
        "MHA-MERGE-1",
        merge_part=lambda lse_half, share, output: steps.merge_part(lse_half, 1 + 0 * share, output),
    ),
    mistake(
        "merge-lse-of-the-larger",
        "returns the larger lse instead of their log-sum-exp",
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
        "computes exp of each lse without subtracting the maximum, which overflows",
        "MHA-MERGE-1",
        merge_lse=without_maximum,
        native=True,
    ),
    mistake(
        "merge-of-two-empty-nan",
        "returns NaN for two empty halves",
        "MHA-MERGE-3",
        merge_lse=from_plain_maximum,
        merge_share=lambda lse_half, lse: numpy.exp(lse_half - lse),
        merge_part=lambda lse_half, share, output: share * output,
        bugs=("vllm-project/vllm PR#39148", "sgl-project/sglang PR#33353"),
    ),
    mistake(
        "merge-empty-half-leaks",
        "multiplies the output of an empty half by 0, so that a NaN in it remains",
        "MHA-MERGE-2",
        merge_part=lambda lse_half, share, output: share * output,
    ),
    mistake(
        "merge-nan-scrubbed",
        "treats a half with a NaN lse as empty",
        "MHA-MERGE-3",
        merge_lse=without_nan,
        merge_share=lambda lse_half, lse: steps.merge_share(
            numpy.where(numpy.isnan(lse_half), -math.inf, lse_half), lse
        ),
    ),
    mistake(
        "merge-infinity-as-empty",
        "treats a half with an lse of +inf as empty",
        "MHA-MERGE-5",
        bugs=("Dao-AILab/flash-attention#978",),
        merge_lse=lambda lse_a, lse_b: steps.merge_lse(infinite_as_empty(lse_a), infinite_as_empty(lse_b)),
        merge_share=lambda lse_half, lse: steps.merge_share(infinite_as_empty(lse_half), lse),
        merge_part=lambda lse_half, share, output: steps.merge_part(infinite_as_empty(lse_half), share, output),
    ),
    mistake(
        "merge-infinity-wins",
        "gives a half with an lse of +inf the share 1",
        "MHA-MERGE-5",
        merge_lse=lambda lse_a, lse_b: numpy.where(
            (lse_a == math.inf) | (lse_b == math.inf), math.inf, steps.merge_lse(lse_a, lse_b)
        ),
        merge_share=infinite_wins,
    ),
    mistake(
        "merge-lost-half-left-out",
        "leaves out a half whose share underflows to 0, so that a NaN in it is lost",
        "MHA-MERGE-6",
        merge_part=without_lost_halves,
    ),
    *(
        Mistake(
            f"merge-of-the-first-half-from-row-{start}",
            f"returns the first half as the output of the rows from {start} on",
            ("MHA-MERGE-1",),
            Joined(steps.Steps(), replacing(merge_lse=of_the_first, merge_share=whole_or_nothing), start, ("output",)),
            functions=MERGE,
            past=Sizes(rows=start),
        )
        for start in (8, 64)
    ),
    of_gradients(
        "merge-shares-constant",
        "treats the shares as constants, so that grad_output does not reach the gradients of lse",
        "MHA-MERGE-7",
        merge_grad_share=lambda lse_a, lse_b, share_a, share_b, row_dot: numpy.zeros_like(row_dot),
    ),
    of_gradients(
        "merge-gradient-through-shares-inverted",
        "inverts the sign of the gradient of lse through the shares",
        "MHA-MERGE-7",
        merge_grad_share=lambda *operands: -steps.merge_grad_share(*operands),
    ),
    of_gradients(
        "merge-gradient-of-one-share",
        "multiplies the gradient of lse through the shares by a single share",
        "MHA-MERGE-7",
        merge_grad_share=lambda lse_a, lse_b, share_a, share_b, row_dot: steps.merge_grad_share(
            lse_a, lse_b, share_a, numpy.ones_like(share_b), row_dot
        ),
    ),
    of_gradients(
        "merge-gradient-of-one-output",
        "uses output_a instead of output_a - output_b in the gradients of lse",
        "MHA-MERGE-7",
        merge_row_dot=lambda grad_output, output_a, output_b: steps.merge_row_dot(grad_output, output_a, 0 * output_b),
    ),
    of_gradients(
        "merge-grad-lse-ignored",
        "ignores grad_lse in the gradients of merging",
        "MHA-MERGE-7",
        needs=("grad_lse",),
        merge_grad_lse=lambda lse_half, share, grad_lse, grad_share: steps.merge_grad_lse(
            lse_half, share, None, grad_share
        ),
    ),
    of_gradients(
        "merge-grad-output-without-shares",
        "returns grad_output as the gradient of each output without multiplying by its share",
        "MHA-MERGE-7",
        merge_grad_output=lambda lse_half, share, grad_output: steps.merge_grad_output(
            lse_half, numpy.ones_like(share), grad_output
        ),
    ),
    of_gradients(
        "merge-gradient-of-an-empty-half",
        "computes gradients of lse from the output of an empty half",
        "MHA-MERGE-7",
        "MHA-MERGE-2",
        merge_grad_share=lambda lse_a, lse_b, share_a, share_b, row_dot: share_a * share_b * row_dot,
    ),
)
