"""The layer with a paged cache and with a window cache, and its norm over all heads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
from description import Input

from .errors import refused
from .layer_build import FLAVOURS, LAYER, cached, describe_layer, vary_layer
from .layer_sizes import CHUNK, CROSS, ENCODED, JOINT_NORMS, NORMS, SELF, STEP, TURNING, WHOLE, parameters, tokens
from .options import integers, options_of
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from description import Description

    from .layer_sizes import LayerSizes

__all__ = ["descriptions"]

BLOCKS, BLOCK_SIZE = 9, 2
TABLE = ((7, 2, 5, 0), (3, 8, 1, 6))
SHARED = ((7, 2, 5, 0), (7, 8, 1, 6))
"""Both batch entries have their first two tokens in block 7."""
CAUSAL = {"causal": True}
LIMITED = {"window": (2, 0), "softcap": 3.0, "sinks": True}


def descriptions() -> Iterator[Description]:
    """Yield norms over all heads, paged caches, and window caches."""
    order = ("MHA-LAYER-1",)
    optional = ("b_q", "b_k", *JOINT_NORMS)
    title = "Normalised over all heads, after the bias."
    yield from vary_layer("joint-norm", title, SELF, optional, clauses=order, variants=(0, 1))
    title = "Normalised over all heads with another epsilon, then rotated."
    more: dict[str, Any] = {"rotary": {"base": 500.0}, "norm_epsilon": 0.25, "variants": (0, 1)}
    yield from vary_layer("joint-norm+rotary", title, CROSS, JOINT_NORMS, {"offset": 4}, clauses=order, **more)
    yield from _paged()
    yield from _wrapping()
    yield from _errors()


def _paged() -> Iterator[Description]:
    for variant, lengths in enumerate(((3, 5), (0, 1))):
        title = f"One token behind {lengths[0]} and {lengths[1]} others in blocks."
        yield _case_of_pages(f"step/{variant + 1}", title, STEP, variant, lengths, rotary={})
        title = f"Three tokens behind {lengths[0]} and {lengths[1]} others in blocks, causal."
        yield _case_of_pages(f"chunk/{variant + 1}", title, CHUNK, variant, lengths, CAUSAL, rotary={})
    title = "A block that both batch entries share."
    yield _case_of_pages("shared/1", title, STEP, 2, (2, 3), table=SHARED, rotary={})
    title = "What lies in slots without a token is NaN, and reaches nothing."
    yield _case_of_pages("stale/1", title, STEP, 3, (6, 2), garbage=math.nan, clauses=("MHA-POISON-1",), rotary={})
    title = "Of three new tokens two and one are real: the others are not stored."
    yield _case_of_pages("ragged/1", title, CHUNK, 0, (2, 4), LIMITED, inputs={"kv_lengths": integers((2, 1))})
    title = "Keys of an encoder lie in blocks; nothing is added."
    yield _case_of_pages("encoder/1", title, ENCODED, 1, (8, 5))
    law: dict[str, Any] = {"clauses": ("MHA-CACHE-2",), "rotary": {}}
    title = "Six tokens in blocks, normalised and rotated, in calls of four, one and one."
    yield _case_of_pages("chunks/1", title, WHOLE, 0, (0, 2), CAUSAL, optional=NORMS, chunks=[4, 1, 1], **law)
    title = "Six tokens in blocks under a window, soft cap and sinks, one by one."
    yield _case_of_pages("window/1", title, WHOLE, 1, (2, 1), LIMITED, chunks=[1] * 6, **law)
    title = "Each cache in blocks is also continued with other tokens."
    law["clauses"] = ("MHA-CACHE-3",)
    yield _case_of_pages("drafts/1", title, WHOLE, 2, (0, 1), CAUSAL, chunks=[2, 3, 1], drafts=True, **law)


def _wrapping() -> Iterator[Description]:
    splits = {"at-once": None, "one-by-one": [1] * 6, "chunks": [4, 1, 1], "drafts": [2, 3, 1]}
    windows: tuple[dict[str, Any], ...] = ({"window": (3, 0)}, LIMITED | {"softcap": 1.0})
    for variant, (lengths, spec) in enumerate(zip(((9, 2), (0, 5)), windows, strict=True)):
        for name, chunks in splits.items():
            if variant == 1 and name in ("at-once", "drafts"):
                continue
            title = f"Six tokens behind {lengths[0]} and {lengths[1]}, of which the cache holds four, {name}."
            more: dict[str, Any] = {} if chunks is None else {"chunks": chunks}
            more |= {"drafts": True} if name == "drafts" else {}
            more["clauses"] = ("MHA-CACHE-3",) if name == "drafts" else ("MHA-CACHE-2",)
            yield _case_of_wrapping(f"{name}/{variant + 1}", title, TURNING, variant, lengths, spec, rotary={}, **more)
    title = "Chunks of four, counted from the first token, behind padding on the left."
    more = {"inputs": {"kv_starts": integers((3, 1))}, "chunk": 4, "chunks": [3, 1, 2]}
    yield _case_of_wrapping("local/1", title, TURNING, 2, (9, 2), CAUSAL, **more)
    title = "Of six new tokens five and one are real: the others are not stored."
    real = {"kv_lengths": integers((5, 1))}
    yield _case_of_wrapping("ragged/1", title, TURNING, 3, (6, 1), {"window": (2, 0)}, inputs=real)
    title = "What lies in slots without a token is NaN, and reaches nothing."
    more = {"garbage": math.nan, "clauses": ("MHA-POISON-1",)}
    yield _case_of_wrapping("stale/1", title, TURNING, 0, (1, 3), {"window": (3, 0)}, chunks=[1, 5], **more)


def _errors() -> Iterator[Description]:
    inputs = {**tokens(TURNING, "one"), **parameters(TURNING), **cached(TURNING, "one", (9, 2))}
    for name, argument, options in (
        ("no-window", "window", {}),
        ("open-window", "window", {"window": (None, 0)}),
        ("large-window", "window", {"window": (4, 0)}),
        ("large-chunk", "chunk", {"chunk": 5, "window": (2, 0)}),
    ):
        label, every = f"{LAYER}/error/cache/wrapping/{name}", {"window_cache": True, **options}
        title = "{}: refused, naming `{}`."
        yield refused(label, argument, "value", "MHA-CACHE-14", inputs, every, LAYER, title=title)


def _case_of_pages(
    name: str,
    title: str,
    sizes: LayerSizes,
    variant: int,
    lengths: Sequence[int],
    spec: Mapping[str, Any] | None = None,
    *,
    table: Sequence[Sequence[int]] = TABLE,
    garbage: float | None = None,
    **more: Any,
) -> Description:
    slots = {(table[b][j // BLOCK_SIZE], j % BLOCK_SIZE) for b, length in enumerate(lengths) for j in range(length)}
    cache = {"cache_lengths": integers(lengths), "cache_block_table": integers(table)}
    for label, size, centre in (("cache_key", sizes.qk_dim, 0.0), ("cache_value", sizes.v_dim, 1.25)):
        pool = bell((BLOCKS, BLOCK_SIZE, sizes.kv_heads, size), 2.0**-4, label, FLAVOURS[variant]) + centre
        for slot in numpy.ndindex(BLOCKS, BLOCK_SIZE) if garbage is not None else ():
            pool[slot] = pool[slot] if slot in slots else garbage
        cache[label] = Input(pool)
    return _case(f"cache/paged/{name}", title, sizes, variant, cache, spec, **more)


def _case_of_wrapping(
    name: str,
    title: str,
    sizes: LayerSizes,
    variant: int,
    lengths: Sequence[int],
    spec: Mapping[str, Any],
    *,
    garbage: float | None = None,
    **more: Any,
) -> Description:
    cache = cached(sizes, FLAVOURS[variant], lengths, garbage=garbage)
    return _case(f"cache/wrapping/{name}", title, sizes, variant, cache, spec, window_cache=True, **more)


def _case(
    name: str,
    title: str,
    sizes: LayerSizes,
    variant: int,
    cache: Mapping[str, Input],
    spec: Mapping[str, Any] | None,
    *,
    optional: Sequence[str] = (),
    inputs: Mapping[str, Input] | None = None,
    clauses: Sequence[str] = (),
    **options: Any,
) -> Description:
    more, plain = options_of(sizes.attention, spec or {}, variant)
    every = {**tokens(sizes, FLAVOURS[variant]), **parameters(sizes, tuple(optional)), **more, **cache}
    return describe_layer(
        name, title, every | dict(inputs or {}), {**plain, **options}, clauses=clauses, outputs=("output",)
    )
