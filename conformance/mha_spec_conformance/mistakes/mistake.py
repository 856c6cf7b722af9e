"""What a known mistake is: the specification with one of its steps replaced."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from mha_spec import checks
from mha_spec.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments
    from mha_spec.layer_steps import LayerSteps
    from mha_spec_conformance.suite.conventions import Convention

__all__ = [
    "ALIBI",
    "ATTENTION",
    "FORWARD",
    "LAYER",
    "MERGE",
    "MERGE_VJP",
    "MULTI_HEAD",
    "ROTARY",
    "VJP",
    "WEIGHTS_OF_LAYER",
    "Compared",
    "Mistake",
    "asking",
    "replacing",
    "unchecked",
]

FORWARD = ("attention", "attention_weights")
VJP = ("attention_vjp",)
ATTENTION = (*FORWARD, *VJP)
MERGE = ("merge_attention",)
MERGE_VJP = ("merge_attention_vjp",)
MULTI_HEAD = ("multi_head_attention", "multi_head_attention_and_weights")
WEIGHTS_OF_LAYER = ("multi_head_attention_weights",)
LAYER = (*MULTI_HEAD, *WEIGHTS_OF_LAYER)
ROTARY = ("rotary_embedding",)
ALIBI = ("alibi_slopes", "alibi_bias")


class Compared(Enum):
    """How a wrong result is compared with the result of a mistake."""

    BY_VALUE = "every element equals that of the mistake within its allowance"
    BY_SIZE_OF_ERRORS = "the errors are about as large as those of the mistake"
    WHERE_NOT_FINITE = "a right element counts too, because the reach of a NaN depends on the size of tiles"
    WITHOUT_EMPTY_LSE = "an lse of -inf is not compared, because the mistake may keep it"


@dataclass(frozen=True)
class Mistake:
    """One way in which attentions go wrong, as a reference that goes wrong in that way.

    It can show only in a call of one of `functions` with all of `needs`. `native` marks a mistake that depends on the
    type of the run: in rounding, in overflow, or in the dtype of a result. A `convention` is a choice that others made
    on purpose. `compared` says how a wrong result is recognised as this mistake.
    """

    name: str
    title: str
    clauses: tuple[str, ...]
    steps: Steps | LayerSteps
    needs: tuple[str, ...] = ()
    functions: tuple[str, ...] = ATTENTION
    convention: Convention | None = None
    bugs: tuple[str, ...] = ()
    native: bool = False
    compared: Compared = Compared.BY_VALUE

    @property
    def variant(self) -> str:
        """How reports name it: `convention=variant` for a convention, else its own name."""
        return self.name if self.convention is None else str(self.convention)


def replacing(**steps: Callable[..., object]) -> Steps:
    """The specification's steps with these in place of its own."""
    return replace(Steps(), **steps)


def asking(change: Callable[[Arguments], Arguments], **steps: Callable[..., object]) -> Steps:
    """Steps that check the arguments as they should, and then answer for the arguments that `change` makes of them."""
    return replacing(check=lambda a: change(checks.check(a)), **steps)


def unchecked(check: Callable[[Arguments], None]) -> Steps:
    """The specification's steps without one of its checks."""
    remaining = tuple(one for one in checks.CHECKS if one is not check)
    return replacing(check=lambda a: checks.check(a, remaining))
