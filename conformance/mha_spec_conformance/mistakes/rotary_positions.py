"""Mistakes in positions of the caller in the layer, and in positions on several axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import layer_checks

from .layer import layered
from .mistake import LAYER
from .rotary import TURNING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mha_spec.layer_checks import LayerArguments

    from .mistake import Mistake

__all__ = ["TOKEN_POSITIONS"]


def positions(name: str, title: str, change: Callable[[LayerArguments], None], *bugs: str) -> Mistake:
    """Return a mistake in the positions of the caller, which changes the checked arguments of the layer."""

    def check(a: LayerArguments) -> LayerArguments:
        checked = layer_checks.check(a)
        if checked.positions is not None:
            change(checked)
        return checked

    return layered(name, title, "MHA-LAYER-7", needs=("positions",), functions=LAYER, bugs=bugs, check=check)


def uncounted(a: LayerArguments) -> None:
    """Count positions from the offset and the cache."""
    a.positions = None


def counted_from_the_first(a: LayerArguments) -> None:
    """Count from the first position of each entry."""
    places = numpy.asarray(a.positions)
    a.positions = places[..., :1] + numpy.arange(places.shape[-1])


def of_the_first_entry(a: LayerArguments) -> None:
    """Use the positions of the first entry for all."""
    places = numpy.asarray(a.positions)
    if places.ndim > 1:
        a.positions = numpy.broadcast_to(places[..., :1, :], places.shape)


def compared(a: LayerArguments) -> None:
    """Compare positions for causal, instead of the places of queries and keys."""
    places = numpy.asarray(a.positions)
    if a.cache is None and places.ndim < 3 and a.options.get("causal"):
        rows = numpy.broadcast_to(places, (len(a.query), places.shape[-1]))
        a.options |= {"causal": False, "mask": rows[:, None, :, None] >= rows[:, None, None, :]}


def section(name: str, title: str, axes: Callable[[Sequence[int]], numpy.ndarray], *bugs: str) -> Mistake:
    """Return a mistake in the axis of each pair."""

    def spread(positions: Any, sections: Sequence[int]) -> Any:
        places = numpy.asarray(positions)
        return numpy.moveaxis(places, 0, -1)[..., axes(sections)] if places.ndim == 3 else positions

    needs = ("sections", "positions")
    return layered(name, title, "MHA-ROTARY-17", needs=needs, functions=TURNING, bugs=bugs, spread=spread)


def in_turn(sections: Sequence[int]) -> numpy.ndarray:
    """Return the axis of each pair where the axes take pairs in turn, until each has its number."""
    left, axes = list(sections), list[int]()
    while any(left):
        for axis in range(len(left)):
            axes += [axis] if left[axis] else []
            left[axis] -= left[axis] > 0
    return numpy.asarray(axes)


def in_blocks(sections: Sequence[int]) -> numpy.ndarray:
    """Return the axis of each pair in blocks."""
    return numpy.repeat(numpy.arange(len(sections)), sections)


TOKEN_POSITIONS = (
    positions(
        "positions-ignored",
        "accepts positions and counts them from the offset and the cache",
        uncounted,
        "epfLLM/Megatron-LLM#23",
    ),
    positions(
        "positions-counted-from-the-first",
        "uses the first position of each batch entry and counts on from it",
        counted_from_the_first,
    ),
    positions(
        "positions-of-the-first-entry",
        "uses the positions of the first batch entry for all entries of the layer",
        of_the_first_entry,
        "unslothai/unsloth#3699",
    ),
    positions("positions-compared", "compares positions of the caller for causal, instead of places", compared),
    section(
        "sections-of-the-first-axis",
        "turns every pair by the positions on the first axis",
        lambda sections: 0 * in_blocks(sections),
        "sgl-project/sglang PR#34446",
    ),
    section(
        "sections-in-turn",
        "gives pairs to the axes in turn, as Qwen3-VL does, instead of in blocks",
        in_turn,
        "Blaizzy/mlx-vlm PR#576",
    ),
    section(
        "sections-reversed",
        "turns the first section by the positions on the last axis",
        lambda sections: len(sections) - 1 - in_blocks(sections),
    ),
    section(
        "sections-from-the-last-pair",
        "counts the sections from the last pair",
        lambda sections: numpy.flip(in_blocks(sections)),
    ),
)
