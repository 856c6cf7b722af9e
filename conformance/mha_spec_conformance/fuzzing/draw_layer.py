"""Draw calls of the layer and of positions: projections, norms, rotation, caches, sequences of calls, ALiBi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mha_spec.parameters import AXES, JOINT_NORMS, REQUIRED

from .call import Call
from .draw_cache import draw_cache, draw_offset_of_window_cache

if TYPE_CHECKING:
    from .drawing import Drawing

__all__ = ["draw_alibi_bias", "draw_alibi_slopes", "draw_layer", "draw_rotary"]

LENGTHS = (1, 2, 3, 5, 8, 0, 13, 16, 17, 33)
OPTIONAL = ("b_q", "b_k", "b_v", "b_o")
OF_WEIGHTS = ("w_q", "w_k", "b_q", "b_k")
"""The parameters that the weights of attention need; `_gains` chooses the gains of norms."""


def draw_layer(d: Drawing) -> Call:
    """Draw a call of the layer, or a sequence of calls that continue a cache."""
    weights = d.function == "multi_head_attention_weights"
    cached = "cache" in d.keywords and (d.takes("cache") or d.rarely())
    sizes = _sizes(d)
    _tokens(d, sizes, weights=weights)
    _parameters(d, sizes, weights=weights)
    if cached:
        draw_cache(d, sizes)
    chunked = cached and not weights and sizes["q_len"] == sizes["kv_len"] > 1 and d.often()
    if chunked:
        cut = 1 + d.below(sizes["q_len"] - 1)
        d.options["chunks"] = [cut, sizes["q_len"] - cut]
        if d.often():
            d.options["drafts"] = True
    if d.takes("rotary"):
        d.options["rotary"] = _rotary(d, sizes["qk_dim"])
        if sizes["q_len"] == sizes["kv_len"] and d.takes("positions"):
            _positions(d, d.options["rotary"], (sizes["batch"], sizes["q_len"]))
    _options(d, sizes, cached=cached, chunked=chunked)
    return Call(d.function, d.dtype, d.recipes, d.options)


def _sizes(d: Drawing) -> dict[str, int]:
    q_len = d.one_of(*LENGTHS)
    kv_heads = d.one_of(1, 2, 3)
    qk_dim = d.one_of(4, 2, 6, 8, 16)
    embed = d.one_of(3, 1, 5, 8, 16)
    return {
        "batch": d.one_of(1, 2, 3),
        "q_len": q_len,
        "kv_len": q_len if d.often() else d.one_of(*LENGTHS),
        "kv_heads": kv_heads,
        "heads": kv_heads * d.one_of(1, 2),
        "qk_dim": qk_dim,
        "v_dim": qk_dim if d.often() else d.one_of(1, 3, 5),
        "embed": embed,
        "k_embed": embed if d.often() else d.one_of(2, 7),
        "v_embed": embed if d.often() else d.one_of(2, 6),
        "out": d.one_of(3, 1, 5),
    }


def _tokens(d: Drawing, sizes: dict[str, int], *, weights: bool) -> None:
    for name, length, embed in (
        ("query", "q_len", "embed"),
        ("key", "kv_len", "k_embed"),
        ("value", "kv_len", "v_embed"),
    ):
        if name != "value" or not weights:
            d.floats(name, (sizes["batch"], sizes[length], sizes[embed]), "scores")


def _parameters(d: Drawing, sizes: dict[str, int], *, weights: bool) -> None:
    names = OF_WEIGHTS if weights else (*REQUIRED, *OPTIONAL)
    present = [name for name in names if name not in OPTIONAL or d.often()]
    gains = _gains(d)
    for name in (*present, *gains):
        d.floats(name, tuple(sizes[axis] for axis in AXES[name]), "scores")
    if gains and d.often():
        d.options["norm_epsilon"] = d.one_of(1e-3, 1e-6, 0.5)


def _gains(d: Drawing) -> list[str]:
    """Choose for queries and for keys no norm, a norm of each head, or one over all heads (MHA-NORM-1, MHA-NORM-3)."""
    gains = []
    for of_head, joint in JOINT_NORMS.items():
        if d.takes("norm_epsilon"):
            gains.append(of_head)
        elif d.takes("joint_norm"):
            gains.append(joint)
    return gains


def _rotary(d: Drawing, size: int) -> dict[str, Any]:
    rotary: dict[str, Any] = {}
    if d.often():
        rotary["interleaved"] = True
    if size > 2 and d.often():
        # The only angle of two rotated components is the position, whatever the base is: more components say more.
        rotary["rotary_dim"] = d.one_of(*range(2, size, 2))
    if d.rarely():
        rotary["frequencies"] = _frequencies(d, rotary.get("rotary_dim", size) // 2)
    elif d.often():
        rotary["base"] = d.one_of(500.0, 1e6)
    if d.rarely():
        rotary["attention_factor"] = d.one_of(0.5, 1.25, 1.1386, 4.0)
    if d.rarely():
        rotary["sections"] = _sections(d, rotary.get("rotary_dim", size) // 2)
    return rotary


def _positions(d: Drawing, rotary: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Draw positions of tokens, sometimes on the axes of `sections`, which are drawn too."""
    if "sections" in rotary and d.often():
        shape = (len(rotary["sections"]), *shape)
    d.array("positions", f"random.integers(-5, {d.one_of(10, 1000)}, {shape})", d.one_of("int32", "int64"))


def _sections(d: Drawing, pairs: int) -> list[int]:
    """Draw the number of pairs of each of three axes."""
    first = d.below(pairs + 1)
    second = d.below(pairs - first + 1)
    return [first, second, pairs - first - second]


def _frequencies(d: Drawing, pairs: int) -> list[float]:
    """Draw frequencies that fall or rise, as a scaled table does and does not; the last may be 0."""
    first, ratio = d.one_of(1.0, 0.125, 1.75), d.one_of(0.5, 0.3, 1.0, 1.25)
    turning = pairs - d.below(pairs) if d.often() else pairs
    return [min(first * ratio**pair, 2.0) for pair in range(turning)] + [0.0] * (pairs - turning)


def _options(d: Drawing, sizes: dict[str, int], *, cached: bool, chunked: bool) -> None:
    """Draw the options of attention; with a cache, a mask, a bias and the ids of keys cover all of its slots."""
    batch, heads, q_len = sizes["batch"], sizes["heads"], sizes["q_len"]
    kv_len = sizes.get("buffer", sizes["kv_len"])
    scores = (batch, heads, q_len, kv_len)
    if d.takes("mask"):
        d.mask("mask", scores, d.one_of(0.7, 0.3))
    if d.takes("bias"):
        d.bias(scores)
    if d.takes("causal"):
        d.options["causal"] = True
    if d.takes("window"):
        d.options["window"] = tuple(d.one_of(0, 1, 3, None) for _ in range(2))
    if d.takes("chunk"):
        d.options["chunk"] = d.one_of(1, 2, 3, 7)
    if d.takes("scale"):
        d.options["scale"] = d.one_of(0.5, 0.0, -0.25)
    if d.takes("softcap"):
        d.options["softcap"] = d.one_of(1.5, 30.0)
    if d.takes("sinks"):
        d.sinks(heads)
    if "dropout_mask" in d.keywords and d.takes("dropout_mask"):
        d.mask("dropout_mask", scores, 0.7)
        d.options["dropout_rate"] = d.one_of(0.5, 0.0)
    if chunked:
        return
    d.starts(batch, kv_len)
    if d.takes("q_segment_ids", "kv_segment_ids"):
        d.segments(batch, q_len, kv_len)
    if d.takes("kv_lengths"):
        d.lengths("kv_lengths", batch, sizes["kv_len"])
    if d.takes("q_lengths"):
        d.lengths("q_lengths", batch, q_len)
    _offset(d, batch, q_len, kv_len, cached=cached)


def _offset(d: Drawing, batch: int, q_len: int, kv_len: int, *, cached: bool) -> None:
    """Draw an offset if the diagonal would be ambiguous, and sometimes otherwise (MHA-LAYER-6)."""
    if "window_cache" in d.options:
        if d.takes("q_offset"):
            draw_offset_of_window_cache(d)
        return
    looks = {"causal", "window", "chunk", "rotary"} & d.options.keys()
    ambiguous = looks and not cached and (q_len != kv_len or "kv_lengths" in d.recipes)
    if "q_offset" in d.keywords and (ambiguous or d.takes("q_offset")):
        d.offset(batch, 0, 1, kv_len - q_len, -2, 1000)


def draw_rotary(d: Drawing) -> Call:
    """Draw a rotary embedding at positions of either sign, integers or floats."""
    size = d.one_of(4, 2, 6, 8, 64)
    batch, length = d.one_of(1, 2, 0), d.one_of(*LENGTHS)
    d.floats("x", (batch, d.one_of(1, 2, 3), length, size), "scores")
    options = {name: value for name, value in _rotary(d, size).items() if name in d.keywords}
    shape = (batch, length) if d.often() else (length,)
    if "sections" in options and d.often():
        shape = (len(options["sections"]), batch, length)
    far = d.one_of(10, 1000, 100_000)
    dtype = d.one_of("int32", "int64", "float32")
    d.array("positions", f"random.integers(-{far}, {far}, {shape})" + (" / 4" if dtype == "float32" else ""), dtype)
    return Call(d.function, d.dtype, d.recipes, options)


def draw_alibi_slopes(d: Drawing) -> Call:
    """Draw a number of heads."""
    return Call(d.function, "float32", {}, {"heads": d.one_of(1, 2, 3, 8, 12, 40, 64, 71)})


def draw_alibi_bias(d: Drawing) -> Call:
    """Draw slopes, lengths and an offset."""
    q_len = d.one_of(*LENGTHS)
    kv_len = q_len if d.often() else d.one_of(*LENGTHS)
    d.array("slopes", f"random.random({(d.one_of(1, 2, 3, 8),)})", d.dtype)
    d.options |= {"q_len": q_len, "kv_len": kv_len}
    if "q_offset" in d.keywords and (q_len != kv_len or d.often()):
        d.options["q_offset"] = d.one_of(0, 1, kv_len - q_len, -5, 1000)
    return Call(d.function, d.dtype, d.recipes, d.options)
