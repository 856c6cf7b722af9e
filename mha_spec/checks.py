"""The checks of arguments that the reference and every backend share.

Each check is a small function that cites its clause; `CHECKS` lists them in the order in which they run. A check looks
at Python values, shapes and dtypes, and at the contents of host data (numbers, sequences, NumPy arrays); it never reads
an array of another library, which may be traced or lie on a device (MHA-LEN-3).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from .arguments import DROPOUT_OPTIONS, PAIRWISE_OPTIONS, SHARDED_FUNCTIONS, WEIGHT_FUNCTIONS, options_of
from .array_checks import (
    check_alike,
    check_floating,
    check_integers,
    check_library,
    check_same_device,
    require_array,
    shape_of,
)
from .arrays import FLOATING, Array, dtype_name, library_of, lies_with, softmax_range, storage_of
from .errors import refuse_type, refuse_value
from .position_checks import check_alignment, check_chunk, check_lengths, check_prefix, check_window
from .scalars import as_float, check_flag, check_number, short_repr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .arguments import Arguments
    from .varlen_arguments import VarlenArguments

__all__ = [
    "CHECKS",
    "check",
    "check_cotangents",
    "check_dropout_mask",
    "check_flag",
    "check_halves",
    "check_library",
    "check_merge_cotangents",
    "check_numbers",
    "check_rate",
    "check_result",
    "check_same_device",
    "check_score_numbers",
    "check_sinks",
    "refuse_unknown",
]

LAYER_KEYWORDS = ("rotary", "positions", "norm_epsilon", "cache")
CUMULATIVE = ("cu_seqlens_q", "cu_seqlens_kv")
HALVES = ("output_a", "lse_a", "output_b", "lse_b")

OWN_KEYWORDS = {
    "attention": ("return_lse",),
    "attention_vjp": ("grad_lse",),
    **dict.fromkeys(SHARDED_FUNCTIONS, ("axis_name", "group", "layout", "return_lse")),
    "merge_attention": HALVES,
    "merge_attention_vjp": ("grad_output", *HALVES, "grad_lse"),
    "multi_head_attention": LAYER_KEYWORDS,
    "multi_head_attention_and_weights": LAYER_KEYWORDS,
    "multi_head_attention_weights": LAYER_KEYWORDS,
    "varlen_attention": (*CUMULATIVE, "return_lse"),
    "varlen_attention_vjp": (*CUMULATIVE, "grad_output", "grad_lse"),
}
"""The arguments of each function that are not options, for hints about misspelt keywords."""


def refuse_unknown(options: Mapping[str, object], function: str = "attention") -> None:
    """Refuse a keyword that `function` does not have, and suggest the nearest keyword (MHA-ARG-1, MHA-DROP-3)."""
    if not options:
        return
    known = options_of(function)
    for name in options:
        if name in known:
            continue
        if name in DROPOUT_OPTIONS and function in WEIGHT_FUNCTIONS:
            refuse_type("MHA-DROP-3", f"`{name}` is not an option of {function}: the weights are those before dropout.")
        if name in PAIRWISE_OPTIONS and function in SHARDED_FUNCTIONS:
            refuse_type(
                "MHA-SHARD-6",
                f"`{name}` is not an option of {function}: it would hold or draw a number for each pair of the whole "
                "sequence. Lengths, windows, chunks, prefixes and segments hide pairs over several devices.",
            )
        # The keyword of another framework, such as `group` in JAX, is not suggested again.
        names = [other for other in (*known, *OWN_KEYWORDS.get(function, ())) if other != name]
        near = get_close_matches(name, names, 1)
        kind = "options" if known else "arguments"
        hint = f"Did you mean `{near[0]}`?" if near else f"The {kind} are {', '.join(names)}."
        refuse_type("MHA-ARG-1", f"`{name}` is not an option of {function}. {hint}")


def check_tensors(a: Arguments) -> None:
    """Require rank-4 arrays of the same library, floating dtype and device (MHA-SHAPE-3)."""
    others = (a.key,) if a.value is None and a.weighs else (a.key, a.value)
    if _alike(a.query, *others):
        return
    tensors: dict[str, Array] = dict(zip(("query", "key", "value"), (a.query, *others), strict=False))
    expected = None
    for label, tensor in tensors.items():
        require_array(label, tensor, "MHA-SHAPE-3")
        check_alike(label, tensor, a.query, "query", "MHA-SHAPE-3")
        if tensor.ndim != 4:
            layout = {
                "query": "(batch, heads, q_len, qk_dim)",
                "key": "(batch, kv_heads, kv_len, qk_dim)",
                "value": "(batch, kv_heads, kv_len, v_dim)",
            }[label]
            refuse_value("MHA-SHAPE-1", f"`{label}` must have rank 4, {layout}, received shape={shape_of(tensor)}.")
        received = check_floating(label, tensor, "MHA-SHAPE-3")
        expected = expected or received
        if received != expected:
            refuse_type(
                "MHA-SHAPE-3",
                f"`{label}` must have the dtype of `query`, dtype={expected}, received dtype={received}. "
                "Convert either first: attention never promotes.",
            )


def _alike(query: Array, *others: Array) -> bool:
    """Tell quickly whether all are dense rank-4 arrays of the same class, dtype and device."""
    if library_of(query) is None or query.ndim != 4 or dtype_name(query) not in FLOATING:
        return False
    if storage_of(query) is not None:
        return False
    dtype = query.dtype
    return all(lies_with(other, query) and other.dtype == dtype and other.ndim == 4 for other in others)


def check_sizes(a: Arguments) -> None:
    """Require equal sizes of shared axes, and heads that are a multiple of kv_heads (MHA-SHAPE-3, MHA-HEAD-2)."""
    q, k = shape_of(a.query), shape_of(a.key)
    v = None if a.value is None else shape_of(a.value)
    if k[0] != q[0]:
        refuse_value(
            "MHA-SHAPE-3", f"`key` must have the batch of `query`, batch={q[0]}, received batch={k[0]} in shape={k}."
        )
    if k[3] != q[3]:
        refuse_value(
            "MHA-SHAPE-3",
            f"`key` must have the last axis of `query`, qk_dim={q[3]}, received qk_dim={k[3]} in shape={k}.",
        )
    if v is not None and v[:3] != k[:3]:
        refuse_value(
            "MHA-SHAPE-3",
            f"`value` must agree with `key` in (batch, kv_heads, kv_len)={k[:3]}, received shape={v}.",
        )
    if q[1] < 1 or q[3] < 1 or k[1] < 1 or (v is not None and v[3] < 1):
        _refuse_size_of_zero(q, k, v)
    if q[1] % k[1]:
        refuse_value(
            "MHA-HEAD-2",
            f"`query` must have heads that are a multiple of kv_heads={k[1]}, received heads={q[1]}. "
            "Are the axes in the order (batch, heads, length, size)?",
        )


def _refuse_size_of_zero(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None) -> None:
    sizes = [("query", q, 1, "heads"), ("query", q, 3, "qk_dim"), ("key", k, 1, "kv_heads")]
    sizes += [] if v is None else [("value", v, 3, "v_dim")]
    label, shape, axis = next((label, shape, axis) for label, shape, index, axis in sizes if shape[index] < 1)
    refuse_value(
        "MHA-SHAPE-2",
        f"`{label}` must have {axis}>=1, received shape={shape}. Only batch, q_len and kv_len may be 0.",
    )


def check_numbers(a: Arguments) -> None:
    """Require Python values in their range for causal, scale, softcap and dropout_rate (MHA-ARG-2)."""
    check_score_numbers(a)
    a.dropout_rate = check_rate(a.dropout_rate)


def check_score_numbers(a: Arguments | VarlenArguments) -> None:
    """Require Python values in their range for causal, scale and softcap (MHA-ARG-2)."""
    a.causal = check_flag("causal", a.causal)
    if a.scale is not None:
        a.scale = _scale(a)
    if a.softcap is not None:
        a.softcap = _softcap(a)


def _scale(a: Arguments | VarlenArguments) -> float:
    scale, (_, largest) = check_number("scale", a.scale), softmax_range(a.query)
    if not abs(scale) <= largest:
        refuse_value(
            "MHA-ARG-2",
            f"`scale` must be finite, |scale|<={largest:.2g}, received scale={short_repr(scale)}. "
            "None is 1/sqrt(qk_dim).",
        )
    return as_float(scale)


def _softcap(a: Arguments | VarlenArguments) -> float:
    softcap, (smallest, largest) = check_number("softcap", a.softcap), softmax_range(a.query)
    if not smallest <= softcap <= largest:
        refuse_value(
            "MHA-ARG-2",
            f"`softcap` must be finite, {smallest:.2g}<=softcap<={largest:.2g}, the normal numbers of the softmax's "
            f"type, received softcap={short_repr(softcap)}. None means no cap.",
        )
    return as_float(softcap)


def check_rate(rate: object) -> float:
    """Require a dropout_rate in its range, and return it as a Python number (MHA-ARG-2)."""
    number = check_number("dropout_rate", rate)
    if not 0 <= number < 1:
        refuse_value(
            "MHA-ARG-2", f"`dropout_rate` must be in 0<=dropout_rate<1, received dropout_rate={short_repr(number)}."
        )
    return as_float(number)


def check_pairwise(a: Arguments) -> None:
    """Require rank 4 and axes that broadcast to the scores; masks are boolean (MHA-MASK-2, MHA-BIAS-1)."""
    if a.mask is not None:
        _check_pairwise(a, "mask", a.mask, "MHA-MASK-2")
    if a.dropout_mask is not None:
        _check_pairwise(a, "dropout_mask", a.dropout_mask, "MHA-MASK-2")
    if a.bias is not None:
        _check_pairwise(a, "bias", a.bias, "MHA-BIAS-1")


def _check_pairwise(a: Arguments, label: str, array: Array, clause: str) -> None:
    check_alike(label, array, a.query, "query", clause, "an array of rank 4")
    _check_pairwise_dtype(label, dtype_name(array))
    (batch, heads, q_len, _), shape = a.query.shape, shape_of(array)
    scores = (batch, heads, q_len, a.kv_len)
    if len(shape) != 4 or not all(map(_broadcasts, shape, scores)):
        refuse_value(
            clause,
            f"`{label}` must have rank 4 and broadcast to (batch, heads, q_len, kv_len)={scores}, "
            f"received shape={shape}. Missing axes are not added: reshape it first.",
        )


def _broadcasts(size: int | None, full: int | None) -> bool:
    """Tell whether an axis broadcasts; a size that is unknown in a trace, None, is compared when the call runs."""
    return size == full or size == 1 or size is None


def _check_pairwise_dtype(label: str, name: str) -> None:
    if label == "bias":
        if name not in FLOATING:
            fix = " A boolean array is `mask`." if name == "bool" else ""
            refuse_type("MHA-BIAS-1", f"`bias` must have a dtype of {', '.join(FLOATING)}, received dtype={name}.{fix}")
    elif name != "bool":
        meaning = "True = may attend" if label == "mask" else "True = keep"
        fix = (
            " A float array that is added to the scores is `bias`."
            if name in FLOATING
            else " Compare it first: mask != 0."
        )
        refuse_type(
            "MHA-MASK-1" if label == "mask" else "MHA-DROP-1",
            f"`{label}` must be boolean ({meaning}), received dtype={name}.{fix}",
        )


def check_sinks(a: Arguments | VarlenArguments) -> None:
    """Require a floating logit for each query head (MHA-SINK-1)."""
    if a.sinks is None:
        return
    check_alike("sinks", a.sinks, a.query, "query", "MHA-SINK-1")
    check_floating("sinks", a.sinks, "MHA-SINK-1")
    if shape_of(a.sinks) != (a.heads,):
        refuse_value(
            "MHA-SINK-1", f"`sinks` must have shape (heads,)={(a.heads,)}, received shape={shape_of(a.sinks)}."
        )


def check_segments(a: Arguments) -> None:
    """Require integer segment ids for both queries and keys, or for neither (MHA-SEG-1)."""
    if a.q_segment_ids is None and a.kv_segment_ids is None:
        return
    if a.q_segment_ids is None or a.kv_segment_ids is None:
        present, missing = ("q", "kv") if a.kv_segment_ids is None else ("kv", "q")
        refuse_value(
            "MHA-SEG-1",
            f"`{missing}_segment_ids` must be given with `{present}_segment_ids`, received "
            f"{missing}_segment_ids=None. In self-attention both are the same array.",
        )
    for side, ids, tensor in (("q", a.q_segment_ids, a.query), ("kv", a.kv_segment_ids, a.key)):
        shape = (a.batch, tensor.shape[2])  # That of a shard, in a call over several devices (MHA-SHARD-2).
        check_integers(f"{side}_segment_ids", ids, a.query, shape, f"(batch, {side}_len)", "MHA-SEG-1")


CHECKS: tuple[Callable[[Arguments], None], ...] = (
    check_tensors,
    check_sizes,
    check_numbers,
    check_window,
    check_chunk,
    check_pairwise,
    check_sinks,
    check_lengths,
    check_segments,
    check_alignment,
    check_prefix,
)


def check(a: Arguments, checks: Iterable[Callable[[Arguments], None]] = CHECKS) -> Arguments:
    """Raise ArgumentValueError or ArgumentTypeError for the first error in `a`, else return `a`.

    The checks replace NumPy scalars by Python values, since a float64 scalar would widen a float32 result (MHA-ARG-2,
    MHA-SOFTMAX-2).
    """
    for run in checks:
        run(a)
    return a


def check_dropout_mask(a: Arguments) -> None:
    """Require dropout_mask with a dropout_rate: the reference and attention_vjp draw no mask (MHA-DROP-4)."""
    if a.dropout_rate > 0 and a.dropout_mask is None:
        refuse_value(
            "MHA-DROP-4",
            f"`dropout_mask` must be given with dropout_rate={a.dropout_rate}: "
            "the reference and attention_vjp draw no random numbers.",
        )


def check_cotangents(a: Arguments, grad_output: Array, grad_lse: Array | None) -> None:
    """Require floating cotangents of the shapes of the output and of lse (MHA-VJP-7)."""
    rows = shape_of(a.query)[:3]
    check_result("MHA-VJP-7", "grad_output", grad_output, "query", a.query, (*rows, a.value.shape[3]))
    if grad_lse is not None:
        check_result("MHA-VJP-7", "grad_lse", grad_lse, "query", a.query, rows)


def check_merge_cotangents(grad_output: Array, grad_lse: Array | None, output_a: Array) -> None:
    """Require floating cotangents of the shapes of the merged output and lse (MHA-MERGE-7)."""
    shape = shape_of(output_a)
    check_result("MHA-MERGE-7", "grad_output", grad_output, "output_a", output_a, shape)
    if grad_lse is not None:
        check_result("MHA-MERGE-7", "grad_lse", grad_lse, "output_a", output_a, shape[:-1])


def check_halves(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> None:
    """Require halves of floating arrays with equal shapes and dtypes (MHA-MERGE-4)."""
    require_array("output_a", output_a, "MHA-MERGE-4")
    if output_a.ndim != 4:
        refuse_value(
            "MHA-MERGE-4",
            f"`output_a` must have rank 4, (batch, heads, q_len, v_dim), received shape={shape_of(output_a)}.",
        )
    halves = {"output_a": output_a, "lse_a": lse_a, "output_b": output_b, "lse_b": lse_b}
    for label, array in halves.items():
        shape = shape_of(output_a) if label.startswith("output") else shape_of(output_a)[:-1]
        check_result("MHA-MERGE-4", label, array, "output_a", output_a, shape)
    for label, first in (("output_b", output_a), ("lse_b", lse_a)):
        if dtype_name(halves[label]) != dtype_name(first):
            refuse_type(
                "MHA-MERGE-4",
                f"`{label}` must have the dtype of the other half, dtype={dtype_name(first)}, "
                f"received dtype={dtype_name(halves[label])}.",
            )


def check_result(clause: str, label: str, array: Array, other: str, like: Array, shape: tuple[int, ...]) -> None:
    """Require a floating array of a shape, and of the library and device of `like`."""
    check_alike(label, array, like, other, clause)
    check_floating(label, array, clause)
    if shape_of(array) != shape:
        refuse_value(clause, f"`{label}` must have shape={shape}, received shape={shape_of(array)}.")
