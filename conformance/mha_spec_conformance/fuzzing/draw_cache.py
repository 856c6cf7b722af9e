"""Draw the caches of the layer: contiguous ones, blocks that batch entries share, and slots that wrap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec import paged_steps, window_steps
from mha_spec.arguments import options_of

from .call import Recipe

if TYPE_CHECKING:
    from .drawing import Drawing

__all__ = ["draw_cache", "draw_offset_of_window_cache"]


def draw_cache(d: Drawing, sizes: dict[str, int]) -> None:
    """Draw a cache with room for the new tokens; `buffer` becomes the number of tokens that it may then hold."""
    held = [d.one_of(0, 1, 2, 5) for _ in range(sizes["batch"])]
    d.integers("cache_lengths", held)
    sizes["buffer"] = max(held) + sizes["kv_len"]
    if d.function == "multi_head_attention" and d.takes("paged_cache"):
        _keep_options(d, paged_steps.OPTIONS)
        _draw_blocks(d, held, sizes)
    elif d.function == "multi_head_attention" and d.takes("window_cache"):
        _keep_options(d, window_steps.OPTIONS)
        _draw_wrapping(d, sizes)
    else:
        _draw_contiguous(d, held, sizes)


def draw_offset_of_window_cache(d: Drawing) -> None:
    """Draw positions of query 0 whose keys a window cache holds: those of new tokens, or behind them (MHA-CACHE-14)."""
    lengths = d.recipes["cache_lengths"].array().tolist()
    d.integers("q_offset", [length + d.one_of(0, 1) for length in lengths])


def _keep_options(d: Drawing, options: tuple[str, ...]) -> None:
    """Leave only the options of a cache, which has no named offsets (MHA-CACHE-10, MHA-CACHE-13)."""
    d.keywords -= {*options_of("multi_head_attention")} - {*options, "kv_lengths"}
    d.readings = ()


def _draw_contiguous(d: Drawing, held: list[int], sizes: dict[str, int]) -> None:
    sizes["buffer"] += d.one_of(0, 1, 3)
    names = _draw_buffers(d, sizes, (sizes["batch"], sizes["kv_heads"], sizes["buffer"]))
    for name in names:
        for entry, length in enumerate(held):
            if length + sizes["kv_len"] < sizes["buffer"] and d.rarely():
                d.mark(name, (entry, 0, sizes["buffer"] - 1), "nan")


def _draw_buffers(d: Drawing, sizes: dict[str, int], axes: tuple[int, ...]) -> tuple[str, str]:
    """Draw keys and values with these axes before the last one."""
    d.floats("cache_key", (*axes, sizes["qk_dim"]), "scores")
    d.floats("cache_value", (*axes, sizes["v_dim"]), "scores")
    return "cache_key", "cache_value"


def _draw_blocks(d: Drawing, held: list[int], sizes: dict[str, int]) -> None:
    """Draw blocks in any order; entries of the batch may share a first block that is full. One block is not used."""
    block_size = d.one_of(2, 1, 3, 16)
    counts = [-(-(length + sizes["kv_len"]) // block_size) for length in held]
    blocks = sum(counts) + 1
    numbers = list(range(blocks))
    numbers = numbers[::-1] if d.often() else numbers
    table = [[numbers.pop() for _ in range(count)] for count in counts]
    shares = d.often()
    for row, length in zip(table[1:], held[1:], strict=True):
        if shares and min(length, held[0]) >= block_size:
            row[0] = table[0][0]
    columns = max(counts) + d.one_of(0, 1)
    padded = [row + [d.one_of(-1, 10**6)] * (columns - len(row)) for row in table]
    expression = f"numpy.array({padded}, dtype='int64').reshape({len(held)}, {columns})"
    d.recipes["cache_block_table"] = Recipe(expression, d.one_of("int32", "int64"))
    for name in _draw_buffers(d, sizes, (blocks, block_size, sizes["kv_heads"])):
        if d.often():
            d.mark(name, (numbers[0],), "nan")


def _draw_wrapping(d: Drawing, sizes: dict[str, int]) -> None:
    """Draw a cache of the last tokens, with a window or a chunk that it has room for (MHA-CACHE-14)."""
    capacity = d.one_of(3, 1, 2, 5, 8)
    _draw_buffers(d, sizes, (sizes["batch"], sizes["kv_heads"], capacity))
    d.options["window_cache"] = True
    by_chunk = "chunk" in d.keywords and d.often()
    if by_chunk:
        d.options["chunk"] = 1 + d.below(capacity)
    if not by_chunk or d.rarely():
        d.options["window"] = (capacity - 1 if d.often() else d.below(capacity), d.one_of(0, None, 1))
    d.keywords -= {"window", "chunk"}
