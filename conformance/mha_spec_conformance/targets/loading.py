"""Load a target: a backend by its name, `package.module:function`, or `path/to/file.py[:function]`.

The signatures of its functions are claims. A module may also declare `arrays`, `device`, `dtypes`, `features`,
`profile`, `conventions`, `supports(question)`, its layout and its ranks; `declarations` checks most of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import types
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec.errors import BackendError
from mha_spec.selection import backend, backend_names
from mha_spec_conformance.suite.functions import DECLARED_FEATURES, FUNCTIONS
from mha_spec_conformance.suite.text import name_of, text_of

from .claims import PROFILES, Claims
from .conversion import LIBRARIES
from .declarations import OF_LAYOUT, TargetError, declared_conventions, declared_layout, one_of
from .layouts import NEEDED
from .metadata import dependencies

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

__all__ = ["Target", "TargetError", "line_in_target", "load"]

REFERENCE = "mha_spec.reference"
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
FEATURES = tuple(
    dict.fromkeys(
        [
            *(feature for function in FUNCTIONS.values() for feature in function.keyword_features),
            *("core", "groups", "value_size", "empty", "poison", "nonfinite"),
            *(feature for function in FUNCTIONS.values() for feature in function.features),
        ]
    )
)
_DISTRIBUTIONS = {"tensorflow": ("tensorflow", "tensorflow-cpu"), "jax": ("jax", "jaxlib")}


@dataclass(frozen=True)
class Target:
    """A loaded target: its functions by the names of the specification, and its claims."""

    functions: Mapping[str, Callable[..., object]]
    claims: Claims
    supports: Callable[[object], object] | None = None


def load(name: str) -> Target:
    """Load the target called `name`.

    Raises:
        TargetError: The target cannot be judged; the message is a single line.
    """
    _extend_path(Path(_working_folder()))
    place, _, function = name.rpartition(":") if _names_function(name) else (name, "", "")
    module, registered = (_backend(name), True) if name in backend_names() else (_module(place), place == REFERENCE)
    functions = _functions(module, place, function)
    return Target(functions, _claims(name, module, functions, registered), _supports(module))


def _names_function(name: str) -> bool:
    return ":" in name and name.rpartition(":")[2].isidentifier()


def _extend_path(folder: Path) -> None:
    """Append the folder to the end of the path, so that a target called torch.py does not hide torch."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _backend(name: str) -> ModuleType:
    """Import the module of a registered backend."""
    try:
        return backend(name)
    except BackendError as error:
        raise TargetError(str(error)) from error


def _module(place: str) -> ModuleType:
    try:
        if place.endswith(".py") or os.sep in place:
            return _from_file(Path(place))
        if importlib.util.find_spec(place.partition(".")[0]) is None:
            raise TargetError(f"target {place!r} is not a backend ({', '.join(backend_names())}), a file or a module")
        return importlib.import_module(place)
    except TargetError:
        raise
    except BaseException as error:
        line = line_in_target(error)
        where = f" ({line})" if line else ""
        raise TargetError(
            f"target {place} does not import: {name_of(type(error))}: {_first_line(error)}{where}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}")
    _extend_path(path.resolve().parent)
    private = f"_mha_spec_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(private, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module
    spec.loader.exec_module(module)
    return module


def line_in_target(error: BaseException) -> str | None:
    """Name the last line of the target's code in a traceback; if there is none, the last line outside this package."""
    package = str(Path(__file__).parents[1])
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames = [(file, line) for file, line in frames if not file.startswith(("<", package))]
    of_target = [(file, line) for file, line in frames if not _is_library(file)] or frames
    return f"{_relative(of_target[-1][0])}:{of_target[-1][1]}" if of_target else None


def _working_folder() -> str:
    """Return the working folder, which a target may have removed."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return os.sep


def _relative(file: str) -> str:
    """Return the path of a file from the working folder; generated code has any name."""
    return os.path.relpath(file, _working_folder()) if Path(file).is_absolute() else file or "<generated>"


def _is_library(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file or file.startswith(STANDARD_LIBRARY)


def _first_line(error: BaseException) -> str:
    return (text_of(error).strip().splitlines() or [""])[0]


def _functions(module: ModuleType, place: str, function: str) -> dict[str, Callable[..., object]]:
    """Return the functions of the module that the specification names; `function` is used as its attention."""
    functions = {name: getattr(module, name) for name in FUNCTIONS if callable(getattr(module, name, None))}
    if function:
        attention = getattr(module, function, None)
        if not callable(attention):
            raise TargetError(f"{place} has no function {function!r}; {_offer(module)}")
        functions[function if function in FUNCTIONS else "attention"] = attention
    if not functions:
        raise TargetError(f"{place} has nothing to judge: there is no function called attention; {_offer(module)}")
    return functions


def _offer(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not names:
        return "it defines no function"
    return f"it defines {', '.join(names)}: choose a function as TARGET:{names[0]}"


def _claims(name: str, module: ModuleType, functions: Mapping[str, Callable[..., object]], registered: bool) -> Claims:
    default = name if registered and name in LIBRARIES else "numpy"
    arrays = one_of("arrays", _declaration(module, "arrays", default), LIBRARIES)
    device = None if registered else _device(module)
    of_layout = {n: v if registered else _declaration(module, n, v) for n, v in OF_LAYOUT.items()}
    features = _declared(module)
    features += DECLARED_FEATURES if registered else ()
    keywords = {role: _keywords(role, function, features, of_layout) for role, function in functions.items()}
    return Claims(
        name=name,
        keywords=keywords,
        **declared_layout(of_layout, keywords),
        unclaimed=() if features else tuple(role for role, function in functions.items() if _takes_any(function)),
        dtypes=_dtypes(module, registered),
        arrays=arrays,
        device=device,
        profile=one_of("profile", _declaration(module, "profile", "standard"), PROFILES),
        conventions=declared_conventions(_declaration(module, "conventions", {})),
        registered=registered,
        versions=_versions(arrays, module),
        hardware=_hardware(arrays, device),
    )


def _declaration(module: ModuleType, name: str, default: object) -> object:
    """Return the declaration `name` of the module; a submodule or function of that name is not a declaration."""
    value = getattr(module, name, default)
    return default if isinstance(value, types.ModuleType) or callable(value) else value


def _keywords(
    role: str, function: Callable[..., object], features: tuple[str, ...], of_layout: Mapping[str, object]
) -> tuple[str, ...]:
    """Return the keywords of a signature, and those of features and layout if the function takes any keyword."""
    stacked = of_layout["stacked"]
    operands = FUNCTIONS[role].stacked(stacked if isinstance(stacked, str) else None).operands
    of_features = (*FUNCTIONS[role].keywords_of(features), *NEEDED.get(str(of_layout["layout"]), ()))
    if (signature := _signature(function)) is None:
        return of_features
    _check_operands(role, operands, signature)
    named = [
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in operands
    ]
    contents = [word for word in FUNCTIONS[role].keywords_of(features) if word in DECLARED_FEATURES]
    return tuple(dict.fromkeys([*named, *(of_features if _takes_any(function) else contents)]))


def _signature(function: Callable[..., object]) -> inspect.Signature | None:
    """Return the signature, or None if it cannot be read."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes_any(function: Callable[..., object]) -> bool:
    """Tell whether the function takes any keyword, according to its signature."""
    signature = _signature(function)
    return signature is not None and any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _check_operands(role: str, operands: tuple[str, ...], signature: inspect.Signature) -> None:
    try:
        signature.bind_partial(*operands)
    except TypeError as error:
        raise TargetError(f"{role} must take {', '.join(operands)} by position, received {signature}") from error


def _declared(module: ModuleType) -> tuple[str, ...]:
    features = _declaration(module, "features", ())
    if not isinstance(features, (tuple, list)):
        raise TargetError(f'`features` must be a tuple of names, as in ("mask",), received {features!r}')
    return tuple(one_of("features", feature, FEATURES) for feature in features)


def _device(module: ModuleType) -> str | None:
    device = _declaration(module, "device", None)
    if device is not None and not isinstance(device, str):
        raise TargetError(f'`device` must be a string, as in "cuda:0", received {device!r}')
    return device


def _dtypes(module: ModuleType, registered: bool) -> tuple[str, ...]:
    dtypes = _declaration(module, "dtypes", FLOATING if registered else ("float64", "float32"))
    if not isinstance(dtypes, (tuple, list)) or not dtypes:
        raise TargetError(f'`dtypes` must be a tuple of names, as in ("float32",), received {dtypes!r}')
    for dtype in dtypes:
        one_of("dtypes", dtype, FLOATING)
    return tuple(dtype for dtype in FLOATING if dtype in dtypes)


def _supports(module: ModuleType) -> Callable[[object], object] | None:
    supports = getattr(module, "supports", None)
    return supports if callable(supports) else None


def _versions(arrays: str, module: ModuleType) -> dict[str, str]:
    package = module.__name__.partition(".")[0]
    names = ("mha-spec", "numpy", *_DISTRIBUTIONS.get(arrays, (arrays,)), package, *dependencies(module))
    versions: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _hardware(arrays: str, device: str | None) -> str:
    """Name the device that computes, if its library has a name for it."""
    if arrays == "jax":
        import jax

        return str(jax.devices(*([device.partition(":")[0]] if device else []))[0].device_kind)
    if arrays == "torch" and device is not None and device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return device or "cpu"
