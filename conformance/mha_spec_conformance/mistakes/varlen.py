"""Mistakes of packed and paged attention: of its bounds, positions, blocks, and of what is added or left unwritten."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arguments import options_of
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS, VarlenArguments
from mha_spec.varlen_reference import (
    VarlenSteps,
    add_sinks,
    add_to_pages,
    keys_of,
    linear_bias,
    pack,
    rows_outside,
    tokens_of,
)
from mha_spec.varlen_sequences import PackedSequence, sequences_of

from .mistake import Mistake

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mha_spec.varlen_reference import Call

    Change = Callable[[VarlenArguments, list[PackedSequence]], list[PackedSequence]]

__all__ = ["VARLEN"]

FORWARD, VJP = VARLEN_FUNCTIONS


def of_sequences(change: Change, **replaced: Callable[..., Any]) -> VarlenSteps:
    """Compute with other sequences than those of the call."""
    return replace(VarlenSteps(), sequences=lambda a: change(a, sequences_of(a)), **replaced)


def of_each(change: Callable[[VarlenArguments, PackedSequence], PackedSequence]) -> VarlenSteps:
    """Change each sequence by itself."""
    return of_sequences(lambda a, sequences: [change(a, sequence) for sequence in sequences])


def positions_run_on(a: VarlenArguments, sequence: PackedSequence) -> PackedSequence:
    """Count the queries from the first token of the call."""
    return sequence._replace(offset=sequence.offset + sequence.queries.start)


def diagonal_of_the_longest(a: VarlenArguments, sequences: list[PackedSequence]) -> list[PackedSequence]:
    """Align all sequences as the longest queries and the longest keys would be."""
    if a.q_offset != "lower_right" or not sequences:
        return sequences
    offset = max(len(s.keys) for s in sequences) - max(len(s.queries) for s in sequences)
    return [sequence._replace(offset=offset) for sequence in sequences]


def one_sequence(a: VarlenArguments, sequences: list[PackedSequence]) -> list[PackedSequence]:
    """Join all sequences, as if there were no bounds."""
    if not sequences or a.is_paged:
        return sequences
    first, last = sequences[0], sequences[-1]
    queries, keys = range(first.queries.start, last.queries.stop), range(first.keys.start, last.keys.stop)
    return [PackedSequence(queries, keys, first.offset)]


def longest_for_all(a: VarlenArguments, sequences: list[PackedSequence]) -> list[PackedSequence]:
    """Give every sequence as many keys as max_seqlen_kv says."""
    if a.max_seqlen_kv is None or a.is_paged:
        return sequences
    length, end = a.max_seqlen_kv, a.key.shape[0]
    return [s._replace(keys=range(s.keys.start, min(s.keys.start + length, end))) for s in sequences]


def with_blocks(change: Callable[[VarlenArguments, int, list[int]], Sequence[int]]) -> VarlenSteps:
    """Read other blocks: `change` returns those of a sequence, by its number and its right blocks."""

    def changed(a: VarlenArguments, sequences: list[PackedSequence]) -> list[PackedSequence]:
        if not a.is_paged:
            return sequences
        blocks = a.key.shape[0]
        return [
            s._replace(blocks=[min(max(block, 0), blocks - 1) for block in change(a, b, s.block_numbers)])
            for b, s in enumerate(sequences)
        ]

    return of_sequences(changed)


def transposed(a: VarlenArguments, b: int, blocks: list[int]) -> list[int]:
    """Read the table as if it were (max_blocks, sequences)."""
    table = numpy.asarray(a.block_table)
    return table.reshape(table.shape[1], table.shape[0]).T[b, : len(blocks)].tolist()


def whole_blocks(a: VarlenArguments, sequence: PackedSequence) -> PackedSequence:
    """See the last block to its end."""
    if sequence.blocks is None:
        return sequence
    return sequence._replace(keys=range(len(sequence.blocks) * a.key.shape[1]))


def all_keys(a: VarlenArguments, sequences: list[PackedSequence]) -> list[PackedSequence]:
    """Ignore seqused_kv where the bounds of the keys are known."""
    if a.cu_seqlens_kv is None or a.is_paged:
        return sequences
    return sequences_of(replace(a, seqused_kv=None))


def with_tail_multiplied(x: Any, tokens: range) -> Any:
    """Multiply the tokens behind a sequence by 0 instead of leaving them out."""
    behind = 0.0 * numpy.asarray(x, dtype=numpy.float64)[tokens.stop :].sum(axis=0, keepdims=True)
    return tokens_of((x + behind).astype(x.dtype), tokens)


def crossing(parts: Any, shape: Any, like: Any, number: float, steps: VarlenSteps) -> Any:
    """Multiply the rows of other sequences by 0 instead of leaving them out."""
    rows = [numpy.where(numpy.isfinite(part), 0.0, numpy.nan).sum() for _, part in parts if part.dtype.kind == "f"]
    packed = pack(parts, shape, like, number, steps)
    return (packed + sum(rows)).astype(packed.dtype)


def without_gaps(a: VarlenArguments, sequences: list[PackedSequence]) -> list[PackedSequence]:
    """Put the gradients of the keys of each sequence directly behind those of the sequence before it."""
    if a.is_paged or not sequences:
        return sequences
    ends = accumulate((len(s.keys) for s in sequences), initial=sequences[0].keys.start)
    return [s._replace(keys=range(*places)) for s, places in zip(sequences, pairwise(ends), strict=True)]


def keys_between_gaps(x: Any, sequence: PackedSequence, a: VarlenArguments, steps: VarlenSteps) -> Any:
    """Read the keys of a sequence from the right places."""
    sequences = sequences_of(a)
    return keys_of(x, sequences[without_gaps(a, sequences).index(sequence)], a, steps)


def shared_slope(call: Call) -> Any:
    """Use the slope of head 0 for all heads."""
    return linear_bias(call if call.slopes is None else call._replace(slopes=0 * call.slopes + call.slopes[0]))


def unshifted_bias(call: Call) -> Any:
    """Count the distances from the upper left."""
    return linear_bias(call._replace(sequence=call.sequence._replace(offset=0)))


def added_bias(call: Call) -> Any:
    """Return the linear bias with the other sign."""
    bias = linear_bias(call)
    return None if bias is None else -bias


def last_of_each_block(parts: Any, shape: Any, like: Any) -> Any:
    """Store the gradients of a block instead of adding them."""
    whole = add_to_pages([], shape, like)
    for blocks, rows in parts:
        for index, block in enumerate(blocks):
            part = rows[index * shape[1] : (index + 1) * shape[1]]
            whole[block, : part.shape[0]] = part
    return whole


def unchecked_arguments(function: str, options: dict[str, Any], *tensors: Any) -> VarlenArguments:
    """Check nothing, and ignore unknown keywords."""
    known = {name: value for name, value in options.items() if name in options_of(function)}
    return VarlenArguments(*tensors, **known, function=function)


def mistake(
    name: str,
    title: str,
    clauses: tuple[str, ...],
    steps: VarlenSteps,
    functions: tuple[str, ...] = VARLEN_FUNCTIONS,
    **more: Any,
) -> Mistake:
    """Return a mistake of packed and paged attention."""
    return Mistake(name, title, clauses, steps, functions=functions, **more)


VARLEN = (
    mistake(
        "packed-positions-run-on",
        "counts the positions of queries from the first token of the call, not of the sequence",
        ("MHA-VARLEN-1", "MHA-VARLEN-5"),
        of_each(positions_run_on),
        needs=("q_offset",),
    ),
    mistake(
        "packed-diagonal-of-the-longest",
        "aligns every sequence by the longest numbers of queries and keys",
        ("MHA-VARLEN-5",),
        of_sequences(diagonal_of_the_longest),
        needs=("q_offset",),
        bugs=("vllm-project/flash-attention#18",),
    ),
    mistake(
        "packed-bounds-ignored",
        "lets all sequences of a packed call see each other",
        ("MHA-VARLEN-1",),
        of_sequences(one_sequence),
        bugs=("NVIDIA-NeMo/RL#2105", "pytorch/pytorch#177378"),
    ),
    mistake(
        "packed-last-sequence-dropped",
        "leaves out the last sequence of a packed call",
        ("MHA-VARLEN-1", "MHA-VARLEN-2"),
        of_sequences(lambda a, sequences: sequences[:-1]),
    ),
    mistake(
        "packed-last-key-dropped",
        "leaves out the last key of each sequence of a packed call",
        ("MHA-VARLEN-2",),
        of_each(lambda a, s: s._replace(keys=s.keys[:-1])),
        bugs=("NVIDIA/TransformerEngine#1930",),
    ),
    mistake(
        "packed-lse-transposed",
        "returns the lse of a packed call with its tokens first",
        ("MHA-VARLEN-9",),
        replace(VarlenSteps(), heads_first=lambda lse: lse),
        (FORWARD,),
        bugs=("vllm-project/vllm-xpu-kernels#479",),
    ),
    mistake(
        "packed-longest-for-all",
        "gives every sequence as many keys as the longest has",
        ("MHA-VARLEN-10",),
        of_sequences(longest_for_all),
        (FORWARD,),
        needs=("max_seqlen_kv",),
    ),
    mistake(
        "packed-used-ignored",
        "sees the keys of a sequence behind those in use",
        ("MHA-VARLEN-4",),
        of_sequences(all_keys),
        needs=("seqused_kv", "cu_seqlens_kv"),
        bugs=("Dao-AILab/flash-attention#2315",),
    ),
    mistake(
        "packed-tail-multiplied",
        "multiplies the tokens behind a sequence by 0 instead of leaving them out",
        ("MHA-VARLEN-3",),
        replace(VarlenSteps(), tokens_of=with_tail_multiplied),
        bugs=("pytorch/pytorch#188933",),
    ),
    mistake(
        "packed-sequences-multiplied",
        "multiplies the rows of other sequences by 0 instead of leaving them out",
        ("MHA-VARLEN-12",),
        replace(VarlenSteps(), pack=crossing),
    ),
    mistake(
        "packed-tail-unwritten",
        "leaves the results of tokens of no sequence unwritten",
        ("MHA-VARLEN-3",),
        replace(VarlenSteps(), rows_outside=lambda like, shape, number: rows_outside(like, shape, 7.0)),
        bugs=("Dao-AILab/flash-attention#2324",),
    ),
    mistake(
        "pages-table-transposed",
        "reads the block table with its axes exchanged",
        ("MHA-VARLEN-6",),
        with_blocks(transposed),
        needs=("block_table",),
    ),
    mistake(
        "pages-in-order-of-memory",
        "takes the blocks of a sequence from the first on as they stand in memory",
        ("MHA-VARLEN-6",),
        with_blocks(lambda a, b, blocks: [blocks[0] + n for n in range(len(blocks))]),
        needs=("block_table",),
        bugs=("hw-native-sys/pypto#470",),
    ),
    mistake(
        "pages-table-ignored",
        "reads the blocks by their number in the row and ignores the table",
        ("MHA-VARLEN-6",),
        with_blocks(lambda a, b, blocks: range(len(blocks))),
        needs=("block_table",),
        bugs=("golang-design/accel#10",),
    ),
    mistake(
        "pages-reversed",
        "reads the blocks of a sequence from the last to the first",
        ("MHA-VARLEN-6",),
        with_blocks(lambda a, b, blocks: blocks[::-1]),
        needs=("block_table",),
    ),
    mistake(
        "pages-tail-seen",
        "sees the slots behind the last key of a sequence",
        ("MHA-VARLEN-7",),
        of_each(whole_blocks),
        needs=("block_table",),
        bugs=("vllm-project/vllm#42494",),
    ),
    mistake(
        "slopes-of-head-0",
        "uses the slope of head 0 for all heads of a packed call",
        ("MHA-VARLEN-8",),
        replace(VarlenSteps(), linear_bias=shared_slope),
        needs=("alibi_slopes",),
    ),
    mistake(
        "slopes-from-the-upper-left",
        "counts the distances of a linear bias from the upper left of each sequence",
        ("MHA-VARLEN-8",),
        replace(VarlenSteps(), linear_bias=unshifted_bias),
        needs=("alibi_slopes",),
        bugs=("Dao-AILab/flash-attention#907",),
    ),
    mistake(
        "slopes-added",
        "adds the slope times the distance instead of subtracting it",
        ("MHA-VARLEN-8",),
        replace(VarlenSteps(), linear_bias=added_bias),
        needs=("alibi_slopes",),
    ),
    mistake(
        "pages-gradient-stored",
        "stores the gradient of a block that is used repeatedly instead of adding it",
        ("MHA-VARLEN-11",),
        replace(VarlenSteps(), add_to_pages=last_of_each_block),
        (VJP,),
        needs=("block_table",),
    ),
    mistake(
        "packed-sinks-gradient-of-the-last",
        "returns the gradient of the sinks from the last sequence alone",
        ("MHA-VARLEN-11",),
        replace(VarlenSteps(), add_sinks=lambda parts, like: add_sinks(parts[-1:], like)),
        (VJP,),
        needs=("sinks",),
    ),
    mistake(
        "packed-gradients-without-gaps",
        "leaves no gap for keys behind those in use between the gradients of two sequences",
        ("MHA-VARLEN-4", "MHA-VARLEN-11"),
        of_sequences(without_gaps, keys_of=keys_between_gaps),
        (VJP,),
        needs=("seqused_kv", "cu_seqlens_kv"),
    ),
    mistake(
        "packed-arguments-unchecked",
        "accepts bounds, lengths, blocks and keywords of a packed call unchecked",
        ("MHA-VARLEN-2", "MHA-VARLEN-4", "MHA-VARLEN-5", "MHA-VARLEN-10", "MHA-ARG-1"),
        replace(VarlenSteps(), arguments=unchecked_arguments),
        (FORWARD,),
    ),
)
