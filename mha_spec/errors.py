"""What goes wrong on the user's side, under one base class."""

from typing import NoReturn

__all__ = ["ArgumentTypeError", "ArgumentValueError", "BackendError", "MhaSpecError", "refuse_type", "refuse_value"]


class MhaSpecError(Exception):
    """Base class of every error that mha-spec raises for a mistake of its user."""

    __init__ = Exception.__init__  # AutoGraph raises again under its own class what has this very one


class ArgumentValueError(MhaSpecError, ValueError):
    """An argument has the right kind and a wrong value: a shape, a range, a combination."""


class ArgumentTypeError(MhaSpecError, TypeError):
    """An argument is of a wrong kind: a float where a boolean array is meant, an unknown keyword."""


class BackendError(MhaSpecError, ValueError):
    """A backend was asked for that is unknown, not installed, ambiguous or broken."""


def refuse_value(clause: str, message: str) -> NoReturn:
    """Raise ArgumentValueError with a message and the clause that it rests on."""
    raise ArgumentValueError(f"{message} [{clause}]")


def refuse_type(clause: str, message: str) -> NoReturn:
    """Raise ArgumentTypeError with a message and the clause that it rests on."""
    raise ArgumentTypeError(f"{message} [{clause}]")
