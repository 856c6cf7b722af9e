"""The sizes of a layer's axes, read off the shapes of its tensors one by one."""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import TYPE_CHECKING

from mha_spec.errors import ArgumentValueError
from mha_spec.scalars import check_integer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Sum = list[list[str]]

__all__ = ["Sizes", "axes_of", "merged_axis"]


def axes_of(pattern: str) -> Sum:
    """Split "heads*qk_dim embed" into its axes, each a list of the axes that are merged in it."""
    return [axis.split("*") for axis in pattern.split()]


def merged_axis(patterns: Sequence[str]) -> int:
    """Give the axis along which the parts of a fused tensor follow each other: the merged one."""
    return next((index for index, axis in enumerate(axes_of(patterns[0])) if len(axis) > 1), 0)


def _sums(patterns: Sequence[str]) -> list[Sum]:
    """Give each axis of a tensor as a sum of products: the parts' products where they are joined, else one product."""
    parts = [axes_of(pattern) for pattern in patterns]
    joined = merged_axis(patterns)
    return [[part[index] for part in (parts if index == joined else parts[:1])] for index in range(len(parts[0]))]


class Sizes:
    """Sizes by axis, with what told each; `same` names the axes that are another one by definition."""

    def __init__(self, same: Mapping[str, str], **given: int | None) -> None:
        self._same = same
        self._sizes: dict[str, int] = {}
        self._sources: dict[str, str] = {}
        for axis, size in given.items():
            if size is not None:
                self._give(axis, size)

    def _give(self, axis: str, given: object) -> None:
        size = check_integer(axis, given, 1, "MHA-PROJ-4")
        name = self._name(axis)
        if self._sizes.setdefault(name, size) != size:
            raise ArgumentValueError(
                f"`{axis}` must be {name}={self._sizes[name]} in this layout, received {axis}={size}."
            )
        self._sources[name] = axis

    def __getitem__(self, axis: str) -> int:
        """The size of an axis that `fit` has read."""
        return self._sizes[self._name(axis)]

    def product(self, axes: Sequence[str]) -> int:
        """The size of several axes merged."""
        return prod(self[axis] for axis in axes)

    def fit_all(self, tensors: Mapping[str, tuple[Sequence[str], tuple[int, ...]]]) -> None:
        """Read the sizes off the patterns and the shape of every tensor, those first that leave nothing open.

        A fused tensor whose number of kv heads is open waits until another tensor has told the size of a head.
        """
        waiting = dict(tensors)
        while waiting:
            ready = [name for name, (patterns, _) in waiting.items() if self._determines(patterns)]
            for name in ready or list(waiting)[:1]:
                self.fit(name, *waiting.pop(name))

    def _determines(self, patterns: Sequence[str]) -> bool:
        return all(len(self._unknown(terms)) < 2 for terms in _sums(patterns))

    def _unknown(self, terms: Sum) -> set[str]:
        return {name for name in map(self._name, chain(*terms)) if name not in self._sizes}

    def fit(self, name: str, patterns: Sequence[str], shape: tuple[int, ...]) -> None:
        """Read the sizes of the axes of a tensor off its shape.

        Raises:
            ArgumentValueError: The shape is not one of these axes, or contradicts what others told, or leaves open what
                the number of heads is.
        """
        sums = _sums(patterns)
        fits = len(shape) == len(sums) and all(
            self._solve(name, terms, size) for terms, size in zip(sums, shape, strict=True)
        )
        if not fits:
            raise ArgumentValueError(self._message(name, sums, shape))

    def check_groups(self) -> None:
        """Raise unless heads is a multiple of kv_heads (MHA-HEAD-2)."""
        if self["heads"] % self["kv_heads"]:
            raise ArgumentValueError(
                f"heads must be a multiple of kv_heads, received heads={self['heads']} of `{self._sources['heads']}` "
                f"and kv_heads={self['kv_heads']} of `{self._sources['kv_heads']}`. [MHA-HEAD-2]"
            )

    def _solve(self, name: str, terms: Sum, size: int) -> bool:
        """Find the one size that is not known, in which the sum is linear; False where none is right."""
        named = [[self._name(axis) for axis in term] for term in terms]
        unknown = self._unknown(terms)
        if len(unknown) > 1:
            axis = next((axis for axis in ("heads", "kv_heads") if axis in unknown), min(unknown))
            raise ArgumentValueError(
                f"`{axis}` must be given: `{name}` has {'+'.join('*'.join(term) for term in named)}={size} in one axis."
            )
        known = [prod(self._sizes.get(axis, 1) for axis in term) for term in named]
        factor = sum(value for value, term in zip(known, named, strict=True) if unknown & set(term))
        rest = size - sum(known) + factor
        if not unknown:
            return rest == 0
        (axis,) = unknown
        if rest < factor or rest % factor:
            return False
        self._sizes[axis], self._sources[axis] = rest // factor, name
        return True

    def _message(self, name: str, sums: Sequence[Sum], shape: tuple[int, ...]) -> str:
        named = [[[self._name(axis) for axis in term] for term in terms] for terms in sums]
        spelt = ", ".join("+".join("*".join(term) for term in terms) for terms in named)
        filled = ", ".join(self._filled(terms) for terms in named)
        axes = dict.fromkeys(chain(*chain(*named)))
        known = [
            f"{axis}={self._sizes[axis]} of `{self._sources[axis]}`"
            for axis in axes
            if self._sources.get(axis, name) != name
        ]
        same = dict.fromkeys(axis for axis in chain(*chain(*sums)) if axis in self._same)
        known += [f"{axis}={self._same[axis]} in this layout" for axis in same]
        return (
            f"`{name}` must have shape=({spelt}){f'=({filled})' if filled != spelt else ''}, received shape={shape}"
            f"{', with ' if known else ''}{', '.join(known)}."
        )

    def _filled(self, terms: Sum) -> str:
        if all(axis in self._sizes for axis in chain(*terms)):
            return str(sum(self.product(term) for term in terms))
        return "+".join("*".join(str(self._sizes.get(axis, axis)) for axis in term) for term in terms)

    def _name(self, axis: str) -> str:
        return self._same.get(axis, axis)
