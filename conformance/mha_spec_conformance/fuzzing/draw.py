"""Draw calls over the whole option space that a target claims."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from mha_spec.arrays import softmax_dtype_name

from .call import ENTRIES, Call, Recipe
from .draw_layer import draw_alibi_bias, draw_alibi_slopes, draw_layer, draw_rotary
from .draw_packed import draw_varlen
from .drawing import Drawing
from .poison import poisoned

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec_conformance.targets.claims import Claims

__all__ = ["calls"]

SMALL = (1, 2, 3, 5, 7, 0, 8, 11, 13)
EDGES = (1, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1025)
MOST_PAIRS = 2**16
"""The largest number of scores of a call, because the reference stores all of them in float64."""

ON_DEVICE = ("q_segment_ids", "kv_segment_ids", "block_table", "cache_block_table")
"""Further integers that a target may take as arrays of NumPy, if its own arrays are of another library."""

WEIGHTS = {
    "attention": 6,
    "attention_vjp": 6,
    "attention_weights": 2,
    "merge_attention": 1,
    "merge_attention_vjp": 1,
    "multi_head_attention": 3,
    "multi_head_attention_and_weights": 1,
    "multi_head_attention_weights": 1,
    "rotary_embedding": 1,
    "alibi_slopes": 1,
    "alibi_bias": 1,
    "varlen_attention": 2,
    "varlen_attention_vjp": 2,
}
"""The relative frequency of each function."""


def calls(claims: Claims, functions: tuple[str, ...] = ()) -> st.SearchStrategy[Call]:
    """Return a strategy of calls that a target claims to answer.

    Args:
        claims: The claims of the target.
        functions: The functions to draw; if empty, all that the target claims.
    """
    names = [name for name in DRAWERS if name in claims.keywords and (not functions or name in functions)]
    weighted = [name for name in names for _ in range(WEIGHTS[name])]

    @st.composite
    def strategy(draw: Callable[..., Any]) -> Call:
        function = draw(st.sampled_from(weighted))
        drawing = Drawing(draw, claims, function, draw(st.sampled_from(_simplest_first(claims.dtypes))))
        return _passed(drawing, DRAWERS[function](drawing))

    return strategy()


def _simplest_first(dtypes: tuple[str, ...]) -> list[str]:
    return sorted(dtypes, key=("float32", "float64", "bfloat16", "float16").index)


def _sizes(d: Drawing) -> dict[str, int]:
    """Draw the sizes of an attention, some on the edges of tiles, with at most `MOST_PAIRS` scores."""
    long = d.one_of(*[False] * 7, True)
    lengths = EDGES if long else SMALL
    q_len = d.one_of(*lengths)
    kv_len = q_len if d.often() else d.one_of(*lengths)
    batch = d.one_of(1, 2, 3, 0) if not long else 1
    kv_heads, group = d.one_of(1, 2, 3), d.one_of(1, 2, 3, 4)
    while batch * kv_heads * group * q_len * kv_len > MOST_PAIRS:
        if group > 1 or kv_heads > 1:
            group, kv_heads = max(group - 1, 1), max(kv_heads - 1, 1)
        else:
            q_len = 4
    qk_dim = d.one_of(4, 1, 2, 3, 5, 8, 16, 17, 32, 33, 64, 80, 128)
    v_dim = qk_dim if d.often() else d.one_of(4, 1, 2, 3, 5, 8, 16, 17, 32, 33, 64, 80, 128)
    return {
        "batch": batch,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "q_len": q_len,
        "kv_len": kv_len,
        "qk_dim": qk_dim,
        "v_dim": v_dim,
    }


def draw_attention(d: Drawing) -> Call:
    """Draw a call of attention, of its weights or of its gradients."""
    sizes = _sizes(d)
    s = sizes.__getitem__
    regime = d.one_of("scores", *(() if d.dtype == "float16" and d.function == "attention_vjp" else ("wide",)))
    d.floats("query", (s("batch"), s("heads"), s("q_len"), s("qk_dim")), regime)
    d.floats("key", (s("batch"), s("kv_heads"), s("kv_len"), s("qk_dim")), regime)
    if d.function != "attention_weights":
        d.floats("value", (s("batch"), s("kv_heads"), s("kv_len"), s("v_dim")), regime)
    if d.function == "attention_vjp":
        rows = (s("batch"), s("heads"), s("q_len"))
        d.floats("grad_output", (*rows, s("v_dim")), "scores", dtype=d.other_dtype())
        if d.takes("grad_lse"):
            d.floats("grad_lse", rows, "scores", dtype=d.one_of(softmax_dtype_name(d.dtype), d.other_dtype()))
    draw_options(d, sizes)
    lse = d.function == "attention" and "return_lse" in d.keywords and d.often()
    call = Call(d.function, d.dtype, d.recipes, d.options, lse=lse)
    return poisoned(d, call) if d.rarely() else call


def draw_options(d: Drawing, sizes: dict[str, int]) -> None:
    """Draw the options that the target takes; each option is present in some calls."""
    batch, heads, q_len, kv_len = (sizes[name] for name in ("batch", "heads", "q_len", "kv_len"))

    scores = (batch, heads, q_len, kv_len)
    if d.takes("mask"):
        d.mask("mask", scores, d.one_of(0.7, 0.95, 0.3, 0.05))
    if d.takes("bias"):
        d.bias(scores)
    draw_positions(d, batch, q_len, kv_len)
    if d.takes("q_segment_ids", "kv_segment_ids"):
        d.segments(batch, q_len, kv_len)
    d.of_scores(heads)
    if "dropout_mask" in d.keywords and d.takes("dropout_mask"):
        d.mask("dropout_mask", scores, d.one_of(0.7, 0.95, 0.0))
        if d.takes("dropout_rate"):
            d.options["dropout_rate"] = d.one_of(0.5, 0.0, 0.1, 0.9)


def draw_positions(d: Drawing, batch: int, q_len: int, kv_len: int) -> None:
    """Draw the options that depend on positions, with an offset if the diagonal would be ambiguous (MHA-POS-2)."""
    lengths = d.takes("kv_lengths")
    if lengths:
        d.lengths("kv_lengths", batch, kv_len)
    if d.takes("q_lengths"):
        d.lengths("q_lengths", batch, q_len)
    known = "q_offset" in d.keywords
    if (known or (q_len == kv_len and not lengths) or d.aligned) and d.takes("causal"):
        d.options["causal"] = True
    if (known or (q_len == kv_len and not lengths)) and d.takes("window"):
        d.options["window"] = tuple(d.one_of(0, 1, 2, 5, 16, None, 2**30) for _ in range(2))
    if known and d.takes("chunk"):
        d.options["chunk"] = d.one_of(1, 2, 3, 7, 16, 64, 2**30)
    d.starts(batch, kv_len)
    windowed = d.options.get("window", (None, None)) != (None, None)
    positional = windowed or not d.options.keys().isdisjoint(("causal", "chunk"))
    ambiguous = positional and (q_len != kv_len or lengths)
    if known and (d.takes("q_offset") or ambiguous):
        d.offset(batch, 0, 1, -1, kv_len - q_len, 5, -q_len, kv_len, 2**30 - 3, -(2**30))
    elif ambiguous:
        d.declared_offset(q_len, kv_len)


def draw_merge(d: Drawing) -> Call:
    """Draw two halves of a softmax, some rows empty or not finite, and for the gradients their cotangents."""
    rows = (d.one_of(1, 2, 0), d.one_of(1, 2, 3), d.one_of(*SMALL))
    v_dim, dtype = d.one_of(4, 1, 3, 8, 17, 64), d.dtype_of_lse()
    for half in "ab":
        d.floats(f"output_{half}", (*rows, v_dim), "scores")
        d.floats(f"lse_{half}", rows, "scores", dtype=dtype)
    if "grad_output" in d.operands:
        d.floats("grad_output", (*rows, v_dim), "scores", dtype=d.other_dtype())
        if d.takes("grad_lse"):
            d.floats("grad_lse", rows, "scores", dtype=dtype)
    if 0 not in rows:
        for _ in range(d.one_of(0, 1, 2)):
            half, place = d.one_of("a", "b"), tuple(d.below(size) for size in rows)
            d.mark(f"lse_{half}", place, d.one_of("-inf", "nan", "inf"))
            if d.often():
                d.mark(f"output_{half}", place, d.one_of("nan", "inf"))
        if d.rarely():
            d.mark(f"output_{d.one_of('a', 'b')}", tuple(d.below(size) for size in rows), d.one_of("nan", "inf"))
    return Call(d.function, d.dtype, d.recipes, d.options)


def _passed(d: Drawing, call: Call) -> Call:
    """Draw how the arrays are passed: as host data, outside their range, in another layout, or before a second call."""
    host: dict[str, str] = {}
    layouts: dict[str, str] = {}
    if d.claims.registered and d.rarely():
        forms: dict[str, tuple[str, ...]] = dict.fromkeys(ENTRIES, ("list", "numpy"))
        if d.claims.arrays != "numpy":
            forms |= dict.fromkeys(ON_DEVICE, ("numpy",))
        host = {name: d.one_of(*forms[name]) for name in call.recipes if name in forms and d.often()}
    beyond = _beyond(d, host)
    if d.layouts and d.rarely():
        names = [name for name in call.recipes if name not in host]
        layouts = {name: d.one_of(*d.layouts) for name in names if d.often()}
    return replace(call, host=host, beyond=beyond, layouts=layouts, reused=not layouts and d.rarely())


def _beyond(d: Drawing, host: dict[str, str]) -> dict[str, Recipe]:
    """Draw lengths outside their buffers, in some calls of a backend that does not read them (MHA-LEN-3)."""
    unread = [name for name in d.rooms if name not in host]
    if not d.claims.registered or d.claims.arrays == "numpy" or not unread or not d.rarely():
        return {}
    moved = {name: d.outside(name) for name in unread}
    return {name: recipe for name, recipe in moved.items() if (recipe.array() != d.recipes[name].array()).any()}


DRAWERS: dict[str, Callable[[Drawing], Call]] = {
    "attention": draw_attention,
    "attention_vjp": draw_attention,
    "attention_weights": draw_attention,
    "merge_attention": draw_merge,
    "merge_attention_vjp": draw_merge,
    "multi_head_attention": draw_layer,
    "multi_head_attention_and_weights": draw_layer,
    "multi_head_attention_weights": draw_layer,
    "rotary_embedding": draw_rotary,
    "alibi_slopes": draw_alibi_slopes,
    "alibi_bias": draw_alibi_bias,
    "varlen_attention": draw_varlen,
    "varlen_attention_vjp": draw_varlen,
}
