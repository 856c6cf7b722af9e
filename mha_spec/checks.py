"""The validation that the reference and every backend share.

Each check is a small function that cites its clause; `CHECKS` lists them in the order in which they speak. A check
looks at Python values, shapes and dtypes, and at the contents of host data (numbers, sequences, NumPy arrays); it never
reads an array of another library, which may be traced or lie on a device (MHA-LEN-3).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import numpy

from .arguments import DROPOUT_OPTIONS, WEIGHT_FUNCTIONS, options_of
from .arrays import FLOATING, Array, device_of, dtype_name, host_integers, library_of, softmax_dtype_name
from .errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .arguments import Arguments

__all__ = [
    "CHECKS",
    "check",
    "check_cotangents",
    "check_dropout_mask",
    "check_entries",
    "check_halves",
    "check_offset",
    "check_rate",
    "of_one_class",
    "refuse_ambiguity",
    "refuse_unknown",
]

LARGEST_POSITION = 2**30
"""Offsets, lengths and windows are at most this in magnitude, so that int32 positions cannot overflow."""

LARGEST_NUMBER = {name: float(numpy.finfo(name).max) for name in ("float32", "float64")}
"""The largest scale and soft cap that each type of the softmax holds."""

LAYER_KEYWORDS = ("rotary", "norm_epsilon", "cache")

OWN_KEYWORDS = {
    "attention": ("return_lse",),
    "attention_vjp": ("grad_lse",),
    "merge_attention": ("output_a", "lse_a", "output_b", "lse_b"),
    "multi_head_attention": LAYER_KEYWORDS,
    "multi_head_attention_and_weights": LAYER_KEYWORDS,
    "multi_head_attention_weights": LAYER_KEYWORDS,
}
"""What a function may have been meant to get beside the options that it shares."""


def _value_error(clause: str, message: str) -> NoReturn:
    raise ArgumentValueError(f"{message} [{clause}]")


def _type_error(clause: str, message: str) -> NoReturn:
    raise ArgumentTypeError(f"{message} [{clause}]")


def refuse_unknown(options: Mapping[str, object], function: str = "attention") -> None:
    """Raise for a keyword that `function` does not have, with the nearest name that exists (MHA-ARG-1, MHA-DROP-3)."""
    known = options_of(function)
    for name in options:
        if name in known:
            continue
        if name in DROPOUT_OPTIONS and function in WEIGHT_FUNCTIONS:
            _type_error("MHA-DROP-3", f"`{name}` is not an option of {function}: the weights are those before dropout.")
        names = [*known, *OWN_KEYWORDS.get(function, ())]
        near = get_close_matches(name, names, 1)
        kind = "options" if known else "arguments"
        hint = f"Did you mean `{near[0]}`?" if near else f"The {kind} are {', '.join(names)}."
        _type_error("MHA-ARG-1", f"`{name}` is not an option of {function}. {hint}")


def check_tensors(a: Arguments) -> None:
    """Query, key and value are rank-4 arrays of one library, one floating dtype and one device (MHA-SHAPE-3)."""
    if _alike(a.query, a.key, a.value):
        return
    library = library_of(a.query)
    name = None
    tensors = {"query": a.query, "key": a.key} | ({} if a.value is None else {"value": a.value})
    for label, tensor in tensors.items():
        if library_of(tensor) is None:
            _type_error("MHA-SHAPE-3", f"`{label}` must be an array, received {type(tensor).__name__}.")
        _check_same_library(label, tensor, a.query, library)
        if tensor.ndim != 4:
            layout = (
                "(batch, heads, q_len, qk_dim)"
                if label == "query"
                else f"(batch, kv_heads, kv_len, {'v' if label == 'value' else 'qk'}_dim)"
            )
            _value_error("MHA-SHAPE-1", f"`{label}` must have rank 4, {layout}, received shape={_shape(tensor)}.")
        received = dtype_name(tensor)
        if received not in FLOATING:
            _type_error(
                "MHA-SHAPE-3", f"`{label}` must have a dtype of {', '.join(FLOATING)}, received dtype={received}."
            )
        name = name or received
        if received != name:
            _type_error(
                "MHA-SHAPE-3",
                f"`{label}` must have the dtype of `query`, dtype={name}, received dtype={received}. "
                "Convert one of them first: attention never promotes.",
            )


def of_one_class(query: Array, key: Array, value: Array) -> bool:
    """Whether all are arrays of one class, and so of one library (MHA-ARG-4)."""
    return type(query) is type(key) is type(value) and library_of(query) is not None


def _alike(query: Array, key: Array, value: Array) -> bool:
    """Whether one look is enough: arrays of one class, dtype and device, and of rank 4."""
    return (
        of_one_class(query, key, value)
        and query.dtype == key.dtype == value.dtype
        and dtype_name(query) in FLOATING
        and query.ndim == key.ndim == value.ndim == 4
        and device_of(query) == device_of(key) == device_of(value)
    )


def check_sizes(a: Arguments) -> None:
    """Batch, kv_heads, kv_len and qk_dim agree, and heads is a multiple of kv_heads (MHA-SHAPE-3, MHA-HEAD-2)."""
    q, k = _shape(a.query), _shape(a.key)
    v = None if a.value is None else _shape(a.value)
    if k[0] != q[0]:
        _value_error(
            "MHA-SHAPE-3", f"`key` must have the batch of `query`, batch={q[0]}, received batch={k[0]} in shape={k}."
        )
    if k[3] != q[3]:
        _value_error(
            "MHA-SHAPE-3",
            f"`key` must have the last axis of `query`, qk_dim={q[3]}, received qk_dim={k[3]} in shape={k}.",
        )
    if v is not None and v[:3] != k[:3]:
        _value_error(
            "MHA-SHAPE-3",
            f"`value` must agree with `key` in (batch, kv_heads, kv_len)={k[:3]}, received shape={v}.",
        )
    for size, label, shape, axis in (
        (q[1], "query", q, "heads"),
        (q[3], "query", q, "qk_dim"),
        (k[1], "key", k, "kv_heads"),
    ):
        if size < 1:
            _value_error(
                "MHA-SHAPE-2",
                f"`{label}` must have {axis}>=1, received shape={shape}. Only batch, q_len and kv_len may be 0.",
            )
    if v is not None and v[3] < 1:
        _value_error("MHA-SHAPE-2", f"`value` must have v_dim>=1, received shape={v}.")
    if q[1] % k[1]:
        _value_error(
            "MHA-HEAD-2",
            f"`query` must have heads that are a multiple of kv_heads={k[1]}, received heads={q[1]}. "
            "Are the axes in the order (batch, heads, length, size)?",
        )


def check_numbers(a: Arguments) -> None:
    """Scale, softcap, causal and dropout_rate are Python values in their range (MHA-ARG-2)."""
    _require_bool("causal", a.causal)
    if a.scale is not None and not abs(_number("scale", a.scale)) <= _largest_number(a):
        _value_error(
            "MHA-ARG-2",
            f"`scale` must be finite, |scale|<={_largest_number(a):.2g}, received scale={a.scale!r}. "
            "None is 1/sqrt(qk_dim).",
        )
    if a.softcap is not None and not 0 < _number("softcap", a.softcap) <= _largest_number(a):
        _value_error(
            "MHA-ARG-2",
            f"`softcap` must be finite, softcap>0 and softcap<={_largest_number(a):.2g}, "
            f"received softcap={a.softcap!r}. None is no cap.",
        )
    check_rate(a.dropout_rate)


def check_rate(rate: object) -> None:
    """dropout_rate is a Python number in its range (MHA-ARG-2)."""
    if not 0 <= _number("dropout_rate", rate) < 1:
        _value_error("MHA-ARG-2", f"`dropout_rate` must be in 0<=dropout_rate<1, received dropout_rate={rate!r}.")


def _largest_number(a: Arguments) -> float:
    return LARGEST_NUMBER[softmax_dtype_name(dtype_name(a.query))]


def check_window(a: Arguments) -> None:
    """A window is a pair (left, right) of counts of positions, each None or 0..2^30 (MHA-ARG-3)."""
    if a.window is None:
        return
    for side, bound in zip(("left", "right"), _pair("window", a.window), strict=True):
        if bound is None:
            continue
        if not _is_integer(bound):
            _type_error("MHA-ARG-3", f"`window` must hold integers or None, received {side}={bound!r}.")
        if not 0 <= bound <= LARGEST_POSITION:
            _value_error(
                "MHA-ARG-3",
                f"`window` must have 0<={side}<=2**30 or {side}=None for no bound, received {side}={bound}.",
            )


def check_pairwise(a: Arguments) -> None:
    """Mask, dropout_mask and bias have rank 4 and broadcast to the scores; the masks are boolean (MHA-MASK-2)."""
    for label, array in (("mask", a.mask), ("dropout_mask", a.dropout_mask), ("bias", a.bias)):
        if array is None:
            continue
        clause = "MHA-BIAS-1" if label == "bias" else "MHA-MASK-2"
        if library_of(array) is None:
            _type_error(clause, f"`{label}` must be an array of rank 4, received {type(array).__name__}.")
        _check_same_library(label, array, a.query, library_of(a.query))
        _check_pairwise_dtype(label, dtype_name(array))
        scores = (a.batch, a.heads, a.q_len, a.kv_len)
        shape = _shape(array)
        if len(shape) != 4 or any(size not in (1, full) for size, full in zip(shape, scores, strict=True)):
            _value_error(
                clause,
                f"`{label}` must have rank 4 and broadcast to (batch, heads, q_len, kv_len)={scores}, "
                f"received shape={shape}. Missing axes are not added: reshape it first.",
            )


def _check_pairwise_dtype(label: str, name: str) -> None:
    if label == "bias":
        if name not in FLOATING:
            fix = " A boolean array is `mask`." if name == "bool" else ""
            _type_error("MHA-BIAS-1", f"`bias` must have a dtype of {', '.join(FLOATING)}, received dtype={name}.{fix}")
    elif name != "bool":
        meaning = "True = may attend" if label == "mask" else "True = keep"
        fix = (
            " A float array that is added to the scores is `bias`."
            if name in FLOATING
            else " Compare it first: mask != 0."
        )
        _type_error(
            "MHA-MASK-1" if label == "mask" else "MHA-DROP-1",
            f"`{label}` must be boolean ({meaning}), received dtype={name}.{fix}",
        )


def check_sinks(a: Arguments) -> None:
    """Sinks are one floating logit per query head (MHA-SINK-1)."""
    if a.sinks is None:
        return
    if library_of(a.sinks) is None:
        _type_error("MHA-SINK-1", f"`sinks` must be an array, received {type(a.sinks).__name__}.")
    _check_same_library("sinks", a.sinks, a.query, library_of(a.query))
    if dtype_name(a.sinks) not in FLOATING:
        _type_error(
            "MHA-SINK-1", f"`sinks` must have a dtype of {', '.join(FLOATING)}, received dtype={dtype_name(a.sinks)}."
        )
    if _shape(a.sinks) != (a.heads,):
        _value_error("MHA-SINK-1", f"`sinks` must have shape (heads,)={(a.heads,)}, received shape={_shape(a.sinks)}.")


def check_lengths(a: Arguments) -> None:
    """Lengths and offsets are integers, one per batch entry; values on the host are within their range (MHA-LEN-3)."""
    if a.q_lengths is None and a.kv_lengths is None and a.q_offset is None:
        return
    check_entries("q_lengths", a.q_lengths, a.query, 0, a.q_len, "q_len")
    check_entries("kv_lengths", a.kv_lengths, a.query, 0, a.kv_len, "kv_len")
    check_offset(a.q_offset, a.query)


def check_offset(offset: Array | Sequence[int] | int | None, query: Array) -> None:
    """An offset is one integer, or one for each batch entry (MHA-POS-1, MHA-LEN-3)."""
    check_entries("q_offset", offset, query, -LARGEST_POSITION, LARGEST_POSITION, "2**30")


def check_entries(
    label: str, value: Array | Sequence[int] | int | None, query: Array, low: int, high: int | None, high_name: str
) -> None:
    """One integer for each batch entry of `query`, within its range where it is host data (MHA-LEN-3).

    A size that is not known when a call is traced, None, bounds nothing.
    """
    if value is None:
        return
    if not (label == "q_offset" and _is_integer(value)):
        _check_integer_array(label, value, query, (query.shape[0],), "(batch,)")
    for number in host_integers(value) or ():
        if number < low or (high is not None and number > high):
            limits = f"{low}<={label}<={high_name}" + (f"={high}" if high_name != "2**30" else "")
            _value_error("MHA-LEN-3", f"`{label}` must be in {limits}, received {number}.")


def check_segments(a: Arguments) -> None:
    """Segment ids are integers for queries and for keys, both or none (MHA-SEG-1)."""
    if (a.q_segment_ids is None) != (a.kv_segment_ids is None):
        given, missing = ("q", "kv") if a.kv_segment_ids is None else ("kv", "q")
        _value_error(
            "MHA-SEG-1",
            f"`{missing}_segment_ids` must be given with `{given}_segment_ids`, received {missing}_segment_ids=None. "
            "In self-attention both are the same array.",
        )
    if a.q_segment_ids is not None:
        _check_integer_array("q_segment_ids", a.q_segment_ids, a.query, (a.batch, a.q_len), "(batch, q_len)")
        _check_integer_array("kv_segment_ids", a.kv_segment_ids, a.query, (a.batch, a.kv_len), "(batch, kv_len)")


def check_alignment(a: Arguments) -> None:
    """Where positions matter and lengths differ, the causal diagonal must be said, never guessed (MHA-POS-2)."""
    if a.positional and a.q_offset is None:
        refuse_ambiguity("causal=True" if a.causal else f"window={a.window}", a.q_len, a.kv_len, a.kv_lengths)


def refuse_ambiguity(user: str, q_len: int, kv_len: int, kv_lengths: Array | Sequence[int] | None) -> None:
    """Raise unless the positions that `user` speaks of are known without an offset (MHA-POS-2)."""
    if q_len == kv_len and kv_lengths is None:
        return
    readings = ["q_offset=0 (upper left, as PyTorch and JAX)"]
    if q_len != kv_len:
        readings.append(f"q_offset={kv_len - q_len} (lower right, kv_len - q_len, as FlashAttention and MLX)")
    if kv_lengths is not None:
        readings.append("q_offset=kv_lengths - q_len (the last valid keys, as ONNX with a cache)")
    why = f"q_len={q_len} and kv_len={kv_len} differ" if q_len != kv_len else "kv_lengths are given"
    _value_error(
        "MHA-POS-2",
        f"`q_offset` must be given with {user} where {why}: the diagonal is ambiguous. "
        f"Pass {' or '.join(readings)}; received q_offset=None.",
    )


CHECKS: tuple[Callable[[Arguments], None], ...] = (
    check_tensors,
    check_sizes,
    check_numbers,
    check_window,
    check_pairwise,
    check_sinks,
    check_lengths,
    check_segments,
    check_alignment,
)


def check(a: Arguments, checks: Iterable[Callable[[Arguments], None]] = CHECKS) -> Arguments:
    """Raise ArgumentValueError or ArgumentTypeError for the first thing wrong with `a`, else give it back.

    NumPy's scalars become Python's: a float64 among them would widen a float32 result (MHA-SOFTMAX-2).
    """
    for one in checks:
        one(a)
    a.scale = None if a.scale is None else float(a.scale)
    a.softcap = None if a.softcap is None else float(a.softcap)
    a.dropout_rate = float(a.dropout_rate)
    if a.window is not None:
        left, right = (None if bound is None else int(bound) for bound in a.window)
        a.window = (left, right)
    if _is_integer(a.q_offset):
        a.q_offset = int(a.q_offset)
    return a


def check_dropout_mask(a: Arguments) -> None:
    """Raise where a mask would have to be drawn: the reference and attention_vjp draw nothing (MHA-DROP-4)."""
    if a.dropout_rate > 0 and a.dropout_mask is None:
        _value_error(
            "MHA-DROP-4",
            f"`dropout_mask` must be given with dropout_rate={a.dropout_rate}: "
            "the reference and attention_vjp draw no random numbers.",
        )


def check_cotangents(a: Arguments, grad_output: Array, grad_lse: Array | None) -> None:
    """Raise unless grad_output is a floating array of the output's shape, and grad_lse of that of lse (MHA-VJP-7)."""
    rows = tuple(a.query.shape[:3])
    expected: dict[str, tuple[Array, tuple[int, ...]]] = {"grad_output": (grad_output, (*rows, a.value.shape[3]))}
    if grad_lse is not None:
        expected["grad_lse"] = (grad_lse, rows)
    for label, (array, shape) in expected.items():
        _check_floating("MHA-VJP-7", label, array, "query", a.query, shape)


def check_halves(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> None:
    """Raise unless both halves are floating arrays of fitting shapes, and of the dtypes of half a (MHA-MERGE-4)."""
    halves = {"output_a": output_a, "lse_a": lse_a, "output_b": output_b, "lse_b": lse_b}
    for label, array in halves.items():
        if library_of(array) is None:
            _type_error("MHA-MERGE-4", f"`{label}` must be an array, received {type(array).__name__}.")
        shape = _shape(output_a) if label.startswith("output") else _shape(output_a)[:-1]
        _check_floating("MHA-MERGE-4", label, array, "output_a", output_a, shape)
    for label, first in (("output_b", output_a), ("lse_b", lse_a)):
        if dtype_name(halves[label]) != dtype_name(first):
            _type_error(
                "MHA-MERGE-4",
                f"`{label}` must have the dtype of the other half, dtype={dtype_name(first)}, "
                f"received dtype={dtype_name(halves[label])}.",
            )


def _check_floating(clause: str, label: str, array: Array, other: str, like: Array, shape: tuple[int, ...]) -> None:
    if library_of(array) != library_of(like):
        _type_error(
            clause,
            f"`{label}` must be an array of {library_of(like)}, as `{other}` is, received {type(array).__name__}.",
        )
    if dtype_name(array) not in FLOATING:
        _type_error(
            clause, f"`{label}` must have a dtype of {', '.join(FLOATING)}, received dtype={dtype_name(array)}."
        )
    if _shape(array) != shape:
        _value_error(clause, f"`{label}` must have shape={shape}, received shape={_shape(array)}.")
    _check_same_device(label, array, other, like)


def _shape(array: Array) -> tuple[int, ...]:
    return tuple(array.shape)


def _require_bool(label: str, value: object) -> None:
    if not isinstance(value, bool):
        _type_error(
            "MHA-ARG-2", f"`{label}` must be True or False, received {label}={value!r} of type {type(value).__name__}."
        )


def _is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, (list, tuple))


def _pair(label: str, value: object) -> Sequence[object]:
    if _is_sequence(value) and len(value) == 2:
        return value
    _type_error(
        "MHA-ARG-3",
        f"`{label}` must be a pair (left, right), received {label}={value!r}. "
        f"A causal window of n keys is {label}=(n - 1, 0).",
    )


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, numpy.integer)) and not isinstance(value, bool)


def _number(label: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _type_error(
            "MHA-ARG-2",
            f"`{label}` must be a Python number, received {label}={value!r} of type {type(value).__name__}.",
        )
    return value


def _check_same_library(label: str, array: Array, query: Array, library: str | None) -> None:
    received = library_of(array)
    if received != library:
        _type_error(
            "MHA-ARG-4",
            f"`{label}` must be an array of {library}, as `query` is, received an array of {received}. "
            "Convert one of them first.",
        )
    _check_same_device(label, array, "query", query)


def _check_same_device(label: str, array: Array, other: str, like: Array) -> None:
    expected, received = device_of(like), device_of(array)
    if None not in (expected, received) and received != expected:
        _value_error(
            "MHA-ARG-4", f"`{label}` must be on the device of `{other}`, device={expected}, received device={received}."
        )


def _check_integer_array(
    label: str, value: Array | Sequence[int] | int, query: Array, shape: tuple[int, ...], axes: str
) -> None:
    clause = "MHA-SEG-1" if label.endswith("segment_ids") else "MHA-LEN-3"
    if library_of(value) is None:
        if len(shape) != 1:
            _type_error(clause, f"`{label}` must be an integer array of shape {axes}={shape}, received {value!r}.")
        if not _is_sequence(value) or not all(_is_integer(number) for number in value):
            _type_error(clause, f"`{label}` must hold integers of shape {axes}={shape}, received {label}={value!r}.")
        received: tuple[int, ...] = (len(value),)
    else:
        if library_of(value) != "numpy":
            _check_same_library(label, value, query, library_of(query))
        if not dtype_name(value).startswith(("int", "uint")):
            _type_error(clause, f"`{label}` must be an integer array, received dtype={dtype_name(value)}.")
        received = _shape(value)
    if received != shape:
        _value_error(clause, f"`{label}` must have shape {axes}={shape}, received shape={received}.")
