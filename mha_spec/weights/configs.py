"""Read the configuration of a model of Hugging Face: a dictionary whose keys are recorded as they are read."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from mha_spec.array_checks import is_mapping, is_sequence
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.scalars import (
    LARGEST_FLOAT,
    are_equal_numbers,
    check_flag,
    check_integer,
    is_integer,
    is_number,
    plain,
    short_repr,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Config", "mapping_of_config"]

CLAUSE = "MHA-PROJ-4"


def mapping_of_config(config: object) -> Mapping[str, Any]:
    """Return a configuration, which is a dictionary or the path of its config.json.

    Raises:
        ArgumentTypeError: It is neither.
        ArgumentValueError: The file cannot be read, or holds something else than a dictionary.
    """
    if is_mapping(config):
        return config
    if not isinstance(config, (str, PathLike)):
        fix = " Pass its to_dict()." if hasattr(config, "to_dict") else ""
        raise ArgumentTypeError(
            f"`config` must be a dictionary or the path of a config.json, received {type(config).__name__}.{fix}"
        )
    path = Path(cast("str", config))
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentValueError(f"`config` must be a JSON file, received config={str(path)!r}: {error}") from error
    if not is_mapping(held):
        raise ArgumentValueError(
            f"`config` must hold a dictionary, received config={str(path)!r}, which holds {type(held).__name__}."
        )
    return held


class Config:
    """The keys of a configuration with the defaults of its model, which remembers the keys that were read."""

    def __init__(self, keys: Mapping[str, Any], defaults: Mapping[str, Any], other_names: Mapping[str, str]) -> None:
        """Take the keys, their defaults, and for keys with two names the older name of each."""
        self._keys, self._defaults, self._other_names = keys, defaults, other_names
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """Return the value of a key, which may be null, or its default where the key is absent."""
        names = self._names(key)
        self._read.update((key, *names))
        values = [plain(self._keys[name]) for name in names]
        if any(repr(value) != repr(values[0]) for value in values[1:]):
            self.refuse(key, f"equal {names[1]}={short_repr(values[1])}")
        return values[0] if values else self._defaults.get(key)

    def has(self, key: str) -> bool:
        """Tell whether a key is present with a value."""
        return self._keys.get(key) is not None

    def integer(self, key: str, least: int = 1, most: int = 2**53) -> int:
        """Return an integer in a range."""
        value = self.get(key)
        if value is None:
            self.refuse(key, "be given")
        if check_integer(self._name(key), value, least, CLAUSE) > most:
            self.refuse(key, f"be {self._name(key)}<={most}")
        return value

    def optional_integer(self, key: str, most: int = 2**53) -> int | None:
        """Return an integer above 0, or None for null."""
        return None if self.get(key) is None else self.integer(key, most=most)

    def flag(self, key: str) -> bool:
        """Return a bool; null is False."""
        value = self.get(key)
        return value is not None and check_flag(self._name(key), value, CLAUSE)

    def number(self, key: str) -> float | None:
        """Return a finite number of at least 0, or None for null."""
        value = self.get(key)
        if value is None:
            return None
        if not is_number(value):
            self.refuse(key, "be a number")
        if not 0 <= value <= LARGEST_FLOAT:
            self.refuse(key, f"be finite and {key}>=0")
        return value

    def positive(self, key: str) -> float | None:
        """Return a finite number above 0, or None for null."""
        value = self.number(key)
        if value == 0:
            self.refuse(key, f"be {key}>0")
        return value

    def refuse(self, key: str, must: str) -> NoReturn:
        """Raise an error that names a key as the configuration does."""
        name = self._name(key)
        value = self._keys.get(name, self._defaults.get(key))
        raise ArgumentValueError(f"`config[{name!r}]` must {must}, received {name}={short_repr(value)}.")

    def _names(self, key: str) -> list[str]:
        """Return the names of a key that the configuration has."""
        return [name for name in dict.fromkeys((key, self._other_names.get(key, key))) if name in self._keys]

    def _name(self, key: str) -> str:
        return next(iter(self._names(key)), key)

    def refuse_use(self, key: str, reason: str) -> None:
        """Raise an error if a flag asks for a computation that the layer lacks."""
        if self.flag(key):
            raise ArgumentValueError(f"`config` has {key}=True, which cannot be loaded: {reason}.")

    @property
    def unread(self) -> list[str]:
        """The keys with a value that nothing has read, in their order."""
        return [str(key) for key, value in self._keys.items() if value is not None and key not in self._read]

    def layer_types(self, layers: int) -> list[str] | None:
        """Return the kind of every layer, or None where the config has no list."""
        types: object = self.get("layer_types")
        if types is None:
            return None
        if not is_sequence(types) or len(types) < layers:
            self.refuse("layer_types", f"be a list with a kind for each of num_hidden_layers={layers}")
        return [str(kind) for kind in types]

    def rate(self, key: str) -> float:
        """Return a rate of dropout; null is 0."""
        rate = self.number(key) or 0.0
        if rate >= 1:
            self.refuse(key, f"be 0<={key}<1")
        return rate

    def value_of_rotation(self, key: str, rotation: Any, name: str) -> Any:
        """Return the value of a key, or of `name` in the dictionary of the rotation, which must not contradict it."""
        value = self.get(key)
        held = rotation.get(name) if is_mapping(rotation) else None
        if held is None:
            return value
        if self.has(key) and not are_equal_numbers(value, held):
            self.refuse(key, f"equal {name}={short_repr(held)}, which the dictionary of the rotation holds")
        return held

    def index(self, key: str, position: object, length: int) -> int:
        """Return a position below `length`."""
        if not is_integer(position) or not 0 <= position < length:
            raise ArgumentValueError(f"`layer` must be 0<=layer<{key}={length}, received layer={short_repr(position)}.")
        return position
