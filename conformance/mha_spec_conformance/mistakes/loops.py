"""Mistakes in loops over tiles: bounds rounded the wrong way, tiles skipped or cut, data of another tile."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps

from .mistake import ANY_SIZE, FORWARD, Mistake, Sizes, changing, replacing
from .visibility import in_prefix

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments

    Seeing = Callable[[numpy.ndarray], numpy.ndarray]

__all__ = ["LOOPS"]

SIZES = (64, 128)


def seeing(change: Seeing) -> steps.Steps:
    """Change which pairs are visible, after all constraints."""
    return replacing(all_of=lambda constraints: change(steps.all_of(constraints)))


def first_keys(count: Callable[[int], int]) -> Seeing:
    """Hide the keys from count(kv_len) on."""
    return lambda visible: visible & (numpy.arange(visible.shape[3]) < count(visible.shape[3]))


def first_rows(count: Callable[[int], int]) -> Seeing:
    """Hide every key from the rows from count(q_len) on."""
    return lambda visible: visible & (numpy.arange(visible.shape[2])[:, None] < count(visible.shape[2]))


def whole_tiles(size: int) -> Callable[[int], int]:
    """Return the number of elements in whole tiles, or of all elements if they do not fill a tile."""
    return lambda length: length // size * size or length


def ends_of_tiles(visible: numpy.ndarray, size: int, rows: Seeing) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the first key and the end of the keys that a tile sees, (batch, heads, q_len, 1), both 0 if none.

    `rows` chooses the rows of each tile that decide: (batch, heads, tiles, size, kv_len) becomes
    (batch, heads, tiles, kv_len).
    """
    batch, heads, q_len, kv_len = visible.shape
    padded = numpy.pad(visible, ((0, 0), (0, 0), (0, -q_len % size), (0, 0)))
    seen = rows(padded.reshape(batch, heads, -1, size, kv_len))
    some = seen.any(axis=-1)
    first = numpy.where(some, seen.argmax(axis=-1), 0)
    end = numpy.where(some, kv_len - seen[..., ::-1].argmax(axis=-1), 0)
    by_row = (numpy.repeat(ends, size, axis=2)[:, :, :q_len, None] for ends in (first, end))
    return next(by_row), next(by_row)


def any_row(tile: numpy.ndarray) -> numpy.ndarray:
    """Let all rows of a tile decide."""
    return numpy.any(tile, axis=3, keepdims=True)[:, :, :, 0]


def loop(size: int, bounds: Callable[..., tuple[numpy.ndarray, numpy.ndarray]], rows: Seeing = any_row) -> steps.Steps:
    """Let each tile of rows read the keys between `bounds` of the first key and of the end of the keys that it sees."""

    def change(visible: numpy.ndarray) -> numpy.ndarray:
        start, stop = bounds(*ends_of_tiles(visible, size, rows))
        keys = numpy.arange(visible.shape[3])
        return visible & (keys >= start) & (keys < stop)

    return seeing(change)


def ceiled(count: numpy.ndarray, size: int) -> numpy.ndarray:
    """Round up to whole tiles."""
    return -(-count // size) * size


def elsewhere(name: str, axis: int, index: Callable[[numpy.ndarray], numpy.ndarray]) -> steps.Steps:
    """Read the argument `name` at other indices of an axis, which it must have."""

    def change(a: Arguments) -> Arguments:
        array: numpy.ndarray | None = getattr(a, name)
        if array is None or array.shape[axis] == 1:
            return a
        return replace(a, **{name: numpy.take(array, index(numpy.arange(array.shape[axis])), axis)})

    return changing(change)


def offset_of(a: Arguments) -> numpy.ndarray:
    """Return the offset of each batch entry, (batch or 1, 1, 1, 1)."""
    return numpy.reshape(numpy.asarray(steps.offset_of(a)), (-1, 1, 1, 1))


def mask_of_the_diagonal(size: int) -> Callable[[Arguments], Arguments]:
    """Use the mask only at the keys from the tile on that has the position of the first row of a tile."""

    def change(a: Arguments) -> Arguments:
        if a.mask is None:
            return a
        first = offset_of(a) + numpy.arange(a.q_len)[:, None] // size * size
        return replace(a, mask=a.mask | (numpy.arange(a.kv_len) < first // size * size))

    return change


def causal_by_tiles(size: int) -> Callable[[Arguments], Arguments]:
    """Let a row see all keys of the tile at its position."""

    def change(a: Arguments) -> Arguments:
        if not a.causal:
            return a
        rows = offset_of(a) + numpy.arange(a.q_len)[:, None]
        keys = numpy.arange(a.kv_len)
        seen = in_prefix(a, keys) | (keys // size <= rows // size)
        return replace(a, causal=False, mask=seen if a.mask is None else seen & a.mask)

    return change


def leaking_diagonal(size: int) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Show every key of the tokens of a call that has this number of keys of history or more."""

    def see_causal(distance: numpy.ndarray) -> numpy.ndarray:
        history, q_len = -distance[:, :, :1, :1], distance.shape[2]
        keys = distance[:, :, :1] + history
        return steps.see_causal(distance) | ((keys < history + q_len) & (history >= size))

    return see_causal


def mistake(
    name: str,
    title: str,
    made: steps.Steps,
    *,
    clauses: tuple[str, ...] = ("MHA-SOFTMAX-1",),
    needs: tuple[str, ...] = (),
    bugs: tuple[str, ...] = (),
    past: Sizes = ANY_SIZE,
    functions: tuple[str, ...] = FORWARD,
) -> Mistake:
    """Return a mistake of a loop."""
    return Mistake(name, title, clauses, made, needs, functions, bugs=bugs, past=past)


CUT = (
    *(
        mistake(
            f"keys-past-{size}-dropped",
            f"reads only the first {size} keys",
            seeing(first_keys(lambda kv_len, size=size: size)),
            clauses=("MHA-SHAPE-1", "MHA-SOFTMAX-1"),
            past=Sizes(keys=size),
        )
        for size in (16, 32, 128, 256)
    ),
    *(
        mistake(
            f"partial-tile-of-{size}-dropped",
            f"drops the keys past the last whole tile of {size}",
            seeing(first_keys(whole_tiles(size))),
            clauses=("MHA-SHAPE-1", "MHA-SOFTMAX-1"),
            bugs=("jax-ml/jax#27224", "pytorch/pytorch#191937"),
            past=Sizes(keys=size),
        )
        for size in (16, 32, 128)
    ),
    *(
        mistake(
            f"partial-tile-of-{size}-rows-dropped",
            f"leaves the rows past the last whole tile of {size} rows empty",
            seeing(first_rows(whole_tiles(size))),
            clauses=("MHA-SHAPE-1",),
            bugs=("FlagOpen/FlagGems PR#898",),
            past=Sizes(rows=size),
        )
        for size in (16, 64)
    ),
)

BOUNDS = (
    *(
        made
        for size in SIZES
        for made in (
            mistake(
                f"loop-of-{size}-ends-early",
                f"rounds the end of the keys that {size} rows see down to whole tiles of {size}",
                loop(size, lambda first, end, size=size: (first, numpy.maximum(end // size, 1) * size)),
                bugs=("jax-ml/jax#27224",),
                past=Sizes(keys=size),
            ),
            mistake(
                f"loop-of-{size}-starts-late",
                f"rounds the first key that {size} rows see up to whole tiles of {size}",
                loop(size, lambda first, end, size=size: (ceiled(first, size), end)),
                clauses=("MHA-WINDOW-1",),
                bugs=("turboderp-org/exllamav3#378", "ggml-org/llama.cpp PR#12776"),
                past=Sizes(keys=size),
            ),
            mistake(
                f"loop-of-{size}-skips-the-last-tile",
                f"does not read the last tile of {size} keys that {size} rows see",
                loop(size, lambda first, end, size=size: (first, numpy.maximum(ceiled(end, size) - size, size))),
                past=Sizes(keys=size),
            ),
            mistake(
                f"loop-of-{size}-skips-the-first-tile",
                f"does not read the first tile of {size} keys that {size} rows see, if they see another",
                loop(
                    size,
                    lambda first, end, size=size: (
                        numpy.minimum(first // size * size + size, (end - 1) // size * size),
                        end,
                    ),
                ),
                past=Sizes(keys=size),
            ),
            mistake(
                f"loop-of-{size}-ends-with-the-first-row",
                f"ends with the last tile of {size} keys that the first of {size} rows sees",
                loop(size, lambda first, end, size=size: (0 * first, ceiled(end, size)), lambda tile: tile[..., 0, :]),
                clauses=("MHA-CAUSAL-1",),
                needs=("causal",),
                past=Sizes(rows=1, keys=size),
            ),
            mistake(
                f"loop-of-{size}-starts-with-the-last-row",
                f"starts with the first tile of {size} keys that the last of {size} rows sees",
                loop(
                    size,
                    lambda first, end, size=size: (first // size * size, end + 2**30),
                    lambda tile: numpy.flip(tile, 3)[..., 0, :],
                ),
                clauses=("MHA-WINDOW-1",),
                needs=("window",),
                past=Sizes(rows=size, keys=size),
            ),
        )
    ),
)

WRONG_TILES = (
    *(
        mistake(
            f"{label.replace(' ', '-')}-of-the-first-tile-of-{axis}",
            f"uses the {label} of the first 64 {axis} for every tile of 64 {axis}",
            elsewhere(argument, number, lambda index: index % 64),
            clauses=(clause,),
            needs=(argument,),
            bugs=bugs,
            past=Sizes(rows=64) if axis == "rows" else Sizes(keys=64),
        )
        for label, argument, clause, number, axis, bugs in (
            ("mask", "mask", "MHA-MASK-1", 3, "keys", ("ml-explore/mlx#3360",)),
            ("mask", "mask", "MHA-MASK-1", 2, "rows", ("pytorch/pytorch#162588",)),
            ("bias", "bias", "MHA-BIAS-1", 3, "keys", ()),
            ("bias", "bias", "MHA-BIAS-1", 2, "rows", ("pytorch/pytorch#187227",)),
            ("dropout mask", "dropout_mask", "MHA-DROP-1", 3, "keys", ("pytorch/pytorch#190717",)),
            ("segments", "kv_segment_ids", "MHA-SEG-1", 1, "keys", ()),
            ("segments", "q_segment_ids", "MHA-SEG-1", 1, "rows", ()),
        )
    ),
    *(
        mistake(
            f"{label}-of-the-tile-before",
            f"uses the {label} of the tile before in every tile of 64 keys but the first",
            elsewhere(argument, number, lambda index: numpy.where(index < 64, index, index - 64)),
            clauses=(clause,),
            needs=(argument,),
            bugs=("vllm-project/vllm PR#47188",),
            past=Sizes(keys=64),
        )
        for label, argument, clause, number in (
            ("mask", "mask", "MHA-MASK-1", 3),
            ("bias", "bias", "MHA-BIAS-1", 3),
            ("segments", "kv_segment_ids", "MHA-SEG-1", 1),
        )
    ),
    *(
        mistake(
            f"keys-of-the-first-tile-of-{size}",
            f"reads key and value of the first {size} keys in every tile of {size}",
            changing(
                lambda a, size=size: replace(
                    a,
                    key=a.key[:, :, numpy.arange(a.kv_len) % size],
                    value=None if a.value is None else a.value[:, :, numpy.arange(a.kv_len) % size],
                )
            ),
            bugs=("huggingface/transformers PR#47708",),
            past=Sizes(keys=size),
        )
        for size in (16, 64)
    ),
    *(
        mistake(
            f"segments-by-tiles-of-{size}",
            f"uses the segment of the first key of each tile of {size} keys for the whole tile",
            elsewhere("kv_segment_ids", 1, lambda index, size=size: index // size * size),
            clauses=("MHA-SEG-1",),
            needs=("kv_segment_ids",),
            past=Sizes(keys=size),
        )
        for size in (16, 64)
    ),
    *(
        mistake(
            f"mask-of-the-diagonal-tile-of-{size}",
            f"uses the mask only in the tile of {size} keys on the diagonal and behind it, and shows earlier tiles",
            changing(mask_of_the_diagonal(size)),
            clauses=("MHA-MASK-1",),
            needs=("mask",),
            past=Sizes(keys=size),
        )
        for size in (16, 64)
    ),
    *(
        mistake(
            f"causal-by-tiles-of-{size}",
            f"compares tiles of {size} instead of positions, so that a row sees later keys of its tile",
            changing(causal_by_tiles(size)),
            clauses=("MHA-CAUSAL-1",),
            needs=("causal",),
            past=Sizes(keys=size),
        )
        for size in (8, 16, 64)
    ),
    *(
        mistake(
            f"causal-leaks-behind-{size}-keys",
            f"does not apply causal within the tokens of a call that has {size} keys of history or more",
            replacing(see_causal=leaking_diagonal(size)),
            clauses=("MHA-CAUSAL-1",),
            needs=("causal",),
            bugs=("tenstorrent/tt-metal#48899",) if size == 64 else (),
            past=Sizes(keys=size),
        )
        for size in (16, 32, 64, 128)
    ),
)

LOOPS = (*CUT, *BOUNDS, *WRONG_TILES)
