"""A drawn call as plain data: NumPy expressions for its arrays, and Python values for everything else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ENTRIES", "Call", "Recipe"]

ENTRIES = ("q_lengths", "kv_lengths", "kv_starts", "prefix_lengths", "seqused_kv", "q_offset")
"""The arguments with an integer for each batch entry or sequence."""

LARGEST = 2**30
"""The largest window, chunk and offset."""


def _risen(number: int, step: int) -> int:
    """Return a larger integer, or a smaller one near the largest."""
    return number + step if number + step <= LARGEST else number - step


OTHER_NUMBERS: dict[str, Callable[[Any, int], Any]] = {
    "q_offset": lambda offset, step: offset - step if offset > 0 else offset + step,
    "scale": lambda scale, step: scale + step / 4,
    "softcap": lambda softcap, step: softcap + step / 2,
    "dropout_rate": lambda rate, step: rate + step / 128,
    "window": lambda window, step: tuple(None if bound is None else _risen(bound, step) for bound in window),
    "chunk": _risen,
    "max_seqlen_q": _risen,
    "max_seqlen_kv": _risen,
}
"""For each option that is a number or a pair of numbers, the legal number of a step from 1 to 7."""


@dataclass(frozen=True)
class Recipe:
    """An array as the NumPy expression that makes it, so that a reproduction script can print the same expression.

    `random` is a generator seeded with `seed`. `marks` puts NaN or infinities into single elements or vectors.
    """

    expression: str
    dtype: str
    seed: int = 0
    marks: tuple[tuple[tuple[int, ...], str], ...] = ()

    def array(self) -> numpy.ndarray:
        """Evaluate the expression and convert the result to `dtype`."""
        names = {"numpy": numpy, "random": numpy.random.default_rng(self.seed)}
        with numpy.errstate(all="ignore"):
            array = numpy.array(eval(self.expression, names)).astype(
                ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
            )
        for place, value in self.marks:
            array[place] = float(value)
        return array

    @property
    def source(self) -> str:
        """Return the Python expression of the array without its marks."""
        random = f"numpy.random.default_rng({self.seed})"
        return f'numpy.array({self.expression.replace("random.", f"{random}.")}).astype("{self.dtype}")'


@dataclass(frozen=True)
class Call:
    """A call of a function of the specification in a dtype.

    Attributes:
        function: The function, by its name.
        dtype: The dtype of the run.
        recipes: The arrays by argument name.
        options: The Python arguments by name.
        lse: True if the call also returns the log-sum-exp.
        host: Names of arrays that are passed as host data, with their form: "list" or "numpy".
        beyond: Lengths that are passed as other numbers than those of `recipes`, outside their buffer, with the same
            meaning (MHA-LEN-3).
        layouts: Names of arrays that do not have the plain memory layout, with their layout.
        reused: True if a second call with other numbers follows, which must not change the results of the first.
    """

    function: str
    dtype: str
    recipes: Mapping[str, Recipe]
    options: Mapping[str, Any] = field(default_factory=dict)
    lse: bool = False
    host: Mapping[str, str] = field(default_factory=dict)
    beyond: Mapping[str, Recipe] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    reused: bool = False

    @cached_property
    def arrays(self) -> dict[str, numpy.ndarray]:
        """The arrays by argument name."""
        return {name: recipe.array() for name, recipe in self.recipes.items()}

    @property
    def passed(self) -> dict[str, Recipe]:
        """The arrays as they are passed."""
        return {**self.recipes, **self.beyond}

    @property
    def size(self) -> tuple[int, int]:
        """Return the numbers of arguments and of elements; a smaller call shows a fault better."""
        forms = (self.recipes, self.options, self.host, self.beyond, self.layouts)
        names = sum(map(len, forms)) + self.reused + self.lse
        return names, sum(array.size for array in self.arrays.values())

    def varied(self, step: int, *, numbers: bool = False) -> Call:
        """Return a call of the same shapes and options over other random numbers, lengths and offsets.

        All of its lengths are within their buffers. With `numbers`, options that are numbers differ too, and so do
        lengths and offsets on the host.
        """
        if step == 0:
            return self
        recipes = {name: replace(recipe, seed=recipe.seed + 1000 * step) for name, recipe in self.recipes.items()}
        # The window and the positions of a cache of the last tokens depend on the tokens that it holds.
        fixed = ("window", "chunk", "q_offset") if "window_cache" in self.options else ()
        for name in ENTRIES:
            if name in recipes and name not in fixed and (numbers or name not in self.host):
                recipes[name] = self._other_integers(name, step)
        options = {
            name: OTHER_NUMBERS[name](value, step)
            if numbers and name in OTHER_NUMBERS and name not in fixed and not isinstance(value, str)
            else value
            for name, value in self.options.items()
        }
        return replace(self, recipes=recipes, options=options, beyond={})

    def _other_integers(self, name: str, step: int) -> Recipe:
        """Return other integers between 0 and those of an array, which are legal in their place."""
        array = self.arrays[name]
        integers = numpy.sign(array) * ((abs(array) - step) % (abs(array) + 1))
        return replace(self.recipes[name], expression=f"numpy.array({integers.tolist()}, dtype='int64')")
