"""Mistakes in softmax over tiles and over splits of the keys: maxima, rescaling, empty tiles, merging."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps

from .loops import seeing
from .mistake import FORWARD, Mistake, Sizes, replacing
from .softmax import exponentials_from

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ONLINE"]

SIZES = (64, 128)


def maxima(row: numpy.ndarray, size: int) -> numpy.ndarray:
    """Return the maximum of each tile of keys; the last column of a row is the sink, which has no tile."""
    keys = row[..., :-1]
    return numpy.maximum.reduceat(keys, numpy.arange(0, keys.shape[-1], size), axis=-1)


def sums(row: numpy.ndarray, size: int) -> numpy.ndarray:
    """Return the sum of each tile of keys."""
    keys = row[..., :-1]
    return numpy.add.reduceat(keys, numpy.arange(0, keys.shape[-1], size), axis=-1)


def by_column(of_tiles: numpy.ndarray, row: numpy.ndarray, size: int, sink: float) -> numpy.ndarray:
    """Repeat a number of each tile for its keys, and append a number for the sink."""
    keys = numpy.repeat(of_tiles, size, axis=-1)[..., : row.shape[-1] - 1]
    return numpy.concatenate([keys, numpy.full_like(row[..., :1], sink)], axis=-1)


def not_rescaled(exponentials: numpy.ndarray, size: int, tile: int) -> numpy.ndarray:
    """Undo the rescaling, from the tile with this number on, of exponentials that are relative to the maximum."""
    if exponentials.shape[-1] <= size * tile + 1:
        return exponentials
    running = numpy.maximum.accumulate(maxima(exponentials, size), axis=-1)
    kept = numpy.concatenate([numpy.repeat(running[..., tile - 1 : tile], tile, axis=-1), running[..., tile:]], axis=-1)
    factor = running[..., -1:] / numpy.where(kept == 0, running[..., -1:], kept)
    return exponentials * by_column(numpy.where(running[..., -1:] == 0, 1.0, factor), exponentials, size, 1.0)


def with_wide_exponentials(**replaced: Callable[..., numpy.ndarray]) -> steps.Steps:
    """Compute the exponentials in float64, because those of an early tile underflow in float32 if they are rescaled."""

    def exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        wide, maximum = steps.exponentials(logits.astype(numpy.float64))
        return wide, maximum.astype(logits.dtype)

    def log_sum_exp(total: numpy.ndarray, maximum: numpy.ndarray) -> numpy.ndarray:
        return steps.log_sum_exp(total.astype(maximum.dtype), maximum)

    return replacing(exponentials=exponentials, log_sum_exp=log_sum_exp, **replaced)


def accumulator_not_rescaled(size: int, tile: int) -> steps.Steps:
    """Rescale the sum of exponentials, and not the accumulated output, from the tile with this number on."""
    return with_wide_exponentials(
        normalise=lambda exponentials, total: steps.normalise(not_rescaled(exponentials, size, tile), total)
    )


def sum_not_rescaled(size: int, tile: int) -> steps.Steps:
    """Rescale the accumulated output, and not the sum of exponentials, from the tile with this number on."""
    return with_wide_exponentials(
        sum_exponentials=lambda exponentials: steps.sum_exponentials(not_rescaled(exponentials, size, tile))
    )


def of_each_tile(size: int) -> Callable[[numpy.ndarray], tuple[numpy.ndarray, numpy.ndarray]]:
    """Subtract the maximum of each tile, and rescale as if the running maximum had been subtracted."""

    def exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        largest, maximum = maxima(logits, size), steps.exponentials(logits)[1]
        excess = numpy.where(largest == -math.inf, 0.0, numpy.maximum.accumulate(largest, axis=-1) - largest)
        return numpy.exp(logits + by_column(excess, logits, size, 0.0) - maximum), maximum

    return exponentials


def with_maximum_of_the_last_tile(size: int) -> Callable[[numpy.ndarray], tuple[numpy.ndarray, numpy.ndarray]]:
    """Return exp(s - m), and the maximum of the last tile as m."""

    def exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        right, maximum = steps.exponentials(logits)
        last = maxima(logits, size)[..., -1:]
        return right, numpy.where(last == -math.inf, maximum, last)

    return exponentials


def from_the_first_tile(size: int) -> Callable[[numpy.ndarray], tuple[numpy.ndarray, numpy.ndarray]]:
    """Subtract the maximum of the first tile in every tile."""
    return lambda logits: exponentials_from(logits, maxima(logits, size)[..., :1])


def nan_where(size: int, tiles: slice) -> steps.Steps:
    """Return NaN in rows that see a key, where any of the tiles `tiles` is wholly hidden."""

    def exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        right, maximum = steps.exponentials(logits)
        empty = (maxima(logits, size)[..., tiles] == -math.inf).any(axis=-1, keepdims=True)
        return numpy.where(empty & (logits != -math.inf).any(axis=-1, keepdims=True), math.nan, right), maximum

    return replacing(exponentials=exponentials)


def normalised_apart(size: int, normalise: Callable[..., numpy.ndarray]) -> steps.Steps:
    """Divide the exponentials of each tile by the sum of the tile; lse stays that of the row."""

    def exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        largest = maxima(logits, size)
        shift = numpy.where(largest == -math.inf, 0.0, largest)
        apart = numpy.exp(logits - by_column(shift, logits, size, math.inf))
        of_tiles = sums(apart, size)
        apart = apart / by_column(numpy.where(of_tiles == 0, 1.0, of_tiles), logits, size, 1.0)
        right, maximum = steps.exponentials(logits)
        lse = steps.log_sum_exp(steps.sum_exponentials(right), maximum)
        live = numpy.maximum((of_tiles > 0).sum(axis=-1, keepdims=True), 1)
        return apart, numpy.where(lse == -math.inf, 0.0, lse - numpy.log(live).astype(lse.dtype))

    return replacing(exponentials=exponentials, normalise=normalise)


def splits_of(size: int) -> Callable[..., numpy.ndarray]:
    """Return the sink column with a split of score 0 for each wholly hidden tile."""

    def sink_column(sinks: numpy.ndarray | None, logits: numpy.ndarray) -> numpy.ndarray:
        column = steps.sink_column(sinks, logits)
        empty = (maxima(numpy.concatenate([logits, column], axis=-1), size) == -math.inf).sum(axis=-1, keepdims=True)
        with numpy.errstate(divide="ignore"):
            return numpy.logaddexp(column, numpy.log(empty)).astype(logits.dtype)

    return sink_column


def sinks_of_each_tile(size: int) -> Callable[..., numpy.ndarray]:
    """Return the sink column with the sink counted once for each tile."""
    return lambda sinks, logits: steps.sink_column(sinks, logits) + math.log(max(-(-logits.shape[-1] // size), 1))


def lse_of_a_tile(size: int, tile: int) -> steps.Steps:
    """Return the right output, and the lse of a single tile of keys and of the sink."""

    def exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        right, maximum = steps.exponentials(logits)
        return right, maximum + _log_share(right, sums(right, size)[..., tile : tile + 1 or None])

    return replacing(exponentials=exponentials)


def _log_share(row: numpy.ndarray, of_tile: numpy.ndarray) -> numpy.ndarray:
    """Return ln((tile + sink) / total)."""
    total = row.sum(axis=-1, keepdims=True)
    with numpy.errstate(divide="ignore"):
        return numpy.where(total == 0, 0.0, numpy.log(of_tile + row[..., -1:]) - numpy.log(total))


def last_tile(size: int) -> steps.Steps:
    """Overwrite the output of earlier tiles."""
    return seeing(
        lambda visible: visible & (numpy.arange(visible.shape[3]) >= (max(visible.shape[3], 1) - 1) // size * size)
    )


def clamped(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return exp(s - m) of at least exp(-64), for hidden keys too."""
    right, maximum = steps.exponentials(logits)
    least = numpy.where((logits != -math.inf).any(axis=-1, keepdims=True), math.exp(-64), 0.0).astype(logits.dtype)
    return numpy.concatenate([numpy.maximum(right[..., :-1], least), right[..., -1:]], axis=-1), maximum


def mistake(
    name: str,
    title: str,
    made: steps.Steps,
    size: int,
    clauses: tuple[str, ...] = ("MHA-SOFTMAX-1",),
    bugs: tuple[str, ...] = (),
    **fields: Any,
) -> Mistake:
    """Return a mistake that shows where the keys have several tiles."""
    return Mistake(name, title, clauses, made, bugs=bugs, past=Sizes(keys=size), **{"functions": FORWARD, **fields})


def of_the_running_maximum(size: int) -> tuple[Mistake, ...]:
    """Return the mistakes of the maximum, the sum and the output that tiles of this number of keys carry on."""
    return (
        mistake(
            f"output-not-rescaled-in-tiles-of-{size}",
            f"does not rescale the output of earlier tiles of {size} keys when the maximum grows",
            accumulator_not_rescaled(size, 1),
            size,
        ),
        mistake(
            f"output-not-rescaled-from-the-third-tile-of-{size}",
            f"does not rescale the output when the maximum grows in the third tile of {size} keys or later",
            accumulator_not_rescaled(size, 2),
            2 * size,
        ),
        mistake(
            f"sum-not-rescaled-in-tiles-of-{size}",
            f"does not rescale the sum of earlier tiles of {size} keys, but the output, when the maximum grows",
            sum_not_rescaled(size, 1),
            size,
        ),
        mistake(
            f"sum-not-rescaled-from-the-third-tile-of-{size}",
            f"does not rescale the sum when the maximum grows in the third tile of {size} keys or later",
            sum_not_rescaled(size, 2),
            2 * size,
        ),
        mistake(
            f"maximum-not-carried-over-in-tiles-of-{size}",
            f"subtracts the maximum of each tile of {size} keys instead of the largest of all tiles so far",
            replacing(exponentials=of_each_tile(size)),
            size,
        ),
        mistake(
            f"maximum-of-the-first-tile-of-{size}",
            f"subtracts the maximum of the first {size} keys in all tiles, which overflows",
            replacing(exponentials=from_the_first_tile(size)),
            size,
            native=True,
            bugs=("NVIDIA/FasterTransformer#43",),
        ),
    )


def of_hidden_tiles(size: int) -> tuple[Mistake, ...]:
    """Return the mistakes of tiles of this number of keys of which a row sees none."""
    return (
        mistake(
            f"hidden-tile-of-{size}-nan",
            f"subtracts the maximum of each tile of {size} keys from itself, which is NaN if the tile is wholly hidden",
            nan_where(size, slice(None)),
            size,
            clauses=("MHA-LSE-1",),
            bugs=("buddy-compiler/buddy-mlir#837", "ggml-org/llama.cpp PR#12776"),
        ),
        mistake(
            f"hidden-first-tile-of-{size}-nan",
            f"rescales by exp(-inf + inf), which is NaN, if the first {size} keys are wholly hidden",
            nan_where(size, slice(1)),
            size,
            clauses=("MHA-LSE-1",),
            bugs=("ggml-org/llama.cpp PR#12776",),
        ),
    )


def of_splits(size: int) -> tuple[Mistake, ...]:
    """Return the mistakes of merging splits of this number of keys."""
    return (
        mistake(
            f"splits-of-{size}-added",
            f"adds the outputs of splits of {size} keys, each with weights that sum to 1",
            normalised_apart(size, lambda exponentials, total: exponentials),
            size,
        ),
        mistake(
            f"splits-of-{size}-averaged",
            f"averages the outputs of splits of {size} keys instead of weighting each by its sum",
            normalised_apart(size, steps.normalise),
            size,
            bugs=("vllm-project/vllm PR#28840",),
        ),
        mistake(
            f"empty-split-of-{size}-counted",
            f"counts a split of {size} keys without a visible key with an lse of 0",
            replacing(sink_column=splits_of(size)),
            size,
            clauses=("MHA-LSE-1",),
            bugs=("vllm-project/vllm PR#47188",),
        ),
        mistake(
            f"sinks-in-each-split-of-{size}",
            f"counts the sink once for each split of {size} keys",
            replacing(sink_column=sinks_of_each_tile(size)),
            size,
            clauses=("MHA-SINK-1",),
            needs=("sinks",),
            bugs=("ROCm/rocm-libraries#12227",),
        ),
    )


def of_single_tiles(size: int) -> tuple[Mistake, ...]:
    """Return the mistakes in which the results of a single tile of this number of keys stand for those of all."""
    return (
        mistake(
            f"lse-of-the-last-split-of-{size}",
            f"returns the lse of the last split of {size} keys",
            lse_of_a_tile(size, -1),
            size,
            clauses=("MHA-LSE-1",),
            functions=("attention",),
        ),
        mistake(
            f"lse-of-the-first-split-of-{size}",
            f"returns the lse of the first split of {size} keys",
            lse_of_a_tile(size, 0),
            size,
            clauses=("MHA-LSE-1",),
            functions=("attention",),
        ),
        mistake(
            f"lse-with-the-maximum-of-the-last-tile-of-{size}",
            f"adds the maximum of the last {size} keys to ln(sum) instead of the maximum of all",
            replacing(exponentials=with_maximum_of_the_last_tile(size)),
            size,
            clauses=("MHA-LSE-1",),
            functions=("attention",),
        ),
        mistake(
            f"last-tile-of-{size}-overwrites",
            f"returns the result of the last tile of {size} keys alone",
            last_tile(size),
            size,
        ),
    )


ONLINE = (
    *(
        entry
        for size in (64, 128)
        for of_size in (of_the_running_maximum, of_hidden_tiles, of_splits, of_single_tiles)
        for entry in of_size(size)
    ),
    Mistake(
        "exponentials-clamped",
        "clamps the exponentials at exp(-64), so that hidden keys keep a weight of 1.6e-28",
        ("MHA-MASK-3",),
        replacing(exponentials=clamped),
        functions=("attention",),
        bugs=("PaddlePaddle/Paddle: softmax of the CPU",),
        native=True,
    ),
)
