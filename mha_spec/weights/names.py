"""The names that a layout expects, and the errors for missing and unknown ones."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn

from mha_spec.errors import ArgumentTypeError, ArgumentValueError

from .operations import is_mapping, mapping_of
from .tables import LAYOUTS, Layout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mha_spec.arrays import Array

__all__ = ["Expected", "flat", "nested", "own_tensors"]

LONGEST_LIST = 16
"""An error names at most so many of the names that are there."""


NEAR = 0.75
"""The similarity, by difflib, from which on a name counts as a misspelt one."""


class Expected:
    """The required names, and the groups of optional names."""

    def __init__(self, names: Iterable[str], optional: Sequence[Collection[str]]) -> None:
        self._names = tuple(names)
        self._optional = optional

    def missing(self, given: Collection[str]) -> list[str]:
        """Name what must be there beside `given`, and is not."""
        absent = {name for group in self._optional if not set(group) & set(given) for name in group}
        return [name for name in self._names if name not in given and name not in absent]

    def unknown(self, given: Collection[str]) -> list[str]:
        """Name what is there and is not expected."""
        return [name for name in given if name not in self._names]

    def fits(self, given: Collection[str]) -> bool:
        """Tell whether no name is missing and none unknown."""
        return not self.missing(given) and not self.unknown(given)

    def refuse(self, given: Collection[str], heading: str) -> NoReturn:
        """Raise for names that do not fit, listing both sides."""
        missing, unknown = self.missing(given), self.unknown(given)
        optional = {name for group in self._optional for name in group}
        lines = [heading, *(f"  missing: {name}{_nearest(name, unknown)}" for name in missing)]
        # A name that is present was not misspelt, so only an absent one can be what an unknown name was meant to be.
        absent = [name for name in self._names if name not in given]
        lines += [f"  unknown: {name}{_nearest(name, absent)}" for name in unknown[:LONGEST_LIST]]
        lines += [f"  expected: {_listed(self._names, optional)}", f"  there: {_listed(sorted(given))}"]
        raise ArgumentValueError("\n".join(lines))


def _nearest(name: str, others: Sequence[str]) -> str:
    near = get_close_matches(name, others, 1, NEAR)
    return f" (is it {near[0]}?)" if near else ""


def _listed(names: Sequence[str], optional: Collection[str] = ()) -> str:
    spelt = [f"[{name}]" if name in optional else name for name in names]
    more = [f"and {len(spelt) - LONGEST_LIST} more"] if len(spelt) > LONGEST_LIST else []
    return ", ".join([*spelt[:LONGEST_LIST], *more]) or "nothing"


def flat(state: Mapping[str, Array], separator: str) -> dict[str, Array]:
    """Flatten dictionaries of dictionaries to a single one with joined names."""
    found: dict[str, Array] = {}
    for name, value in state.items():
        if is_mapping(value):
            found |= {f"{name}{separator}{key}": array for key, array in flat(value, separator).items()}
        else:
            found[str(name)] = value
    return found


def nested(state: Mapping[str, Array], separator: str) -> dict[str, Array]:
    """Give joined names as dictionaries of dictionaries."""
    found: dict[str, Array] = {}
    for name, array in state.items():
        *folders, last = name.split(separator)
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = array
    return found


def own_tensors(state: Mapping[str, Array] | Sequence[Array], layout: Layout, prefix: str) -> dict[str, Array]:
    """Give the tensors of one layer of `state` by the layout's names.

    Raises:
        ArgumentTypeError: The state is neither a mapping nor, where the layout has an order, a list.
        ArgumentValueError: Names are missing or unknown, or hold what params has no place for.
    """
    if isinstance(state, (list, tuple)) and layout.ordered:
        return _in_order(state, layout, prefix)
    everything = flat(mapping_of(state, "state"), layout.separator)
    head = beginning(prefix, layout)
    given = {name.removeprefix(head): array for name, array in everything.items() if name.startswith(head)}
    for name in given:
        if name in layout.refused:
            raise ArgumentValueError(f"`{head}{name}` cannot be loaded: {layout.refused[name]}.")
    own = {name: array for name, array in given.items() if name not in layout.apart}
    expected = Expected(layout.tensors, layout.optional)
    if not expected.fits(own):
        where = f"under {head!r}" if head else "and no others without a prefix"
        expected.refuse(
            own, f"`state` must hold the names of {layout.describes} {where}.{_hint(everything, own, layout)}"
        )
    return own


def beginning(prefix: object, layout: Layout) -> str:
    """Give what every name of the layer begins with: the prefix and one separator, or nothing."""
    if not isinstance(prefix, str):
        raise ArgumentTypeError(f"`prefix` must be a string, received prefix={prefix!r}.")
    return f"{prefix.removesuffix(layout.separator)}{layout.separator}" if prefix else ""


def _in_order(arrays: Sequence[Array], layout: Layout, prefix: str) -> dict[str, Array]:
    if prefix:
        raise ArgumentValueError(f"`prefix` must be '' where `state` is a list, received prefix={prefix!r}.")
    optional = {name for group in layout.optional for name in group}
    orders = [list(layout.tensors), [name for name in layout.tensors if name not in optional]]
    for names in orders:
        if len(names) == len(arrays):
            return dict(zip(names, arrays, strict=True))
    raise ArgumentValueError(
        f"`state` must hold the {len(orders[0])} or, without {_listed(sorted(optional))}, the {len(orders[1])} weights "
        f"of {layout.describes} in its order, {_listed(orders[0])}; received {len(arrays)} arrays."
    )


def _hint(everything: Mapping[str, Array], own: Collection[str], layout: Layout) -> str:
    """Suggest another prefix or another layout that fits the names."""
    fitting = [name for name, other in LAYOUTS.items() if Expected(other.tensors, other.optional).fits(own)]
    if fitting and own:
        return f" Those there are of layout {' or '.join(map(repr, fitting))}."
    if set(own) & set(layout.tensors):
        return ""
    expected = Expected(layout.tensors, layout.optional)
    first = next(iter(layout.tensors))
    ends = [name.removesuffix(first) for name in everything if name.endswith(layout.separator + first)]
    found = [
        end for end in ends if not expected.missing([n.removeprefix(end) for n in everything if n.startswith(end)])
    ]
    return f" Such a layer is under {_listed([repr(end) for end in found])}." if found else ""
