"""The checks of a packed or paged call, which the reference and every backend share.

As in `mha_spec.checks`, only Python values, shapes, dtypes and host data are looked at: an array of a library other
than NumPy is never read for an error (MHA-VARLEN-2).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .array_checks import (
    check_alike,
    check_floating,
    check_integers,
    is_sequence,
    require_array,
    shape_of,
)
from .arrays import Array, host_integers, library_of
from .checks import check_result, check_score_numbers, check_sinks, refuse_unknown
from .errors import refuse_type, refuse_value
from .offsets import for_each_entry
from .position_checks import LARGEST_POSITION, check_common_offset, check_position, check_window
from .scalars import check_integer, plain, short_repr
from .varlen_arguments import VarlenArguments, count_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["CHECKS", "check", "check_cotangents", "host_lengths", "varlen_arguments"]

PACKED = {
    "query": "(q_tokens, heads, qk_dim)",
    "key": "(kv_tokens, kv_heads, qk_dim)",
    "value": "(kv_tokens, kv_heads, v_dim)",
}
"""The axes of the tensors."""

PAGED = PACKED | {
    "key": "(blocks, block_size, kv_heads, qk_dim)",
    "value": "(blocks, block_size, kv_heads, v_dim)",
}
"""The axes of the tensors in a call with a block_table."""

SIZES = {"query": ("heads", "qk_dim"), "key": ("kv_heads", "qk_dim"), "value": ("kv_heads", "v_dim")}
"""The last axes, of which none may have size 0."""

LARGEST_LENGTH = 2**53
"""The largest cumulative length of keys in blocks, which no backend's integers exceed."""


def varlen_arguments(function: str, options: dict[str, Any], *tensors: Any) -> VarlenArguments:
    """Check the arguments of a packed or paged call, and return them; `tensors` are the first five."""
    refuse_unknown(options, function)
    return check(VarlenArguments(*tensors, **options, function=function))


def check_tensors(a: VarlenArguments) -> None:
    """Require arrays of one library, floating dtype and device, with the axes of the layout (MHA-VARLEN-1, -6)."""
    layout = PAGED if a.is_paged else PACKED
    expected = None
    for label, tensor in (("query", a.query), ("key", a.key), ("value", a.value)):
        require_array(label, tensor, "MHA-SHAPE-3")
        check_alike(label, tensor, a.query, "query", "MHA-SHAPE-3")
        _check_rank(label, tensor, layout[label], is_paged=a.is_paged)
        received = check_floating(label, tensor, "MHA-SHAPE-3")
        expected = expected or received
        if received != expected:
            refuse_type(
                "MHA-SHAPE-3",
                f"`{label}` must have the dtype of `query`, dtype={expected}, received dtype={received}. "
                "Convert either first: attention never promotes.",
            )


def _check_rank(label: str, tensor: Array, axes: str, *, is_paged: bool) -> None:
    rank = axes.count(",") + 1
    if tensor.ndim == rank:
        return
    clause, fix = ("MHA-VARLEN-6", "with a block_table") if is_paged else ("MHA-VARLEN-1", "without a block_table")
    refuse_value(
        clause, f"`{label}` must have rank {rank} {fix}, {axes}, received shape={shape_of(tensor)}. No axis is a batch."
    )


def check_sizes(a: VarlenArguments) -> None:
    """Require equal sizes of shared axes, none of them 0, and heads that are a multiple of kv_heads (MHA-SHAPE-3)."""
    shapes: Any = shape_of(a.query), shape_of(a.key), shape_of(a.value)
    q, k, v = shapes
    if k[-1] != q[-1]:
        refuse_value(
            "MHA-SHAPE-3",
            f"`key` must have the last axis of `query`, qk_dim={q[-1]}, received qk_dim={k[-1]} in shape={k}.",
        )
    if len(v) != len(k) or any(None not in sizes and sizes[0] != sizes[1] for sizes in zip(v[:-1], k, strict=False)):
        axes = "(blocks, block_size, kv_heads)" if a.is_paged else "(kv_tokens, kv_heads)"
        refuse_value("MHA-SHAPE-3", f"`value` must agree with `key` in {axes}={k[:-1]}, received shape={v}.")
    for label, shape in (("query", q), ("key", k), ("value", v)):
        for name, size in zip(SIZES[label], shape[-2:], strict=True):
            if size < 1:
                refuse_value("MHA-SHAPE-2", f"`{label}` must have {name}>=1, received shape={shape}.")
    if a.is_paged and k[1] == 0:
        refuse_value("MHA-VARLEN-6", f"`key` must have block_size>=1, received shape={k}.")
    if q[1] % k[-2]:
        refuse_value(
            "MHA-HEAD-2",
            f"`query` must have heads that are a multiple of kv_heads={k[-2]}, received heads={q[1]}. "
            "Are the axes in the order (tokens, heads, size)?",
        )


def check_cumulative(a: VarlenArguments) -> None:
    """Require cumulative lengths of queries and keys for the same sequences (MHA-VARLEN-2)."""
    _check_entries("cu_seqlens_q", a.cu_seqlens_q, a.query, None)
    _check_bounds("cu_seqlens_q", a.cu_seqlens_q, a.query.shape[0], "q_tokens")
    if a.cu_seqlens_kv is None:
        if not a.is_paged or a.seqused_kv is None:
            refuse_type(
                "MHA-VARLEN-2",
                "`cu_seqlens_kv` must hold integers of shape (sequences + 1,), received None. "
                "It may be None only in a call with block_table and seqused_kv.",
            )
        return
    _check_entries("cu_seqlens_kv", a.cu_seqlens_kv, a.query, count_of(a.cu_seqlens_q))
    if a.is_paged:
        _check_bounds("cu_seqlens_kv", a.cu_seqlens_kv, None, "")
    else:
        _check_bounds("cu_seqlens_kv", a.cu_seqlens_kv, a.key.shape[0], "kv_tokens")


def _check_entries(label: str, value: object, query: Array, count: int | None) -> None:
    """Require integers with one axis, of a known number of entries or of at least one."""
    library = library_of(value)
    if library is None and not is_sequence(value):
        refuse_type(
            "MHA-VARLEN-2",
            f"`{label}` must hold integers of shape (sequences + 1,), received {label}={short_repr(value)} "
            f"of type {type(value).__name__}.",
        )
    entries: Any = value
    if library is not None and len(entries.shape) != 1:
        refuse_value("MHA-VARLEN-2", f"`{label}` must have shape (sequences + 1,), received shape={shape_of(entries)}.")
    received = count_of(entries)
    if received == 0:
        refuse_value(
            "MHA-VARLEN-2", f"`{label}` must have shape (sequences + 1,), received shape=(0,). It begins with 0."
        )
    expected = received if count is None else count
    check_integers(label, value, query, (expected,), "(sequences + 1,)", "MHA-VARLEN-2")


def _check_bounds(label: str, value: Array | Sequence[int], tokens: int | None, axis: str) -> None:
    """Require host data to begin with 0, never to decrease, and to end within the tokens (MHA-VARLEN-2)."""
    numbers = host_integers(value)
    if numbers is None:
        return
    if numbers[0] != 0:
        refuse_value(
            "MHA-VARLEN-2",
            f"`{label}` must begin with 0, {label}[0]=0, received {label}[0]={short_repr(numbers[0])}. "
            f"Sequence b has the tokens from {label}[b] to {label}[b + 1].",
        )
    for index, (before, number) in enumerate(pairwise(numbers), start=1):
        if number < before:
            refuse_value(
                "MHA-VARLEN-2",
                f"`{label}` must not decrease, {label}[{index}]>={label}[{index - 1}]={short_repr(before)}, "
                f"received {label}[{index}]={short_repr(number)}. Pass cumulative lengths, not lengths.",
            )
    limit, name = (LARGEST_LENGTH, "2**53") if tokens is None else (tokens, f"{axis}={tokens}")
    if numbers[-1] > limit:
        refuse_value(
            "MHA-VARLEN-2",
            f"`{label}` must end within the tokens, {label}[{len(numbers) - 1}]<={name}, "
            f"received {label}[{len(numbers) - 1}]={short_repr(numbers[-1])}.",
        )


def check_table(a: VarlenArguments) -> None:
    """Require a table of integers with a row for each sequence (MHA-VARLEN-6)."""
    if a.block_table is None:
        return
    require_array("block_table", a.block_table, "MHA-VARLEN-6", "an array of integers (sequences, max_blocks)")
    columns = a.block_table.shape[1] if len(a.block_table.shape) == 2 else 0
    shape = (a.sequences, columns)
    check_integers("block_table", a.block_table, a.query, shape, "(sequences, max_blocks)", "MHA-VARLEN-6")


def check_used(a: VarlenArguments) -> None:
    """Require that each sequence has the keys in use, and its blocks exist, where that is host data (MHA-VARLEN-4)."""
    if a.seqused_kv is not None:
        check_integers("seqused_kv", a.seqused_kv, a.query, (a.sequences,), "(sequences,)", "MHA-VARLEN-4")
    rooms = _host_differences(a.cu_seqlens_kv)
    for sequence, length in enumerate(host_integers_of(a.seqused_kv) or ()):
        limit = a.capacity if rooms is None else rooms[sequence]
        if length < 0 or (limit is not None and length > limit):
            refuse_value(
                "MHA-VARLEN-4",
                f"`seqused_kv` must be in 0<=seqused_kv[{sequence}]<={limit}, the keys of the sequence, "
                f"received seqused_kv[{sequence}]={short_repr(length)}.",
            )
    if a.is_paged:
        _check_blocks(a)


def _check_blocks(a: VarlenArguments) -> None:
    """Require room in the table for the keys of each sequence, and blocks that exist (MHA-VARLEN-6)."""
    table: Any = a.block_table
    lengths, capacity, (blocks, block_size) = host_lengths(a)[1], a.capacity, a.key.shape[:2]
    for sequence, length in enumerate(lengths or ()):
        if capacity is not None and length > capacity:
            refuse_value(
                "MHA-VARLEN-6",
                f"`block_table` must have room for the keys of sequence {sequence}, "
                f"max_blocks * block_size>={length}, received {capacity} in {blocks} blocks. Append columns.",
            )
    if lengths is None or block_size is None or library_of(table) != "numpy":
        return
    for sequence, length in enumerate(lengths):
        for column, block in enumerate(table[sequence, : -(-length // block_size)].tolist()):
            if block < 0 or (blocks is not None and block >= blocks):
                refuse_value(
                    "MHA-VARLEN-6",
                    f"`block_table` must name blocks that exist, 0<=block_table[{sequence}, {column}]<blocks={blocks}, "
                    f"received {short_repr(block)}. Only entries behind its {length} keys are not used.",
                )


def check_longest(a: VarlenArguments) -> None:
    """Require max_seqlen_q and max_seqlen_kv to be integers that no length on the host exceeds (MHA-VARLEN-10)."""
    lengths = host_lengths(a)
    a.max_seqlen_q = _longest("max_seqlen_q", a.max_seqlen_q, lengths[0])
    a.max_seqlen_kv = _longest("max_seqlen_kv", a.max_seqlen_kv, lengths[1])


def _longest(label: str, value: int | None, lengths: list[int] | None) -> int | None:
    if value is None:
        return None
    number, longest = check_integer(label, value, 0, "MHA-VARLEN-10"), max(lengths or (), default=0)
    if number < longest:
        refuse_value(
            "MHA-VARLEN-10",
            f"`{label}` must be at least the longest length, {label}>={longest}, "
            f"received {label}={short_repr(number)}. None is always right.",
        )
    return number


def check_offsets(a: VarlenArguments) -> None:
    """Require an integer, one for each sequence, or a name; or lengths that need no offset (MHA-VARLEN-5)."""
    a.q_offset = for_each_entry(plain(a.q_offset), a.sequences)
    if a.q_offset is None:
        _check_alignment(a)
    elif not check_common_offset(a.q_offset):
        check_integers("q_offset", a.q_offset, a.query, (a.sequences,), "(sequences,)", "MHA-VARLEN-5")
        for number in host_integers_of(a.q_offset) or ():
            check_position("q_offset", number, -LARGEST_POSITION, LARGEST_POSITION, "2**30")


def _check_alignment(a: VarlenArguments) -> None:
    if not a.positional:
        return
    if a.cu_seqlens_kv is a.cu_seqlens_q and a.seqused_kv is None and not a.is_paged:
        return
    q_lengths, kv_lengths = host_lengths(a)
    if q_lengths is not None and q_lengths == kv_lengths:
        return
    user = "causal=True" if a.causal else "alibi_slopes" if a.alibi_slopes is not None else f"window={a.window}"
    why = (
        "the numbers of queries and keys are not known to be equal"
        if q_lengths is None or kv_lengths is None
        else "{1} queries and {2} keys of sequence {0} differ".format(
            *next((b, *pair) for b, pair in enumerate(zip(q_lengths, kv_lengths, strict=True)) if pair[0] != pair[1])
        )
    )
    refuse_value(
        "MHA-VARLEN-5",
        f'`q_offset` must be given with {user} where {why}: the diagonal is ambiguous. Pass q_offset="lower_right" '
        "(the keys in use - the queries of each sequence, as FlashAttention, vLLM and PyTorch) or "
        'q_offset="upper_left" (0), or one array for both cu_seqlens; received q_offset=None.',
    )


def check_slopes(a: VarlenArguments) -> None:
    """Require a floating slope for each query head (MHA-VARLEN-8)."""
    if a.alibi_slopes is None:
        return
    check_alike("alibi_slopes", a.alibi_slopes, a.query, "query", "MHA-VARLEN-8")
    check_floating("alibi_slopes", a.alibi_slopes, "MHA-VARLEN-8")
    if shape_of(a.alibi_slopes) != (a.heads,):
        refuse_value(
            "MHA-VARLEN-8",
            f"`alibi_slopes` must have shape (heads,)={(a.heads,)}, received shape={shape_of(a.alibi_slopes)}.",
        )


def host_lengths(a: VarlenArguments) -> tuple[list[int] | None, list[int] | None]:
    """Return the numbers of queries and of keys in use of each sequence; None for lengths that must not be read."""
    used = host_integers_of(a.seqused_kv)
    if used is None and a.seqused_kv is None:
        used = _host_differences(a.cu_seqlens_kv)
    return _host_differences(a.cu_seqlens_q), used


def host_integers_of(value: Any) -> list[int] | None:
    """Return integers on the host; None for an array that must not be read, and for None."""
    return None if value is None else host_integers(value)


def _host_differences(bounds: Any) -> list[int] | None:
    numbers = host_integers_of(bounds)
    return None if numbers is None else [stop - start for start, stop in pairwise(numbers)]


CHECKS: tuple[Callable[[VarlenArguments], None], ...] = (
    check_tensors,
    check_sizes,
    check_score_numbers,
    check_window,
    check_sinks,
    check_slopes,
    check_cumulative,
    check_table,
    check_used,
    check_longest,
    check_offsets,
)


def check(a: VarlenArguments, checks: Iterable[Callable[[VarlenArguments], None]] = CHECKS) -> VarlenArguments:
    """Raise ArgumentValueError or ArgumentTypeError for the first error in `a`, else return `a`."""
    for run in checks:
        run(a)
    return a


def check_cotangents(a: VarlenArguments, grad_output: Array, grad_lse: Array | None) -> None:
    """Require floating cotangents of the shapes of the output and of lse (MHA-VARLEN-11)."""
    tokens, heads = shape_of(a.query)[:2]
    shape = (tokens, heads, a.value.shape[-1])
    check_result("MHA-VARLEN-11", "grad_output", grad_output, "query", a.query, shape)
    if grad_lse is not None:
        check_result("MHA-VARLEN-11", "grad_lse", grad_lse, "query", a.query, (heads, tokens))
