"""Reduce a failing answer to small grids and a few numbers, so that a page can draw it.

A grid has at most 32 cells on a side. A cell stands for a square or oblong block of elements, of which it shows the
worst; the sides of a block are powers of two, so that the edges of tiles stay visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.judging.bounds import precision
from mha_spec_conformance.judging.compare import in_full_shape, shares
from mha_spec_conformance.judging.places import WrongElements
from mha_spec_conformance.judging.properties import visible_pairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mha_spec_conformance.judging.result import Result

__all__ = ["ERRORS", "PAIRS", "Drawing", "Element", "drawing_of"]

MOST_CELLS = 32
"""The number of cells on a side of a grid."""

MOST_GRIDS = 8
"""The number of grids of an output; each shows a head or a batch entry."""

MOST_OUTPUTS = 3

MOST_ELEMENTS = 6
"""The number of elements whose numbers are listed."""

STEPS = (1.0, 10.0, 100.0, 1000.0)
"""The multiples of the allowance at which the shade of an error changes."""

ERRORS = {
    0: "within the allowance",
    1: "up to 10 times the allowance",
    2: "up to 100 times",
    3: "up to 1000 times",
    4: "more than 1000 times",
    5: "NaN, infinite, or not exactly the required value",
}
"""The shades of errors; an element that is not compared has none."""

PAIRS = {0: "hidden", 1: "partly visible", 2: "visible"}


@dataclass(frozen=True)
class Grid:
    """A matrix of cells: for each shade, the outline of its cells as the data of an SVG path in units of a cell."""

    title: str
    rows: int
    columns: int
    paths: Mapping[int, str]
    marked_rows: str = ""
    """Triangles at the left of the rows of cells in which an element is wrong."""
    marked_columns: str = ""


@dataclass(frozen=True)
class Picture:
    """Grids of the same kind, their axes, and the number of grids that are left out."""

    name: str
    axes: tuple[str, str]
    sizes: tuple[int, int]
    block: tuple[int, int]
    """The numbers of elements along the sides of a cell."""
    grids: tuple[Grid, ...]
    left_out: int = 0
    counts: tuple[int, int] = (0, 0)
    """The numbers of wrong and of compared elements, or of visible pairs and of all pairs."""
    has_blanks: bool = False
    """True if elements are not compared."""


@dataclass(frozen=True)
class Element:
    """A wrong element: its index, the expected number, the received number, and the allowance."""

    index: tuple[int, ...]
    expected: float
    got: float
    allowance: float
    times: float
    """The error as a multiple of the allowance."""


@dataclass(frozen=True)
class Drawing:
    """The parts of a failing answer that a page shows."""

    pairs: Picture | None
    errors: tuple[Picture, ...]
    output: str
    axes: tuple[str, ...]
    """The output of the elements, and its axes."""
    elements: tuple[Element, ...]

    @property
    def size(self) -> int:
        """The number of characters of all paths."""
        pictures = (*self.errors, *([self.pairs] if self.pairs else []))
        return sum(len(path) for picture in pictures for grid in picture.grids for path in grid.paths.values())


def drawing_of(result: Result, profile: str = "standard") -> Drawing | None:
    """Reduce a failure to a drawing; None if the answer is not known or has no wrong element."""
    if result.wrong is None or result.worst is None:
        return None
    elements = WrongElements(result.wrong, profile)
    if not elements.outputs:
        return None
    first = result.worst.output
    names = sorted(elements.outputs, key=lambda name: name != first)[:MOST_OUTPUTS]
    used = {name: _used(elements, name, profile) for name in names}
    return Drawing(
        pairs=_pairs(elements, result.worst.output, result.worst.index),
        errors=tuple(_errors(elements, name, used[name], result.worst.index) for name in names),
        output=first,
        axes=elements.axes(first),
        elements=tuple(_listed(elements, first, used[first], result.worst.index)),
    )


def _used(elements: WrongElements, name: str, profile: str) -> numpy.ndarray:
    """Return the share of the allowance that each element of an output uses; NaN if it is not compared."""
    wrong, golden = elements.wrong, elements.expected[name]
    used = shares(name, golden, wrong.outputs[name], wrong.allowances[name], precision(wrong.ask.dtype, profile))
    return numpy.where(elements.compared[name], in_full_shape(used, golden, numpy.nan), numpy.nan)


def _errors(elements: WrongElements, name: str, used: numpy.ndarray, worst: tuple[int, ...]) -> Picture:
    """Draw the errors of an output: a grid of its last two axes for each index of the others."""
    axes = elements.axes(name)
    matrices, axes = (used, axes) if used.ndim > 1 else (used.reshape(1, -1), ("", *axes))
    leading, sizes = matrices.shape[:-2], matrices.shape[-2:]
    chosen = _chosen(leading, worst[: len(leading)] if len(worst) == used.ndim else (0,) * len(leading))
    grids = [_grid(_place(axes, index), _shades(_reduced(matrices[index], numpy.fmax))) for index in chosen]
    return Picture(
        name=name,
        axes=(axes[-2], axes[-1]),
        sizes=sizes,
        block=(_block(sizes[0]), _block(sizes[1])),
        grids=tuple(grids),
        left_out=int(numpy.prod(leading)) - len(grids),
        counts=(int(elements.marks[name].sum()), int(elements.compared[name].sum())),
        has_blanks=not elements.compared[name].all(),
    )


def _chosen(shape: tuple[int, ...], worst: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Choose few indices that are spread over all, among them that of the worst element."""
    number = int(numpy.prod(shape))
    spread = {round(i * (number - 1) / max(MOST_GRIDS - 2, 1)) for i in range(MOST_GRIDS - 1)}
    kept = range(number) if number <= MOST_GRIDS else sorted({*spread, int(numpy.ravel_multi_index(worst, shape))})
    return [tuple(int(i) for i in numpy.unravel_index(flat, shape)) for flat in kept]


def _pairs(elements: WrongElements, output: str, worst: tuple[int, ...]) -> Picture | None:
    """Draw the visible pairs of the head that has the worst element, with marks at wrong rows and keys."""
    visible = visible_pairs(elements.wrong.ask.case, elements.inputs)
    if visible is None or not visible.size:
        return None
    place = {axis: int(i) for axis, i in zip(elements.axes(output), worst, strict=True)}
    group = visible.shape[1] // elements.inputs["key"].shape[1]
    entry, kv_head = place.get("batch entry", 0), place.get("kv head", 0)
    head = place["head"] if "head" in place else kv_head * group
    at = {"batch entry": entry, "head": head, "kv head": head // group}
    seen = visible[entry, head]
    rows, columns = seen.shape
    return Picture(
        name="pairs",
        axes=("row", "key"),
        sizes=(rows, columns),
        block=(_block(rows), _block(columns)),
        grids=(
            _grid(
                _place(("batch entry", "head"), (entry, head)),
                _reduced(seen, numpy.logical_or).astype(int) + _reduced(seen, numpy.logical_and),
                _wrong_along(elements, "row", at, rows),
                _wrong_along(elements, "key", at, columns),
            ),
        ),
        left_out=visible.shape[0] * visible.shape[1] - 1,
        counts=(int(seen.sum()), seen.size),
    )


def _wrong_along(elements: WrongElements, axis: str, at: Mapping[str, int], size: int) -> numpy.ndarray:
    """Mark the blocks of rows or of keys in which an element of this batch entry and head is wrong.

    The gradient of a bias may have axes of size 1, which stand for all entries.
    """
    wrong = numpy.zeros(size, dtype=bool)
    for name in elements.outputs:
        marks = elements.marks[name]
        axes = elements.axes(name)
        if axis in axes:
            index = (
                min(at[other], n - 1) if other in at else slice(None)
                for other, n in zip(axes, marks.shape, strict=True)
            )
            left = [other for other in axes if other not in at]
            wrong |= marks[tuple(index)].any(axis=tuple(i for i, other in enumerate(left) if other != axis))
    return numpy.logical_or.reduceat(wrong, numpy.arange(0, size, _block(size)))


def _block(size: int) -> int:
    """Return the smallest power of two by which a size is at most the number of cells on a side."""
    return 1 << max(0, (-(-size // MOST_CELLS) - 1).bit_length())


def _reduced(matrix: numpy.ndarray, reduce: numpy.ufunc) -> numpy.ndarray:
    """Reduce each block of a matrix to a cell."""
    for axis in (0, 1):
        size = matrix.shape[axis]
        matrix = reduce.reduceat(matrix, numpy.arange(0, size, _block(size)), axis=axis)
    return matrix


def _shades(used: numpy.ndarray) -> numpy.ndarray:
    """Return the shade of each share of the allowance; -1 for an element that is not compared."""
    shades = numpy.where(numpy.isinf(used), len(STEPS) + 1, numpy.searchsorted(STEPS, used))
    return numpy.where(numpy.isnan(used), -1, shades)


def _grid(title: str, shades: numpy.ndarray, rows: Iterable[bool] = (), columns: Iterable[bool] = ()) -> Grid:
    """Outline the cells of each shade, where cells of the same shade next to each other share an outline."""
    paths: dict[int, list[str]] = {}
    for y, line in enumerate(shades):
        edges = [0, *(numpy.flatnonzero(numpy.diff(line)) + 1).tolist(), len(line)]
        for x, end in pairwise(edges):
            paths.setdefault(int(line[x]), []).append(f"M{x} {y}h{end - x}v1h{x - end}z")
    height, width = shades.shape
    return Grid(
        title,
        height,
        width,
        {shade: "".join(parts) for shade, parts in sorted(paths.items()) if shade >= 0},
        "".join(f"M-1 {y}.1l.8 .4-.8 .4z" for y, marked in enumerate(rows) if marked),
        "".join(f"M{x}.1-1l.4 .8 .4-.8z" for x, marked in enumerate(columns) if marked),
    )


def _place(axes: tuple[str, ...], index: tuple[int, ...]) -> str:
    return ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=False))


def _listed(elements: WrongElements, name: str, used: numpy.ndarray, worst: tuple[int, ...]) -> Iterable[Element]:
    """List the worst element, and wrong elements that are spread over the output."""
    golden, wrong = elements.expected[name], elements.wrong
    expected = in_full_shape(golden.values, golden, numpy.nan)
    marked = numpy.argwhere(elements.marks[name])
    spread = numpy.linspace(0, len(marked) - 1, MOST_ELEMENTS).round().astype(int)
    chosen = dict.fromkeys([worst, *(tuple(int(i) for i in marked[at]) for at in spread)])
    for index in [*chosen][:MOST_ELEMENTS]:
        numbers = (float(x[index]) for x in (expected, wrong.outputs[name], wrong.allowances[name], used))
        yield Element(index, *numbers)
