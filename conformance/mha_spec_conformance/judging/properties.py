"""Return the properties of a question: its function, dtype and features, its sizes, and facts about its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec.arguments import OPTIONS, Arguments
from mha_spec.arrays import FLOATING, dtype_name
from mha_spec.errors import MhaSpecError
from mha_spec.reference import Reference
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS, VarlenArguments
from mha_spec.varlen_sequences import sequences_of

from .bounds.evaluation import in_float64

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.cases import Case

    Inputs = Mapping[str, numpy.ndarray]

__all__ = ["Properties", "feature_of", "sizes_of", "visible_pairs"]

TILES = (16, 32, 64, 128, 256, 512)
"""The sizes of tiles that kernels use."""

LARGEST_FLOAT16 = 65504.0

MOST_PAIRS = 2**23
"""The largest number of pairs (i, j) that are marked as visible or hidden."""

ROTARY = ("base", "interleaved", "rotary_dim", "frequencies", "attention_factor", "sections")
"""The options of a rotation."""

ATTENTION = ("attention", "attention_weights", "attention_vjp")
"""The functions whose pairs (i, j) the reference can mark as visible from the arguments alone."""


FEATURES = {"group > 1": "groups", "a single kv head": "groups", "v_dim != qk_dim": "value_size", "q_offset": "offset"}
"""The features that sizes and arguments are a part of, by the beginning of the property."""


def feature_of(text: str) -> str:
    """Return the feature that a property belongs to; a property that begins with none of FEATURES may be a feature."""
    return next((feature for beginning, feature in FEATURES.items() if text.startswith(beginning)), text)


class Properties:
    """Gives the properties of questions; those that a case has in every dtype are computed once."""

    def __init__(self) -> None:
        self._of_cases: dict[str, frozenset[str]] = {}

    def __call__(self, ask: Ask) -> frozenset[str]:
        """Return the properties of a question, each in the words of the report."""
        case = ask.case
        if case.id not in self._of_cases:
            self._of_cases[case.id] = frozenset(() if case.expect == "error" else _of_case(case))
        words = {f"function {case.function}", f"dtype {ask.dtype}", *ask.features}
        words |= {"attention, alone or in a layer"} if "query" in case.input_names else set()
        words |= {"a dtype of 16 bits"} if ask.dtype in ("float16", "bfloat16") else set()
        words |= {f"result `{name}`" for name in ask.outputs if len(ask.outputs) > 1}
        return self._of_cases[case.id] | words


def _of_case(case: Case) -> Iterator[str]:
    arrays = case.inputs(case.dtypes[0])
    sizes = sizes_of(arrays)
    yield from _of_sizes(sizes)
    yield from _of_offset(case, arrays)
    yield from _of_lengths(arrays)
    yield from _of_broadcasting(sizes, arrays)
    yield from _of_options(case)
    yield from _of_sequences(case, arrays)
    yield from _of_data(case, arrays)


def sizes_of(arrays: Inputs) -> dict[str, int]:
    """Return the sizes of a call by name, as far as its arrays have them."""
    shapes = {name: array.shape for name, array in arrays.items()}
    query, key, value = (shapes.get(name, ()) for name in ("query", "key", "value"))
    if "w_q" in shapes:
        key, value = key or query, value or key or query
        return {"batch": query[0], "q_len": query[1], "kv_len": key[1]} | {
            "heads": shapes["w_q"][1],
            "kv_heads": shapes["w_k"][1] if "w_k" in shapes else shapes["w_q"][1],
            "qk_dim": shapes["w_q"][2],
            **({"v_dim": shapes["w_v"][2]} if "w_v" in shapes else {}),
        }
    if "cu_seqlens_q" in shapes:
        return {"heads": query[1], "kv_heads": key[-2], "qk_dim": query[2], "v_dim": value[-1]}
    if len(query) == 4 and len(key) == 4:
        sizes = dict(zip(("batch", "heads", "q_len", "qk_dim"), query, strict=True))
        sizes |= {"kv_heads": key[1], "kv_len": key[2]}
        return sizes | ({"v_dim": value[3]} if len(value) == 4 else {})
    first = next((shape for shape in shapes.values() if len(shape) == 4), ())
    return dict(zip(("batch", "heads", "q_len", "v_dim"), first, strict=False))


def _of_sizes(sizes: Mapping[str, int]) -> Iterator[str]:
    batch, heads, q_len = (sizes.get(name) for name in ("batch", "heads", "q_len"))
    kv_heads, kv_len = sizes.get("kv_heads"), sizes.get("kv_len")
    if batch is not None:
        yield "batch > 1" if batch > 1 else f"batch = {batch}"
    if heads and kv_heads:
        yield "group > 1" if heads > kv_heads else "group = 1"
        if kv_heads == 1 < heads:
            yield "a single kv head"
        elif heads > kv_heads:
            yield "group > 1 and several kv heads"
    if q_len is not None:
        yield "q_len = 1" if q_len == 1 else "q_len > 1" if q_len else "q_len = 0"
    if kv_len is not None and q_len is not None:
        yield "q_len = kv_len" if q_len == kv_len else "q_len != kv_len"
        yield from ["kv_len > q_len"] if kv_len > q_len else ["kv_len < q_len"] if kv_len < q_len else []
    for name, size in (("q_len", q_len), ("kv_len", kv_len), ("qk_dim", sizes.get("qk_dim"))):
        if size is not None:
            yield from (f"{name} > {tile}" for tile in TILES if size > tile)
            yield from (f"{name} > {tile} and not a multiple of it" for tile in TILES if size > tile and size % tile)
    if "v_dim" in sizes and "qk_dim" in sizes:
        yield "v_dim != qk_dim" if sizes["v_dim"] != sizes["qk_dim"] else "v_dim = qk_dim"


def _of_offset(case: Case, arrays: Inputs) -> Iterator[str]:
    offset = arrays.get("q_offset", case.options.get("q_offset"))
    if isinstance(offset, str):
        yield "q_offset is the name of an alignment"
        return
    if offset is None:
        return
    values = numpy.asarray(offset)
    yield from ["q_offset > 0"] if (values > 0).any() else []
    yield from ["q_offset < 0"] if (values < 0).any() else []
    yield from (f"q_offset >= {tile}" for tile in TILES if (values >= tile).any())
    if values.size > 1 and (values != values.ravel()[0]).any():
        yield "q_offset differs between batch entries"


def _of_lengths(arrays: Inputs) -> Iterator[str]:
    """Tell whether the lengths of the batch entries differ, and whether one of them is 0."""
    for name in ("q_lengths", "kv_lengths", "cache_lengths"):
        lengths = arrays.get(name, numpy.ones(0))
        yield from [f"{name} differ"] if len(set(lengths.tolist())) > 1 else []
        yield from [f"{name} contain 0"] if (lengths <= 0).any() else []


def _of_broadcasting(sizes: Mapping[str, int], arrays: Inputs) -> Iterator[str]:
    """Tell along which axes the mask, the bias and the dropout mask have several entries."""
    for name in ("mask", "bias", "dropout_mask"):
        shape = arrays[name].shape if name in arrays else ()
        if len(shape) == 4:
            for axis, size in zip(("batch entries", "heads", "queries", "keys"), shape, strict=True):
                yield f"{name} differs between {axis}" if size > 1 else f"{name} is the same for all {axis}"
            if shape[0] > 1 and shape[0] == sizes.get("kv_heads"):
                yield f"the batch of {name} = kv_heads"


def _of_options(case: Case) -> Iterator[str]:
    names = {*case.options, *case.input_names}
    yield from ["with positions of the caller"] if {"positions", "rotary"} <= names else []
    if "positions" in names or "rotary" in names:
        rotary = case.options.get("rotary")
        options = {**case.options, **(rotary if isinstance(rotary, dict) else {})}
        yield from (f"rotary with {name}" for name in ROTARY if options.get(name))
    yield from (f"with {name}" for name in ("grad_lse", "chunks", "drafts", "k_norm", "q_norm") if name in names)
    left, right = (case.options.get("window") or (None, None))[:2]
    yield from ["window has a left side"] if left is not None else []
    yield from ["window has a right side"] if right is not None else []


def _of_sequences(case: Case, arrays: Inputs) -> Iterator[str]:
    """Tell what the sequences of a packed or paged call have in common, and which of them are empty."""
    if case.function not in VARLEN_FUNCTIONS:
        return
    keywords = {**arrays, **case.options, "cu_seqlens_kv": arrays.get("cu_seqlens_kv")}
    keywords = {name: x for name, x in keywords.items() if not name.startswith("grad_")}
    sequences = sequences_of(VarlenArguments(**keywords))
    lengths = [(len(sequence.queries), len(sequence.keys)) for sequence in sequences]
    blocks = [block for sequence in sequences for block in sequence.block_numbers]
    facts = {
        "several sequences": len(sequences) > 1,
        "sequences of different lengths": len(set(lengths)) > 1,
        "a sequence without queries": any(queries == 0 for queries, _ in lengths),
        "a sequence without keys": any(keys == 0 for _, keys in lengths),
        "a query that no sequence has": sum(queries for queries, _ in lengths) < len(arrays["query"]),
        "a block that is used repeatedly": len(blocks) > len(set(blocks)),
    }
    yield from (words for words, holds in facts.items() if holds)


def _of_data(case: Case, arrays: Inputs) -> Iterator[str]:
    floating = [array for name, array in arrays.items() if dtype_name(array) in FLOATING and name != "bias"]
    if not all(numpy.isfinite(array.astype(numpy.float64)).all() for array in floating):
        yield "an operand is not finite"
    if case.function not in ATTENTION:
        return
    query, key = (arrays[name].astype(numpy.float64) for name in ("query", "key"))
    if query.size and key.size and numpy.isfinite(query).all() and numpy.isfinite(key).all():
        yield from ["a product of query and key exceeds 65504"] if _overflows_float16(query, key) else []
    visible = visible_pairs(case, arrays)
    if visible is None:
        return
    yield from ["a row sees no key"] if not visible.any(axis=3).all() else ["every row sees a key"]
    yield from ["a row sees several keys"] if (visible.sum(axis=3) > 1).any() else []
    yield from ["a pair is hidden"] if not visible.all() else ["every pair is visible"]


def _overflows_float16(query: numpy.ndarray, key: numpy.ndarray) -> bool:
    """Tell whether a product of a query and a key exceeds float16; the norms bound it, and spare most products."""
    norms = (numpy.linalg.norm(array, axis=3).max() for array in (query, key))
    if numpy.prod(list(norms)) <= LARGEST_FLOAT16:
        return False
    keys = numpy.repeat(key, query.shape[1] // key.shape[1], axis=1).swapaxes(2, 3)
    return bool(abs(query @ keys).max() > LARGEST_FLOAT16)


def visible_pairs(case: Case, arrays: Inputs) -> numpy.ndarray | None:
    """Mark the visible pairs, (batch, heads, q_len, kv_len); None for other functions, or if there are too many."""
    if case.function not in ATTENTION:
        return None
    if numpy.prod(arrays["query"].shape[:3]) * arrays["key"].shape[2] > MOST_PAIRS:
        return None
    named = {name: x for name, x in in_float64(arrays).items() if name in ("query", "key", "value", *OPTIONS)}
    options = {name: tuple(x) if isinstance(x, list) else x for name, x in case.options.items() if name in OPTIONS}
    try:
        a = Arguments(**{"value": None, **named, **options})
        shape = (a.batch, a.heads, a.q_len, a.kv_len)
        return numpy.broadcast_to(Reference().visible(a), shape)
    except (MhaSpecError, ValueError, TypeError):
        return None
