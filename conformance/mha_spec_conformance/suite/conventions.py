"""The conventions on which implementations differ: a closed list, with the variant of the specification first."""

from __future__ import annotations

from typing import NamedTuple

from mha_spec.errors import MhaSpecError

__all__ = ["CONVENTIONS", "Convention", "ConventionError", "check_convention", "parse_convention"]

CONVENTIONS = {
    "mask_polarity": ("true_attends", "true_hides"),
    "causal_alignment": (
        "upper_left",
        "lower_right",
        "lower_right_of_kv_lengths",
        "lower_right_of_lengths",
    ),
    "fully_masked_row": ("zero", "mean_of_values", "nan"),
    "empty_row_lse": ("minus_inf", "zero", "plus_inf"),
    "group_order": ("repeat", "tile"),
    "window_left": ("inclusive", "exclusive"),
    "lse_base": ("e", "2"),
    "softcap_order": ("before_bias", "after_bias"),
    "output_dtype": ("query", "float32", "float64"),
    "precision": ("standard", "strict", "tf32", "half_scores", "half_sums", "half_gradients", "approximate_tanh"),
    "nonfinite": ("excluded", "reaches_tile", "leaks", "scrubbed"),
}


class Convention(NamedTuple):
    """One variant of a convention, written `name=variant`."""

    name: str
    variant: str

    def __str__(self) -> str:
        return f"{self.name}={self.variant}"


class ConventionError(MhaSpecError, ValueError):
    """A convention or a variant is not on the list."""


def check_convention(name: str, variant: str) -> Convention:
    """Return the convention, or raise a ConventionError that lists the names or variants that exist."""
    if name not in CONVENTIONS:
        raise ConventionError(f"{name!r} is not a convention; the conventions are {', '.join(CONVENTIONS)}")
    if variant not in CONVENTIONS[name]:
        raise ConventionError(f"convention {name} must be {' or '.join(CONVENTIONS[name])}, received {variant!r}")
    return Convention(name, variant)


def parse_convention(text: str) -> Convention:
    """Read `CONVENTION=VARIANT`."""
    name, equals, variant = text.partition("=")
    if not equals:
        raise ConventionError(
            f"a convention is written CONVENTION=VARIANT, as in mask_polarity=true_hides, received {text!r}"
        )
    return check_convention(name.strip(), variant.strip())
