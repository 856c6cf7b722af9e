"""Make the text of a target fit for a message: a line of printable characters, of limited length."""

from __future__ import annotations

__all__ = ["name_of", "one_line", "printable", "repr_of", "text_of"]

MOST_CHARACTERS = 2000
"""The length of a message; a target may raise an exception whose text is longer."""


def text_of(value: object, most: int = MOST_CHARACTERS) -> str:
    """Return the text of an object, also if its `__str__` raises or does not return a string."""
    try:
        text = str.__str__(str(value))
    except BaseException as error:
        return f"<{name_of(type(value))} whose text raises {name_of(type(error))}>"
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def printable(text: str, keep: str = "") -> str:
    """Escape every character that a terminal does not print, such as control characters, except those in `keep`.

    Such a character could move the cursor, or forge a line of the report.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def one_line(value: object, most: int = MOST_CHARACTERS) -> str:
    """Return the text of an object in a single printable line."""
    return text_of(printable(text_of(value, most)), most)


def repr_of(value: object, most: int = 200) -> str:
    """Return the representation of an object in a single printable line, also if its `__repr__` raises."""
    try:
        return one_line(repr(value), most)
    except BaseException:
        return f"an object of type {name_of(type(value))}"


def name_of(cls: type) -> str:
    """Return the name of a class, also if its metaclass has another attribute of that name."""
    return type.__dict__["__name__"].__get__(cls)
