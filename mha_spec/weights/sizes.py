"""The sizes of a layer's axes, read from the shapes of its tensors."""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import TYPE_CHECKING

from mha_spec.errors import ArgumentValueError
from mha_spec.scalars import check_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Sum = list[list[str]]

__all__ = ["Sizes", "axes_of", "merged_axis"]


def axes_of(pattern: str) -> Sum:
    """Split "heads*qk_dim embed" into its axes, each a list of the axes that are merged in it."""
    return [axis.split("*") for axis in pattern.split()]


def merged_axis(patterns: Sequence[str]) -> int:
    """Return the axis along which a fused tensor joins its parts: the first that merges several axes, else axis 0."""
    return next((index for index, axis in enumerate(axes_of(patterns[0])) if len(axis) > 1), 0)


def _sums(patterns: Sequence[str]) -> list[Sum]:
    """Return each axis of a tensor as a sum of products, with a product for each part that is joined along it."""
    parts = [axes_of(pattern) for pattern in patterns]
    joined = merged_axis(patterns)
    return [[part[index] for part in (parts if index == joined else parts[:1])] for index in range(len(parts[0]))]


class Sizes:
    """The size of each axis, and the tensor or argument that it is from; `equal` maps axes to axes of equal size."""

    def __init__(self, equal: Mapping[str, str], **arguments: int | None) -> None:
        self._equal = equal
        self._sizes: dict[str, int] = {}
        self._sources: dict[str, str] = {}
        for axis, size in arguments.items():
            if size is not None:
                self._set(axis, size)

    def _set(self, axis: str, argument: object) -> None:
        size = check_size(axis, argument, 1, "MHA-PROJ-4")
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
        """Read the sizes from the patterns and the shape of every tensor, first of those that leave no size open.

        A fused tensor whose number of kv heads is open waits until the size of a head is known from another tensor.
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
        """Read the sizes of the axes of a tensor from its shape.

        Raises:
            ArgumentValueError: The shape does not have these axes, contradicts another size, or leaves the number of
                heads open.
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
        """Solve the sum, which is linear, for the only unknown size; return False if there is no solution."""
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
        symbolic = ", ".join("+".join("*".join(term) for term in terms) for terms in named)
        filled = ", ".join(self._filled(terms) for terms in named)
        axes = dict.fromkeys(chain(*chain(*named)))
        known = [
            f"{axis}={self._sizes[axis]} of `{self._sources[axis]}`"
            for axis in axes
            if self._sources.get(axis, name) != name
        ]
        equal = dict.fromkeys(axis for axis in chain(*chain(*sums)) if axis in self._equal)
        known += [f"{axis}={self._equal[axis]} in this layout" for axis in equal]
        return (
            f"`{name}` must have shape=({symbolic}){f'=({filled})' if filled != symbolic else ''}, "
            f"received shape={shape}{', with ' if known else ''}{', '.join(known)}."
        )

    def _filled(self, terms: Sum) -> str:
        if all(axis in self._sizes for axis in chain(*terms)):
            return str(sum(self.product(term) for term in terms))
        return "+".join("*".join(str(self._sizes.get(axis, axis)) for axis in term) for term in terms)

    def _name(self, axis: str) -> str:
        return self._equal.get(axis, axis)
