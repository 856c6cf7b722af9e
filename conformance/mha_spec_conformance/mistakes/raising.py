"""Mistakes that return a result for a call that must raise an error."""

from __future__ import annotations

from mha_spec import checks, position_checks
from mha_spec.arguments import OPTIONS

from .mistake import MERGE, MERGE_VJP, VJP, Mistake, replacing, unchecked

__all__ = ["RAISING"]

RAISING = (
    Mistake(
        "options-unknown-swallowed",
        "accepts any keyword and ignores the unknown ones",
        ("MHA-ARG-1",),
        replacing(check_options=lambda options, function: {name: options[name] for name in options if name in OPTIONS}),
        bugs=("flashinfer-ai/flashinfer#1193", "sgl-project/sglang#33915"),
    ),
    Mistake(
        "tensors-unchecked",
        "accepts query, key and value of any rank and of different dtypes",
        ("MHA-SHAPE-3",),
        unchecked(checks.check_tensors),
    ),
    Mistake(
        "sizes-unchecked",
        "accepts sizes that do not fit together",
        ("MHA-SHAPE-2", "MHA-SHAPE-3", "MHA-HEAD-2"),
        unchecked(checks.check_sizes),
    ),
    Mistake(
        "numbers-unchecked",
        "accepts scale, softcap and dropout_rate outside their ranges",
        ("MHA-ARG-2",),
        unchecked(checks.check_numbers),
    ),
    Mistake(
        "window-unchecked",
        "accepts a window that is not a pair of counts",
        ("MHA-ARG-3",),
        unchecked(position_checks.check_window),
    ),
    Mistake(
        "chunk-unchecked",
        "accepts a chunk that is not a count of positions",
        ("MHA-WINDOW-3",),
        unchecked(position_checks.check_chunk),
        needs=("chunk",),
    ),
    Mistake(
        "prefix-unchecked",
        "accepts prefix_lengths that have no effect",
        ("MHA-CAUSAL-2",),
        unchecked(position_checks.check_prefix),
        needs=("prefix_lengths",),
    ),
    Mistake(
        "masks-unchecked",
        "accepts masks and biases of any dtype and of any shape that broadcasts",
        ("MHA-MASK-1", "MHA-MASK-2", "MHA-BIAS-1", "MHA-DROP-1"),
        unchecked(checks.check_pairwise),
        bugs=("pytorch/pytorch#21518",),
    ),
    Mistake(
        "sinks-unchecked",
        "accepts sinks of any shape that broadcasts",
        ("MHA-SINK-1",),
        unchecked(checks.check_sinks),
    ),
    Mistake(
        "lengths-unchecked",
        "accepts lengths and starts beyond the buffer and below 0",
        ("MHA-LEN-3", "MHA-LEN-5"),
        unchecked(position_checks.check_lengths),
        bugs=("facebookresearch/xformers#1122",),
    ),
    Mistake(
        "segments-unchecked",
        "accepts segment ids of the queries without those of the keys",
        ("MHA-SEG-1",),
        unchecked(checks.check_segments),
    ),
    Mistake(
        "alignment-guessed",
        "puts the causal diagonal at the upper left if q_offset is missing and ambiguous",
        ("MHA-POS-2",),
        unchecked(position_checks.check_alignment),
        bugs=("pytorch/pytorch#108108", "NVIDIA/cudnn-frontend PR#493"),
    ),
    Mistake(
        "cotangents-unchecked",
        "accepts a grad_output or grad_lse of any shape that broadcasts",
        ("MHA-VJP-7",),
        replacing(check_cotangents=lambda a, grad_output, grad_lse: None),
        functions=VJP,
    ),
    Mistake(
        "dropout-rate-without-mask-ignored",
        "accepts a dropout rate without a dropout mask and drops nothing",
        ("MHA-DROP-4",),
        replacing(check_dropout_mask=lambda a: None),
        needs=("dropout_rate",),
    ),
    Mistake(
        "merge-unchecked",
        "accepts halves of any shapes that broadcast",
        ("MHA-MERGE-4",),
        replacing(check_halves=lambda output_a, lse_a, output_b, lse_b: None),
        functions=MERGE,
    ),
    Mistake(
        "merge-cotangents-unchecked",
        "accepts cotangents of any shape that broadcasts to the merged result",
        ("MHA-MERGE-7",),
        replacing(check_merge_cotangents=lambda grad_output, grad_lse, output: None),
        functions=MERGE_VJP,
    ),
)
