"""The data that pass between the runner and the process of the target.

A `Question` goes to the process and an `Answer` comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy

__all__ = ["LAYOUTS", "Answer", "Question", "Raised"]

LAYOUTS = ("strided", "reversed", "read_only")
"""The memory layouts, other than the plain layout, in which inputs are passed (MHA-PURE-2)."""


@dataclass(frozen=True, slots=True)
class Question:
    """One call: the function, its arrays as NumPy arrays and its options; the other fields describe the case."""

    id: str
    function: str
    dtype: str
    arrays: Mapping[str, numpy.ndarray]
    options: Mapping[str, object]
    outputs: tuple[str, ...]
    features: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    repeat: bool = False
    placed: Mapping[str, str] = field(default_factory=dict)
    """The layouts of single arrays; all other arrays have the plain layout."""
    reused: bool = False
    """If True, a second call with other numbers follows, which must not change the results of the first."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array by name."""
        return {name: array.shape for name, array in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of the target: its classes, the most derived first, its message and the line of the target."""

    classes: tuple[str, ...]
    message: str
    where: str | None = None

    def __str__(self) -> str:
        first = self.message.strip().splitlines()[:1]
        return ": ".join([self.classes[0], *first]) + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question.

    `kind` is "returned", "raised", "unsupported", "malformed" (the results are not arrays that can be compared),
    "crash", "timeout" or "internal" (a fault of the suite); `reason` explains the last five. `written` names the inputs
    that the call wrote to. `layouts` holds, for each other layout of the inputs, the outputs or the error. `foreign` is
    the library of the outputs if it is not that of the inputs.
    """

    kind: str
    outputs: Mapping[str, numpy.ndarray] = field(default_factory=dict)
    reason: str | None = None
    raised: Raised | None = None
    written: tuple[str, ...] = ()
    layouts: Mapping[str, Mapping[str, numpy.ndarray] | str] = field(default_factory=dict)
    deterministic: bool | None = None
    foreign: str | None = None
    seconds: float = 0.0
    overwritten: tuple[str, ...] = ()
    """The outputs that a second call changed."""
