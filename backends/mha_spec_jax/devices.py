"""Which arrays can be worked together: those that jax is free to move, and those on the same devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from mha_spec.array_checks import check_same_device

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check_devices"]


def check_devices(arguments: Mapping[str, object]) -> None:
    """Raise where two arrays are committed to different devices, or to the same in another order (MHA-ARG-4).

    The shared checks compare each array with the first one, which may itself be free to move.
    """
    committed = {name: value for name, value in arguments.items() if _is_committed(value)}
    if len(committed) < 2:
        return
    first, *others = committed.items()
    for label, array in others:
        check_same_device(label, array, *first)


def _is_committed(value: object) -> bool:
    return isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.committed
