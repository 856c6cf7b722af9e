"""A known mistake: the specification with a replaced step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from mha_spec import checks
from mha_spec.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments
    from mha_spec.layer_steps import LayerSteps
    from mha_spec.varlen_reference import VarlenSteps
    from mha_spec_conformance.suite.changed import Changed
    from mha_spec_conformance.suite.conventions import Convention
    from mha_spec_conformance.suite.joined import Joined

__all__ = [
    "ALIBI",
    "ANY_SIZE",
    "ATTENTION",
    "FORWARD",
    "LAYER",
    "MERGE",
    "MERGE_VJP",
    "MULTI_HEAD",
    "OUTPUT_AND_WEIGHTS",
    "ROTARY",
    "VJP",
    "WEIGHTS_OF_LAYER",
    "Compared",
    "Mistake",
    "Sizes",
    "changing",
    "replacing",
    "unchecked",
]

FORWARD = ("attention", "attention_weights")
VJP = ("attention_vjp",)
ATTENTION = (*FORWARD, *VJP)
MERGE = ("merge_attention",)
MERGE_VJP = ("merge_attention_vjp",)
OUTPUT_AND_WEIGHTS = ("multi_head_attention_and_weights",)
MULTI_HEAD = ("multi_head_attention", *OUTPUT_AND_WEIGHTS)
WEIGHTS_OF_LAYER = (*OUTPUT_AND_WEIGHTS, "multi_head_attention_weights")
LAYER = (*MULTI_HEAD, "multi_head_attention_weights")
ROTARY = ("rotary_embedding",)
ALIBI = ("alibi_slopes", "alibi_bias")


class Compared(Enum):
    """Ways to compare a wrong result with the result of a mistake."""

    BY_VALUE = "every element equals that of the mistake within its allowance"
    BY_SIZE_OF_ERRORS = "the errors are about as large as those of the mistake"
    WHERE_NOT_FINITE = "a correct element counts too, because the size of tiles decides how far a NaN spreads"
    ANYTHING_FOR_NAN = "any number counts where the mistake gives NaN, because it does not set the result"
    WITHOUT_EMPTY_LSE = "an lse of -inf is not compared, because the mistake may keep it"


class Sizes(NamedTuple):
    """Sizes of a call; a merge has rows alone."""

    rows: int = 0
    keys: int = 0
    heads: int = 0


ANY_SIZE = Sizes()


@dataclass(frozen=True)
class Mistake:
    """A way in which an attention can be wrong, as steps of the reference that are wrong in the same way.

    The mistake can show only in a call of any of `functions` that passes all of `needs`, in any of `dtypes` (none: in
    all), where each size is larger than that of `past`. `native` marks a mistake that depends on the dtype of
    the run: in rounding, in overflow, or in the dtype of a result. `convention` names a choice that others made on
    purpose. `compared` says how a wrong result is recognised as this mistake.
    """

    name: str
    title: str
    clauses: tuple[str, ...]
    steps: Steps | LayerSteps | VarlenSteps | Joined | Changed
    needs: tuple[str, ...] = ()
    functions: tuple[str, ...] = ATTENTION
    convention: Convention | None = None
    bugs: tuple[str, ...] = ()
    native: bool = False
    compared: Compared = Compared.BY_VALUE
    dtypes: tuple[str, ...] = ()
    past: Sizes = ANY_SIZE

    @property
    def variant(self) -> str:
        """Return the name in reports: `convention=variant` for a convention, else the name of the mistake."""
        return self.name if self.convention is None else str(self.convention)

    @property
    def sentence(self) -> str:
        """Return what an implementation with the mistake does, with the bugs that were this mistake."""
        return f"{self.name}, which {self.title}" + (f" ({', '.join(self.bugs)})" if self.bugs else "")


def replacing(**steps: Callable[..., object]) -> Steps:
    """Return the specification's steps, some of them replaced."""
    return replace(Steps(), **steps)


def changing(change: Callable[[Arguments], Arguments], **steps: Callable[..., object]) -> Steps:
    """Return steps that check the arguments, and then compute with the arguments that `change` returns."""
    return replacing(check=lambda a: change(checks.check(a)), **steps)


def unchecked(check: Callable[[Arguments], None]) -> Steps:
    """Return the specification's steps without the check `check`."""
    remaining = tuple(kept for kept in checks.CHECKS if kept is not check)
    return replacing(check=lambda a: checks.check(a, remaining))
