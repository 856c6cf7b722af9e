"""The sentences of `dates.py`: dates as people write them, and in ISO 8601.

Each format names exactly one day: with slashes the month comes first, with dots the day, and a year of two digits lies
between 1970 and 2069.
"""

from __future__ import annotations

from calendar import day_abbr, day_name, month_abbr, month_name
from datetime import date, timedelta
from typing import TYPE_CHECKING, NamedTuple

import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["BEGIN", "PAD", "SYMBOLS", "TARGET_LENGTH", "Pairs", "pairs", "spell", "split"]

FIRST, LAST = date(1970, 1, 1), date(2069, 12, 31)

SYMBOLS = ("", "^", *" ',-./0123456789abcdefghijklmnopqrstuvwxyz")
"""The vocabulary: padding, the beginning of a sentence, and the characters of both languages."""

PAD, BEGIN = 0, 1
SOURCE_LENGTH, TARGET_LENGTH = 26, 10
_NUMBER = {symbol: number for number, symbol in enumerate(SYMBOLS)}


def _ordinal(day: int) -> str:
    ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


WAYS: tuple[Callable[[date], str], ...] = (
    lambda d: f"{d.day} {month_name[d.month]} {d.year}",
    lambda d: f"{month_name[d.month]} {d.day}, {d.year}",
    lambda d: f"{month_abbr[d.month]} {_ordinal(d.day)} {d.year}",
    lambda d: f"the {_ordinal(d.day)} of {month_name[d.month]} {d.year}",
    lambda d: f"{day_name[d.weekday()]} {d.day} {month_abbr[d.month]} {d.year}",
    lambda d: f"{day_abbr[d.weekday()]}, {month_name[d.month]} {_ordinal(d.day)}, {d.year}",
    lambda d: f"{d.day}-{month_abbr[d.month]}-{d.year % 100:02}",
    lambda d: f"{month_abbr[d.month]} {d.day} '{d.year % 100:02}",
    lambda d: f"{d.month}/{d.day}/{d.year}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d: f"{d.day}.{d.month}.{d.year % 100:02}",
    lambda d: f"{d.year}{d.month:02}{d.day:02}",
)
"""The formats in which people write a date; the model sees the words in lower case."""


class Pairs(NamedTuple):
    """Sentences as numbers: the written dates (count, source length), their lengths (count,), and their ISO forms."""

    source: numpy.ndarray
    source_lengths: numpy.ndarray
    target: numpy.ndarray


def split(seed: int, held_out: int) -> tuple[list[date], list[date]]:
    """Split the days of a century into days to train on and `held_out` other days to test on."""
    days = [FIRST + timedelta(number) for number in range((LAST - FIRST).days + 1)]
    order = numpy.random.default_rng(seed).permutation(len(days))
    shuffled = [days[number] for number in order]
    return shuffled[held_out:], shuffled[:held_out]


def pairs(days: Sequence[date], rng: numpy.random.Generator, count: int | None = None) -> Pairs:
    """Write `count` random days of `days`, or each day once, each in a random format."""
    chosen = days if count is None else [days[number] for number in rng.integers(len(days), size=count)]
    ways = rng.integers(len(WAYS), size=len(chosen))
    written = [WAYS[way](day).lower() for day, way in zip(chosen, ways, strict=True)]
    source = numpy.full((len(written), SOURCE_LENGTH), PAD, dtype=numpy.int32)
    for row, text in zip(source, written, strict=True):
        row[: len(text)] = _numbers(text)
    lengths = numpy.asarray([len(text) for text in written], dtype=numpy.int32)
    return Pairs(source, lengths, numpy.asarray([_numbers(day.isoformat()) for day in chosen], dtype=numpy.int32))


def _numbers(text: str) -> list[int]:
    return [_NUMBER[symbol] for symbol in text]


def spell(numbers: Sequence[int]) -> str:
    """Return the sentence that `numbers` encode."""
    return "".join(SYMBOLS[number] for number in numbers)
