"""Mistakes of norms over all heads, and of paged and window caches: tokens stored elsewhere, or seen wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import layer_steps, paged_steps, window_steps
from mha_spec.reference import varlen_attention

from .caching import padding_counted, stored_at, stored_at_the_end
from .layer import layered
from .mistake import MULTI_HEAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from .mistake import Mistake

__all__ = ["LAYER_VARIANTS"]


def by_table(change: Callable[[numpy.ndarray], numpy.ndarray]) -> Callable[..., Any]:
    """Find the slots of new tokens by another table."""
    return lambda cache, stop, new: paged_steps.new_slots(
        cache._replace(block_table=change(numpy.asarray(cache.block_table))), stop, new
    )


def from_block_start(cache: Any, stop: Any, new: Any) -> Any:
    """Count the slots of new tokens from the start of a block."""
    size = cache.key.shape[1]
    lengths = numpy.asarray(cache.lengths)
    return paged_steps.new_slots(cache._replace(lengths=lengths // size * size), stop, new)


def reading(**other: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """Attend to blocks with other arguments of the packed call, from the blocks and the arguments."""

    def varlen(query: Any, key: Any, value: Any, *bounds: Any, **options: Any) -> Any:
        changed = {name: change(key, options) for name, change in other.items()}
        return varlen_attention(query, key, value, *bounds, **options | changed)

    return varlen


def consecutive(key: Any, options: dict[str, Any]) -> numpy.ndarray:
    """Return a table of blocks one after the other."""
    table = numpy.asarray(options["block_table"])
    return numpy.arange(table.size, dtype=table.dtype).reshape(table.shape) % key.shape[0]


def whole_blocks(key: Any, options: dict[str, Any]) -> numpy.ndarray:
    """Return lengths that count all slots of the last block."""
    size = key.shape[1]
    return -(-numpy.asarray(options["seqused_kv"]) // size) * size


def paged(name: str, title: str, *clauses: str, bugs: tuple[str, ...] = (), **steps: Any) -> Mistake:
    """Return a mistake of a paged cache."""
    needs = ("cache_block_table", *(["key"] if "new_slots" in steps else []))
    return layered(name, title, *clauses, needs=needs, functions=MULTI_HEAD, bugs=bugs, **steps)


def wrapped_at(change: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Store new tokens in other slots of a window cache, as `stored_at`."""
    return stored_at(change, window_steps.store_wrapped)


def appended_with_limited_count(cache: Any, *arguments: Any) -> Any:
    """Append new tokens, and count tokens up to the capacity."""
    new = window_steps.append_window(cache, *arguments)
    return new._replace(lengths=numpy.minimum(new.lengths, new.key.shape[2]))


def stored_first(query: Any, caches: Any, _: Any, options: Any, steps: Any) -> Any:
    """Attend to the new cache alone, in which the last tokens of a call have replaced keys of its first queries."""
    old, new = caches
    options = {name: option for name, option in options.items() if name != "kv_lengths"}
    options.setdefault("q_offset", old.lengths)
    return window_steps.operands(query, (new, new), (None, None), options, steps)


def attending(**other: Callable[[Any], Any]) -> Callable[..., Any]:
    """Attend to a window cache with other options."""

    def operands(*arguments: Any) -> Any:
        key, value, options = window_steps.operands(*arguments)
        return key, value, options | {name: change(options[name]) for name, change in other.items() if name in options}

    return operands


def wrapping(name: str, title: str, *clauses: str, bugs: tuple[str, ...] = (), **steps: Any) -> Mistake:
    """Return a mistake of a window cache."""
    return layered(name, title, *clauses, needs=("window_cache",), functions=MULTI_HEAD, bugs=bugs, **steps)


def jointly(name: str, title: str, normalise: Callable[[Any, Any, float], Any], *bugs: str) -> Mistake:
    """Return a mistake of a norm over all heads."""
    return layered(name, title, "MHA-NORM-3", needs=("q_joint_norm",), bugs=bugs, normalise_jointly=normalise)


def each_head(x: Any, gain: Any, epsilon: float) -> Any:
    """Normalise each head by itself."""
    return layer_steps.normalise(x, numpy.ones(x.shape[3], x.dtype), epsilon) * gain[:, None, :]


LAYER_VARIANTS = (
    jointly("joint-norm-of-each-head", "computes the mean square of each head by itself", each_head),
    jointly("joint-norm-ignored", "accepts q_joint_norm and k_joint_norm and does not use them", lambda x, *_: x),
    jointly(
        "joint-norm-gain-of-a-head",
        "multiplies all heads by the gain of the first",
        lambda x, gain, epsilon: layer_steps.normalise_jointly(x, gain[:1] + 0 * gain, epsilon),
    ),
    jointly(
        "joint-norm-sums-the-heads",
        "divides the sum of squares of all heads by the size of a head",
        lambda x, gain, epsilon: layer_steps.normalise_jointly(x, gain, epsilon / x.shape[1]) / x.shape[1] ** 0.5,
    ),
    paged(
        "paged-tokens-of-the-first-entry",
        "stores the tokens of every batch entry in the blocks of the first",
        "MHA-CACHE-9",
        new_slots=by_table(lambda table: table[:1] + 0 * table),
    ),
    paged(
        "paged-tokens-ignore-the-table",
        "stores new tokens as if the blocks of all batch entries lay one after the other",
        "MHA-CACHE-9",
        new_slots=by_table(lambda table: numpy.arange(table.size).reshape(table.shape)),
    ),
    paged(
        "paged-tokens-one-block-late",
        "stores new tokens in the next block",
        "MHA-CACHE-9",
        new_slots=by_table(lambda table: numpy.roll(table, -1, axis=1)),
    ),
    paged(
        "paged-tokens-from-the-block-start",
        "stores new tokens from the first slot of a block on, over the tokens that it holds",
        "MHA-CACHE-9",
        new_slots=from_block_start,
    ),
    paged(
        "paged-keys-ignore-the-table",
        "reads keys as if the blocks of all batch entries lay one after the other",
        "MHA-CACHE-10",
        varlen=reading(block_table=consecutive),
    ),
    paged(
        "paged-keys-of-whole-blocks",
        "sees all slots of the last block",
        "MHA-CACHE-10",
        varlen=reading(seqused_kv=whole_blocks),
    ),
    paged(
        "paged-window-dropped",
        "does not use the window with a paged cache",
        "MHA-CACHE-10",
        varlen=reading(window=lambda key, options: None),
        bugs=("EricLBuehler/mistral.rs#2094",),
    ),
    paged(
        "paged-queries-upper-left",
        "puts the queries at position 0, whatever number of tokens the blocks hold",
        "MHA-CACHE-10",
        "MHA-CACHE-2",
        varlen=reading(q_offset=lambda key, options: 0),
    ),
    wrapping(
        "window-cache-stops-at-the-end",
        "stores new tokens in the last slot once the cache is full",
        "MHA-CACHE-12",
        store_wrapped=wrapped_at(
            lambda start, stop, buffer: (
                numpy.minimum(start, buffer.shape[2] - 1),
                numpy.minimum(stop, buffer.shape[2]),
            )
        ),
    ),
    wrapping(
        "window-cache-one-slot-late",
        "stores new tokens in the next slot",
        "MHA-CACHE-12",
        store_wrapped=wrapped_at(lambda start, stop, _: (start + 1, stop + 1)),
        bugs=("huggingface/transformers#47708",),
    ),
    wrapping(
        "window-cache-rolled",
        "shifts the buffer of a window cache for new tokens even if it is not full",
        "MHA-CACHE-12",
        store_wrapped=stored_at_the_end,
        bugs=("huggingface/transformers#37574",),
    ),
    wrapping(
        "window-cache-count-stops",
        "counts tokens up to the capacity",
        "MHA-CACHE-12",
        "MHA-CACHE-13",
        append_window=appended_with_limited_count,
    ),
    wrapping(
        "window-cache-in-the-order-of-slots",
        "takes the slots of a full cache for positions",
        "MHA-CACHE-13",
        unroll=lambda buffer, lengths, new: window_steps.unroll(buffer, 0 * numpy.asarray(lengths), new),
        bugs=("Lightning-AI/litgpt#2182",),
    ),
    wrapping(
        "window-cache-empty-slots-seen",
        "sees slots without a token",
        "MHA-CACHE-13",
        window_operands=attending(kv_starts=lambda starts: 0 * starts),
    ),
    wrapping(
        "window-cache-stored-first",
        "stores all new tokens first, so that the first queries do not see the tokens that the last ones replace",
        "MHA-CACHE-13",
        "MHA-CACHE-2",
        window_operands=stored_first,
        bugs=("pytorch/executorch#20346",),
    ),
    wrapping(
        "window-cache-padding-kept",
        "stores padding in a window cache, and counts it",
        "MHA-CACHE-13",
        new_lengths=padding_counted,
    ),
)
