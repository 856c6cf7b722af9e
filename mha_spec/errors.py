"""The errors that mha-spec raises, with a common base class."""

from typing import NoReturn

__all__ = ["ArgumentTypeError", "ArgumentValueError", "BackendError", "MhaSpecError", "refuse_type", "refuse_value"]


class MhaSpecError(Exception):
    """Base class of every error that mha-spec raises for a mistake of the caller."""

    __init__ = Exception.__init__  # AutoGraph keeps the class of errors with exactly this constructor.


class ArgumentValueError(MhaSpecError, ValueError):
    """An argument has the right type and a wrong value: a shape, a range, a combination."""


class ArgumentTypeError(MhaSpecError, TypeError):
    """An argument has a wrong type, such as a float array for a mask, or a keyword is unknown."""


class BackendError(MhaSpecError, ValueError):
    """The requested backend is unknown, not installed, ambiguous or broken."""


def refuse_value(clause: str, message: str) -> NoReturn:
    """Raise ArgumentValueError with a message that cites a clause."""
    raise ArgumentValueError(f"{message} [{clause}]")


def refuse_type(clause: str, message: str) -> NoReturn:
    """Raise ArgumentTypeError with a message that cites a clause."""
    raise ArgumentTypeError(f"{message} [{clause}]")
