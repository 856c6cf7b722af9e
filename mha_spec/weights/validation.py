"""Checks of the table of a layout, which may be a user's."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from mha_spec.array_checks import is_mapping, is_sequence
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.parameters import AXES, REQUIRED
from mha_spec.scalars import short_repr

from .sizes import axes_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from .tables import Layout

__all__ = ["check_layout"]

MAPPINGS = ("tensors", "equal_axes", "options", "refused", "apart")
GROUPS = ("optional", "by_kv_head", "one_less")
SIZES = tuple(dict.fromkeys(axis for axes in AXES.values() for axis in axes))
"""The names of all axes."""


def check_layout(layout: Layout) -> None:
    """Require a table whose names, params and axes are known.

    Raises:
        ArgumentTypeError: A field is no mapping, no sequence, or holds something else than strings.
        ArgumentValueError: A name is unknown, a param has other axes than its own, or w_q or w_k is missing.
    """
    for field in MAPPINGS:
        if not is_mapping(getattr(layout, field)):
            _refuse_type(field, "a mapping of names", getattr(layout, field))
    for field in GROUPS:
        if not is_sequence(getattr(layout, field)):
            _refuse_type(field, "a tuple of names", getattr(layout, field))
    _require_text("separator", "a string such as '.'", layout.separator)
    for name, parts in layout.tensors.items():
        _check_tensor(f"tensors[{short_repr(name)}]", parts)
    for group in layout.optional:
        if not is_sequence(group):
            _refuse_type("optional", "a tuple of tuples of names", group)
        _check_known("optional", group, layout.tensors)
    _check_known("by_kv_head", layout.by_kv_head, layout.tensors)
    _check_known("one_less", layout.one_less, AXES)
    _check_known("equal_axes", [*layout.equal_axes, *layout.equal_axes.values()], SIZES)
    optional = {name for group in layout.optional for name in group}
    held = {param for name, parts in layout.tensors.items() if name not in optional for param in parts}
    missing = [param for param in REQUIRED[:2] if param not in held]
    if missing:
        raise ArgumentValueError(
            f"`Layout.tensors` must hold {' and '.join(REQUIRED[:2])}, received missing={', '.join(missing)}."
        )


def _check_tensor(label: str, parts: object) -> None:
    """Require the axes of each param of a tensor, which have the same number of axes of the tensor."""
    if not is_mapping(parts) or not parts:
        _refuse_type(label, "a mapping of the params that it holds to their axes", parts)
    for param, pattern in parts.items():
        _check_known(label, [param], AXES)
        _require_text(f"{label}[{param!r}]", "a string such as 'heads*qk_dim embed'", pattern)
        if sorted(axis for merged in axes_of(pattern) for axis in merged) != sorted(AXES[param]):
            raise ArgumentValueError(
                f"`Layout.{label}[{param!r}]` must name each axis of {param} once, {', '.join(AXES[param])}, "
                f"received {short_repr(pattern)}. A tensor that holds several params lists the axes of each."
            )
    if len({len(axes_of(pattern)) for pattern in parts.values()}) > 1:
        raise ArgumentValueError(
            f"`Layout.{label}` must have the same number of axes for each param, received {short_repr(dict(parts))}."
        )


def _check_known(label: str, names: Collection[Any], known: Collection[str]) -> None:
    """Require names that are known, and suggest the nearest."""
    for name in names:
        _require_text(label, "names", name)
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The names are {', '.join(known)}."
            raise ArgumentValueError(f"`Layout.{label}` must hold known names, received {short_repr(name)}. {hint}")


def _require_text(label: str, expected: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        _refuse_type(label, expected, value)


def _refuse_type(label: str, expected: str, received: object) -> NoReturn:
    raise ArgumentTypeError(
        f"`Layout.{label}` must be {expected}, received {short_repr(received)} of type {type(received).__name__}."
    )
