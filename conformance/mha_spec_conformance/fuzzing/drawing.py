"""Draw the arguments of a call; the simplest choice is first, because shrinking prefers it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
from hypothesis import strategies as st

from mha_spec.arrays import FLOATING, softmax_dtype_name
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.conversion import layouts_of

from .call import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mha_spec_conformance.targets.claims import Claims

__all__ = ["Drawing"]

REGIMES = {
    "scores": (
        "random.integers(-4, 5, {shape}) / 4",
        "random.standard_normal({shape})",
        "3 * random.standard_normal({shape})",
        "numpy.full({shape}, 0.75)",
        "random.standard_normal({shape}) ** 3",
        "random.standard_normal({shape}) / 1000",
        "random.standard_normal({shape}) + 20",
    ),
    "wide": (
        "random.standard_normal({shape})",
        "30 * random.standard_normal({shape})",
        "random.choice([-1e4, 1e4], {shape})",
        "random.standard_normal({shape}) ** 7",
    ),
}
"""Expressions of floating arrays: ordinary ones, and those with large logits, heavy tails and outliers."""

SEGMENTS = ("numpy.sort(random.integers(0, 3, {shape}), axis=-1)", "random.integers(-1, 2, {shape})")
FAR_SEGMENTS = tuple(
    f"random.choice({ids}, {{shape}})"
    for ids in (
        [0, -1, -2],
        [2**31 - 1, -(2**31), 0],
        [2**32 - 1, -1, 0],
        [2**63 - 1, -(2**63), 0],
        [2**24, 2**24 + 1],
        [2**53, 2**53 + 1],
    )
)
"""Ids near the ends of an integer type, some of them equal in one type and not in another, and neighbours beyond the
integers that a floating type holds. In an unsigned type, -1 becomes its largest integer.
"""

INTEGERS = ("int32", "int64", "uint32", "uint64", "uint8", "int16")
"""Types of segment ids, which need not be the same on both sides (MHA-SEG-1)."""

BIASES = (
    "random.standard_normal({shape})",
    "numpy.where(random.random({shape}) < 0.25, -numpy.inf, random.standard_normal({shape}))",
    "numpy.where(random.random({shape}) < 0.25, -1e9, random.standard_normal({shape}))",
    "20 * random.standard_normal({shape})",
)
WIDE_BIASES = (
    "numpy.where(random.random({shape}) < 0.25, -1e300, random.standard_normal({shape}))",
    "numpy.where(random.random({shape}) < 0.75, -1e300, random.standard_normal({shape}))",
)
SINKS = (
    "random.standard_normal({shape})",
    "numpy.where(random.random({shape}) < 0.5, -numpy.inf, random.standard_normal({shape}))",
    "20 * random.standard_normal({shape})",
)
WIDE_SINKS = ("random.choice([-1e300, 1e300, 0.5], {shape})",)
"""Numbers that are infinite in the softmax's type (MHA-BIAS-2, MHA-SINK-1), as those of `WIDE_BIASES` are."""


class Drawing:
    """The arrays and options of a call that are drawn so far, with methods that draw more."""

    def __init__(self, draw: Callable[..., Any], claims: Claims, function: str, dtype: str) -> None:
        self._draw = draw
        self.claims = claims
        self.function = function
        self.dtype = dtype
        self.keywords = frozenset(claims.keywords[function])
        self.operands = FUNCTIONS[function].operands
        self.layouts = layouts_of(claims.arrays)
        self.readings = ("lower_right", "upper_left") if claims.registered else ()
        self.recipes: dict[str, Recipe] = {}
        self.options: dict[str, Any] = {}
        self.rooms: dict[str, list[int]] = {}
        self._share = self.one_of(2, 1, 4)

    def one_of(self, *choices: Any) -> Any:
        """Choose a value; the first is the simplest."""
        return self._draw(st.sampled_from(choices))

    def below(self, size: int) -> int:
        """Choose an index."""
        return self._draw(st.integers(0, size - 1))

    def often(self) -> bool:
        """Return True with probability 1/2."""
        return self._draw(st.booleans())

    def rarely(self) -> bool:
        """Return True with probability 1/4."""
        return self.one_of(False, False, False, True)

    def takes(self, *keywords: str) -> bool:
        """Choose whether the call has the keywords; return False if the target does not take them."""
        return self.keywords.issuperset(keywords) and self._draw(st.integers(0, 9)) >= 10 - self._share

    @property
    def seed(self) -> int:
        """Choose the seed of an array."""
        return self._draw(st.integers(0, 99))

    def array(self, name: str, expression: str, dtype: str) -> None:
        """Keep an array."""
        self.recipes[name] = Recipe(expression, dtype, self.seed)

    def floats(self, name: str, shape: Sequence[int], regime: str, *, dtype: str | None = None) -> None:
        """Draw a floating array of a regime."""
        self.array(name, self.one_of(*REGIMES[regime]).format(shape=tuple(shape)), dtype or self.dtype)

    def other_dtype(self) -> str:
        """Choose the dtype of the run, or sometimes another dtype."""
        return self.one_of(*FLOATING) if self.claims.registered and self.rarely() else self.dtype

    def dtype_of_lse(self) -> str:
        """Choose the dtype of the lse of two halves: that of the softmax, or sometimes another (MHA-MERGE-4)."""
        return self.one_of(*FLOATING) if self.claims.registered and self.rarely() else softmax_dtype_name(self.dtype)

    def mark(self, name: str, place: tuple[int, ...], value: str) -> None:
        """Put a NaN or an infinity into an array that was drawn."""
        recipe = self.recipes[name]
        self.recipes[name] = replace(recipe, marks=(*recipe.marks, (place, value)))

    def pairwise(self, scores: tuple[int, ...], expression: str) -> str:
        """Draw an expression that broadcasts to the scores; sometimes it already has their shape, with strides of 0."""
        shape = tuple(size if self.often() else 1 for size in scores)
        drawn = expression.format(shape=shape)
        return f"numpy.broadcast_to({drawn}, {scores})" if shape != scores and self.rarely() else drawn

    def mask(self, name: str, scores: tuple[int, ...], share: float) -> None:
        """Draw a boolean mask with this share of True."""
        self.array(name, self.pairwise(scores, f"random.random({{shape}}) < {share}"), "bool")

    def bias(self, scores: tuple[int, ...]) -> None:
        """Draw a bias; some elements are -inf, very low, or beyond the range of the softmax's type."""
        dtype, is_wide = self._dtype_of_logits()
        choices = BIASES if dtype != "float16" else (*BIASES[:2], BIASES[3])
        self.array("bias", self.pairwise(scores, self.one_of(*(WIDE_BIASES if is_wide else choices))), dtype)

    def sinks(self, heads: int) -> None:
        """Draw sinks, some of them -inf or beyond the range of the softmax's type."""
        dtype, is_wide = self._dtype_of_logits()
        self.array("sinks", self.one_of(*(WIDE_SINKS if is_wide else SINKS)).format(shape=(heads,)), dtype)

    def _dtype_of_logits(self) -> tuple[str, bool]:
        """Choose the dtype of a bias or of sinks, and whether some of its numbers are beyond the softmax's type."""
        softmax = softmax_dtype_name(self.dtype)
        dtype = self.one_of(softmax, self.other_dtype(), "float64")
        return dtype, dtype == "float64" != softmax and not self.rarely()

    def of_scores(self, heads: int) -> None:
        """Draw scale, softcap and sinks."""
        if self.takes("scale"):
            self.options["scale"] = self.one_of(0.5, 1.0, 0.0, -0.5, 0.125, 2, 3.0)
        if self.takes("softcap"):
            self.options["softcap"] = self.one_of(1.5, 30.0, 0.25, 50, 1e4)
        if self.takes("sinks"):
            self.sinks(heads)

    def segments(self, batch: int, q_len: int, kv_len: int) -> None:
        """Draw segment ids, sorted or not, or far ones in any types."""
        expression, of_queries = self.one_of(*SEGMENTS), self.one_of("int32", "int64")
        of_keys = of_queries
        if self.often():
            expression, of_queries, of_keys = (self.one_of(*choices) for choices in (FAR_SEGMENTS, INTEGERS, INTEGERS))
        self.array("q_segment_ids", expression.format(shape=(batch, q_len)), of_queries)
        self.array("kv_segment_ids", expression.format(shape=(batch, kv_len)), of_keys)

    def length(self, size: int, *others: int) -> int:
        """Choose a length within a buffer, also one of the others that it holds."""
        return min(size, max(0, self.one_of(size, size - 1, size // 2, 1, 0, *others)))

    def integers(self, name: str, values: list[int]) -> None:
        """Keep an array of integers."""
        self.recipes[name] = Recipe(f"numpy.array({values}, dtype='int64')", self.one_of("int32", "int64"))

    def bounded(self, name: str, values: list[int], rooms: list[int]) -> None:
        """Keep an array of integers, none of them larger than the number of tokens that its buffer has room for."""
        self.integers(name, values)
        self.rooms[name] = rooms

    def lengths(self, name: str, batch: int, size: int) -> None:
        """Draw a length within a buffer for each batch entry."""
        self.bounded(name, [self.length(size) for _ in range(batch)], [size] * batch)

    def outside(self, name: str) -> Recipe:
        """Return lengths of which the full ones lie beyond their buffer and the empty ones are negative."""
        dtype = self.recipes[name].dtype
        far = self.one_of(1, 40, 2**31 - 1, *([2**32 + 1] if dtype == "int64" else []))
        pairs = zip(self.recipes[name].array().tolist(), self.rooms[name], strict=True)
        largest = numpy.iinfo(dtype).max
        lengths = [min(room + far, largest) if length == room else length or -far for length, room in pairs]
        return Recipe(f"numpy.array({lengths}, dtype='int64')", dtype)

    def starts(self, batch: int, kv_len: int) -> None:
        """Draw padding on the left, and prefixes where causal and the window leave room for them (MHA-CAUSAL-2)."""
        if self.takes("kv_starts"):
            self.bounded("kv_starts", [kv_len - self.length(kv_len) for _ in range(batch)], [kv_len] * batch)
        lifted = self.options.get("causal") and self.options.get("window", (None, None))[1] != 0
        if lifted and self.takes("prefix_lengths"):
            self.lengths("prefix_lengths", batch, kv_len)

    @property
    def aligned(self) -> bool:
        """True if the target declares its causal alignment."""
        return "causal_alignment" in self.claims.conventions

    def offset(self, batch: int, *choices: int) -> None:
        """Draw an offset for all batch entries, by number, by name or in an array without axes, or one for each."""
        if self.often():
            self.options["q_offset"] = self.one_of(*choices, *self.readings)
        elif self.claims.registered and self.rarely():
            self.recipes["q_offset"] = Recipe(f"numpy.array({self.one_of(*choices)})", self.one_of("int32", "int64"))
        else:
            self.integers("q_offset", [self.one_of(*choices) for _ in range(batch)])

    def declared_offset(self, q_len: int, kv_len: int) -> None:
        """Keep the offset that a target without `q_offset` implies; the ask omits it again."""
        reading = self.claims.conventions["causal_alignment"]
        self.options["q_offset"] = 0 if reading == "upper_left" else kv_len - q_len
