"""Mistakes in the softmax: fills, maxima, empty rows, sinks and log-sum-exp."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.conventions import Convention

from .mistake import FORWARD, VJP, Compared, Mistake, changing, replacing

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments

__all__ = ["SOFTMAX"]

TILE = 64


def keep_hidden_weights(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Compute sum_j weights_ij values_jc over all pairs; a hidden value that is not finite counts as 0."""
    hidden = numpy.where(visible, 0.0, weights) @ numpy.where(numpy.isfinite(values), values, 0.0)
    return steps.sum_over_visible(weights, values, visible) + hidden


def dot_of_all(
    weights: numpy.ndarray, grad_weights: numpy.ndarray, visible: numpy.ndarray, grad_lse: numpy.ndarray | None
) -> numpy.ndarray:
    """Compute D over all pairs, hidden pairs included."""
    products = weights * numpy.where(visible | numpy.isfinite(grad_weights), grad_weights, 0.0)
    dot = products.sum(axis=-1, keepdims=True)
    return dot if grad_lse is None else dot - grad_lse


def grad_value_of_all(dropped: numpy.ndarray, grad_output: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Compute dV over all pairs, hidden pairs included."""
    return keep_hidden_weights(dropped.swapaxes(-1, -2), grad_output, visible.swapaxes(-1, -2))


def unguarded(**others: Callable[..., object]) -> steps.Steps:
    """Use the weight of a hidden pair, whatever it is."""
    return replacing(sum_over_visible=keep_hidden_weights, row_dot=dot_of_all, grad_value=grad_value_of_all, **others)


def filling(value: float) -> steps.Steps:
    """Give a hidden pair the finite logit `value`, and use the weight that results."""
    return unguarded(hide=lambda logits, visible: numpy.where(visible, logits, value))


def uniform_where_empty(exponentials: numpy.ndarray, total: numpy.ndarray) -> numpy.ndarray:
    """Return the weights, uniform over all keys in an empty row."""
    keys = numpy.arange(exponentials.shape[-1]) < exponentials.shape[-1] - 1
    return numpy.where(total == 0, keys / max(exponentials.shape[-1] - 1, 1), steps.normalise(exponentials, total))


def plain_exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return exp(s - m), where m is -inf for an empty row."""
    maximum = logits.max(axis=-1, keepdims=True)
    return numpy.exp(logits - maximum), maximum


def exponentials_from(logits: numpy.ndarray, maximum: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return exp(s - m) for this maximum m."""
    maximum = numpy.broadcast_to(numpy.where(maximum == -math.inf, 0.0, maximum), (*logits.shape[:-1], 1)).astype(
        logits.dtype
    )
    return numpy.exp(logits - maximum), maximum


def floored_maximum(logits: numpy.ndarray, floor: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return exp(s - m) with m at least `floor`."""
    return exponentials_from(logits, numpy.maximum(logits.max(axis=-1, keepdims=True), floor))


def never_rescaled(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return exp(s - m) with m the largest logit up to the tile of the key; earlier tiles are not corrected."""
    starts = numpy.arange(0, logits.shape[-1], TILE)
    running = numpy.maximum.accumulate(numpy.maximum.reduceat(logits, starts, axis=-1), axis=-1)
    running = numpy.repeat(numpy.where(running == -math.inf, 0.0, running), TILE, axis=-1)[..., : logits.shape[-1]]
    return numpy.exp(logits - running), steps.exponentials(logits)[1]


def without_last_key(exponentials: numpy.ndarray) -> numpy.ndarray:
    """Return the exponentials of all keys but the last, and of the sink."""
    return numpy.concatenate([exponentials[..., :-2], exponentials[..., -1:]], axis=-1)


def over_queries(exponentials: numpy.ndarray, total: numpy.ndarray) -> numpy.ndarray:
    """Normalise each key over the queries."""
    return steps.normalise(exponentials, exponentials.sum(axis=-2, keepdims=True))


def padded_with_zeros(sinks: numpy.ndarray | None, logits: numpy.ndarray) -> numpy.ndarray:
    """Add the padding of the last tile, as keys of score 0, to the sink column."""
    padding = -logits.shape[-1] % TILE
    column = steps.sink_column(sinks, logits)
    return numpy.logaddexp(column, math.log(padding)) if padding else column


def counted_twice(sinks: numpy.ndarray | None, logits: numpy.ndarray) -> numpy.ndarray:
    """Return the sink column with each sink counted twice."""
    return steps.sink_column(sinks, logits) + math.log(2)


def only_with_keys(sinks: numpy.ndarray | None, logits: numpy.ndarray) -> numpy.ndarray:
    """Return the sink column, without the sink in rows that see no key."""
    seen = (logits != -math.inf).any(axis=-1, keepdims=True)
    return numpy.where(seen, steps.sink_column(sinks, logits), -math.inf)


def outside_the_maximum(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return exp(s - m) with m over the keys alone, so that a large sink overflows."""
    return exponentials_from(logits, logits[..., :-1].max(axis=-1, keepdims=True, initial=-math.inf))


def with_sinks(a: Arguments, sinks: numpy.ndarray | None) -> Arguments:
    """Replace the sinks of a call; a call without sinks is unchanged."""
    return a if a.sinks is None else replace(a, sinks=sinks)


def lse_where_empty(value: float) -> steps.Steps:
    """Give an empty row the lse `value`."""
    return replacing(
        log_sum_exp=lambda total, maximum: numpy.where(total == 0, value, steps.log_sum_exp(total, maximum))
    )


FILLS = (
    *(
        Mistake(
            f"fill-of-{slug}",
            f"gives a hidden pair the logit {value:g} instead of leaving it out",
            ("MHA-EMPTY-1", "MHA-MASK-3"),
            filling(value),
            bugs=bugs,
        )
        for slug, value, bugs in (
            ("minus-1e-9", -1e-9, ("Shujun-He/RibonanzaNet#5", "awslabs/gluonts PR#1401")),
            ("minus-10", -10.0, ("lucidrains/nGPT-pytorch#11",)),
            ("minus-1e4", -1e4, ("huggingface/transformers PR#17306",)),
            ("minus-65504", -65504.0, ("torch-spyre/torch-spyre#4517",)),
            ("minus-1e5", -1e5, ("TransformerLensOrg/TransformerLens#318",)),
        )
    ),
    Mistake(
        "empty-row-mean",
        "returns the mean of the values for an empty row, as a large negative fill does",
        ("MHA-EMPTY-1", "MHA-EMPTY-3"),
        unguarded(normalise=uniform_where_empty),
        convention=Convention("fully_masked_row", "mean_of_values"),
        compared=Compared.WITHOUT_EMPTY_LSE,
        bugs=(
            "microsoft/onnxruntime#28904",
            "keras-team/keras PR#21149",
            "huggingface/diffusers PR#14349",
            "ml-explore/mlx#2395",
        ),
    ),
    Mistake(
        "empty-row-nan",
        "returns NaN for an empty row",
        ("MHA-EMPTY-1", "MHA-EMPTY-3"),
        unguarded(exponentials=plain_exponentials, normalise=lambda exponentials, total: exponentials / total),
        convention=Convention("fully_masked_row", "nan"),
        compared=Compared.WITHOUT_EMPTY_LSE,
        bugs=("pytorch/pytorch#103749", "iree-org/iree#24175", "tracel-ai/burn#4694", "pytorch/pytorch#160064"),
    ),
    Mistake(
        "empty-row-nan-gradient",
        "returns 0 for an empty row, and NaN for its query gradient",
        ("MHA-EMPTY-3",),
        replacing(
            grad_query=lambda grad_scores, key, visible, scale: numpy.where(
                visible.any(axis=-1, keepdims=True), steps.grad_query(grad_scores, key, visible, scale), math.nan
            )
        ),
        functions=VJP,
        bugs=("pytorch/pytorch#41508", "Xilinx/brevitas PR#1591", "Dao-AILab/flash-attention#443"),
    ),
)

SUMS = (
    Mistake(
        "maximum-not-subtracted",
        "computes exp of the logits without subtracting the maximum, which overflows",
        ("MHA-SOFTMAX-1",),
        replacing(exponentials=lambda logits: exponentials_from(logits, numpy.zeros((1, 1, 1, 1)))),
        bugs=("NVIDIA/FasterTransformer#43",),
        native=True,
    ),
    Mistake(
        "maximum-at-least-minus-1e4",
        "starts the maximum at -1e4, so that rows with smaller logits are 0",
        ("MHA-SOFTMAX-1",),
        replacing(exponentials=lambda logits: floored_maximum(logits, -1e4)),
        bugs=("tracel-ai/burn PR#4697",),
    ),
    Mistake(
        "maximum-at-least-minus-5e4",
        "starts the maximum at -5e4, so that rows with smaller logits are 0",
        ("MHA-SOFTMAX-1",),
        replacing(exponentials=lambda logits: floored_maximum(logits, -5e4)),
        bugs=("flashinfer-ai/flashinfer#4267",),
    ),
    Mistake(
        "maximum-of-the-head",
        "subtracts the same maximum in all rows of a head, so that rows with small logits underflow",
        ("MHA-SOFTMAX-1",),
        replacing(
            exponentials=lambda logits: exponentials_from(
                logits, logits.max(axis=(-1, -2), keepdims=True, initial=-math.inf)
            )
        ),
        native=True,
    ),
    Mistake(
        "maximum-of-the-batch",
        "subtracts the same maximum in all batch entries, so that an entry changes the results of another",
        ("MHA-PURE-3", "MHA-SOFTMAX-1"),
        replacing(
            exponentials=lambda logits: exponentials_from(
                logits, logits.max(axis=(0, -1), keepdims=True, initial=-math.inf)
            )
        ),
        native=True,
    ),
    Mistake(
        "tiles-not-rescaled",
        "does not rescale the sum of earlier tiles when the maximum grows",
        ("MHA-SOFTMAX-1",),
        replacing(exponentials=never_rescaled),
    ),
    Mistake(
        "tile-padded-with-zeros",
        "counts the padding of the last tile as keys of score 0",
        ("MHA-SOFTMAX-1",),
        replacing(sink_column=padded_with_zeros),
        bugs=("jax-ml/jax#27224",),
    ),
    Mistake(
        "last-key-missing-from-the-sum",
        "leaves the last key out of the sum of exponentials",
        ("MHA-SOFTMAX-1",),
        replacing(sum_exponentials=lambda exponentials: steps.sum_exponentials(without_last_key(exponentials))),
    ),
    Mistake(
        "one-added-to-the-sum",
        "adds 1 to the sum of exponentials",
        ("MHA-SOFTMAX-1",),
        replacing(sink_column=lambda sinks, logits: numpy.logaddexp(steps.sink_column(sinks, logits), 0.0)),
    ),
    Mistake(
        "softmax-over-queries",
        "normalises over the queries instead of the keys",
        ("MHA-SOFTMAX-1",),
        replacing(
            exponentials=lambda logits: exponentials_from(
                logits, logits.max(axis=(-1, -2), keepdims=True, initial=-math.inf)
            ),
            normalise=over_queries,
        ),
        functions=FORWARD,
        native=True,
        bugs=("labmlai/annotated_deep_learning_paper_implementations#146", "nerdai/llms-from-scratch-rs PR#30"),
    ),
    Mistake(
        "weights-not-normalised",
        "does not divide the exponentials by their sum",
        ("MHA-SOFTMAX-1", "MHA-WEIGHTS-1"),
        replacing(normalise=lambda exponentials, total: exponentials),
    ),
)

SINKS = (
    Mistake(
        "sinks-scaled",
        "multiplies the sinks by the scale",
        ("MHA-SINK-2",),
        changing(
            lambda a: with_sinks(
                a, a.sinks * steps.scale_of(a.scale, a.query.shape[3]) if a.sinks is not None else None
            )
        ),
        needs=("sinks",),
        bugs=("ROCm/rocm-libraries#12227",),
    ),
    Mistake(
        "sinks-capped",
        "applies the soft cap to the sinks",
        ("MHA-SINK-2",),
        changing(
            lambda a: (
                a if a.sinks is None or a.softcap is None else replace(a, sinks=steps.soft_cap(a.sinks, a.softcap))
            )
        ),
        needs=("sinks", "softcap"),
    ),
    Mistake(
        "sinks-counted-twice",
        "counts the sink twice",
        ("MHA-SINK-1",),
        replacing(sink_column=counted_twice),
        needs=("sinks",),
        bugs=("ROCm/rocm-libraries#12227",),
    ),
    Mistake(
        "sinks-need-a-key",
        "leaves the sink out of rows that see no key",
        ("MHA-EMPTY-2", "MHA-SINK-2"),
        replacing(sink_column=only_with_keys),
        needs=("sinks",),
        bugs=("ROCm/rocm-libraries PR#12229",),
    ),
    Mistake(
        "sinks-by-kv-head",
        "reads sink h // group for query head h",
        ("MHA-SINK-1",),
        changing(
            lambda a: (
                a if a.sinks is None else replace(a, sinks=a.sinks[numpy.arange(a.heads) // (a.heads // a.kv_heads)])
            )
        ),
        needs=("sinks",),
        bugs=("sgl-project/sgl-kernel-xpu PR#254",),
    ),
    Mistake(
        "weights-without-the-sink",
        "leaves the sink out of the sum, so that the weights of a row sum to 1",
        ("MHA-WEIGHTS-1", "MHA-SINK-1"),
        replacing(
            normalise=lambda exponentials, total: steps.normalise(
                exponentials, exponentials[..., :-1].sum(axis=-1, keepdims=True)
            )
        ),
        needs=("sinks",),
    ),
    Mistake(
        "sinks-of-the-first-head",
        "uses the sink of the first head for all",
        ("MHA-SINK-1",),
        changing(lambda a: a if a.sinks is None else replace(a, sinks=a.sinks[0 * numpy.arange(a.heads)])),
        needs=("sinks",),
    ),
    Mistake(
        "sinks-subtracted",
        "inverts the sign of the sinks",
        ("MHA-SINK-1",),
        changing(lambda a: a if a.sinks is None else replace(a, sinks=-a.sinks)),
        needs=("sinks",),
    ),
    Mistake(
        "sinks-outside-the-maximum",
        "leaves the sink out of the maximum, so that a large sink overflows",
        ("MHA-SINK-1",),
        replacing(exponentials=outside_the_maximum),
        needs=("sinks",),
        bugs=("Dao-AILab/flash-attention PR#2752",),
        native=True,
    ),
    Mistake(
        "sinks-infinite-nan",
        "returns NaN for a sink of -inf",
        ("MHA-SINK-2",),
        replacing(
            sink_column=lambda sinks, logits: numpy.where(
                numpy.isinf(steps.sink_column(sinks, logits)), math.nan, steps.sink_column(sinks, logits)
            )
        ),
        needs=("sinks",),
    ),
)

LSE = (
    Mistake(
        "lse-base-2",
        "returns lse in base 2",
        ("MHA-LSE-1",),
        replacing(log_sum_exp=lambda total, maximum: steps.log_sum_exp(total, maximum) / math.log(2)),
        functions=("attention",),
        convention=Convention("lse_base", "2"),
        bugs=("flashinfer-ai/flashinfer#2113", "flashinfer-ai/flashinfer#4485"),
    ),
    Mistake(
        "lse-without-maximum",
        "returns ln(sum) as lse without adding the maximum",
        ("MHA-LSE-1",),
        replacing(log_sum_exp=lambda total, maximum: steps.log_sum_exp(total, 0 * maximum)),
        functions=("attention",),
    ),
    Mistake(
        "lse-maximum-alone",
        "returns the maximum as lse",
        ("MHA-LSE-1",),
        replacing(log_sum_exp=lambda total, maximum: numpy.where(total == 0, -math.inf, maximum)),
        functions=("attention",),
    ),
    Mistake(
        "lse-in-half-precision",
        "stores lse in 16 bits",
        ("MHA-LSE-2",),
        replacing(
            log_sum_exp=lambda total, maximum: (
                steps.log_sum_exp(total, maximum).astype(numpy.float16).astype(total.dtype)
            )
        ),
        functions=("attention",),
    ),
    Mistake(
        "lse-empty-0",
        "returns 0 as lse for an empty row",
        ("MHA-EMPTY-2",),
        lse_where_empty(0.0),
        functions=("attention",),
        convention=Convention("empty_row_lse", "zero"),
    ),
    Mistake(
        "lse-empty-plus-infinity",
        "returns +inf as lse for an empty row",
        ("MHA-EMPTY-2",),
        lse_where_empty(math.inf),
        functions=("attention",),
        convention=Convention("empty_row_lse", "plus_inf"),
        bugs=("Dao-AILab/flash-attention PR#978",),
    ),
    Mistake(
        "lse-empty-finite",
        "returns a large negative lse for an empty row",
        ("MHA-EMPTY-2",),
        lse_where_empty(-1e30),
        functions=("attention",),
        bugs=("flashinfer-ai/flashinfer#4452",),
    ),
)

SOFTMAX = (*FILLS, *SUMS, *SINKS, *LSE)
