"""varlen_attention and its gradients: packed sequences, and keys and values in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Description, Input
from portable import generate

from .errors import refused
from .options import integers
from .tensors import bell, seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Inputs = dict[str, Input]

FORWARD, VJP = "varlen_attention", "varlen_attention_vjp"

Q_LENGTHS, KV_LENGTHS = (1, 0, 1, 2, 3), (3, 2, 0, 5, 1)
Q_TOKENS, KV_TOKENS = 8, 13
"""The tokens of most calls, so that a compiled target compiles once for calls that differ in their lengths."""
USED = (2, 2, 0, 4, 1)
SLOPES = (0.5, 0.25, 1.0, 0.125)
UNITS = {"query": 2.0**-3, "key": 2.0**-6, "value": 2.0**-3}
"""The units of generated inputs: the logits of long heads stay small."""

FEATURES = {
    "block_table": "paged",
    "seqused_kv": "kv_used",
    "alibi_slopes": "slopes",
    "q_offset": "offset",
    **{name: name for name in ("causal", "window", "scale", "softcap", "sinks")},
}
CLAUSES = {
    "block_table": ("MHA-VARLEN-6",),
    "seqused_kv": ("MHA-VARLEN-4",),
    "alibi_slopes": ("MHA-VARLEN-8",),
    "q_offset": ("MHA-VARLEN-5",),
    "sinks": ("MHA-SINK-1",),
    "softcap": ("MHA-CAP-1",),
    "scale": ("MHA-SCORE-1",),
}
LOWER_RIGHT = {"causal": True, "q_offset": "lower_right"}


def packed(
    q_lengths: Sequence[int] = Q_LENGTHS,
    kv_lengths: Sequence[int] = KV_LENGTHS,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    sizes: tuple[int, int] = (5, 3),
    tokens: tuple[int, int] = (Q_TOKENS, KV_TOKENS),
) -> Inputs:
    """Return a packed call, whose tokens behind the last sequence hold NaN."""
    q_tokens, kv_tokens = tokens
    shapes = {"query": (q_tokens, heads, sizes[0]), "key": (kv_tokens, kv_heads, sizes[0])}
    shapes["value"] = (kv_tokens, kv_heads, sizes[1])
    inputs = {}
    for name, shape in shapes.items():
        array = bell(shape, 2.0**-3, "packed", name)
        end = sum(q_lengths if name == "query" else kv_lengths)
        array[end:] = numpy.nan
        inputs[name] = Input(array)
    return inputs | {"cu_seqlens_q": bounds(q_lengths), "cu_seqlens_kv": bounds(kv_lengths)}


def generated(inputs: Inputs) -> Inputs:
    """Replace the floating inputs by generated ones of their shapes; the index stores only the seeds of these."""
    more: Inputs = {}
    for name, unit in UNITS.items():
        shape = inputs[name].values.shape
        how = {"seed": seed_of(*shape, "packed", name), "kind": "bell", "unit": unit}
        more[name] = Input(generate(shape, **how), "case", how)
    return inputs | more


def bounds(lengths: Sequence[int]) -> Input:
    """Return the cumulative lengths of sequences."""
    return integers(numpy.cumsum([0, *lengths]))


def paged(
    table: Sequence[Sequence[int]],
    used: Sequence[int],
    q_lengths: Sequence[int] = Q_LENGTHS,
    *,
    blocks: int = 7,
    block_size: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    sizes: tuple[int, int] = (5, 3),
    q_tokens: int = Q_TOKENS,
    by: str = "seqused_kv",
) -> Inputs:
    """Return a paged call, with lengths `by` an argument; slots that no sequence has hold NaN."""
    query = packed(q_lengths, (), heads=heads, sizes=sizes, tokens=(q_tokens, 0))["query"]
    inputs = {"query": query, "cu_seqlens_q": bounds(q_lengths)}
    seen = numpy.zeros((blocks, block_size), dtype=bool)
    for row, length in zip(table, used, strict=True):
        for j in range(length):
            seen[row[j // block_size], j % block_size] = True
    for name, size in zip(("key", "value"), sizes, strict=True):
        array = bell((blocks, block_size, kv_heads, size), 2.0**-3, "paged", name)
        inputs[name] = Input(numpy.where(seen[..., None, None], array, numpy.nan))
    lengths = bounds(used) if by == "cu_seqlens_kv" else integers(numpy.array(used))
    return inputs | {"block_table": integers(numpy.array(table)), by: lengths}


PERMUTED = ((4, 2, -1), (3, -1, 1000), (-1, -1, -1), (6, 0, 5), (1, -1, -1))
SHARED = ((4, 2, -1), (4, -1, 1000), (-1, -1, -1), (4, 2, 6), (2, -1, 9))
REPEATED = ((4, 4, -1), (5, -1, 1000), (-1, -1, -1), (3, 3, 3), (3, -1, 9))
IN_BLOCKS, IN_SHARED = (4, 1, 0, 7, 1), (4, 1, 0, 8, 2)


def with_used(inputs: Inputs, used: Sequence[int] = USED) -> Inputs:
    """Use only the first keys of each sequence."""
    return inputs | {"seqused_kv": integers(numpy.array(used))}


def with_options(inputs: Inputs, **options: Any) -> tuple[Inputs, dict[str, Any]]:
    """Add options to a call: arrays to the inputs, all others as they are."""
    heads = inputs["query"].values.shape[1]
    arrays: Inputs = {}
    if options.pop("sinks", False):
        arrays["sinks"] = Input(numpy.append(bell((heads - 1,), 2.0**-3, "packed sinks"), -numpy.inf))
    if options.pop("slopes", False):
        arrays["alibi_slopes"] = Input(numpy.array(SLOPES[:heads]), "softmax")
    offsets = options.get("q_offset")
    if isinstance(offsets, list):
        arrays["q_offset"] = integers(numpy.array(options.pop("q_offset")))
    return inputs | arrays, options


ALL = {"causal": True, "q_offset": "lower_right", "window": (2, None), "scale": 0.75, "softcap": 2.0, "sinks": True}
HINTS, TEN = {"max_seqlen_q": 3, "max_seqlen_kv": 5}, ("MHA-VARLEN-10",)
ALL_PACKED = {**ALL, "slopes": True, "max_seqlen_q": 7, "max_seqlen_kv": 5}

CALLS: dict[str, tuple[str, Inputs, dict[str, Any], tuple[str, ...]]] = {
    "plain": ("Five sequences, of which one has no queries and one no keys.", packed(), {}, ("MHA-VARLEN-3",)),
    "equal": ("Causal self-attention of packed sequences.", packed(*[(2, 1, 3, 0, 1)] * 2), LOWER_RIGHT, ()),
    "lower-right": ("The diagonal at the lower right of each sequence.", packed(), LOWER_RIGHT, ("MHA-VARLEN-5",)),
    "upper-left": (
        "The diagonal at the upper left of each sequence.",
        packed(),
        {"causal": True, "q_offset": "upper_left"},
        (),
    ),
    "offsets": ("An offset for each sequence.", packed(), {"causal": True, "q_offset": [0, 0, -1, 1, 0]}, ()),
    "one-offset": ("One offset for all sequences.", packed(), {"causal": True, "q_offset": 2}, ()),
    "window": ("A window of both sides in each sequence.", packed(), {"window": (2, 0), "q_offset": "lower_right"}, ()),
    "scale": ("A negative scale, and the longest length of the keys.", packed(), {"scale": -0.5, **HINTS}, TEN),
    "softcap": ("A soft cap, and the longest length of the keys.", packed(), {"softcap": 1.5, **HINTS}, TEN),
    "hints": ("The longest lengths, which change nothing.", packed(), HINTS, TEN),
    "sinks": ("Sinks, of which one is -inf.", packed(), {"sinks": True}, ()),
    "slopes": (
        "A linear bias that begins again in each sequence.",
        packed(),
        {"slopes": True, "q_offset": "lower_right"},
        (),
    ),
    "all": ("All options together.", with_used(packed()), ALL_PACKED, TEN),
    "no-groups": ("As many key heads as query heads.", packed(heads=3, kv_heads=3), LOWER_RIGHT, ()),
    "one-kv-head": ("A single key head.", packed(heads=3, kv_heads=1), LOWER_RIGHT, ()),
    "used": (
        "Keys behind those in use, which no diagonal hides.",
        with_used(packed()),
        {"window": (2, None), "q_offset": "lower_right"},
        (),
    ),
    "used-behind-full": (
        "Sequences of equal lengths, of which the first uses all of its keys.",
        with_used(packed((1, 1, 2, 2, 1), (2, 3, 1, 3, 3)), (2, 2, 1, 1, 3)),
        {},
        (),
    ),
    "one-sequence": ("A single sequence, which fills the arrays.", packed((7,), (5,), tokens=(7, 5)), {}, ()),
    "no-sequences": (
        "No sequence: every token belongs to none.",
        packed((), (), tokens=(2, 3)),
        {"sinks": True},
        ("MHA-VARLEN-3",),
    ),
    "singles": ("Sequences of a single token.", packed((1,) * 5, (1,) * 5), LOWER_RIGHT, ()),
    "long": (
        "Sequences that end inside of tiles.",
        generated(packed((33, 5, 65), (70, 5, 40), heads=1, kv_heads=1, tokens=(103, 115))),
        LOWER_RIGHT,
        (),
    ),
    "size-64": (
        "Heads of 64.",
        generated(packed((1, 2), (6, 5), heads=2, kv_heads=1, sizes=(64, 64), tokens=(3, 11))),
        LOWER_RIGHT,
        (),
    ),
    "paged": ("Blocks in another order.", paged(PERMUTED, IN_BLOCKS), {}, ("MHA-VARLEN-7",)),
    "paged-shared": ("Blocks that sequences share.", paged(SHARED, IN_SHARED), LOWER_RIGHT, ("MHA-VARLEN-7",)),
    "paged-repeated": (
        "Blocks that occur repeatedly in a row.",
        paged(REPEATED, (5, 1, 0, 9, 2)),
        {"slopes": True, "q_offset": "lower_right"},
        (),
    ),
    "paged-bounds": ("Lengths of keys by cu_seqlens_kv.", paged(PERMUTED, IN_BLOCKS, by="cu_seqlens_kv"), {}, ()),
    "paged-full": ("Sequences that fill their blocks.", paged(PERMUTED, (6, 3, 0, 9, 3)), LOWER_RIGHT, ()),
    "paged-decode": ("A query of each sequence.", paged(PERMUTED, IN_BLOCKS, (1,) * 5), LOWER_RIGHT, ()),
    "paged-single-slots": (
        "Blocks of a single slot.",
        paged(((3, 1), (0, 2)), (2, 1), (2, 3), blocks=4, block_size=1),
        {},
        (),
    ),
    "paged-all": ("All options together, in blocks.", paged(SHARED, IN_SHARED), {**ALL, "slopes": True}, ()),
    "paged-size-128": (
        "Decoding with heads of 128.",
        generated(
            paged(((1, 0),), (21,), (1,), blocks=3, block_size=16, heads=2, kv_heads=1, sizes=(128, 128), q_tokens=1)
        ),
        LOWER_RIGHT,
        (),
    ),
}
"""Title, inputs, options and further clauses of each call."""

IN_ALL_DTYPES = ("all", "paged-all")
"""The calls that are asked in all dtypes; a compiled target compiles for each."""

IN_BFLOAT16 = (
    "equal",
    "long",
    "lower-right",
    "paged",
    "paged-decode",
    "paged-full",
    "paged-shared",
    "paged-size-128",
    "plain",
    "poisoned-sequence",
    "singles",
    "size-64",
    "used",
    "window",
)
"""The calls that kernels without float32 are asked, too: their options are those that such kernels have."""

TAGS = {
    "equal": ("boundary",),
    "singles": ("boundary", "decode"),
    "paged-decode": ("decode",),
    "paged-size-128": ("decode",),
}
"""The tags of calls in which the diagonal by another name, or no diagonal, gives the same result."""

GRADIENTS = (
    "plain",
    "lower-right",
    "offsets",
    "sinks",
    "slopes",
    "all",
    "one-kv-head",
    "used",
    "used-behind-full",
    "no-sequences",
    "paged-shared",
    "paged-repeated",
    "paged-all",
)


def descriptions() -> Iterator[Description]:
    """Yield the calls, their gradients, calls in which a sequence holds NaN, and errors."""
    for name, (title, inputs, options, clauses) in CALLS.items():
        more, plain = with_options(inputs, **options)
        yield describe(FORWARD, name, title, more, plain, clauses)
        if name in GRADIENTS:
            yield describe(VJP, name, f"Gradients. {title}", with_cotangents(more), plain, clauses)
    for function in (FORWARD, VJP):
        yield poisoned(function)
    yield from errors()


def with_cotangents(inputs: Inputs) -> Inputs:
    """Add cotangents; those of tokens of no sequence are NaN."""
    (tokens, heads, _), size = inputs["query"].values.shape, inputs["value"].values.shape[-1]
    end = int(inputs["cu_seqlens_q"].values[-1])
    grad_output = bell((tokens, heads, size), 2.0**-3, "packed grad_output") + 0.5
    grad_lse = bell((heads, tokens), 2.0**-3, "packed grad_lse")
    grad_output[end:], grad_lse[:, end:] = numpy.nan, numpy.nan
    return {"grad_output": Input(grad_output), **inputs, "grad_lse": Input(grad_lse, "softmax")}


def poisoned(function: str) -> Description:
    """Return a call whose first sequence holds NaN, which reaches no other."""
    inputs = packed()
    for name in ("query", "key", "value"):
        array = inputs[name].values.copy()
        array[: 1 if name == "query" else 3] = numpy.nan
        inputs[name] = Input(array)
    inputs, options = with_options(inputs, **LOWER_RIGHT)
    inputs = with_cotangents(inputs) if function == VJP else inputs
    return describe(
        function, "poisoned-sequence", "A sequence of NaN beside others.", inputs, options, ("MHA-VARLEN-12",)
    )


def describe(
    function: str,
    name: str,
    title: str,
    inputs: Mapping[str, Input],
    options: Mapping[str, Any],
    clauses: Sequence[str] = (),
) -> Description:
    """Describe a case; the clauses and features that follow from its arguments are added."""
    words = [word for word in (*inputs, *options) if word in FEATURES]
    of_function = ("MHA-VARLEN-1", "MHA-VARLEN-2", "MHA-VARLEN-9") if function == FORWARD else ("MHA-VARLEN-11",)
    every = [*clauses, *(clause for word in words for clause in CLAUSES.get(word, ())), *of_function]
    features = ["varlen", *(["vjp"] if function == VJP else []), *(FEATURES[word] for word in words)]
    return Description(
        id=f"{function}/{name}",
        title=title,
        function=function,
        clauses=tuple(dict.fromkeys(every)),
        features=tuple(dict.fromkeys(features)),
        inputs=inputs,
        options=options,
        tags=("structured", *TAGS.get(name, ())),
        lse=function == FORWARD,
        dtypes=dtypes_of(name),
    )


def dtypes_of(name: str) -> tuple[str, ...]:
    """Return the dtypes that a call is asked in."""
    if name in IN_ALL_DTYPES:
        return ALL_DTYPES
    return ("float32", "bfloat16") if name in IN_BFLOAT16 else ("float32",)


ERRORS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bounds-from-one": ("cu_seqlens_q", "value", "MHA-VARLEN-2", {"cu_seqlens_q": (1, 1, 2, 4, 7, 7)}),
    "bounds-decrease": ("cu_seqlens_kv", "value", "MHA-VARLEN-2", {"cu_seqlens_kv": (0, 3, 2, 5, 10, 11)}),
    "bounds-beyond-tokens": ("cu_seqlens_q", "value", "MHA-VARLEN-2", {"cu_seqlens_q": (0, 1, 1, 2, 4, 9)}),
    "bounds-of-another-count": ("cu_seqlens_kv", "value", "MHA-VARLEN-2", {"cu_seqlens_kv": (0, 3, 5)}),
    "used-beyond-keys": (
        "seqused_kv",
        "value",
        "MHA-VARLEN-4",
        {"cu_seqlens_kv": (0, 3, 5, 5, 10, 11), "seqused_kv": (3, 3, 0, 5, 1)},
    ),
    "ambiguous-causal": ("q_offset", "value", "MHA-VARLEN-5", {"causal": True}),
    "longest-too-small": (
        "max_seqlen_q",
        "value",
        "MHA-VARLEN-10",
        {"max_seqlen_q": 2, "cu_seqlens_q": (0, 1, 1, 2, 4, 7)},
    ),
    "mask": ("mask", "type", "MHA-ARG-1", {"mask": None}),
}
"""Argument, kind, clause and changed options of each refused call."""


def errors() -> Iterator[Description]:
    """Yield calls that must raise an error that names the argument; their integers are host data."""
    for name, (argument, kind, clause, options) in ERRORS.items():
        inputs = {label: item for label, item in packed().items() if label not in options}
        yield refused(f"{FORWARD}/error/{name}", argument, kind, clause, inputs, options, FORWARD)
