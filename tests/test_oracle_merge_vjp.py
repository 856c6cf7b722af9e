"""The oracle of the goldens: kinds and exact values of the gradients of merging."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.answers import kinds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from oracle import Answer

    Oracle = Callable[..., Mapping[str, Answer]]

NAN, INFINITY = math.nan, math.inf


def _ask(
    oracle: Oracle, lses: tuple[float, float], outputs: tuple[float, float] = (2.0, 3.0), **cotangents: float
) -> dict[str, tuple[Any, Any]]:
    """Return value and kind of each gradient of one row of one component, by operand."""
    arrays: dict[str, numpy.ndarray] = {"grad_output": numpy.full((1, 1, 1, 1), cotangents.pop("grad_output", 0.75))}
    for half, lse, output in zip("ab", lses, outputs, strict=True):
        arrays |= {f"output_{half}": numpy.full((1, 1, 1, 1), output), f"lse_{half}": numpy.full((1, 1, 1), lse)}
    arrays |= {name: numpy.full((1, 1, 1), value) for name, value in cotangents.items()}
    answers = oracle("merge_attention_vjp", arrays)
    return {
        name.removeprefix("grad_"): (answer.values.item(), numpy.asarray(kinds_of(answer)).item())
        for name, answer in answers.items()
    }


def test_an_empty_half_has_gradients_of_zero_and_the_other_the_cotangents(ask_oracle: Oracle) -> None:
    gradients = _ask(ask_oracle, (-INFINITY, 5.0), (NAN, 3.0), grad_lse=0.5)
    assert gradients == {"output_a": (0, 1), "lse_a": (0, 1), "output_b": (0.75, 1), "lse_b": (0.5, 1)}
    gradients = _ask(ask_oracle, (5.0, -INFINITY), (2.0, INFINITY))
    assert gradients == {"output_a": (0.75, 1), "lse_a": (0, 1), "output_b": (0, 1), "lse_b": (0, 1)}


def test_a_cotangent_that_is_rounded_to_its_operand_is_compared_within_an_allowance(ask_oracle: Oracle) -> None:
    gradients = _ask(ask_oracle, (-INFINITY, 5.0), grad_output=0.1, grad_lse=0.3)
    assert gradients == {"output_a": (0, 1), "lse_a": (0, 1), "output_b": (0.1, 0), "lse_b": (0.3, 0)}


def test_two_empty_halves_have_gradients_of_zero(ask_oracle: Oracle) -> None:
    gradients = _ask(ask_oracle, (-INFINITY, -INFINITY), (NAN, INFINITY), grad_lse=0.5)
    assert gradients == dict.fromkeys(("output_a", "lse_a", "output_b", "lse_b"), (0, 1))


@pytest.mark.parametrize(
    ("lses", "cotangents"),
    [
        ((NAN, 0.5), {}),
        ((0.5, INFINITY), {}),
        ((0.5, 1.5), {"grad_output": INFINITY}),
        ((0.5, 1.5), {"grad_lse": NAN}),
    ],
)
def test_gradients_of_rows_with_unspecified_gradients_are_not_compared(
    lses: tuple[float, float], cotangents: dict[str, float], ask_oracle: Oracle
) -> None:
    assert {kind for _, kind in _ask(ask_oracle, lses, **cotangents).values()} == {4}


def test_an_output_that_is_not_finite_affects_only_the_gradients_of_lse(ask_oracle: Oracle) -> None:
    gradients = _ask(ask_oracle, (0.5, 0.5), (NAN, 3.0))
    assert {name: kind for name, (_, kind) in gradients.items()} == {
        "output_a": 0,
        "output_b": 0,
        "lse_a": 4,
        "lse_b": 4,
    }
    assert gradients["output_a"][0] == 0.375


def test_a_share_that_underflows_leaves_zero(ask_oracle: Oracle) -> None:
    gradients = _ask(ask_oracle, (0.0, 2000.0), grad_lse=0.5)
    assert gradients == {"output_a": (0, 0), "lse_a": (0, 0), "output_b": (0.75, 0), "lse_b": (0.5, 0)}
