"""Mistakes of packed sequences, pages, groups of heads and positions: data of another sequence, page, head or row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy

from mha_spec import steps

from .loops import offset_of
from .mistake import ANY_SIZE, ATTENTION, FORWARD, Mistake, Sizes, changing, replacing
from .scores import reading_heads
from .visibility import at_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments

__all__ = ["PACKED"]

PAGE = 16
"""The number of keys of a page."""


def summed(lengths: numpy.ndarray) -> numpy.ndarray:
    """Return the sum of the lengths up to each entry."""
    return numpy.cumsum(lengths, axis=0)


def of_kv_lengths(change: Callable[[numpy.ndarray], numpy.ndarray]) -> steps.Steps:
    """Use other lengths of the keys, (batch, 1, 1, 1)."""
    return replacing(see_kv_lengths=lambda positions, lengths: positions < change(lengths))


def of_q_lengths(change: Callable[[numpy.ndarray], numpy.ndarray]) -> steps.Steps:
    """Use other lengths of the queries, (batch, 1, 1, 1)."""
    return replacing(see_q_lengths=lambda indices, lengths: indices < change(lengths))


def packed_positions(a: Arguments) -> Arguments:
    """Count the positions of the queries from the first row of the packed batch."""
    if a.q_lengths is None or not a.positional:
        return a
    lengths = numpy.clip(numpy.asarray(a.q_lengths), 0, a.q_len)
    start = (numpy.cumsum(lengths) - lengths).reshape(-1, 1, 1, 1)
    return at_positions(a, offset_of(a) + start + numpy.arange(a.q_len)[:, None])


def grouped_positions(a: Arguments) -> Arguments:
    """Count the positions of the rows of all heads of a group, which are interleaved."""
    group = a.heads // max(a.kv_heads, 1)
    if group <= 1 or not a.positional:
        return a
    head = (numpy.arange(a.heads) % group).reshape(1, -1, 1, 1)
    return at_positions(a, offset_of(a) + numpy.arange(a.q_len)[:, None] * group + head)


def reading(
    index: Callable[[Arguments, numpy.ndarray, numpy.ndarray], tuple[numpy.ndarray, numpy.ndarray]],
) -> steps.Steps:
    """Read the key and value of another entry or slot: `index` of the entries, (batch, 1), and of the slots."""

    def change(a: Arguments) -> Arguments:
        entries, slots = index(a, numpy.arange(a.batch)[:, None], numpy.arange(a.kv_len))
        entries, slots = numpy.broadcast_arrays(entries, slots)
        key, value = (
            None if x is None else x[entries[:, None], numpy.arange(x.shape[1])[:, None], slots[:, None]]
            for x in (a.key, a.value)
        )
        return replace(a, key=key, value=value)

    return changing(change)


def with_positions(change: Callable[[numpy.ndarray], numpy.ndarray]) -> steps.Steps:
    """Change the positions of the queries."""
    return replacing(query_positions=lambda offset, q_len: change(steps.query_positions(offset, q_len)))


def rounded_to(dtype: type[Any]) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Store positions in another type."""

    def change(positions: numpy.ndarray) -> numpy.ndarray:
        with numpy.errstate(all="ignore"):
            return positions.astype(dtype).astype(numpy.float64)

    return change


def of_the_tile(size: int) -> steps.Steps:
    """Give every row of a tile the position of the first."""
    return replacing(
        query_positions=lambda offset, q_len: (
            steps.query_positions(offset, q_len) - (numpy.arange(q_len) % size).reshape(1, 1, -1, 1)
        )
    )


def mistake(
    name: str,
    title: str,
    clause: str,
    made: steps.Steps,
    *needs: str,
    bugs: tuple[str, ...] = (),
    functions: tuple[str, ...] = FORWARD,
    past: Sizes = ANY_SIZE,
) -> Mistake:
    """Return a mistake of reading other data."""
    return Mistake(name, title, (clause,), made, needs, functions, bugs=bugs, past=past)


LENGTHS = (
    *(
        made
        for word, argument, clause, using in (
            ("kv", "kv_lengths", "MHA-LEN-1", of_kv_lengths),
            ("q", "q_lengths", "MHA-LEN-2", of_q_lengths),
        )
        for made in (
            mistake(
                f"{word}-lengths-summed",
                f"reads {argument} as the sum of the lengths up to each batch entry",
                clause,
                using(summed),
                argument,
                bugs=("Dao-AILab/flash-attention#1537",),
            ),
            mistake(
                f"{word}-lengths-of-the-next-entry",
                f"uses the {argument} of the next batch entry",
                clause,
                using(lambda lengths: numpy.roll(lengths, -1, axis=0)),
                argument,
                bugs=("Dao-AILab/flash-attention#1537",),
            ),
            mistake(
                f"{word}-lengths-of-the-longest",
                f"uses the largest of {argument} for all batch entries",
                clause,
                using(lambda lengths: numpy.max(lengths, axis=0, keepdims=True, initial=0)),
                argument,
                bugs=("facebookresearch/xformers#1122",),
            ),
            mistake(
                f"{word}-lengths-of-the-shortest",
                f"uses the smallest of {argument} for all batch entries",
                clause,
                using(lambda lengths: numpy.min(lengths, axis=0, keepdims=True, initial=2**30)),
                argument,
            ),
        )
    ),
    *(
        mistake(
            f"kv-lengths-rounded-up-to-{size}",
            f"reads whole tiles of {size} keys, so that it sees unused slots behind kv_lengths",
            "MHA-LEN-1",
            of_kv_lengths(lambda lengths, size=size: -(-lengths // size) * size),
            "kv_lengths",
            bugs=("vllm-project/vllm-xpu-kernels PR#181", "Dao-AILab/flash-attention#1745"),
        )
        for size in (16, 64)
    ),
    *(
        mistake(
            f"kv-lengths-rounded-down-to-{size}",
            f"drops the keys of kv_lengths that do not fill a tile of {size}",
            "MHA-LEN-1",
            of_kv_lengths(lambda lengths, size=size: lengths // size * size),
            "kv_lengths",
            bugs=("NVIDIA/TransformerEngine#1930",),
        )
        for size in (16, 64)
    ),
    mistake(
        "packed-rows-as-positions",
        "counts positions from the first row of the packed batch instead of the first of each sequence",
        "MHA-LEN-2",
        changing(packed_positions),
        "q_lengths",
        functions=("attention",),
    ),
    mistake(
        "grouped-rows-as-positions",
        "counts the interleaved rows of the heads of a group as positions",
        "MHA-CAUSAL-1",
        changing(grouped_positions),
        "causal",
    ),
)

PAGES = (
    mistake(
        "page-table-of-the-entry-before",
        f"reads the pages of the batch entry before from key {PAGE} on, as from a stale page table",
        "MHA-LEN-1",
        reading(lambda a, entries, slots: (numpy.where(slots < PAGE, entries, (entries - 1) % max(a.batch, 1)), slots)),
        "kv_lengths",
        past=Sizes(keys=PAGE),
        bugs=("tenstorrent/tt-metal#41215",),
    ),
    mistake(
        "page-table-of-the-first-entry",
        "reads the key and value of the first batch entry for all",
        "MHA-LEN-1",
        reading(lambda a, entries, slots: (0 * entries, slots)),
        "kv_lengths",
    ),
    *(
        mistake(
            f"page-before-from-page-{page}",
            f"reads the page before from page {page} of {PAGE} keys on",
            "MHA-LEN-1",
            reading(
                lambda a, entries, slots, page=page: (
                    entries,
                    numpy.where(slots < page * PAGE, slots, slots - PAGE),
                )
            ),
            "kv_lengths",
            past=Sizes(keys=page * PAGE),
        )
        for page in (1, 2)
    ),
)

HEADS = (
    *(
        mistake(
            f"group-of-{size}-heads",
            f"reads the key/value head of the first of {size} query heads for all of them",
            "MHA-HEAD-1",
            reading_heads(
                lambda head, heads, kv_heads, size=size: head // size * size // max(heads // max(kv_heads, 1), 1)
            ),
            functions=ATTENTION,
            bugs=("FlashML-org/FreeToken PR#177",),
            past=Sizes(heads=size),
        )
        for size in (2, 4, 16)
    ),
    *(
        mistake(
            f"heads-past-{size}-wrap",
            f"reads query head h - {size} from head {size} on",
            "MHA-HEAD-1",
            changing(lambda a, size=size: replace(a, query=a.query[:, numpy.arange(a.heads) % size])),
            past=Sizes(heads=size),
        )
        for size in (4, 8, 16, 64)
    ),
    *(
        mistake(
            f"kv-heads-past-{size}-wrap",
            f"reads key/value head h - {size} from head {size} on",
            "MHA-LSE-1",
            reading_heads(lambda head, heads, kv_heads, size=size: head // max(heads // max(kv_heads, 1), 1) % size),
            functions=ATTENTION,
            past=Sizes(heads=size),
        )
        for size in (8, 16)
    ),
)

POSITIONS = (
    mistake(
        "positions-in-int16",
        "stores positions in int16, which wraps at 32768",
        "MHA-POS-1",
        with_positions(rounded_to(numpy.int16)),
        "q_offset",
        bugs=("ml-explore/mlx#3360",),
    ),
    mistake(
        "positions-in-float32",
        "stores positions in float32, which rounds from 2^24 on",
        "MHA-POS-1",
        with_positions(rounded_to(numpy.float32)),
        "q_offset",
    ),
    mistake(
        "positions-in-float16",
        "stores positions in float16, which rounds from 2^11 on",
        "MHA-POS-1",
        with_positions(rounded_to(numpy.float16)),
        "q_offset",
        bugs=("huggingface/transformers#29285",),
    ),
    mistake(
        "positions-in-bfloat16",
        "stores positions in bfloat16, which rounds from 2^8 on",
        "MHA-POS-1",
        with_positions(rounded_to(ml_dtypes.bfloat16)),
        "q_offset",
        bugs=("EleutherAI/gpt-neox#1003",),
    ),
    *(
        mistake(
            f"positions-clamped-at-{last}",
            f"treats a position past {last} as {last}",
            "MHA-POS-1",
            with_positions(lambda positions, last=last: numpy.minimum(positions, last)),
            "q_offset",
        )
        for last in (2047, 4095)
    ),
    *(
        mistake(
            f"positions-of-tiles-of-{size}",
            f"gives every row of a tile of {size} rows the position of the first",
            "MHA-POS-1",
            of_the_tile(size),
            "causal",
            past=Sizes(rows=1),
        )
        for size in (4, 16)
    ),
)

PACKED = (*LENGTHS, *PAGES, *HEADS, *POSITIONS)
