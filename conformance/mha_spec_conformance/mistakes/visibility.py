"""Mistakes in visibility: wrong polarity, bounds off by 1, another alignment, another index."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.conventions import Convention

from .mistake import Mistake, changing, replacing

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = ["VISIBILITY", "at_positions", "first_along", "in_prefix"]


def first_along(name: str, axis: int) -> steps.Steps:
    """Use the first entry of the argument `name` along `axis` for every entry."""

    def change(a: Arguments) -> Arguments:
        return replace(a, **{name: numpy.take(getattr(a, name), [0], axis)}) if getattr(a, name) is not None else a

    return changing(change)


def as_bias(mask: numpy.ndarray, a: Arguments) -> numpy.ndarray:
    """Add the boolean mask to the bias, as the numbers 0 and 1."""
    return mask.astype(float) + (0 if a.bias is None else a.bias)


def mask_as_bias(a: Arguments) -> Arguments:
    """Add a boolean mask to the scores as 0 and 1."""
    return a if a.mask is None else replace(a, mask=None, bias=as_bias(a.mask, a))


def head_before_batch(a: Arguments) -> Arguments:
    """Read a mask without a head axis at (b * heads + h) modulo its batch."""
    if a.mask is None or a.mask.shape[1] != 1:
        return a
    index = numpy.arange(a.batch * a.heads).reshape(a.batch, a.heads) % max(len(a.mask), 1)
    return replace(a, mask=a.mask[index, 0])


def with_query_stride(a: Arguments) -> Arguments:
    """Give a mask without a query axis a stride over queries, so that row i reads past the mask of its batch entry."""
    if a.mask is None or a.mask.shape[2] != 1:
        return a
    rows = a.mask.reshape(-1, a.mask.shape[3])
    first = numpy.arange(len(rows)).reshape(*a.mask.shape[:2], 1)
    return replace(a, mask=rows[(first + numpy.arange(a.q_len)) % max(len(rows), 1)])


def transposed(mask: numpy.ndarray) -> numpy.ndarray:
    """Exchange queries and keys of a mask that is square or a padding of the keys."""
    rows, columns = mask.shape[2:]
    return mask.swapaxes(2, 3) if rows in (1, columns) else mask


def padding_of_queries(a: Arguments) -> Arguments:
    """Hide the rows of padded positions instead of the keys."""
    return a if a.mask is None or a.q_len != a.kv_len else replace(a, mask=transposed(a.mask))


def at_positions(a: Arguments, positions: numpy.ndarray) -> Arguments:
    """Apply causal, window and chunk at these positions of the queries, (batch or 1, heads or 1, q_len, 1)."""
    keys = numpy.arange(a.kv_len)
    left, right = (math.inf if side is None else side for side in a.bounded_window or (None, None))
    seen = (keys - positions >= -left) & (keys - positions <= right)
    if a.causal:
        seen = seen & (in_prefix(a, keys) | (keys <= positions))
    if a.chunk is not None:
        starts = 0 if a.kv_starts is None else numpy.reshape(a.kv_starts, (-1, 1, 1, 1))
        seen = seen & steps.see_chunk(positions, keys, a.chunk, starts)
    return replace(a, causal=False, window=None, chunk=None, mask=seen if a.mask is None else seen & a.mask)


def in_prefix(a: Arguments, keys: numpy.ndarray) -> numpy.ndarray:
    """Return True for the keys of the prefix, (batch or 1, 1, 1, kv_len)."""
    return keys < (0 if a.prefix_lengths is None else numpy.reshape(a.prefix_lengths, (-1, 1, 1, 1)))


def restarting_positions(a: Arguments) -> Arguments:
    """Count the positions of each segment from its first query and its first key."""
    if a.q_segment_ids is None or not a.positional:
        return a
    queries, keys = numpy.asarray(a.q_segment_ids), numpy.asarray(a.kv_segment_ids)
    first = numpy.zeros(queries.shape, int)
    for b, i in numpy.ndindex(first.shape):
        first[b, i] = numpy.argmax(keys[b] == queries[b, i]) - numpy.argmax(queries[b] == queries[b, i])
    return at_positions(a, (numpy.arange(a.q_len) + first)[:, None, :, None])


def any_of(constraints: list[numpy.ndarray]) -> numpy.ndarray:
    """Show a pair if any constraint of the call holds; the first constraint, which always holds, is left out."""
    return numpy.any(numpy.stack(numpy.broadcast_arrays(*(constraints[1:] or constraints))), axis=0)


VISIBILITY = (
    Mistake(
        "mask-polarity-inverted",
        "reads True in a mask as hidden",
        ("MHA-MASK-1",),
        replacing(see_mask=lambda mask: ~mask),
        needs=("mask",),
        convention=Convention("mask_polarity", "true_hides"),
        bugs=("lucidrains/x-transformers#160", "InseeFrLab/torchTextClassifiers PR#92", "NVIDIA/TransformerEngine#267"),
    ),
    Mistake(
        "mask-added",
        "adds the boolean mask to the scores as 0 and 1",
        ("MHA-MASK-1",),
        changing(mask_as_bias),
        needs=("mask",),
        bugs=("huggingface/diffusers#14342", "huggingface/transformers PR#41443"),
    ),
    Mistake(
        "mask-transposed",
        "exchanges queries and keys in the mask",
        ("MHA-MASK-1", "MHA-MASK-2"),
        changing(padding_of_queries),
        needs=("mask",),
        bugs=("hyunwoongko/transformer PR#40",),
    ),
    Mistake(
        "mask-of-the-first-batch-entry",
        "uses the mask of the first batch entry for all",
        ("MHA-MASK-2",),
        first_along("mask", 0),
        needs=("mask",),
    ),
    Mistake(
        "mask-of-the-first-head",
        "uses the mask of the first head for all",
        ("MHA-MASK-2",),
        first_along("mask", 1),
        needs=("mask",),
    ),
    Mistake(
        "mask-of-the-first-query",
        "uses the mask of the first query for all",
        ("MHA-MASK-2",),
        first_along("mask", 2),
        needs=("mask",),
    ),
    Mistake(
        "mask-head-before-batch",
        "reads a mask without a head axis at the indices of a mask with a head axis",
        ("MHA-MASK-2",),
        changing(head_before_batch),
        needs=("mask",),
        bugs=(
            "tenstorrent/tt-metal#39946",
            "tenstorrent/tt-metal PR#42846",
            "pytorch/pytorch PR#188764",
            "lsdefine/attention-is-all-you-need-keras#36",
        ),
    ),
    Mistake(
        "mask-with-query-stride",
        "reads a mask without a query axis with a stride over queries, so that it reads rows of other batch entries",
        ("MHA-MASK-2",),
        changing(with_query_stride),
        needs=("mask",),
        bugs=("pytorch/pytorch PR#184180", "openvinotoolkit/openvino PR#30758"),
    ),
    Mistake(
        "constraints-joined-with-or",
        "shows a pair if any of the constraints allows it",
        ("MHA-MASK-3",),
        replacing(all_of=any_of),
    ),
    Mistake(
        "last-constraint-wins",
        "uses a single constraint of several",
        ("MHA-MASK-3",),
        replacing(all_of=lambda constraints: constraints[0] & constraints[-1]),
        bugs=("pytorch/pytorch#99282",),
    ),
    Mistake(
        "causal-inverted",
        "shows the keys after a position and hides those up to it",
        ("MHA-CAUSAL-1",),
        replacing(see_causal=lambda distance: distance > 0),
        needs=("causal",),
        bugs=("pytorch/xla PR#8978",),
    ),
    Mistake(
        "causal-hides-itself",
        "hides the key at the position of the query",
        ("MHA-CAUSAL-1",),
        replacing(see_causal=lambda distance: distance < 0),
        needs=("causal",),
    ),
    Mistake(
        "causal-shows-the-next",
        "shows the key after the position of the query",
        ("MHA-CAUSAL-1",),
        replacing(see_causal=lambda distance: distance <= 1),
        needs=("causal",),
    ),
    Mistake(
        "offset-ignored",
        "puts the causal diagonal at the upper left, whatever q_offset is",
        ("MHA-POS-1", "MHA-POS-2"),
        replacing(check=lambda a: steps.check(replace(a, q_offset=0)) if a.positional else steps.check(a)),
        convention=Convention("causal_alignment", "upper_left"),
        bugs=("onnx/onnx#8054", "google/flax#5591", "NVIDIA/cutlass#2336"),
    ),
    Mistake(
        "causal-lower-right",
        "puts the causal diagonal at the lower right, kv_len - q_len",
        ("MHA-POS-1", "MHA-POS-2"),
        replacing(check=lambda a: steps.check(replace(a, q_offset=a.kv_len - a.q_len) if a.positional else a)),
        convention=Convention("causal_alignment", "lower_right"),
        bugs=("ml-explore/mlx#2835", "Dao-AILab/flash-attention#517", "huggingface/transformers PR#30437"),
    ),
    Mistake(
        "causal-lower-right-of-kv-lengths",
        "puts the causal diagonal at kv_lengths - q_len",
        ("MHA-POS-1", "MHA-POS-2"),
        replacing(
            check=lambda a: steps.check(
                a
                if not a.positional or a.kv_lengths is None
                else replace(a, q_offset=numpy.asarray(a.kv_lengths) - a.q_len)
            )
        ),
        convention=Convention("causal_alignment", "lower_right_of_kv_lengths"),
        bugs=("onnx/onnx PR#8068",),
    ),
    Mistake(
        "causal-lower-right-of-lengths",
        "puts the causal diagonal at kv_lengths - q_lengths",
        ("MHA-POS-1", "MHA-POS-2"),
        replacing(
            check=lambda a: steps.check(
                a if not a.positional or a.q_lengths is None else replace(a, q_offset="lower_right")
            )
        ),
        convention=Convention("causal_alignment", "lower_right_of_lengths"),
    ),
    Mistake(
        "causal-lower-right-never-negative",
        "puts the causal diagonal at max(kv_len - q_len, 0)",
        ("MHA-POS-1", "MHA-POS-2"),
        replacing(check=lambda a: steps.check(replace(a, q_offset=max(a.kv_len - a.q_len, 0)) if a.positional else a)),
        bugs=("ml-explore/mlx PR#2967",),
    ),
    Mistake(
        "offset-plus-one",
        "counts the positions of the queries too high by 1",
        ("MHA-POS-1",),
        replacing(query_positions=lambda offset, q_len: steps.query_positions(offset + 1, q_len)),
    ),
    Mistake(
        "offset-minus-one",
        "counts the positions of the queries too low by 1",
        ("MHA-POS-1",),
        replacing(query_positions=lambda offset, q_len: steps.query_positions(offset - 1, q_len)),
    ),
    Mistake(
        "offset-inverted",
        "subtracts the offset from the positions of the queries",
        ("MHA-POS-1",),
        replacing(query_positions=lambda offset, q_len: steps.query_positions(-offset, q_len)),
        needs=("q_offset",),
    ),
    Mistake(
        "offset-never-negative",
        "treats a negative offset as 0",
        ("MHA-POS-1",),
        replacing(query_positions=lambda offset, q_len: steps.query_positions(numpy.maximum(offset, 0), q_len)),
        needs=("q_offset",),
        bugs=("fla-org/flash-linear-attention PR#902",),
    ),
    Mistake(
        "offset-of-the-first-entry",
        "uses the offset of the first batch entry for all",
        ("MHA-POS-1",),
        replacing(query_positions=lambda offset, q_len: steps.query_positions(offset[:1], q_len)),
        needs=("q_offset",),
        bugs=("huggingface/transformers#22161",),
    ),
    Mistake(
        "window-left-exclusive",
        "hides the key at the left end of the window",
        ("MHA-WINDOW-1",),
        replacing(see_window_left=lambda distance, left: distance > -left),
        needs=("window",),
        convention=Convention("window_left", "exclusive"),
        bugs=("jax-ml/jax PR#23247", "NVIDIA/TransformerEngine PR#1212"),
    ),
    Mistake(
        "window-left-plus-one",
        "shows a key too many at the left end of the window",
        ("MHA-WINDOW-1",),
        replacing(see_window_left=lambda distance, left: distance >= -left - 1),
        needs=("window",),
        bugs=("huggingface/transformers#39408", "zml/zml PR#763", "ml-explore/mlx-lm PR#390"),
    ),
    Mistake(
        "window-left-inverted",
        "inverts the sign of the left side of the window",
        ("MHA-WINDOW-1",),
        replacing(see_window_left=lambda distance, left: distance >= left),
        needs=("window",),
        bugs=("huggingface/transformers PR#41228",),
    ),
    Mistake(
        "window-right-exclusive",
        "hides the key at the right end of the window",
        ("MHA-WINDOW-2",),
        replacing(see_window_right=lambda distance, right: distance < right),
        needs=("window",),
    ),
    Mistake(
        "window-right-plus-one",
        "shows a key too many at the right end of the window",
        ("MHA-WINDOW-2",),
        replacing(see_window_right=lambda distance, right: distance <= right + 1),
        needs=("window",),
    ),
    Mistake(
        "window-right-inverted",
        "inverts the sign of the right side of the window",
        ("MHA-WINDOW-2",),
        replacing(see_window_right=lambda distance, right: distance <= -right),
        needs=("window",),
    ),
    Mistake(
        "window-sides-exchanged",
        "exchanges the left and the right side of the window",
        ("MHA-WINDOW-1", "MHA-WINDOW-2"),
        changing(lambda a: a if a.window is None else replace(a, window=tuple(reversed(a.window)))),
        needs=("window",),
    ),
    Mistake(
        "window-of-0-unbounded",
        "treats a window side of 0 as unbounded",
        ("MHA-WINDOW-1", "MHA-WINDOW-2"),
        changing(lambda a: a if a.window is None else replace(a, window=tuple(side or None for side in a.window))),
        needs=("window",),
        bugs=("unslothai/unsloth PR#8253",),
    ),
    Mistake(
        "window-unbounded-of-0",
        "treats an unbounded window side as 0, so that a window to the left is causal",
        ("MHA-WINDOW-2", "MHA-WINDOW-1"),
        changing(lambda a: a if a.window is None else replace(a, window=tuple(side or 0 for side in a.window))),
        needs=("window",),
        bugs=("NVIDIA/TransformerEngine#629",),
    ),
    Mistake(
        "kv-lengths-plus-one",
        "reads a key past kv_lengths",
        ("MHA-LEN-1",),
        replacing(see_kv_lengths=lambda positions, lengths: positions <= lengths),
        needs=("kv_lengths",),
        bugs=("vllm-project/vllm-xpu-kernels PR#181",),
    ),
    Mistake(
        "kv-lengths-minus-one",
        "drops the last key of kv_lengths",
        ("MHA-LEN-1",),
        replacing(see_kv_lengths=lambda positions, lengths: positions < lengths - 1),
        needs=("kv_lengths",),
    ),
    Mistake(
        "kv-lengths-inverted",
        "shows the keys past kv_lengths and hides the others",
        ("MHA-LEN-1",),
        replacing(see_kv_lengths=lambda positions, lengths: positions >= lengths),
        needs=("kv_lengths",),
    ),
    Mistake(
        "kv-lengths-of-the-first-entry",
        "uses the first of kv_lengths for all batch entries",
        ("MHA-LEN-1",),
        replacing(see_kv_lengths=lambda positions, lengths: positions < lengths[:1]),
        needs=("kv_lengths",),
    ),
    Mistake(
        "kv-lengths-even",
        "rounds kv_lengths down to an even number",
        ("MHA-LEN-1",),
        replacing(see_kv_lengths=lambda positions, lengths: positions < lengths // 2 * 2),
        needs=("kv_lengths",),
        bugs=("NVIDIA/TransformerEngine#1930",),
    ),
    Mistake(
        "kv-lengths-of-0-full",
        "treats a kv_length of 0 as unlimited",
        ("MHA-LEN-1", "MHA-EMPTY-1"),
        replacing(see_kv_lengths=lambda positions, lengths: (positions < lengths) | (lengths == 0)),
        needs=("kv_lengths",),
        bugs=("Dao-AILab/flash-attention PR#2568",),
    ),
    Mistake(
        "q-lengths-plus-one",
        "computes a row past q_lengths",
        ("MHA-LEN-2",),
        replacing(see_q_lengths=lambda indices, lengths: indices <= lengths),
        needs=("q_lengths",),
    ),
    Mistake(
        "q-lengths-minus-one",
        "leaves out the last row of q_lengths",
        ("MHA-LEN-2",),
        replacing(see_q_lengths=lambda indices, lengths: indices < lengths - 1),
        needs=("q_lengths",),
    ),
    Mistake(
        "q-lengths-inverted",
        "computes the rows past q_lengths and not those before",
        ("MHA-LEN-2",),
        replacing(see_q_lengths=lambda indices, lengths: indices >= lengths),
        needs=("q_lengths",),
    ),
    Mistake(
        "q-lengths-of-the-first-entry",
        "uses the first of q_lengths for all batch entries",
        ("MHA-LEN-2",),
        replacing(see_q_lengths=lambda indices, lengths: indices < lengths[:1]),
        needs=("q_lengths",),
    ),
    Mistake(
        "segments-inverted",
        "shows the keys of other segments and hides those of the same segment",
        ("MHA-SEG-1",),
        replacing(see_segments=lambda q_ids, kv_ids: q_ids != kv_ids),
        needs=("q_segment_ids",),
    ),
    Mistake(
        "segments-before-shown",
        "shows the segments of smaller ids too",
        ("MHA-SEG-1",),
        replacing(see_segments=lambda q_ids, kv_ids: q_ids >= kv_ids),
        needs=("q_segment_ids",),
        bugs=("axolotl-ai-cloud/axolotl PR#3796",),
    ),
    Mistake(
        "segment-0-hidden",
        "treats the segment id 0 as padding",
        ("MHA-SEG-2",),
        replacing(see_segments=lambda q_ids, kv_ids: (q_ids == kv_ids) & (q_ids != 0)),
        needs=("q_segment_ids",),
    ),
    Mistake(
        "negative-segment-hidden",
        "treats negative segment ids as padding",
        ("MHA-SEG-2",),
        replacing(see_segments=lambda q_ids, kv_ids: (q_ids == kv_ids) & (q_ids >= 0)),
        needs=("q_segment_ids",),
    ),
    Mistake(
        "segments-restart-positions",
        "counts the positions of causal and window from the start of each segment",
        ("MHA-SEG-2",),
        changing(restarting_positions),
        needs=("q_segment_ids",),
    ),
)
