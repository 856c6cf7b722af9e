"""The form of a case in the index of the goldens, as docs/goldens.md describes it.

It is checked when the goldens are read, so that no type that is wrong in a file can end a run later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mha_spec.arrays import FLOATING

from .functions import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["are_texts", "is_text", "wrong_member"]

INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
INPUT_DTYPES = ("case", "softmax", "bool", *FLOATING, *INTEGERS)
"""The dtypes of inputs; `case` is the dtype of the run, and `softmax` the type of its softmax."""


def wrong_member(entry: Mapping[str, Any]) -> str | None:
    """Describe the first member of a case that has a wrong form; None if all have the form of an index."""
    for name, (expected, holds) in _CASE.items():
        if not holds(entry[name]):
            return f"`{name}` must be {expected}, received {name}={entry[name]!r:.100}"
    if entry["expect"] == "error" and not _is_error(entry.get("error")):
        return f"`error` must have an argument and a kind, received error={entry.get('error')!r:.100}"
    for group, form in (("inputs", _INPUT), ("outputs", _OUTPUT)):
        for name, item in entry[group].items():
            wrong = _wrong_item(item, form)
            if wrong is not None:
                return f"`{name}`: {wrong}"
    return None


def _wrong_item(item: Mapping[str, Any], form: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> str | None:
    form = {**form, **(_GENERATED if "generator" in item else _STORED)}
    for name, (expected, holds) in form.items():
        if not holds(item.get(name)):
            return f"`{name}` must be {expected}, received {name}={item.get(name)!r:.100}"
    return None


def is_text(value: Any) -> bool:
    """Tell whether a member is a string."""
    return isinstance(value, str)


def are_texts(value: Any) -> bool:
    """Tell whether a member is a list of strings."""
    return isinstance(value, list) and all(map(is_text, value))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**40 for size in value)


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_option, value.values()))


def _is_option(value: Any) -> bool:
    if isinstance(value, dict) and "number" in value:
        return value.keys() == {"number"} and value["number"] in ("nan", "inf", "-inf")
    return value is None or isinstance(value, bool | int | float | str | list | dict)


def _are_entries(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def _is_generator(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"kind", "seed", "unit", "mean", *_WHOLE_NUMBERS}:
        return False
    numbers = (value.get("unit", 1.0), value.get("mean", 0.0))
    if not is_text(value.get("kind")) or not all(type(number) in (int, float) for number in numbers):
        return False
    return all(
        type(number) is int and least <= number < end
        for name, (least, end) in _WHOLE_NUMBERS.items()
        if name in value or name == "seed"
        for number in (value.get(name),)
    )


def _is_location(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and is_text(value.get("file")) and is_text(value.get("tensor")))


def _is_error(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("argument")) and value.get("kind") in ("type", "value")


_WHOLE_NUMBERS = {
    "seed": (0, 2**64),
    "bits": (1, 63),
    "share": (0, 257),
    "tile": (1, 2**40),
    "levels": (0, 2**40),
    "hidden": (0, 257),
}
"""The members of a generator that are whole numbers: the least, and the number after the largest."""

_TEXT = "a string", is_text
_TEXTS = "a list of strings", are_texts
_ENTRIES = "an object of objects", _are_entries
_LOCATION = "null or the file and the tensor", _is_location

_CASE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("title",), _TEXT),
    **dict.fromkeys(("clauses", "features", "tags"), _TEXTS),
    **dict.fromkeys(("inputs", "outputs"), _ENTRIES),
    "function": ("the name of a function", lambda value: is_text(value) and value in FUNCTIONS),
    "level": ("MUST or SHOULD", lambda value: value in ("MUST", "SHOULD")),
    "dtypes": (f"some of {', '.join(FLOATING)}", lambda value: are_texts(value) and {*value} <= {*FLOATING}),
    "options": ("an object of options", _are_options),
    "expect": ("values or error", lambda value: value in ("values", "error")),
}
"""The members of a case: what each must be, and the test of it."""

_INPUT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "shape": ("a list of sizes", _are_sizes),
    "dtype": (f"one of {', '.join(INPUT_DTYPES)}", lambda value: is_text(value) and value in INPUT_DTYPES),
}
_OUTPUT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "shape": ("a list of sizes", _are_sizes),
    "kinds": _LOCATION,
    "rows": _LOCATION,
}
_STORED: dict[str, tuple[str, Callable[[Any], bool]]] = {"file": _TEXT, "tensor": _TEXT}
_GENERATED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "generator": ("an object of kind, seed and their parameters", _is_generator),
    "sha256": _TEXT,
}
