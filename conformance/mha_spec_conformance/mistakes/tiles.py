"""Mistakes of a later tile: an option that is used in the first tile and forgotten in the tiles behind it.

Most kernels work on tiles of 64 or 128 rows and keys. Each mistake of a family is an option, with the steps that forget
it, and the row or key at which it is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.joined import Joined

from .ignored import everywhere
from .mistake import ATTENTION, FORWARD, VJP, Mistake, Sizes, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TILES"]

SIZES = (64, 128)
"""The rows and keys at which these mistakes begin."""

OF_ROWS = ("output", "lse", "weights")
"""The results whose rows depend on the options of the same row alone."""

OF_KEYS = ("grad_key", "grad_value")
"""The gradients that a backward pass computes for a tile of keys at a time."""


def from_row(start: int, made: steps.Steps) -> Joined:
    """Take the results of these steps in the rows from `start` on, and those of the specification before."""
    return Joined(steps.Steps(), made, start, OF_ROWS)


def from_key(start: int, **wrong: Callable[..., object]) -> steps.Steps:
    """Take these steps at the keys from `start` on, and the steps of the specification before."""
    return replacing(**{name: later(getattr(steps, name), step, start) for name, step in wrong.items()})


def later(right: Callable[..., Any], wrong: Callable[..., Any], start: int) -> Callable[..., Any]:
    """Return a step that gives the results of `right` at keys before `start`, and those of `wrong` from there on."""

    def step(*operands: Any) -> numpy.ndarray:
        before, after = numpy.broadcast_arrays(right(*operands), wrong(*operands))
        return numpy.where(numpy.arange(before.shape[-1]) < start, before, after)

    return step


def in_last_tile(size: int, **wrong: Callable[..., object]) -> steps.Steps:
    """Take these steps at the keys that do not fill a tile, and the steps of the specification before."""
    return replacing(**{name: past_whole_tiles(getattr(steps, name), step, size) for name, step in wrong.items()})


def past_whole_tiles(right: Callable[..., Any], wrong: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Return a step that gives the results of `right` in the whole tiles of keys, and those of `wrong` behind them."""

    def step(*operands: Any) -> numpy.ndarray:
        whole, rest = numpy.broadcast_arrays(right(*operands), wrong(*operands))
        keys = whole.shape[-1]
        # A mask that is the same for all keys has an axis of 1, and is left as it is.
        return numpy.where(numpy.arange(keys) < (keys // size * size if keys > size else keys), whole, rest)

    return step


def default_scale(query: numpy.ndarray, key: numpy.ndarray, scale: float) -> numpy.ndarray:
    """Compute the scores with the default scale, whatever the scale is."""
    return steps.scores(query, key, steps.scale_of(None, query.shape[-1]))


@dataclass(frozen=True)
class Option:
    """An option of attention, with the steps that forget it and the clause that they break."""

    name: str
    clause: str
    argument: str
    forgetting: Mapping[str, Callable[..., object]]
    along_keys: bool = True
    functions: tuple[str, ...] = ATTENTION
    bugs: tuple[str, ...] = field(default=())


OPTIONS = (
    Option("mask", "MHA-MASK-1", "mask", {"see_mask": everywhere}, bugs=("pytorch/pytorch#159247",)),
    Option(
        "bias",
        "MHA-BIAS-1",
        "bias",
        {"add_bias": lambda scores, bias: scores, "see_bias": everywhere},
        bugs=("pytorch/pytorch#153799", "keras-team/keras-hub#2861"),
    ),
    Option(
        "scale",
        "MHA-SCORE-1",
        "scale",
        {"scores": default_scale},
        functions=FORWARD,
        bugs=("tenstorrent/tt-metal#33304",),
    ),
    Option(
        "softcap",
        "MHA-CAP-1",
        "softcap",
        {"soft_cap": lambda scores, softcap: scores, "cap_slope": lambda scores, softcap: 1.0},
        bugs=("ggml-org/llama.cpp PR#29034", "sgl-project/sgl-kernel-xpu PR#491"),
    ),
    Option("causal", "MHA-CAUSAL-1", "causal", {"see_causal": everywhere}, bugs=("jax-ml/jax#19237",)),
    Option(
        "window",
        "MHA-WINDOW-1",
        "window",
        {"see_window_left": everywhere, "see_window_right": everywhere},
        bugs=("EricLBuehler/mistral.rs#2094", "vllm-project/vllm PR#47188"),
    ),
    Option(
        "kv-lengths",
        "MHA-LEN-1",
        "kv_lengths",
        {"see_kv_lengths": lambda positions, lengths: everywhere(positions < lengths)},
        bugs=("vllm-project/vllm-xpu-kernels PR#181", "tenstorrent/tt-metal#41215"),
    ),
    Option(
        "q-lengths",
        "MHA-LEN-2",
        "q_lengths",
        {"see_q_lengths": everywhere},
        along_keys=False,
        bugs=("tile-ai/tilelang PR#2461",),
    ),
    Option(
        "segments",
        "MHA-SEG-1",
        "q_segment_ids",
        {"see_segments": lambda q_ids, kv_ids: everywhere(q_ids == kv_ids)},
        bugs=("AI-Hypercomputer/maxtext#4476", "pytorch/pytorch#177378"),
    ),
    Option(
        "sinks",
        "MHA-SINK-1",
        "sinks",
        {"sink_column": lambda sinks, logits: steps.sink_column(None, logits)},
        along_keys=False,
        bugs=("NVIDIA/TransformerEngine PR#3551", "sgl-project/sgl-kernel-xpu PR#254"),
    ),
    Option(
        "dropout",
        "MHA-DROP-1",
        "dropout_mask",
        {"drop": lambda x, dropout_mask, rate: x},
        functions=("attention", *VJP),
        bugs=("pytorch/pytorch#190717",),
    ),
)
"""The options that a tile can forget."""


def lost_from_key(option: Option, start: int) -> Mistake:
    """Return the mistake of a loop over tiles of keys."""
    return Mistake(
        f"{option.name}-lost-from-key-{start}",
        f"does not use {option.argument} at the keys from {start} on",
        (option.clause,),
        from_key(start, **option.forgetting),
        needs=(option.argument,),
        functions=option.functions,
        bugs=option.bugs,
        past=Sizes(keys=start),
    )


def lost_in_last_tile(option: Option, size: int) -> Mistake:
    """Return the mistake of a separate loop body for the tile of keys that is not full."""
    return Mistake(
        f"{option.name}-lost-in-the-last-tile-of-{size}",
        f"does not use {option.argument} at the keys that do not fill a tile of {size}",
        (option.clause,),
        in_last_tile(size, **option.forgetting),
        needs=(option.argument,),
        functions=option.functions,
        bugs=option.bugs,
        past=Sizes(keys=size),
    )


def lost_from_row(option: Option, start: int) -> Mistake:
    """Return the mistake of a grid of tiles of rows."""
    return Mistake(
        f"{option.name}-lost-from-row-{start}",
        f"does not use {option.argument} in the rows from {start} on",
        (option.clause,),
        from_row(start, replacing(**option.forgetting)),
        needs=(option.argument,),
        functions=tuple(name for name in option.functions if name in FORWARD),
        bugs=option.bugs,
        past=Sizes(rows=start),
    )


def lost_in_backward(option: Option, start: int) -> Mistake:
    """Return the mistake of a backward pass over tiles of keys."""
    return Mistake(
        f"{option.name}-lost-in-the-gradients-from-key-{start}",
        f"computes the gradients of key and value without {option.argument} from key {start} on",
        (option.clause, "MHA-VJP-2"),
        Joined(steps.Steps(), replacing(**option.forgetting), start, OF_KEYS),
        needs=(option.argument,),
        functions=VJP,
        bugs=option.bugs,
        past=Sizes(keys=start),
    )


TILES = (
    *(lost_from_key(option, start) for option in OPTIONS if option.along_keys for start in SIZES),
    *(lost_in_last_tile(option, size) for option in OPTIONS if option.along_keys for size in SIZES),
    *(lost_from_row(option, start) for option in OPTIONS for start in SIZES),
    *(lost_in_backward(option, start) for option in OPTIONS for start in SIZES),
)
