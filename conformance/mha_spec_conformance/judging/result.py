"""The outcome of a case in a dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.conventions import Convention

    from .compare import Worst
    from .recognition import Wrong

__all__ = ["FAILING", "INTERNAL", "OUTCOMES", "WITHOUT_ARRAYS", "Result"]

OUTCOMES = ("pass", "fail", "deviation", "error", "crash", "timeout", "unsupported")
FAILING = frozenset({"fail", "deviation", "error", "crash", "timeout"})
"""The outcomes that make a target not conformant, unless they are accepted or known."""

INTERNAL = "internal"
"""The outcome of a case that could not be judged because of a fault of the suite."""

WITHOUT_ARRAYS = frozenset({"error", "crash", "timeout", INTERNAL})
"""The outcomes of calls that were made and returned no arrays."""


@dataclass(frozen=True)
class Result:
    """The outcome of a case in a dtype."""

    ask: Ask
    outcome: str
    reason: str | None = None
    allowance_used: float | None = None
    worst: Worst | None = None
    diagnosis: tuple[str, ...] = ()
    conventions: tuple[Convention, ...] = ()
    deterministic: bool | None = None
    clauses: tuple[str, ...] = ()
    seconds: float = 0.0
    note: str | None = None
    malformed: bool = False
    refused: tuple[str, ...] = ()
    """The further calls that the target refused, as memory layouts that it does not support."""
    wrong: Wrong | None = field(default=None, repr=False, compare=False)
    """The answer, if its values are wrong."""

    @property
    def key(self) -> tuple[str, str]:
        """The id and dtype, which identify a result in a run."""
        return self.ask.key

    @property
    def compared(self) -> bool:
        """True if the call returned arrays that can be compared, so that a clause can be broken."""
        return not self.malformed and self.outcome not in WITHOUT_ARRAYS | {"unsupported"}

    @property
    def must(self) -> bool:
        """True if the result counts for the exit status."""
        return self.ask.level == "MUST"
