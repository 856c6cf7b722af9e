"""Which backend answers: that of the query's array type, or the one that MHA_SPEC_BACKEND fixed at import.

Backends are found through the entry-point group `mha_spec.backends` (name -> module), ours like anybody's, and loaded
one at a time, on first use. A backend answers for the array library whose name it carries; `numpy` answers for every
library of the Python array API that has no backend of its own.
"""

from __future__ import annotations

import os
import warnings
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from .arrays import library_of
from .errors import ArgumentTypeError, BackendError

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint
    from types import ModuleType

__all__ = [
    "DEFAULT",
    "ENVIRONMENT_VARIABLE",
    "backend",
    "backend_for",
    "backend_names",
    "backend_of_numbers",
    "backend_origin",
    "function_for",
    "function_of",
    "install_command",
]

GROUP = "mha_spec.backends"
ENVIRONMENT_VARIABLE = "MHA_SPEC_BACKEND"
DEFAULT = "numpy"


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        known = found.setdefault(point.name, point)
        if known.value != point.value:
            raise BackendError(
                f"two backends are called {point.name!r}: {known.value} and {point.value}; uninstall one of them"
            )
    return found


def backend_names() -> tuple[str, ...]:
    """Name every backend that is registered, whether or not its framework is installed."""
    return tuple(sorted(_entry_points()))


def backend_origin(name: str) -> tuple[str, str]:
    """Give the module of a registered backend, and the distribution that brings it with its version."""
    point = _entry_points()[name]
    return point.value, "" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def install_command(name: str) -> str | None:
    """Say how to install what a registered backend needs: the extra of that name, where its distribution has one."""
    distribution = _entry_points()[name].dist
    extras = () if distribution is None else distribution.metadata.get_all("Provides-Extra") or ()
    return f"pip install '{distribution.name}[{name}]'" if distribution is not None and name in extras else None


def _offer() -> str:
    """Every backend, and what to install for those whose library is not there."""
    from importlib.util import find_spec

    commands = {name: install_command(name) for name in backend_names()}
    offered = [
        f"{name} (not installed: {command})" if command and find_spec(name) is None else name
        for name, command in commands.items()
    ]
    return f"there are {', '.join(offered) or 'none'}"


@cache
def backend(name: str) -> ModuleType:
    """Give the backend called `name`, loading it.

    Raises:
        BackendError: No backend has that name, or its framework is not installed, or it does not import.
    """
    points = _entry_points()
    if name not in points:
        raise BackendError(f"no backend is called {name!r}; {_offer()}")
    point = points[name]
    try:
        return point.load()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name != point.module:
            command = install_command(name)
            fix = f": {command}" if command else ""
            raise BackendError(f"backend {name!r} needs {error.name}, which is not installed{fix}") from error
        message = f"backend {name!r} ({point.value}) does not import: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        raise BackendError(message) from error


def _fixed(name: str | None) -> ModuleType | None:
    """The backend that the environment fixes, or None where it says nothing."""
    try:
        return None if name is None else backend(name)
    except BackendError as error:
        offer = f"; {_offer()}" if name in backend_names() else ""
        raise BackendError(f"{ENVIRONMENT_VARIABLE}={name!r}: {error}{offer}") from error


_FIXED_LIBRARY = os.environ.get(ENVIRONMENT_VARIABLE)
_FIXED = _fixed(_FIXED_LIBRARY)


def _backend_of(library: str | None, received: str, label: str) -> ModuleType:
    if library is None:
        raise ArgumentTypeError(f"`{label}` must be an array, received {received}. [MHA-SHAPE-3]")
    if _FIXED is not None:
        if library != _FIXED_LIBRARY and _FIXED_LIBRARY != DEFAULT:
            raise ArgumentTypeError(
                f"`{label}` must be an array of {_FIXED_LIBRARY}, which {ENVIRONMENT_VARIABLE} fixes, "
                f"received one of {library}. [MHA-ARG-4]"
            )
        return _FIXED
    return backend(library if library in _entry_points() else DEFAULT)


_BACKEND_OF_CLASS: dict[type, ModuleType] = {}


def backend_for(array: object, label: str = "query") -> ModuleType:
    """Give the backend that answers for `array`, the argument called `label`."""
    found = _BACKEND_OF_CLASS.get(type(array))
    if found is None:
        found = _BACKEND_OF_CLASS[type(array)] = _backend_of(library_of(array), type(array).__name__, label)
    return found


def function_for(name: str, array: object, label: str = "query") -> Callable[..., Any]:
    """Give a function of the backend that answers for `array`, the argument called `label`."""
    return function_of(backend_for(array, label), name)


def function_of(module: ModuleType, name: str) -> Callable[..., Any]:
    """Give a function of a backend, which need not have them all.

    Raises:
        BackendError: It has none of that name.
    """
    try:
        return getattr(module, name)
    except AttributeError:
        raise BackendError(f"backend {getattr(module, '__name__', module)} has no function {name!r}") from None


def backend_of_numbers() -> ModuleType:
    """Give the backend that answers where no array says which: the one that is fixed, else NumPy's."""
    return backend(DEFAULT) if _FIXED is None else _FIXED
