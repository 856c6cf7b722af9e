"""Mistakes in prefixes, chunks and padding on the left: ignored, off by 1, counted from elsewhere, lifting too much."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps

from .loops import offset_of
from .mistake import Mistake, changing, replacing
from .visibility import in_prefix

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments

    Change = Callable[[Arguments], Arguments]
    Seeing = Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray]

__all__ = ["STRUCTURED"]


def with_chunk(change: Change) -> steps.Steps:
    """Change the arguments of a call with chunks."""
    return changing(lambda a: a if a.chunk is None else change(a))


def with_prefix(change: Change) -> steps.Steps:
    """Change the arguments of a call with prefixes."""
    return changing(lambda a: a if a.prefix_lengths is None else change(a))


def with_starts(change: Change) -> steps.Steps:
    """Change the arguments of a call with kv_starts."""
    return changing(lambda a: a if a.kv_starts is None else change(a))


def in_its_chunk(see: Seeing) -> steps.Steps:
    """Compare the distances of a key from the first key of the query's chunk and from the first key behind it."""

    def see_chunk(
        queries: numpy.ndarray, keys: numpy.ndarray, chunk: int, starts: numpy.ndarray | int
    ) -> numpy.ndarray:
        first = (queries - starts) // chunk * chunk + starts
        return see(keys - first, keys - first - chunk)

    return replacing(see_chunk=see_chunk)


def rounded_towards_0(
    queries: numpy.ndarray, keys: numpy.ndarray, chunk: int, starts: numpy.ndarray | int
) -> numpy.ndarray:
    """Divide as integers do in C, so that chunk 0 has the positions on both sides of 0."""
    chunks = [numpy.sign(x) * (abs(x) // chunk) for x in (queries - starts, keys - starts)]
    return chunks[0] == chunks[1]


def chunk_as_window(a: Arguments) -> Arguments:
    """Show as many keys up to the position as a chunk has."""
    left, right = a.window or (None, None)
    size = (a.chunk or 1) - 1
    return replace(a, chunk=None, window=(size if left is None else min(left, size), right))


def of_entries(value: object) -> numpy.ndarray:
    """Return integers of batch entries as an array (batch, 1, 1, 1)."""
    return numpy.asarray(value).reshape(-1, 1, 1, 1)


def as_mask(a: Arguments, seen: numpy.ndarray, **without: None) -> Arguments:
    """Hide what a mask hides, and drop the options that it replaces."""
    return replace(a, mask=seen if a.mask is None else seen & a.mask, prefix_lengths=None, causal=False, **without)


def positions_of(a: Arguments) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the positions of the queries, (batch or 1, 1, q_len, 1), and those of the keys."""
    return offset_of(a) + numpy.arange(a.q_len)[:, None], numpy.arange(a.kv_len)


def prefix_lifts_window(a: Arguments) -> Arguments:
    """Show the keys of the prefix to rows whose window does not reach them."""
    queries, keys = positions_of(a)
    left, right = (math.inf if side is None else side for side in a.window or (None, None))
    seen = (keys <= queries) & (keys >= queries - left) & (keys <= queries + right)
    return as_mask(a, seen | in_prefix(a, keys), window=None)


def prefix_lifts_chunk(a: Arguments) -> Arguments:
    """Show the keys of the prefix to rows of other chunks."""
    if a.chunk is None:
        return a
    queries, keys = positions_of(a)
    starts = 0 if a.kv_starts is None else of_entries(a.kv_starts)
    seen = (keys <= queries) & steps.see_chunk(queries, keys, a.chunk, starts)
    return as_mask(a, seen | in_prefix(a, keys), chunk=None)


def prefix_lifts_padding(a: Arguments) -> Arguments:
    """Show keys of the prefix that lengths or starts hide."""
    queries, keys = positions_of(a)
    seen = keys <= queries
    if a.kv_lengths is not None:
        seen = seen & (keys < of_entries(a.kv_lengths))
    if a.kv_starts is not None:
        seen = seen & (keys >= of_entries(a.kv_starts))
    lifted = as_mask(a, seen | in_prefix(a, keys), kv_lengths=None)
    return lifted if a.chunk is not None else replace(lifted, kv_starts=None)


def prefix_of_query_indices(a: Arguments) -> Arguments:
    """Lift causal only for rows whose index, not position, is in the prefix."""
    queries, keys = positions_of(a)
    rows, prefixes = numpy.arange(a.q_len)[:, None], of_entries(a.prefix_lengths)
    return as_mask(a, (keys <= queries) | ((keys < prefixes) & (rows < prefixes)))


def plus_starts(a: Arguments, numbers: object, sign: int = 1) -> numpy.ndarray:
    """Add the kv_starts of the batch entries to numbers, or subtract them with the sign -1."""
    return numpy.asarray(numbers) + sign * numpy.asarray(a.kv_starts)


def counted_from_starts(name: str) -> steps.Steps:
    """Count the integers of an option from kv_starts."""

    def change(a: Arguments) -> Arguments:
        counted = getattr(a, name)
        return a if counted is None else replace(a, **{name: plus_starts(a, counted)})

    return with_starts(change)


def padded_queries_hidden(a: Arguments) -> Arguments:
    """Hide every key from the rows before the start."""
    queries, _ = positions_of(a)
    real = queries >= of_entries(a.kv_starts)
    return replace(a, mask=real if a.mask is None else real & a.mask)


STRUCTURED = (
    Mistake(
        "chunk-ignored",
        "accepts a chunk and lets every row see the keys of other chunks",
        ("MHA-WINDOW-3",),
        with_chunk(lambda a: replace(a, chunk=None)),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-ignored-for-one-query",
        "does not use the chunk for a single query",
        ("MHA-WINDOW-3",),
        with_chunk(lambda a: replace(a, chunk=None if a.q_len == 1 else a.chunk)),
        needs=("chunk",),
        bugs=("sgl-project/sglang PR#5479",),
    ),
    Mistake(
        "chunk-as-window",
        "reads a chunk as a window of as many keys",
        ("MHA-WINDOW-3",),
        with_chunk(chunk_as_window),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-plus-one",
        "makes the chunks a position too long",
        ("MHA-WINDOW-3",),
        with_chunk(lambda a: replace(a, chunk=(a.chunk or 0) + 1)),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-minus-one",
        "makes the chunks a position too short",
        ("MHA-WINDOW-3",),
        with_chunk(lambda a: replace(a, chunk=max((a.chunk or 0) - 1, 1))),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-first-hidden",
        "hides the first key of each chunk",
        ("MHA-WINDOW-3",),
        in_its_chunk(lambda from_first, from_end: (from_first > 0) & (from_end < 0)),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-next-shown",
        "shows the first key of the next chunk",
        ("MHA-WINDOW-3",),
        in_its_chunk(lambda from_first, from_end: (from_first >= 0) & (from_end <= 0)),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-before-shown",
        "shows the chunk before, as blocks of a window do",
        ("MHA-WINDOW-3",),
        in_its_chunk(lambda from_first, from_end: (from_first >= from_end - from_first) & (from_end < 0)),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-of-indices",
        "counts the chunks of queries from the first query of the call",
        ("MHA-WINDOW-3", "MHA-POS-1"),
        replacing(
            see_chunk=lambda queries, keys, chunk, starts: steps.see_chunk(
                queries - queries[:, :, :1], keys, chunk, starts
            )
        ),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-rounded-towards-0",
        "rounds towards 0, so that the positions before the first chunk lie in it",
        ("MHA-WINDOW-3",),
        replacing(see_chunk=rounded_towards_0),
        needs=("chunk",),
    ),
    Mistake(
        "chunk-counts-padding",
        "counts chunks from index 0, whatever kv_starts are",
        ("MHA-WINDOW-3", "MHA-LEN-4"),
        replacing(see_chunk=lambda queries, keys, chunk, starts: steps.see_chunk(queries, keys, chunk, 0)),
        needs=("chunk", "kv_starts"),
        bugs=("huggingface/transformers PR#40324", "PaddlePaddle/PaddleFormers PR#4536"),
    ),
    Mistake(
        "chunk-implies-causal",
        "hides the keys after the position if there are chunks",
        ("MHA-WINDOW-3",),
        with_chunk(lambda a: replace(a, causal=True)),
        needs=("chunk",),
    ),
    Mistake(
        "prefix-ignored",
        "accepts prefix_lengths and is causal in the prefix",
        ("MHA-CAUSAL-2",),
        with_prefix(lambda a: replace(a, prefix_lengths=None)),
        needs=("prefix_lengths",),
        bugs=("huggingface/transformers#39389", "vllm-project/vllm-gaudi PR#1797"),
    ),
    Mistake(
        "prefix-ignored-with-window",
        "is causal in the prefix if there is a window",
        ("MHA-CAUSAL-2",),
        with_prefix(lambda a: replace(a, prefix_lengths=None if a.window else a.prefix_lengths)),
        needs=("prefix_lengths", "window"),
        bugs=("vllm-project/vllm PR#47217",),
    ),
    Mistake(
        "prefix-plus-one",
        "lets every row see a key behind the prefix",
        ("MHA-CAUSAL-2",),
        replacing(see_prefix=lambda causal, keys, lengths: causal | (keys <= lengths)),
        needs=("prefix_lengths",),
    ),
    Mistake(
        "prefix-minus-one",
        "leaves out the last key of the prefix",
        ("MHA-CAUSAL-2",),
        replacing(see_prefix=lambda causal, keys, lengths: causal | (keys < lengths - 1)),
        needs=("prefix_lengths",),
    ),
    Mistake(
        "prefix-of-the-first-entry",
        "uses the first of prefix_lengths for all batch entries",
        ("MHA-CAUSAL-2",),
        replacing(see_prefix=lambda causal, keys, lengths: causal | (keys < lengths[:1])),
        needs=("prefix_lengths",),
    ),
    Mistake(
        "prefix-of-query-indices",
        "lifts causal only for rows whose index lies in the prefix",
        ("MHA-CAUSAL-2",),
        with_prefix(prefix_of_query_indices),
        needs=("prefix_lengths", "q_offset"),
    ),
    Mistake(
        "prefix-lifts-all",
        "is not causal at all if there is a prefix",
        ("MHA-CAUSAL-2",),
        with_prefix(lambda a: replace(a, prefix_lengths=None, causal=False)),
        needs=("prefix_lengths",),
    ),
    Mistake(
        "prefix-lifts-window",
        "shows the keys of the prefix beyond the window",
        ("MHA-CAUSAL-2",),
        with_prefix(prefix_lifts_window),
        needs=("prefix_lengths", "window"),
        bugs=("huggingface/transformers PR#46850",),
    ),
    Mistake(
        "prefix-lifts-chunk",
        "shows the keys of the prefix in other chunks",
        ("MHA-CAUSAL-2",),
        with_prefix(prefix_lifts_chunk),
        needs=("prefix_lengths", "chunk"),
    ),
    Mistake(
        "prefix-lifts-padding",
        "shows the keys of the prefix that lengths or starts hide",
        ("MHA-CAUSAL-2",),
        with_prefix(prefix_lifts_padding),
        needs=("prefix_lengths",),
        bugs=("huggingface/transformers#30993",),
    ),
    Mistake(
        "prefix-counted-from-the-start",
        "counts prefix_lengths from kv_starts",
        ("MHA-LEN-4",),
        counted_from_starts("prefix_lengths"),
        needs=("prefix_lengths", "kv_starts"),
    ),
    Mistake(
        "starts-ignored",
        "accepts kv_starts and reads the padding",
        ("MHA-LEN-4",),
        replacing(see_kv_starts=lambda keys, starts: numpy.ones((keys >= starts).shape, bool)),
        needs=("kv_starts",),
        bugs=("Dao-AILab/flash-attention#1788", "huggingface/optimum-habana#623"),
    ),
    Mistake(
        "starts-ignored-for-one-query",
        "reads the padding if there is a single query",
        ("MHA-LEN-4",),
        with_starts(lambda a: replace(a, kv_starts=None if a.q_len == 1 else a.kv_starts)),
        needs=("kv_starts",),
        bugs=("ml-explore/mlx-lm#1906", "OpenNMT/OpenNMT-py PR#2532"),
    ),
    Mistake(
        "starts-plus-one",
        "drops the first key behind the padding",
        ("MHA-LEN-4",),
        replacing(see_kv_starts=lambda keys, starts: keys > starts),
        needs=("kv_starts",),
    ),
    Mistake(
        "starts-minus-one",
        "reads the last key of the padding",
        ("MHA-LEN-4",),
        replacing(see_kv_starts=lambda keys, starts: keys >= starts - 1),
        needs=("kv_starts",),
    ),
    Mistake(
        "starts-as-lengths",
        "reads kv_starts as the number of keys that are used",
        ("MHA-LEN-4",),
        replacing(see_kv_starts=lambda keys, starts: keys < starts),
        needs=("kv_starts",),
    ),
    Mistake(
        "starts-of-the-first-entry",
        "uses the first of kv_starts for all batch entries",
        ("MHA-LEN-4",),
        replacing(see_kv_starts=lambda keys, starts: keys >= starts[:1]),
        needs=("kv_starts",),
    ),
    Mistake(
        "starts-move-keys",
        "counts the positions of the keys from kv_starts, and not those of the queries",
        ("MHA-LEN-4", "MHA-POS-1"),
        with_starts(lambda a: replace(a, q_offset=plus_starts(a, steps.offset_of(a))) if a.positional else a),
        needs=("kv_starts",),
    ),
    Mistake(
        "starts-move-queries",
        "counts the positions of the queries from kv_starts, and not those of the keys",
        ("MHA-LEN-4", "MHA-POS-1"),
        with_starts(lambda a: replace(a, q_offset=plus_starts(a, steps.offset_of(a), -1)) if a.positional else a),
        needs=("kv_starts",),
    ),
    Mistake(
        "starts-move-lengths",
        "counts kv_lengths from kv_starts",
        ("MHA-LEN-4", "MHA-LEN-1"),
        counted_from_starts("kv_lengths"),
        needs=("kv_starts", "kv_lengths"),
    ),
    Mistake(
        "starts-hide-queries",
        "hides every key from rows before the start",
        ("MHA-LEN-4",),
        with_starts(padded_queries_hidden),
        needs=("kv_starts",),
    ),
    Mistake(
        "causal-ignored-with-starts",
        "is not causal if there is padding on the left",
        ("MHA-LEN-4", "MHA-MASK-3"),
        with_starts(lambda a: replace(a, causal=False)),
        needs=("kv_starts", "causal"),
        bugs=("huggingface/transformers PR#41966",),
    ),
)
