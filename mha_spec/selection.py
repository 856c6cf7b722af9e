"""Which backend answers: that of the query's array type, or the one that MHA_SPEC_BACKEND fixed at import.

Backends are found through the entry-point group `mha_spec.backends` (name -> module), ours like anybody's, and loaded
one at a time, on first use. A backend answers for the array library whose name it carries; `numpy` answers for every
library of the Python array API that has no backend of its own.
"""

from __future__ import annotations

import os
import warnings
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from .arrays import library_of
from .errors import ArgumentTypeError, BackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import ModuleType

__all__ = ["DEFAULT", "ENVIRONMENT_VARIABLE", "backend", "backend_for", "backend_names"]

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


@cache
def backend(name: str) -> ModuleType:
    """Give the backend called `name`, loading it.

    Raises:
        BackendError: No backend has that name, or its framework is not installed, or it does not import.
    """
    points = _entry_points()
    if name not in points:
        raise BackendError(f"no backend is called {name!r}; there are {', '.join(backend_names()) or 'none'}")
    point = points[name]
    try:
        return point.load()
    except ModuleNotFoundError as error:
        ours = point.dist is not None and point.dist.name == "mha-spec"
        fix = f": pip install 'mha-spec[{name}]'" if ours else ""
        raise BackendError(f"backend {name!r} needs {error.name}, which is not installed{fix}") from error
    except Exception as error:
        message = f"backend {name!r} ({point.value}) does not import: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        raise BackendError(message) from error


def _fixed() -> ModuleType | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return None if name is None else backend(name)


_FIXED = _fixed()
_FIXED_LIBRARY = os.environ.get(ENVIRONMENT_VARIABLE)


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
