"""Choose the backend by the query's array type, unless MHA_SPEC_BACKEND fixes a backend at import.

All backends, including ours, are registered in the entry-point group `mha_spec.backends` (name -> module), and each is
loaded on first use. A backend serves the array library of the same name; `numpy` serves every library of the Python
array API without a backend.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .arrays import library_of_class
from .compiling import not_traced
from .errors import ArgumentTypeError, BackendError
from .scalars import short_repr

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint
    from types import ModuleType

__all__ = [
    "backend",
    "backend_for",
    "backend_names",
    "backend_of_numbers",
    "backend_origin",
    "function_for",
    "function_of",
]

GROUP = "mha_spec.backends"
ENVIRONMENT_VARIABLE = "MHA_SPEC_BACKEND"
DEFAULT = "numpy"


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        known = points.setdefault(point.name, point)
        if known.value != point.value:
            raise BackendError(
                f"two backends are called {point.name!r}: {known.value} and {point.value}; uninstall either"
            )
    return points


def backend_names() -> tuple[str, ...]:
    """Return the names of all registered backends, whether their framework is installed or not."""
    return tuple(sorted(_entry_points()))


def backend_origin(name: str) -> tuple[str, str]:
    """Return the module of a registered backend, and its distribution with its version."""
    point = _entry_points()[name]
    return point.value, "" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def install_command(name: str) -> str | None:
    """Return the command that installs the framework of a backend, if its distribution has an extra of that name."""
    distribution = _entry_points()[name].dist
    extras = () if distribution is None else distribution.metadata.get_all("Provides-Extra") or ()
    return f"pip install '{distribution.name}[{name}]'" if distribution is not None and name in extras else None


def _offer() -> str:
    """List every backend, with the command that installs a missing library."""
    from importlib.util import find_spec

    commands = {name: install_command(name) for name in backend_names()}
    backends = [
        f"{name} (not installed: {command})" if command and find_spec(name) is None else name
        for name, command in commands.items()
    ]
    return f"the backends are {', '.join(backends) or 'none'}"


_LOADED: dict[str, ModuleType] = {}


def backend(name: str) -> ModuleType:
    """Load and return the backend called `name`.

    Raises:
        BackendError: No backend has that name, or its framework is not installed, or it does not import.
    """
    return _LOADED[_load(_checked_name(name))]


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        received = f"received name={short_repr(name)} of type {type(name).__name__}"
        raise BackendError(f"`name` must be that of a backend, {received}; {_offer()}")
    return name


@not_traced
def _load(name: str) -> str:
    """Load a backend on first use, and return its name."""
    if name not in _LOADED:
        _LOADED[name] = _imported(name)
    return name


def _imported(name: str) -> ModuleType:
    points = _entry_points()
    if name not in points:
        raise BackendError(f"no backend is called {short_repr(name)}; {_offer()}")
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
    """Load the backend that the environment variable names; None where it is not set."""
    try:
        return None if name is None else backend(name)
    except BackendError as error:
        offer = f"; {_offer()}" if name in backend_names() else ""
        raise BackendError(f"{ENVIRONMENT_VARIABLE}={name!r}: {error}{offer}") from error


_FIXED_LIBRARY = os.environ.get(ENVIRONMENT_VARIABLE)
_FIXED = _fixed(_FIXED_LIBRARY)


_NAME_OF_CLASS: dict[type, str] = {}


def backend_for(array: object, label: str = "query") -> ModuleType:
    """Return the backend of `array`, the argument called `label`."""
    return _LOADED[_load_for(type(array), label)]


@not_traced
def _load_for(cls: type, label: str) -> str:
    """Load the backend of a class of arrays on first use, and return its name."""
    name = _NAME_OF_CLASS.get(cls)
    if name is None:
        name = _NAME_OF_CLASS[cls] = _load(_name_for(library_of_class(cls), cls.__name__, label))
    return name


def _name_for(library: str | None, received: str, label: str) -> str:
    if library is None:
        raise ArgumentTypeError(f"`{label}` must be an array, received {received}. [MHA-SHAPE-3]")
    if _FIXED_LIBRARY is not None:
        if library != _FIXED_LIBRARY and _FIXED_LIBRARY != DEFAULT:
            raise ArgumentTypeError(
                f"`{label}` must be an array of {_FIXED_LIBRARY}, which {ENVIRONMENT_VARIABLE} fixes, "
                f"received an array of {library}. [MHA-ARG-4]"
            )
        return _FIXED_LIBRARY
    return library if library in _entry_points() else DEFAULT


def function_for(name: str, array: object, label: str = "query") -> Callable[..., Any]:
    """Return a function of the backend of `array`, the argument called `label`."""
    return function_of(backend_for(array, label), name)


def function_of(module: ModuleType, name: str) -> Callable[..., Any]:
    """Return a function of a backend.

    Raises:
        BackendError: The backend does not have the function.
    """
    try:
        return getattr(module, name)
    except AttributeError:
        raise BackendError(f"backend {getattr(module, '__name__', module)} has no function {name!r}") from None


def backend_of_numbers() -> ModuleType:
    """Return the backend for calls without an array: that of MHA_SPEC_BACKEND, else NumPy's."""
    return backend(DEFAULT) if _FIXED is None else _FIXED
