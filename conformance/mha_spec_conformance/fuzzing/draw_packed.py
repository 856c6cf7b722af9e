"""Draw packed and paged calls: sequences of any lengths, tokens of no sequence, and blocks that sequences share."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from mha_spec.arrays import softmax_dtype_name

from .call import Call, Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .drawing import Drawing

__all__ = ["draw_varlen"]

LENGTHS = (2, 1, 3, 5, 0, 7, 11)
EDGES = (15, 16, 17, 31, 33, 64, 65, 129)
SIZES = (4, 1, 2, 3, 8, 17, 64)


def draw_varlen(d: Drawing) -> Call:
    """Draw a packed call or, if the target takes a block table, sometimes a paged call."""
    sequences, kv_heads = d.one_of(2, 1, 3, 4, 7, 0), d.one_of(1, 2, 3)
    heads, qk_dim = kv_heads * d.one_of(1, 2, 3), d.one_of(*SIZES)
    v_dim = qk_dim if d.often() else d.one_of(*SIZES)
    # Sequences of equal lengths, which an implementation may compute at once, are rare among many lengths.
    lengths = LENGTHS if d.often() else (d.one_of(*LENGTHS), d.one_of(*LENGTHS))
    q_lengths = [d.one_of(*lengths) for _ in range(sequences)]
    kv_lengths = [length if d.often() else d.one_of(*lengths) for length in q_lengths]
    if sequences and d.one_of(*[False] * 7, True):
        q_lengths[-1], kv_lengths[-1] = d.one_of(*EDGES), d.one_of(*EDGES)
    q_tokens = sum(q_lengths) + d.one_of(0, 1, 3)
    d.floats("query", (q_tokens, heads, qk_dim), "scores")
    d.integers("cu_seqlens_q", [0, *accumulate(q_lengths)])
    if d.takes("block_table"):
        _draw_blocks(d, kv_lengths, kv_heads, (qk_dim, v_dim))
    else:
        kv_lengths = _draw_tokens(d, kv_lengths, lengths, kv_heads, (qk_dim, v_dim))
    _hide(d, "query", range(sum(q_lengths), q_tokens))
    if "grad_output" in d.operands:
        d.floats("grad_output", (q_tokens, heads, v_dim), "scores", dtype=d.other_dtype())
        if d.takes("grad_lse"):
            d.floats("grad_lse", (heads, q_tokens), "scores", dtype=softmax_dtype_name(d.dtype))
    _draw_options(d, q_lengths, kv_lengths, heads)
    lse = d.function == "varlen_attention" and "return_lse" in d.keywords and d.often()
    return Call(d.function, d.dtype, d.recipes, d.options, lse=lse)


def _draw_tokens(
    d: Drawing, lengths: list[int], others: Sequence[int], kv_heads: int, sizes: tuple[int, int]
) -> list[int]:
    """Draw packed keys and values, some of them not in use; return the numbers of keys in use."""
    tokens = sum(lengths) + d.one_of(0, 1, 3)
    for name, size in zip(("key", "value"), sizes, strict=True):
        d.floats(name, (tokens, kv_heads, size), "scores")
        _hide(d, name, range(sum(lengths), tokens))
    d.integers("cu_seqlens_kv", [0, *accumulate(lengths)])
    if d.takes("seqused_kv"):
        rooms = lengths
        lengths = [d.length(room, *others) for room in rooms]
        d.bounded("seqused_kv", lengths, rooms)
    return lengths


def _draw_blocks(d: Drawing, lengths: list[int], kv_heads: int, sizes: tuple[int, int]) -> None:
    """Draw keys and values in blocks; entries of the table that no key needs are not blocks."""
    block_size, blocks = d.one_of(4, 1, 2, 16), d.one_of(3, 1, 2, 8)
    counts = [-(-length // block_size) for length in lengths]
    columns = max(counts, default=0) + d.one_of(0, 1)
    table = [[d.below(blocks) for _ in range(count)] + [d.one_of(-1, 10**6)] * (columns - count) for count in counts]
    for name, size in zip(("key", "value"), sizes, strict=True):
        d.floats(name, (blocks, block_size, kv_heads, size), "scores")
    expression = f"numpy.array({table}, dtype='int64').reshape({len(lengths)}, {columns})"
    d.recipes["block_table"] = Recipe(expression, d.one_of("int32", "int64"))
    by_bounds = "seqused_kv" not in d.keywords or d.rarely()
    if by_bounds:
        d.integers("cu_seqlens_kv", [0, *accumulate(lengths)])
    else:
        d.bounded("seqused_kv", lengths, [columns * block_size] * len(lengths))
    read = {
        (row[key // block_size], key % block_size)
        for row, length in zip(table, lengths, strict=True)
        for key in range(length)
    }
    unread = [(block, slot) for block in range(blocks) for slot in range(block_size) if (block, slot) not in read]
    if unread and d.often():
        place, name = unread[d.below(len(unread))], d.one_of("key", "value")
        d.mark(name, place, "nan")


def _hide(d: Drawing, name: str, tokens: range) -> None:
    """Put NaN into a token of no sequence, in some calls."""
    if tokens and d.often():
        d.mark(name, (tokens.start,), "nan")


def _draw_options(d: Drawing, q_lengths: list[int], kv_lengths: list[int], heads: int) -> None:
    """Draw the options; a call that compares positions has an offset (MHA-VARLEN-5)."""
    if "q_offset" in d.keywords:
        if d.takes("causal"):
            d.options["causal"] = True
        if d.takes("window"):
            d.options["window"] = tuple(d.one_of(0, 1, 2, 5, 16, None, 2**30) for _ in range(2))
        if d.takes("alibi_slopes"):
            d.array("alibi_slopes", f"random.random(({heads},))", softmax_dtype_name(d.dtype))
        bounded = d.options.get("window", (None, None)) != (None, None)
        positional = d.options.get("causal") or bounded or "alibi_slopes" in d.recipes
        if positional or d.takes("q_offset"):
            far = () if "alibi_slopes" in d.recipes else (2**30 - 3, -(2**30))
            d.offset(len(q_lengths), 0, 1, -1, 5, -3, *far)
    d.of_scores(heads)
    for name, lengths in (("max_seqlen_q", q_lengths), ("max_seqlen_kv", kv_lengths)):
        if d.takes(name):
            d.options[name] = max(lengths, default=0) + d.one_of(0, 1, 100)
