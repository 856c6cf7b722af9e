"""The names that a layout expects, and the errors for missing and unknown ones."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from mha_spec.array_checks import is_mapping
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.scalars import short_repr

from .operations import mapping_of
from .tables import LAYOUTS, Layout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mha_spec.arrays import Array

__all__ = ["Expected", "flat", "layer_tensors", "nested"]

LONGEST_LIST = 16
"""The largest number of names that an error lists."""

NEAR = 0.75
"""The least similarity, by difflib, of a name to the name that it misspells."""


DEEPEST = 100
"""The largest number of dictionaries inside each other, beyond which a dictionary probably contains itself."""


class Expected:
    """The required names, and the groups of optional names."""

    def __init__(self, names: Iterable[str], optional: Sequence[Collection[str]]) -> None:
        self._names = tuple(names)
        self._optional = optional

    def missing(self, names: Collection[str]) -> list[str]:
        """Return the names that `names` lacks; if it has a name of an optional group, it needs the whole group."""
        not_needed = {name for group in self._optional if not set(group) & set(names) for name in group}
        return [name for name in self._names if name not in names and name not in not_needed]

    def unknown(self, names: Collection[str]) -> list[str]:
        """Return the names that are not expected."""
        return [name for name in names if name not in self._names]

    def fits(self, names: Collection[str]) -> bool:
        """Tell whether no name is missing and none is unknown."""
        return not self.missing(names) and not self.unknown(names)

    def refuse(self, names: Collection[str], heading: str) -> NoReturn:
        """Raise an error that lists the missing, the unknown, the expected and the present names."""
        missing, unknown = self.missing(names), self.unknown(names)
        optional = {name for group in self._optional for name in group}
        lines = [heading, *(f"  missing: {name}{_nearest(name, unknown)}" for name in missing)]
        # An unknown name can be a misspelling only of a name that is absent.
        absent = [name for name in self._names if name not in names]
        lines += [f"  unknown: {name}{_nearest(name, absent)}" for name in unknown[:LONGEST_LIST]]
        lines += [f"  expected: {_listed(self._names, optional)}", f"  received: {_listed(sorted(names))}"]
        raise ArgumentValueError("\n".join(lines))


def _nearest(name: str, others: Sequence[str]) -> str:
    near = get_close_matches(name, others, 1, NEAR)
    return f" (is it {near[0]}?)" if near else ""


def _listed(names: Sequence[str], optional: Collection[str] = ()) -> str:
    labels = [f"[{name}]" if name in optional else name for name in names]
    more = [f"and {len(labels) - LONGEST_LIST} more"] if len(labels) > LONGEST_LIST else []
    return ", ".join([*labels[:LONGEST_LIST], *more]) or "nothing"


def flat(state: Mapping[str, Array], separator: str) -> dict[str, Array]:
    """Flatten nested dictionaries to a single dictionary with joined names.

    Raises:
        ArgumentValueError: Two arrays have the same joined name, or the dictionaries are nested too deeply.
    """
    arrays: dict[str, Array] = {}
    # A stack, because a recursion would end in an error of Python where a dictionary contains itself.
    stack: list[tuple[tuple[str, ...], Any]] = [((), state)]
    while stack:
        names, value = stack.pop()
        if len(names) > DEEPEST:
            raise ArgumentValueError(f"`state` is nested deeper than {DEEPEST} dictionaries, at {names[:3]}.")
        if is_mapping(value):
            stack += reversed([((*names, str(name)), entry) for name, entry in value.items()])
            continue
        joined = separator.join(names)
        if joined in arrays:
            raise ArgumentValueError(f"`state` holds two arrays of the name {joined!r}; rename either.")
        arrays[joined] = value
    return arrays


def nested(state: Mapping[str, Array], separator: str) -> dict[str, Array]:
    """Split joined names, and return nested dictionaries."""
    root: dict[str, Array] = {}
    for name, array in state.items():
        *folders, last = name.split(separator)
        parent = root
        for folder in folders:
            parent = parent.setdefault(folder, {})
        parent[last] = array
    return root


def layer_tensors(state: Mapping[str, Array] | Sequence[Array], layout: Layout, prefix: str) -> dict[str, Array]:
    """Return the tensors of the layer of `state` under `prefix`, by the names of the layout.

    Raises:
        ArgumentTypeError: The state is neither a mapping nor, where the layout has an order, a list.
        ArgumentValueError: A name is missing, unknown, or that of a weight that params cannot hold.
    """
    if isinstance(state, (list, tuple)) and layout.ordered:
        return _in_order(state, layout, prefix)
    everything = flat(mapping_of(state, "state"), layout.separator)
    head = beginning(prefix, layout)
    in_layer = {name.removeprefix(head): array for name, array in everything.items() if name.startswith(head)}
    for name in in_layer:
        if name in layout.refused:
            raise ArgumentValueError(f"`{head}{name}` cannot be loaded: {layout.refused[name]}.")
    tensors = {name: array for name, array in in_layer.items() if name not in layout.apart}
    expected = Expected(layout.tensors, layout.optional)
    if not expected.fits(tensors):
        where = f"under {head!r}" if head else "and no others without a prefix"
        expected.refuse(
            tensors, f"`state` must hold the names of {layout.describes} {where}.{_hint(everything, tensors, layout)}"
        )
    return tensors


def beginning(prefix: object, layout: Layout) -> str:
    """Return the beginning of every name of the layer: the prefix and a separator, or nothing."""
    if not isinstance(prefix, str):
        raise ArgumentTypeError(f"`prefix` must be a string, received prefix={short_repr(prefix)}.")
    return f"{prefix.removesuffix(layout.separator)}{layout.separator}" if prefix else ""


def _in_order(arrays: Sequence[Array], layout: Layout, prefix: str) -> dict[str, Array]:
    if prefix:
        raise ArgumentValueError(f"`prefix` must be '' where `state` is a list, received prefix={short_repr(prefix)}.")
    optional = {name for group in layout.optional for name in group}
    orders = [list(layout.tensors), [name for name in layout.tensors if name not in optional]]
    for names in orders:
        if len(names) == len(arrays):
            return dict(zip(names, arrays, strict=True))
    raise ArgumentValueError(
        f"`state` must hold the {len(orders[0])} or, without {_listed(sorted(optional))}, the {len(orders[1])} weights "
        f"of {layout.describes} in its order, {_listed(orders[0])}; received {len(arrays)} arrays."
    )


def _hint(everything: Mapping[str, Array], tensors: Collection[str], layout: Layout) -> str:
    """Suggest another prefix or another layout that fits the names."""
    fitting = [name for name, other in LAYOUTS.items() if Expected(other.tensors, other.optional).fits(tensors)]
    if fitting and tensors:
        return f" These names are of layout {' or '.join(map(repr, fitting))}."
    if set(tensors) & set(layout.tensors):
        return ""
    expected = Expected(layout.tensors, layout.optional)
    first = next(iter(layout.tensors))
    ends = [name.removesuffix(first) for name in everything if name.endswith(layout.separator + first)]
    prefixes = [
        end for end in ends if not expected.missing([n.removeprefix(end) for n in everything if n.startswith(end)])
    ]
    return f" Such a layer is under {_listed([repr(end) for end in prefixes])}." if prefixes else ""
