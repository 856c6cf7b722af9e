"""Cases from sizes, a flavour of data and a spec of options, with the clauses and features that follow from them."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy
from description import ALL_DTYPES, Description, Input

from .options import options_of, words_for
from .tensors import FLAVOURS, bell, generators, leaning, tensors
from .visible import visible_pairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .options import Spec
    from .sizes import Sizes

__all__ = ["describe", "inputs_of", "vary"]

LARGE = 4096
"""Keys with more elements than this are generated instead of stored, if their flavour allows it."""

_OPTION_CLAUSES = {
    "mask": ("MHA-MASK-1",),
    "bias": ("MHA-BIAS-1",),
    "causal": ("MHA-CAUSAL-1",),
    "q_offset": ("MHA-POS-1",),
    "q_lengths": ("MHA-LEN-2",),
    "kv_lengths": ("MHA-LEN-1",),
    "kv_starts": ("MHA-LEN-4",),
    "prefix_lengths": ("MHA-CAUSAL-2",),
    "chunk": ("MHA-WINDOW-3",),
    "q_segment_ids": ("MHA-SEG-1", "MHA-SEG-2"),
    "scale": ("MHA-SCORE-1",),
    "softcap": ("MHA-CAP-1",),
    "sinks": ("MHA-SINK-1", "MHA-SINK-2"),
    "dropout_mask": ("MHA-DROP-1",),
}
_FEATURE_OF = {"q_offset": "offset", "q_segment_ids": "segments", "dropout_mask": "dropout"}
_FUNCTION_CLAUSES = {
    "attention": ("MHA-DTYPE-1",),
    "attention_weights": ("MHA-DTYPE-1", "MHA-WEIGHTS-1"),
    "attention_vjp": ("MHA-DTYPE-2", "MHA-VJP-1", "MHA-VJP-2", "MHA-VJP-3"),
}
_FUNCTION_FEATURE = {"attention_weights": "weights", "attention_vjp": "vjp"}
_VISIBILITY = ("mask", "causal", "window", "chunk", "q_lengths", "kv_lengths", "kv_starts", "q_segment_ids")


def inputs_of(
    sizes: Sizes, flavour: str, spec: Spec, variant: int, function: str = "attention"
) -> tuple[dict[str, Input], dict[str, Any]]:
    """Return the inputs and plain options of one case."""
    more, options = options_of(sizes, spec, variant)
    if function == "attention_vjp":
        names, arrays = ("grad_output", "query", "key", "value"), leaning(sizes, flavour)
    else:
        names, arrays = ("query", "key", "value"), tensors(sizes, flavour)
    generated = generators(sizes, flavour) if function == "attention" and sizes.kv_len * sizes.qk_dim > LARGE else None
    made = generated or (None,) * len(arrays)
    inputs = {name: Input(array, "case", how) for name, array, how in zip(names, arrays, made, strict=True)}
    if function == "attention_weights":
        del inputs["value"]
    if spec.get("grad_lse"):
        inputs["grad_lse"] = Input(bell(sizes.output[:3], 2.0**-3, "grad_lse", variant), "softmax")
    return {**inputs, **more}, options


def describe(
    name: str,
    title: str,
    sizes: Sizes,
    inputs: Mapping[str, Input],
    options: Mapping[str, Any] | None = None,
    *,
    function: str = "attention",
    clauses: Iterable[str] = (),
    features: Iterable[str] = (),
    tags: Sequence[str] = ("structured",),
    dtypes: tuple[str, ...] = ALL_DTYPES,
    level: str = "MUST",
    lse: bool | None = None,
    sampled_rows: int | None = None,
    edges: bool = False,
) -> Description:
    """Describe one case; clauses and features that follow from its inputs and options are added."""
    options = options or {}
    identity = f"{function}/{name}"
    # Three cases of four compare lse; the checksum chooses them, so that the choice depends only on the id.
    with_lse = zlib.crc32(identity.encode()) % 4 != 0 if lse is None else lse
    return Description(
        id=identity,
        title=title,
        function=function,
        clauses=_merged(clauses, _clauses(function, sizes, inputs, options, with_lse)),
        features=_merged(features, _features(function, sizes, inputs, options)),
        inputs=inputs,
        options=options,
        tags=tuple(tags),
        dtypes=dtypes,
        level=level,
        lse=with_lse and function == "attention",
        sampled_rows=sampled_rows,
        edges=edges,
    )


def vary(
    name: str,
    sizes: Sizes,
    spec: Spec,
    variants: Iterable[tuple[str, int]],
    *,
    function: str = "attention",
    **more: Any,
) -> Iterator[Description]:
    """Yield one case per (flavour of data, variant of options), with the same sizes and plain options."""
    for flavour, variant in variants:
        inputs, options = inputs_of(sizes, flavour, spec, variant, function)
        tags = ("generic",) if flavour in ("generic", "random", "steep") else ("structured",)
        title = f"{_phrase(spec, variant, function)}. Data: {FLAVOURS[flavour]}."
        yield describe(
            f"{name}/{flavour}-{variant + 1}",
            title,
            sizes,
            inputs,
            options,
            function=function,
            **{"tags": tags, **more},
        )


def _phrase(spec: Spec, variant: int, function: str) -> str:
    subject = {"attention": "Attention", "attention_weights": "Weights", "attention_vjp": "Gradients"}[function]
    return f"{subject} with {words_for(spec, variant)}" if spec else f"Plain {subject.lower()}"


def _merged(*groups: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))


def _features(function: str, sizes: Sizes, inputs: Mapping[str, Input], options: Mapping[str, Any]) -> list[str]:
    names = [name for name in (*inputs, *options) if name in {*_OPTION_CLAUSES, "window"}]
    features = [_FUNCTION_FEATURE[function]] if function in _FUNCTION_FEATURE else []
    features += [_FEATURE_OF.get(name, name) for name in names]
    if not features:
        features.append("core")
    if sizes.heads != sizes.kv_heads:
        features.append("groups")
    if sizes.qk_dim != sizes.v_dim and function != "attention_weights":
        features.append("value_size")
    if 0 in (sizes.batch, sizes.q_len, sizes.kv_len):
        features.append("empty")
    return features


def _clauses(
    function: str, sizes: Sizes, inputs: Mapping[str, Input], options: Mapping[str, Any], lse: bool
) -> list[str]:
    clauses = [clause for name in (*inputs, *options) for clause in _OPTION_CLAUSES.get(name, ())]
    clauses += _FUNCTION_CLAUSES[function]
    clauses += _value_clauses(sizes, inputs, options)
    if lse and function == "attention":
        clauses.append("MHA-LSE-1")
    if sum(name in inputs or name in options for name in _VISIBILITY) > 1:
        clauses.append("MHA-MASK-3")
    if not visible_pairs(sizes, inputs, options).any(axis=-1).all():
        clauses += (
            ["MHA-EMPTY-3"] if function == "attention_vjp" else ["MHA-EMPTY-1", *(["MHA-EMPTY-2"] if lse else [])]
        )
    return clauses + (_gradient_clauses(sizes, inputs) if function == "attention_vjp" else [])


def _value_clauses(sizes: Sizes, inputs: Mapping[str, Input], options: Mapping[str, Any]) -> list[str]:
    left, right = options.get("window") or (None, None)
    held = {
        "MHA-HEAD-1": sizes.heads != sizes.kv_heads and sizes.kv_heads > 1,
        "MHA-SCORE-2": "scale" not in options,
        "MHA-SCORE-3": options.get("scale", 1) <= 0,
        "MHA-WINDOW-1": left is not None,
        "MHA-WINDOW-2": right is not None,
        "MHA-CAP-2": "softcap" in options and ("bias" in inputs or "mask" in inputs),
        "MHA-BIAS-3": "bias" in inputs and bool(numpy.isneginf(inputs["bias"].values).any()),
        "MHA-DROP-2": "dropout_mask" in inputs and options.get("dropout_rate", 0) == 0,
        "MHA-MASK-2": "mask" in inputs and inputs["mask"].values.shape != sizes.scores,
    }
    return [clause for clause, holds in held.items() if holds]


def _gradient_clauses(sizes: Sizes, inputs: Mapping[str, Input]) -> list[str]:
    held = {
        "MHA-VJP-4": sizes.heads != sizes.kv_heads,
        "MHA-VJP-5": "bias" in inputs,
        "MHA-VJP-6": "sinks" in inputs,
        "MHA-LSE-3": "grad_lse" in inputs,
    }
    return [clause for clause, holds in held.items() if holds]
