"""The contents of the options: for each option a few variants, from ordinary to extreme.

A case names its options in a `Spec`: {"mask": "b1qk", "causal": True, "window": (2, None), "dropout": (0.25, "bhqk")}.
Pairwise options name their axes; integer options and sinks have the value True.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import Input
from portable import words

from .tensors import bell, seed_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike

    from .sizes import Sizes

    Spec = Mapping[str, Any]

__all__ = ["bits", "integers", "options_of", "words_for"]

PLAIN = ("causal", "window", "scale", "softcap")

VARIANTS = {
    "mask": ("two of three pairs visible", "one in three visible", "a hidden row", *["a key hidden from each row"] * 3),
    "bias": ("ordinary", "with -inf", "some near -30000", "-inf beside some near -30000", *["a rare -inf"] * 2),
    "offset": ("unlike", "lower right", "negative", "0, and past the last key", *["inside"] * 2),
    "kv_lengths": ("partial", "full and partial", "0 and partial", "partial and 1", *["long"] * 2),
    "q_lengths": ("partial", "full and 1", "partial", "full and 0", *["long"] * 2),
    "segments": (
        "packed in order",
        "unsorted, with negative ids",
        "on one side only",
        "two, interleaved",
        *["long"] * 2,
    ),
    "sinks": ("ordinary", "some -inf", "one large, one far below", "negative", *["ordinary"] * 2),
    "dropout": ("most kept", "most dropped", "a row dropped", "a key dropped", *["most kept"] * 2),
}
"""The contents of the variants of each option in words, for titles; the makers below create them."""


def bits(shape: tuple[int, ...], share: float, *names: object) -> numpy.ndarray:
    """Return booleans of which about `share` are True."""
    high = words(int(numpy.prod(shape)), seed_of(*shape, *names)) >> numpy.uint64(56)
    return (high < numpy.uint64(round(256 * share))).reshape(shape)


def integers(values: ArrayLike) -> Input:
    """Return an int32 input."""
    return Input(numpy.asarray(values, dtype="int32"), "int32")


def options_of(sizes: Sizes, spec: Spec, variant: int) -> tuple[dict[str, Input], dict[str, Any]]:
    """Return the array inputs and the plain options of a spec, in one variant."""
    inputs: dict[str, Input] = {}
    plain = {name: spec[name] for name in PLAIN if name in spec}
    for name, make in _MAKERS.items():
        if name in spec:
            inputs.update(make(sizes, spec[name], variant))
    if "offset" in spec and not isinstance(spec["offset"], bool):
        plain["q_offset"] = spec["offset"]
    elif spec.get("offset"):
        inputs["q_offset"] = _offsets(sizes, inputs.get("kv_lengths"), variant)
    if "dropout" in spec:
        plain["dropout_rate"] = spec["dropout"][0]
    return inputs, plain


def words_for(spec: Spec, variant: int) -> str:
    """Describe a spec in words: its options and their contents."""
    phrases = [_phrase(name, value, variant) for name, value in spec.items() if name != "grad_lse"]
    return "; ".join([*phrases, *(["a cotangent of the lse"] if spec.get("grad_lse") else [])])


def _phrase(name: str, value: Any, variant: int) -> str:
    if name == "dropout":
        rate, axes = value
        return f"dropout at rate {rate} of shape ({', '.join(axes)}): {VARIANTS[name][variant]}"
    if name in PLAIN:
        return name if value is True else f"{name}={value}"
    if name == "offset" and value is not True:
        return f"q_offset={value}"
    shape = f" of shape ({', '.join(value)})" if isinstance(value, str) else ""
    return f"{name}{shape}: {VARIANTS[name][variant]}"


def _mask(sizes: Sizes, axes: str, variant: int) -> dict[str, Input]:
    shape = sizes.pairwise(axes)
    mask = bits(shape, (0.66, 0.34, 0.6, 1.0, 1.0, 1.0)[variant], "mask", variant)
    if variant == 2:
        _clear_a_row(mask)
    if variant >= 3:
        batch, head, row, position = numpy.indices(shape)
        mask = (position - row - head - batch) % shape[3] != (variant - 2) % shape[3]
    if mask.all():
        mask.flat[-1] = False
    if not mask.any() and mask.size > 1:
        mask.flat[0] = True
    return {"mask": Input(mask, "bool")}


def _clear_a_row(pairs: numpy.ndarray) -> None:
    """Set the row in the middle to False, or that of the last head or batch entry if rows share a mask."""
    if pairs.shape[2] > 1:
        pairs[..., pairs.shape[2] // 2, :] = False
    elif pairs.shape[0] * pairs.shape[1] > 1:
        pairs[-1, -1] = False


def _bias(sizes: Sizes, axes: str, variant: int) -> dict[str, Input]:
    shape = sizes.pairwise(axes)
    bias = bell(shape, 2.0**-3, "bias", variant)
    if variant in (2, 3):
        bias = numpy.where(bits(shape, 0.3, "low bias", variant), -29952.0, bias)
    if variant != 0 and variant != 2 and bias.size > 1:
        bias = numpy.where(bits(shape, 0.25 if variant < 4 else 0.05, "hidden", variant), -numpy.inf, bias)
        bias.flat[0] = -numpy.inf
    return {"bias": Input(bias)}


def _cycle(rows: Sequence[Sequence[int]], sizes: Sizes, variant: int) -> list[int]:
    row = rows[variant % len(rows)]
    return [row[entry % len(row)] for entry in range(sizes.batch)]


def _offsets(sizes: Sizes, kv_lengths: Input | None, variant: int) -> Input:
    """Return offsets; those of the variant "lower right" follow kv_lengths, if the case has them."""
    end = sizes.kv_len - sizes.q_len
    if variant == 1 and kv_lengths is not None:
        return integers(kv_lengths.values - sizes.q_len)
    rows = ((end, end - 3), (end, end), (-2, end + 1), (0, sizes.kv_len - 1), (end, 3), (end - 1, 4))
    return integers(_cycle(rows, sizes, variant))


def _kv_lengths(sizes: Sizes, _: bool, variant: int) -> dict[str, Input]:
    full = sizes.kv_len
    rows = (
        (full - 2, full // 2),
        (full, full - 3),
        (0, full - 1),
        (full // 2, 1),
        (full - 4, full - 2),
        (full - 2, full),
    )
    return {"kv_lengths": integers(_cycle(rows, sizes, variant))}


def _q_lengths(sizes: Sizes, _: bool, variant: int) -> dict[str, Input]:
    full = sizes.q_len
    rows = (
        (full - 1, full // 2 + 1),
        (full, 1),
        (full - 1, full // 2),
        (full, 0),
        (full - 1, full - 2),
        (full, full - 3),
    )
    return {"q_lengths": integers(_cycle(rows, sizes, variant))}


def _segments(sizes: Sizes, _: bool, variant: int) -> dict[str, Input]:
    row, key = numpy.arange(sizes.q_len), numpy.arange(sizes.kv_len)
    patterns: tuple[Callable[[numpy.ndarray, int], numpy.ndarray], ...] = (
        lambda index, entry: (index * (3 + entry)) // max(sizes.q_len, sizes.kv_len),
        lambda index, entry: (index * 2 + entry) % 3 - 1,
        lambda index, entry: index // 2 * (3 - entry) % 5 - 2,
        lambda index, entry: (index + entry) // 2 % 2 * 7,
        lambda index, entry: (index + entry) // 9 - 1,
        lambda index, entry: (index + 2 * entry) // 5 % 2 * -3,
    )
    pattern = patterns[variant]
    ids = [numpy.stack([pattern(index, entry) for entry in range(sizes.batch)]) for index in (row, key)]
    return {"q_segment_ids": integers(ids[0]), "kv_segment_ids": integers(ids[1])}


def _sinks(sizes: Sizes, _: bool, variant: int) -> dict[str, Input]:
    sinks = bell((sizes.heads,), 2.0**-3, "sinks", variant) + 1
    if variant == 1:
        sinks[1::3] = -numpy.inf
    if variant == 2:
        sinks[:2] = 100.0 if sizes.heads > 2 else 6.0, -100.0
    if variant == 3:
        sinks = -numpy.abs(sinks)
    return {"sinks": Input(sinks)}


def _dropout(sizes: Sizes, rate_and_axes: tuple[float, str], variant: int) -> dict[str, Input]:
    shape = sizes.pairwise(rate_and_axes[1])
    keep = bits(shape, (0.75, 0.4, 0.7, 0.8, 0.8, 0.9)[variant], "dropout", variant)
    if variant == 2:
        _clear_a_row(keep)
    if variant == 3:
        keep[..., 0] = False
    if keep.all():
        keep.flat[0] = False
    return {"dropout_mask": Input(keep, "bool")}


_MAKERS: dict[str, Callable[..., dict[str, Input]]] = {
    "mask": _mask,
    "bias": _bias,
    "kv_lengths": _kv_lengths,
    "q_lengths": _q_lengths,
    "segments": _segments,
    "sinks": _sinks,
    "dropout": _dropout,
}
