"""Describe where the wrong elements of failures lie: outputs, batch entries, heads, rows, keys, components, tiles.

A description is a set of elements that contains every wrong element of a failure and leaves out right ones. For many
failures the description is chosen that holds for nearly all of them and leaves out most; the number of failures for
which it holds is part of the text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy

from .axes import axes_of
from .bounds import precision
from .compare import wrong_elements
from .indices import TILES, plural
from .properties import sizes_of, visible_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .recognition import Wrong

__all__ = ["Place", "WrongElements", "described"]

LEAST_LEFT_OUT = 0.05
"""A description is worth a line if it leaves out this share of the elements."""

MOST_OUTPUTS = 3
"""The largest number of outputs that are listed."""

NEARLY_ALL = 0.9
"""A description is reported if it holds for this share of the failures."""


class WrongElements:
    """The wrong elements of an answer, by output."""

    def __init__(self, wrong: Wrong, profile: str = "standard") -> None:
        """Compare the answer element by element."""
        self.wrong = wrong
        run = precision(wrong.ask.dtype, profile)
        self.expected = wrong.ask.expected
        self.marks: dict[str, numpy.ndarray] = {}
        self.compared: dict[str, numpy.ndarray] = {}
        for name, golden in self.expected.items():
            marks = wrong_elements(name, golden, wrong.outputs[name], wrong.allowances[name], run)
            self.marks[name], self.compared[name] = marks

    def axes(self, output: str) -> tuple[str, ...]:
        """Name the axes of an output."""
        return axes_of(output, len(self.expected[output].shape), self.wrong.ask.case.function)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that have wrong elements."""
        return tuple(name for name, marks in self.marks.items() if marks.any())

    @cached_property
    def inputs(self) -> Mapping[str, numpy.ndarray]:
        """The inputs of the call."""
        return self.wrong.ask.case.inputs(self.wrong.ask.dtype)

    def sets(self, output: str) -> Iterator[tuple[str, str, numpy.ndarray]]:
        """Yield sets of elements of an output, each with the axis that it describes and its description."""
        shape = self.marks[output].shape
        axes = self.axes(output)
        group = self._group()
        for axis, (name, size) in enumerate(zip(axes, shape, strict=True)):
            along = [1] * len(shape)
            along[axis] = size
            for text, members in _sets_along(name, size, group):
                yield name, text, numpy.broadcast_to(members.reshape(along), shape)
        yield from self._sets_of_rows(output, axes)
        yield from self._sets_of_keys(output, axes)

    def _group(self) -> int:
        sizes = sizes_of(self.inputs)
        return sizes.get("heads", 1) // max(sizes.get("kv_heads", 1), 1)

    def _sets_of_rows(self, output: str, axes: tuple[str, ...]) -> Iterator[tuple[str, str, numpy.ndarray]]:
        """Yield sets of rows by what they see."""
        if axes[:3] != ("batch entry", "head", "row") or (visible := self._visible) is None:
            return
        shape = self.marks[output].shape
        seen = visible.sum(axis=3)
        if seen.shape != shape[:3]:
            return
        after = [1] * (len(shape) - 3)
        for text, rows in _kinds_of_rows(visible, seen):
            yield "seen", text, numpy.broadcast_to(rows.reshape(*rows.shape, *after), shape)
        if axes[3:] == ("key",):
            yield "pair", "hidden pairs", ~visible
            yield "pair", "visible pairs", visible

    def _sets_of_keys(self, output: str, axes: tuple[str, ...]) -> Iterator[tuple[str, str, numpy.ndarray]]:
        """Yield sets of keys by whether a row sees them."""
        if axes != ("batch entry", "kv head", "key", "component") or (visible := self._visible) is None:
            return
        shape = self.marks[output].shape
        pairs = visible.reshape(shape[0], shape[1], -1, visible.shape[2], shape[2])
        rows = pairs.sum(axis=(2, 3))[..., None]
        yield (
            "seen",
            "batch entries that see no key",
            numpy.broadcast_to(rows.sum(axis=(1, 2), keepdims=True) == 0, shape),
        )
        yield "seen", "keys that no row sees", numpy.broadcast_to(rows == 0, shape)
        yield "seen", "keys that a row sees", numpy.broadcast_to(rows > 0, shape)

    @cached_property
    def _visible(self) -> numpy.ndarray | None:
        return visible_pairs(self.wrong.ask.case, self.inputs)


def _kinds_of_rows(visible: numpy.ndarray, seen: numpy.ndarray) -> Iterator[tuple[str, numpy.ndarray]]:
    """Yield sets of rows, each with its description."""
    keys = visible.shape[3]
    yield "rows that see no key", seen == 0
    yield "rows that see a key", seen > 0
    yield "rows of which a key is hidden", seen < keys
    yield "rows that see every key", seen == keys
    empty = (seen == 0).all(axis=(1, 2))
    yield "batch entries that see no key", numpy.broadcast_to(empty[:, None, None], seen.shape)
    yield "batch entries that see a key", numpy.broadcast_to(~empty[:, None, None], seen.shape)
    for tile in TILES:
        if keys > tile:
            whole = numpy.stack([visible[..., k : k + tile].any(axis=3) for k in range(0, keys, tile)], axis=3)
            yield f"rows of which a whole tile of {tile} keys is hidden", numpy.logical_not(whole.all(axis=3))


def _sets_along(axis: str, size: int, group: int) -> Iterator[tuple[str, numpy.ndarray]]:
    """Yield sets of indices along an axis, each with its description."""
    index, names = numpy.arange(size), plural(axis)
    if size < 2:
        return
    yield f"{axis} 0", index == 0
    yield f"the last {axis}", index == size - 1
    yield f"{names} from 1 on", index > 0
    yield f"{names} before the last", index < size - 1
    for tile in TILES:
        if size > tile:
            yield f"{names} from {tile} on", index >= tile
            yield f"{names} below {tile}", index < tile
            yield f"{names} of the last tile of {tile}", index >= (size - 1) // tile * tile
    if axis == "head" and 1 < group < size:
        yield "heads that are not the first of their group", index % group != 0
        yield "the first head of each group", index % group == 0
        yield "heads of every group but the first", index >= group
    if axis == "component" and size > 2:
        yield "the first half of the components", index < (size + 1) // 2
        yield "the second half of the components", index >= size // 2
    if axis == "component" and size > 3:
        yield "even components", index % 2 == 0
        yield "odd components", index % 2 == 1


@dataclass
class _Count:
    """The failures for which a description holds, and the share of the elements that it leaves out."""

    holds: int = 0
    asked: int = 0
    left_out: float = 0.0


@dataclass(frozen=True)
class Place:
    """A description of where wrong elements lie, and the number of failures for which it holds."""

    text: str
    failures: int
    of_failures: int

    def __str__(self) -> str:
        return self.text + ("" if self.failures == self.of_failures else f" ({self.failures} of {self.of_failures})")


def described(failures: Sequence[WrongElements]) -> list[Place]:
    """Describe the outputs that are wrong, and on each axis the smallest set that holds for nearly all failures."""
    places = _outputs(failures)
    counts: defaultdict[str, defaultdict[str, _Count]] = defaultdict(lambda: defaultdict(_Count))
    for failure in failures:
        for axis, text, holds, left_out in _tested(failure):
            count = counts[axis][text]
            count.asked += 1
            count.holds += holds
            count.left_out += left_out if holds else 0.0
    for texts in counts.values():
        text, count = max(
            texts.items(), key=lambda item: (item[1].holds >= NEARLY_ALL * item[1].asked, item[1].left_out)
        )
        worth = count.left_out >= LEAST_LEFT_OUT * count.asked and count.asked >= NEARLY_ALL * len(failures) / 2
        if worth and count.holds >= NEARLY_ALL * count.asked:
            places.append(Place(f"only {text}", count.holds, count.asked))
    return places


def _outputs(failures: Sequence[WrongElements]) -> list[Place]:
    """Name the fewest outputs that hold all wrong elements of nearly all failures, if there are others."""
    count = Counter(name for failure in failures for name in failure.outputs)
    kept = {name for name, _ in count.most_common()}
    for name in reversed([name for name, _ in count.most_common()]):
        if _within(kept - {name}, failures) < NEARLY_ALL * len(failures):
            break
        kept.remove(name)
    others = {name for failure in failures for name in failure.marks} - kept
    if not kept or not others or min(len(kept), len(others)) > MOST_OUTPUTS:
        return []
    few = len(kept) <= MOST_OUTPUTS
    order = dict.fromkeys(name for failure in failures for name in failure.marks if few == (name in kept))
    named = " and ".join(f"`{name}`" for name in order)
    return [Place(f"only {named}" if few else f"all outputs but {named}", _within(kept, failures), len(failures))]


def _within(outputs: set[str], failures: Sequence[WrongElements]) -> int:
    """Count the failures of which no other output is wrong."""
    return sum(outputs.issuperset(failure.outputs) for failure in failures)


def _tested(failure: WrongElements) -> Iterator[tuple[str, str, bool, float]]:
    """Test each description on a failure; a description holds if it holds for each output that has the axis."""
    tests: defaultdict[tuple[str, str], list[tuple[bool, float]]] = defaultdict(list)
    for output in failure.outputs:
        marks, compared = failure.marks[output], failure.compared[output]
        for axis, text, members in failure.sets(output):
            holds = not (marks & ~members).any()
            tests[axis, text].append((holds, float((compared & ~members).sum() / compared.sum())))
    for (axis, text), results in tests.items():
        yield axis, text, all(holds for holds, _ in results), sum(left for _, left in results) / len(results)
