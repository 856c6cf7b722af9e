"""varlen_attention and its gradients: packed sequences, and keys and values in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Description, Input
from portable import generate

from .options import integers
from .tensors import bell, seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Inputs = dict[str, Input]

FORWARD, VJP = "varlen_attention", "varlen_attention_vjp"

Q_LENGTHS, KV_LENGTHS = (3, 0, 5, 1), (5, 4, 0, 11)
EQUAL = (3, 1, 7, 0)
USED = (4, 4, 0, 9)
Q_TAIL, KV_TAIL = 2, 3
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
    sizes: tuple[int, int] = (7, 5),
    tails: tuple[int, int] = (Q_TAIL, KV_TAIL),
    tail: float = numpy.nan,
) -> Inputs:
    """Return a packed call, whose tokens behind the last sequence hold `tail`."""
    q_tokens, kv_tokens = sum(q_lengths) + tails[0], sum(kv_lengths) + tails[1]
    shapes = {"query": (q_tokens, heads, sizes[0]), "key": (kv_tokens, kv_heads, sizes[0])}
    shapes["value"] = (kv_tokens, kv_heads, sizes[1])
    inputs = {}
    for name, shape in shapes.items():
        array = bell(shape, 2.0**-3, "packed", name)
        end = sum(q_lengths if name == "query" else kv_lengths)
        array[end:] = tail
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
    blocks: int = 8,
    block_size: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    sizes: tuple[int, int] = (7, 5),
    poison: bool = True,
    by: str = "seqused_kv",
) -> Inputs:
    """Return a paged call, with lengths `by` an argument; slots that no sequence has hold NaN, if `poison`."""
    inputs = {"query": packed(q_lengths, used, heads=heads, sizes=sizes)["query"], "cu_seqlens_q": bounds(q_lengths)}
    seen = numpy.zeros((blocks, block_size), dtype=bool)
    for row, length in zip(table, used, strict=True):
        for j in range(length):
            seen[row[j // block_size], j % block_size] = True
    for name, size in zip(("key", "value"), sizes, strict=True):
        array = bell((blocks, block_size, kv_heads, size), 2.0**-3, "paged", name)
        inputs[name] = Input(numpy.where(seen[..., None, None], array, numpy.nan) if poison else array)
    lengths = bounds(used) if by == "cu_seqlens_kv" else integers(numpy.array(used))
    return inputs | {"block_table": integers(numpy.array(table)), by: lengths}


PERMUTED = ((6, 2, -1), (5, -1, 1000), (-1, -1, -1), (3, 0, 7))
SHARED = ((6, 2, -1), (6, -1, 1000), (-1, -1, -1), (6, 2, 7))
REPEATED = ((6, 6, -1), (5, -1, 1000), (-1, -1, -1), (3, 3, 3))


def with_used(inputs: Inputs) -> Inputs:
    """Use only the first keys of each sequence."""
    return inputs | {"seqused_kv": integers(numpy.array(USED))}


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


ALL = {"causal": True, "q_offset": "lower_right", "window": (6, None), "scale": 0.75, "softcap": 2.0, "sinks": True}
HINTS, TEN = {"max_seqlen_q": 5, "max_seqlen_kv": 11}, ("MHA-VARLEN-10",)
ALL_PACKED = {**ALL, "slopes": True, "max_seqlen_q": 7, "max_seqlen_kv": 11}

CALLS: dict[str, tuple[str, Inputs, dict[str, Any], tuple[str, ...]]] = {
    "plain": ("Four sequences, of which one has no queries and one no keys.", packed(), {}, ("MHA-VARLEN-3",)),
    "equal": (
        "Causal self-attention of packed sequences.",
        packed(EQUAL, EQUAL),
        {"causal": True, "q_offset": "lower_right"},
        (),
    ),
    "lower-right": ("The diagonal at the lower right of each sequence.", packed(), LOWER_RIGHT, ("MHA-VARLEN-5",)),
    "upper-left": (
        "The diagonal at the upper left of each sequence.",
        packed(),
        {"causal": True, "q_offset": "upper_left"},
        (),
    ),
    "offsets": ("An offset for each sequence.", packed(), {"causal": True, "q_offset": [2, 0, -1, 8]}, ()),
    "one-offset": ("One offset for all sequences.", packed(), {"causal": True, "q_offset": 3}, ()),
    "window": ("A window of both sides in each sequence.", packed(), {"window": (2, 1), "q_offset": "lower_right"}, ()),
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
    "all": ("All options together.", with_used(packed()), ALL_PACKED, ("MHA-VARLEN-10",)),
    "no-groups": ("As many key heads as query heads.", packed(heads=3, kv_heads=3), LOWER_RIGHT, ()),
    "one-kv-head": ("A single key head.", packed(heads=3, kv_heads=1), LOWER_RIGHT, ()),
    "used": ("Keys behind those in use.", with_used(packed()), LOWER_RIGHT, ()),
    "one-sequence": ("A single sequence, which fills the arrays.", packed((7,), (5,), tails=(0, 0)), {}, ()),
    "no-sequences": ("No sequence: every token belongs to none.", packed((), ()), {"sinks": True}, ("MHA-VARLEN-3",)),
    "singles": (
        "Sequences of a single token.",
        packed((1,) * 5, (1,) * 5),
        {"causal": True, "q_offset": "lower_right"},
        (),
    ),
    "long": (
        "Sequences that end inside of tiles.",
        packed((33, 5, 65), (70, 5, 40), heads=1, kv_heads=1),
        LOWER_RIGHT,
        (),
    ),
    "size-64": (
        "Heads of 64.",
        generated(packed((2, 3), (6, 5), heads=2, kv_heads=2, sizes=(64, 64), tails=(0, 0))),
        LOWER_RIGHT,
        (),
    ),
    "paged": ("Blocks in another order.", paged(PERMUTED, (5, 1, 0, 9)), {}, ("MHA-VARLEN-7",)),
    "paged-shared": ("Blocks that sequences share.", paged(SHARED, (5, 1, 0, 11)), LOWER_RIGHT, ("MHA-VARLEN-7",)),
    "paged-repeated": (
        "Blocks that occur repeatedly in a row.",
        paged(REPEATED, (7, 1, 0, 12)),
        {"slopes": True, "q_offset": "lower_right"},
        (),
    ),
    "paged-bounds": ("Lengths of keys by cu_seqlens_kv.", paged(PERMUTED, (5, 1, 0, 9), by="cu_seqlens_kv"), {}, ()),
    "paged-full": ("Sequences that fill their blocks.", paged(PERMUTED, (8, 4, 0, 12)), LOWER_RIGHT, ()),
    "paged-decode": ("A query of each sequence.", paged(PERMUTED, (5, 1, 0, 9), (1, 1, 1, 1)), LOWER_RIGHT, ()),
    "paged-single-slots": (
        "Blocks of a single slot.",
        paged(((3, 1), (0, 2)), (2, 1), (2, 3), blocks=4, block_size=1),
        {},
        (),
    ),
    "paged-all": ("All options together, in blocks.", paged(SHARED, (5, 1, 0, 11)), {**ALL, "slopes": True}, ()),
    "paged-size-128": (
        "Decoding with heads of 128.",
        generated(paged(((1, 0),), (21,), (1,), blocks=3, block_size=16, heads=2, kv_heads=1, sizes=(128, 128))),
        LOWER_RIGHT,
        (),
    ),
}
"""Title, inputs, options and further clauses of each call."""

IN_ALL_DTYPES = ("plain", "all", "paged", "paged-all")
"""The calls that are asked in all dtypes; a compiled target compiles for each."""

GRADIENTS = (
    "plain",
    "lower-right",
    "offsets",
    "sinks",
    "slopes",
    "all",
    "one-kv-head",
    "used",
    "no-sequences",
    "paged",
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
        array[:3] = numpy.nan
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
        tags=("structured",),
        lse=function == FORWARD,
        dtypes=ALL_DTYPES if name in IN_ALL_DTYPES else ("float32", "bfloat16"),
    )


ERRORS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bounds-from-one": ("cu_seqlens_q", "value", "MHA-VARLEN-2", {"cu_seqlens_q": (1, 3, 3, 8, 9)}),
    "bounds-decrease": ("cu_seqlens_kv", "value", "MHA-VARLEN-2", {"cu_seqlens_kv": (0, 5, 4, 9, 20)}),
    "bounds-beyond-tokens": ("cu_seqlens_q", "value", "MHA-VARLEN-2", {"cu_seqlens_q": (0, 3, 3, 8, 12)}),
    "bounds-of-another-count": ("cu_seqlens_kv", "value", "MHA-VARLEN-2", {"cu_seqlens_kv": (0, 5, 9)}),
    "used-beyond-keys": (
        "seqused_kv",
        "value",
        "MHA-VARLEN-4",
        {"cu_seqlens_kv": (0, 5, 9, 9, 20), "seqused_kv": (5, 5, 0, 11)},
    ),
    "ambiguous-causal": ("q_offset", "value", "MHA-VARLEN-5", {"causal": True}),
    "longest-too-small": (
        "max_seqlen_q",
        "value",
        "MHA-VARLEN-10",
        {"max_seqlen_q": 4, "cu_seqlens_q": (0, 3, 3, 8, 9)},
    ),
    "mask": ("mask", "type", "MHA-ARG-1", {"mask": None}),
}
"""Argument, kind, clause and changed options of each refused call."""


def errors() -> Iterator[Description]:
    """Yield calls that must raise an error that names the argument; their integers are host data."""
    for name, (argument, kind, clause, options) in ERRORS.items():
        inputs = {label: item for label, item in packed(tail=0.0).items() if label not in options}
        title = f"{name.replace('-', ' ').capitalize()} is refused, and the message names `{argument}`."
        yield Description(
            id=f"{FORWARD}/error/{name}",
            title=title,
            function=FORWARD,
            clauses=(clause,),
            features=("errors",),
            inputs=inputs,
            options=options,
            tags=("structured",),
            dtypes=("float32",),
            lse=False,
            error={"argument": argument, "kind": kind},
        )
