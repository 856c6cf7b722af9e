"""The validation that the reference and every backend share.

Each check is a small function that cites its clause; `CHECKS` lists them in the order in which they speak. A check
looks at Python values, shapes and dtypes, and at the contents of host data (numbers, sequences, NumPy arrays); it never
reads an array of another library, which may be traced or lie on a device (MHA-LEN-3).
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn, TypeGuard

from .arguments import OPTIONS
from .arrays import FLOATING, Array, device_of, dtype_name, host_integers, library_of
from .errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .arguments import Arguments

__all__ = [
    "CHECKS",
    "check",
    "check_cotangents",
    "check_dropout_mask",
    "check_halves",
    "check_weight_options",
    "refuse_unknown",
]

LARGEST_POSITION = 2**30
"""Offsets, lengths and windows are at most this in magnitude, so that int32 positions cannot overflow."""


def _value_error(clause: str, message: str) -> NoReturn:
    raise ArgumentValueError(f"{message} [{clause}]")


def _type_error(clause: str, message: str) -> NoReturn:
    raise ArgumentTypeError(f"{message} [{clause}]")


def refuse_unknown(options: Mapping[str, object], known: Iterable[str] = OPTIONS) -> None:
    """Raise for a keyword that the function does not have, with the nearest name that exists (MHA-ARG-1)."""
    for name in options.keys() - known:
        near = get_close_matches(name, list(known), 1)
        hint = f"Did you mean `{near[0]}`?" if near else f"The options are {', '.join(known)}."
        _type_error("MHA-ARG-1", f"`{name}` is not an option of attention. {hint}")


def check_tensors(a: Arguments) -> None:
    """Query, key and value are rank-4 arrays of one library, one floating dtype and one device (MHA-SHAPE-3)."""
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


def check_sizes(a: Arguments) -> None:
    """Batch, kv_heads, kv_len and qk_dim agree, and heads is a multiple of kv_heads (MHA-SHAPE-3, MHA-HEAD-2)."""
    q, k = _shape(a.query), _shape(a.key)
    if k[0] != q[0]:
        _value_error(
            "MHA-SHAPE-3", f"`key` must have the batch of `query`, batch={q[0]}, received batch={k[0]} in shape={k}."
        )
    if k[3] != q[3]:
        _value_error(
            "MHA-SHAPE-3",
            f"`key` must have the last axis of `query`, qk_dim={q[3]}, received qk_dim={k[3]} in shape={k}.",
        )
    if a.value is not None and _shape(a.value)[:3] != k[:3]:
        _value_error(
            "MHA-SHAPE-3",
            f"`value` must agree with `key` in (batch, kv_heads, kv_len)={k[:3]}, received shape={_shape(a.value)}.",
        )
    for label, tensor, axes in (("query", q, {"heads": 1, "qk_dim": 3}), ("key", k, {"kv_heads": 1})):
        for axis, index in axes.items():
            if tensor[index] < 1:
                _value_error(
                    "MHA-SHAPE-2",
                    f"`{label}` must have {axis}>=1, received shape={tensor}. Only batch, q_len and kv_len may be 0.",
                )
    if a.value is not None and _shape(a.value)[3] < 1:
        _value_error("MHA-SHAPE-2", f"`value` must have v_dim>=1, received shape={_shape(a.value)}.")
    if q[1] % k[1]:
        _value_error(
            "MHA-HEAD-2",
            f"`query` must have heads that are a multiple of kv_heads={k[1]}, received heads={q[1]}. "
            "Are the axes in the order (batch, heads, length, size)?",
        )


def check_numbers(a: Arguments) -> None:
    """Scale, softcap, causal and dropout_rate are Python values in their range (MHA-ARG-2)."""
    _require_bool("causal", a.causal)
    if a.scale is not None and not (_is_number("scale", a.scale) and math.isfinite(a.scale)):
        _value_error("MHA-ARG-2", f"`scale` must be finite, received scale={a.scale!r}. None is 1/sqrt(qk_dim).")
    if a.softcap is not None and not (_is_number("softcap", a.softcap) and math.isfinite(a.softcap) and a.softcap > 0):
        _value_error(
            "MHA-ARG-2", f"`softcap` must be finite and softcap>0, received softcap={a.softcap!r}. None is no cap."
        )
    if not (_is_number("dropout_rate", a.dropout_rate) and 0 <= a.dropout_rate < 1):
        _value_error(
            "MHA-ARG-2", f"`dropout_rate` must be in 0<=dropout_rate<1, received dropout_rate={a.dropout_rate!r}."
        )


def check_window(a: Arguments) -> None:
    """A window is a pair (left, right) of counts of positions, each None or 0..2^30 (MHA-ARG-3)."""
    if a.window is None:
        return
    for side, bound in zip(("left", "right"), _pair("window", a.window), strict=True):
        if bound is None:
            continue
        if isinstance(bound, bool) or not isinstance(bound, int):
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
        if library_of(array) is None:
            _type_error("MHA-MASK-2", f"`{label}` must be an array of rank 4, received {type(array).__name__}.")
        _check_same_library(label, array, a.query, library_of(a.query))
        _check_pairwise_dtype(label, dtype_name(array))
        scores = (a.batch, a.heads, a.q_len, a.kv_len)
        shape = _shape(array)
        if len(shape) != 4 or any(size not in (1, full) for size, full in zip(shape, scores, strict=True)):
            _value_error(
                "MHA-MASK-2",
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
    ranges = (
        ("q_lengths", a.q_lengths, 0, a.q_len, "q_len"),
        ("kv_lengths", a.kv_lengths, 0, a.kv_len, "kv_len"),
        ("q_offset", a.q_offset, -LARGEST_POSITION, LARGEST_POSITION, "2**30"),
    )
    for label, value, low, high, high_name in ranges:
        if value is None:
            continue
        scalar = label == "q_offset" and isinstance(value, int) and not isinstance(value, bool)
        if not scalar:
            _check_integer_array(label, value, a, (a.batch,), "(batch,)")
        for number in host_integers(value) or ():
            if not low <= number <= high:
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
        _check_integer_array("q_segment_ids", a.q_segment_ids, a, (a.batch, a.q_len), "(batch, q_len)")
        _check_integer_array("kv_segment_ids", a.kv_segment_ids, a, (a.batch, a.kv_len), "(batch, kv_len)")


def check_alignment(a: Arguments) -> None:
    """Where positions matter and lengths differ, the causal diagonal must be said, never guessed (MHA-POS-2)."""
    if not a.positional or a.q_offset is not None or (a.q_len == a.kv_len and a.kv_lengths is None):
        return
    user = "causal=True" if a.causal else f"window={a.window}"
    readings = [
        "q_offset=0 (upper left, as PyTorch and JAX)",
        f"q_offset={a.kv_len - a.q_len} (lower right, kv_len - q_len, as FlashAttention and MLX)",
    ]
    if a.kv_lengths is not None:
        readings.append("q_offset=kv_lengths - q_len (the last valid keys, as ONNX with a cache)")
    why = f"q_len={a.q_len} and kv_len={a.kv_len} differ" if a.q_len != a.kv_len else "kv_lengths are given"
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
    """Raise ArgumentValueError or ArgumentTypeError for the first thing wrong with `a`, else give it back."""
    for one in checks:
        one(a)
    return a


def check_weight_options(options: Mapping[str, object]) -> None:
    """Raise for an option of dropout, which attention_weights does not have (MHA-DROP-3)."""
    for name in ("dropout_rate", "dropout_mask", "dropout_key"):
        if name in options:
            _type_error(
                "MHA-DROP-3", f"`{name}` is not an option of attention_weights: the weights are those before dropout."
            )


def check_dropout_mask(a: Arguments) -> None:
    """Raise where a mask would have to be drawn: the reference and attention_vjp draw nothing (MHA-DROP-4)."""
    if a.dropout_rate > 0 and a.dropout_mask is None:
        _value_error(
            "MHA-DROP-4",
            f"`dropout_mask` must be given with dropout_rate={a.dropout_rate}: "
            "the reference and attention_vjp draw no random numbers.",
        )


def check_cotangents(a: Arguments, grad_output: Array, grad_lse: Array | None) -> None:
    """Raise unless grad_output has the shape of the output and grad_lse that of lse (MHA-VJP-7)."""
    rows = tuple(a.query.shape[:3])
    expected: dict[str, tuple[Array, tuple[int, ...]]] = {"grad_output": (grad_output, (*rows, a.value.shape[3]))}
    if grad_lse is not None:
        expected["grad_lse"] = (grad_lse, rows)
    for label, (array, shape) in expected.items():
        if library_of(array) != library_of(a.query):
            _type_error(
                "MHA-VJP-7",
                f"`{label}` must be an array of {library_of(a.query)}, as `query` is, received {type(array).__name__}.",
            )
        if tuple(array.shape) != shape:
            _value_error("MHA-VJP-7", f"`{label}` must have shape={shape}, received shape={tuple(array.shape)}.")


def check_halves(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> None:
    """Raise unless the halves of a merge are arrays of one library whose shapes fit (MHA-MERGE-4)."""
    for label, array in (("output_a", output_a), ("lse_a", lse_a), ("output_b", output_b), ("lse_b", lse_b)):
        if library_of(array) is None or library_of(array) != library_of(output_a):
            _type_error(
                "MHA-MERGE-4",
                f"`{label}` must be an array of the library of `output_a`, received {type(array).__name__}.",
            )
        shape = tuple(output_a.shape) if label.startswith("output") else tuple(output_a.shape)[:-1]
        if tuple(array.shape) != shape:
            _value_error("MHA-MERGE-4", f"`{label}` must have shape={shape}, received shape={tuple(array.shape)}.")


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


def _integers(value: object) -> Sequence[int] | None:
    """Give a Python sequence of integers as it is, anything else as None."""
    if not _is_sequence(value):
        return None
    numbers = [number for number in value if isinstance(number, int) and not isinstance(number, bool)]
    return numbers if len(numbers) == len(value) else None


def _is_number(label: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _type_error(
            "MHA-ARG-2",
            f"`{label}` must be a Python number, received {label}={value!r} of type {type(value).__name__}.",
        )
    return True


def _check_same_library(label: str, array: Array, query: Array, library: str | None) -> None:
    received = library_of(array)
    if received != library:
        _type_error(
            "MHA-ARG-4",
            f"`{label}` must be an array of {library}, as `query` is, received an array of {received}. "
            "Convert one of them first.",
        )
    expected_device, received_device = device_of(query), device_of(array)
    if None not in (expected_device, received_device) and received_device != expected_device:
        _value_error(
            "MHA-ARG-4",
            f"`{label}` must be on the device of `query`, device={expected_device}, received device={received_device}.",
        )


def _check_integer_array(
    label: str, value: Array | Sequence[int], a: Arguments, shape: tuple[int, ...], axes: str
) -> None:
    if library_of(value) is None:
        numbers = _integers(value)
        if numbers is None or len(shape) != 1:
            _type_error(
                "MHA-LEN-3", f"`{label}` must hold integers of shape {axes}={shape}, received {label}={value!r}."
            )
        received: tuple[int, ...] = (len(numbers),)
    else:
        if library_of(value) != "numpy":
            _check_same_library(label, value, a.query, library_of(a.query))
        if not dtype_name(value).startswith(("int", "uint")):
            _type_error("MHA-LEN-3", f"`{label}` must be an integer array, received dtype={dtype_name(value)}.")
        received = _shape(value)
    if received != shape:
        _value_error("MHA-LEN-3", f"`{label}` must have shape {axes}={shape}, received shape={received}.")
