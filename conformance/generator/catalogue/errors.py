"""Calls that must raise an error that names the argument, in every backend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
from description import Description, Input

from .build import inputs_of
from .options import integers
from .sizes import Sizes
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SIZES = Sizes(2, 4, 2, 3, 5, 7, 11)


def descriptions() -> Iterator[Description]:
    """Yield options out of range, inputs that do not fit, and errors of the other functions."""
    for name, argument, kind, clause, options in _OPTIONS:
        yield _refused(name, argument, kind, clause, {}, options)
    for name, argument, kind, clause, change in _INPUTS:
        yield _refused(name, argument, kind, clause, change, {})
    for name, argument, clause, change, options in _AMBIGUOUS:
        yield _refused(name, argument, "value", clause, change, options)
    yield _refused(
        "softcap-subnormal-float64", "softcap", "value", "MHA-ARG-2", {}, {"softcap": 2.0**-1023}, dtype="float64"
    )
    yield from _without_an_operand()
    yield from _other_functions()


def _refused(
    name: str,
    argument: str,
    kind: str,
    clause: str,
    change: Mapping[str, Input],
    options: Mapping[str, Any],
    *,
    function: str = "attention",
    sizes: Sizes = SIZES,
    dtype: str = "float32",
) -> Description:
    inputs, _ = inputs_of(sizes, "generic", {}, 0, function)
    return refused(f"{function}/error/{name}", argument, kind, clause, {**inputs, **change}, options, function, dtype)


def _without_an_operand() -> Iterator[Description]:
    """Yield None for each array, which a function may confuse with an absent option."""
    operands = {"attention": ("query", "key", "value"), "attention_vjp": ("value",), "attention_weights": ("key",)}
    for function, names in operands.items():
        inputs, _ = inputs_of(SIZES, "generic", {}, 0, function)
        for name in names:
            others = {label: item for label, item in inputs.items() if label != name}
            identity = f"{function}/error/{name.replace('_', '-')}-none"
            yield refused(identity, name, "type", "MHA-SHAPE-1", others, {name: None}, function)


def refused(
    identity: str,
    argument: str,
    kind: str,
    clause: str,
    inputs: Mapping[str, Input],
    options: Mapping[str, Any],
    function: str,
    dtype: str = "float32",
    title: str = "{} is refused, and the message names `{}`.",
) -> Description:
    """Describe a call that must raise an error of this kind that names the argument."""
    words = identity.rpartition("/")[2].replace("-", " ").capitalize()
    return Description(
        id=identity,
        title=title.format(words, argument),
        function=function,
        clauses=(clause,),
        features=("errors",),
        inputs=inputs,
        options=options,
        tags=("structured",),
        dtypes=(dtype,),
        lse=False,
        error={"argument": argument, "kind": kind},
    )


def _of(shape: tuple[int, ...], dtype: str = "case") -> Input:
    values = bell(shape, 2.0**-3, "refused")
    return Input(values > 0 if dtype == "bool" else numpy.round(values) if dtype.startswith("int") else values, dtype)


_OPTIONS: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("unknown-keyword", "is_causal", "type", "MHA-ARG-1", {"is_causal": True}),
    ("unknown-keyword-mask", "attn_mask", "type", "MHA-ARG-1", {"attn_mask": None}),
    ("scale-nan", "scale", "value", "MHA-ARG-2", {"scale": math.nan}),
    ("scale-infinite", "scale", "value", "MHA-ARG-2", {"scale": math.inf}),
    ("scale-text", "scale", "type", "MHA-ARG-2", {"scale": "default"}),
    ("softcap-zero", "softcap", "value", "MHA-ARG-2", {"softcap": 0.0}),
    ("softcap-negative", "softcap", "value", "MHA-ARG-2", {"softcap": -30.0}),
    ("softcap-infinite", "softcap", "value", "MHA-ARG-2", {"softcap": math.inf}),
    ("causal-integer", "causal", "type", "MHA-ARG-2", {"causal": 1}),
    ("dropout-rate-one", "dropout_rate", "value", "MHA-ARG-2", {"dropout_rate": 1.0}),
    ("dropout-rate-negative", "dropout_rate", "value", "MHA-ARG-2", {"dropout_rate": -0.25}),
    ("dropout-rate-nan", "dropout_rate", "value", "MHA-ARG-2", {"dropout_rate": math.nan}),
    ("mask-python-boolean", "mask", "type", "MHA-MASK-2", {"mask": True}),
    ("bias-python-number", "bias", "type", "MHA-MASK-2", {"bias": 0.5}),
    ("sinks-python-number", "sinks", "type", "MHA-SINK-1", {"sinks": 1.5}),
    ("window-number", "window", "type", "MHA-ARG-3", {"window": 3, "q_offset": 2}),
    ("window-negative", "window", "value", "MHA-ARG-3", {"window": (-1, 0), "q_offset": 2}),
    ("window-negative-right", "window", "value", "MHA-ARG-3", {"window": (None, -1), "q_offset": 2}),
    ("window-triple", "window", "type", "MHA-ARG-3", {"window": (1, 2, 3), "q_offset": 2}),
    ("window-fraction", "window", "type", "MHA-ARG-3", {"window": (1.5, 0), "q_offset": 2}),
    ("window-beyond-positions", "window", "value", "MHA-ARG-3", {"window": (2**30 + 1, 0), "q_offset": 2}),
    ("kv-lengths-beyond-kv-len", "kv_lengths", "value", "MHA-LEN-3", {"kv_lengths": (6, 3)}),
    ("kv-lengths-negative", "kv_lengths", "value", "MHA-LEN-3", {"kv_lengths": (5, -1)}),
    ("kv-lengths-of-wrong-count", "kv_lengths", "value", "MHA-LEN-3", {"kv_lengths": (5, 3, 2)}),
    ("kv-lengths-fractions", "kv_lengths", "type", "MHA-LEN-3", {"kv_lengths": (5.0, 3.0)}),
    ("kv-lengths-one-number", "kv_lengths", "type", "MHA-LEN-3", {"kv_lengths": 4}),
    ("chunk-zero", "chunk", "value", "MHA-WINDOW-3", {"chunk": 0, "q_offset": 2}),
    ("chunk-beyond-positions", "chunk", "value", "MHA-WINDOW-3", {"chunk": 2**30 + 1, "q_offset": 2}),
    ("chunk-fraction", "chunk", "type", "MHA-WINDOW-3", {"chunk": 2.0, "q_offset": 2}),
    ("kv-starts-beyond-kv-len", "kv_starts", "value", "MHA-LEN-5", {"kv_starts": (6, 3)}),
    ("kv-starts-negative", "kv_starts", "value", "MHA-LEN-5", {"kv_starts": (0, -1)}),
    ("kv-starts-one-number", "kv_starts", "type", "MHA-LEN-5", {"kv_starts": 2}),
    (
        "prefix-lengths-beyond-kv-len",
        "prefix_lengths",
        "value",
        "MHA-LEN-5",
        {"prefix_lengths": (3, 6), "causal": True, "q_offset": 2},
    ),
    ("prefix-lengths-without-causal", "prefix_lengths", "value", "MHA-CAUSAL-2", {"prefix_lengths": (3, 2)}),
    (
        "prefix-lengths-with-causal-window",
        "prefix_lengths",
        "value",
        "MHA-CAUSAL-2",
        {"prefix_lengths": (3, 2), "causal": True, "q_offset": 2, "window": (4, 0)},
    ),
    ("q-lengths-beyond-q-len", "q_lengths", "value", "MHA-LEN-3", {"q_lengths": (4, 3)}),
    ("q-lengths-negative", "q_lengths", "value", "MHA-LEN-3", {"q_lengths": (-1, 3)}),
    ("offset-beyond-positions", "q_offset", "value", "MHA-LEN-3", {"causal": True, "q_offset": -(2**30) - 1}),
    ("offset-of-wrong-count", "q_offset", "value", "MHA-LEN-3", {"causal": True, "q_offset": (0, 1, 2)}),
    ("offset-fraction", "q_offset", "type", "MHA-LEN-3", {"causal": True, "q_offset": 2.0}),
    ("offset-of-unknown-name", "q_offset", "value", "MHA-POS-2", {"causal": True, "q_offset": "bottom_right"}),
    ("offset-of-unknown-name-unused", "q_offset", "value", "MHA-POS-2", {"q_offset": "lower-right"}),
    ("softcap-flushed", "softcap", "value", "MHA-ARG-2", {"softcap": 1e-50}),
    ("softcap-subnormal", "softcap", "value", "MHA-ARG-2", {"softcap": 2.0**-127}),
    ("return-lse-integer", "return_lse", "type", "MHA-ARG-2", {"return_lse": 1}),
)
_INPUTS: tuple[tuple[str, str, str, str, dict[str, Input]], ...] = (
    ("query-rank-3", "query", "value", "MHA-SHAPE-1", {"query": _of((4, 3, 7))}),
    ("key-rank-5", "key", "value", "MHA-SHAPE-1", {"key": _of((1, 2, 2, 5, 7))}),
    ("value-rank-3", "value", "value", "MHA-SHAPE-1", {"value": _of((2, 5, 11))}),
    ("query-integer", "query", "type", "MHA-SHAPE-3", {"query": _of(SIZES.query, "int32")}),
    ("key-of-another-dtype", "key", "type", "MHA-SHAPE-3", {"key": _of(SIZES.key, "float16")}),
    ("value-of-another-dtype", "value", "type", "MHA-SHAPE-3", {"value": _of(SIZES.value, "float16")}),
    ("key-of-another-batch", "key", "value", "MHA-SHAPE-3", {"key": _of((3, 2, 5, 7))}),
    ("key-of-another-size", "key", "value", "MHA-SHAPE-3", {"key": _of((2, 2, 5, 6))}),
    ("value-of-another-length", "value", "value", "MHA-SHAPE-3", {"value": _of((2, 2, 4, 11))}),
    ("value-of-other-heads", "value", "value", "MHA-SHAPE-3", {"value": _of((2, 4, 5, 11))}),
    ("heads-no-multiple", "query", "value", "MHA-HEAD-2", {"query": _of((2, 5, 3, 7))}),
    ("heads-fewer-than-kv-heads", "query", "value", "MHA-HEAD-2", {"query": _of((2, 1, 3, 7))}),
    ("no-heads", "query", "value", "MHA-SHAPE-2", {"query": _of((2, 0, 3, 7))}),
    ("no-kv-heads", "key", "value", "MHA-SHAPE-2", {"key": _of((2, 0, 5, 7)), "value": _of((2, 0, 5, 11))}),
    ("no-size", "query", "value", "MHA-SHAPE-2", {"query": _of((2, 4, 3, 0)), "key": _of((2, 2, 5, 0))}),
    ("no-value-size", "value", "value", "MHA-SHAPE-2", {"value": _of((2, 2, 5, 0))}),
    ("mask-integer", "mask", "type", "MHA-MASK-1", {"mask": _of(SIZES.scores, "int32")}),
    ("mask-float", "mask", "type", "MHA-MASK-1", {"mask": _of(SIZES.scores)}),
    ("mask-rank-2", "mask", "value", "MHA-MASK-2", {"mask": _of((3, 5), "bool")}),
    ("mask-rank-3", "mask", "value", "MHA-MASK-2", {"mask": _of((2, 3, 5), "bool")}),
    ("mask-of-kv-heads", "mask", "value", "MHA-MASK-2", {"mask": _of((2, 2, 3, 5), "bool")}),
    ("mask-too-short", "mask", "value", "MHA-MASK-2", {"mask": _of((1, 1, 3, 4), "bool")}),
    ("bias-boolean", "bias", "type", "MHA-BIAS-1", {"bias": _of(SIZES.scores, "bool")}),
    ("bias-integer", "bias", "type", "MHA-BIAS-1", {"bias": _of(SIZES.scores, "int32")}),
    ("bias-rank-3", "bias", "value", "MHA-MASK-2", {"bias": _of((4, 3, 5))}),
    ("bias-too-long", "bias", "value", "MHA-MASK-2", {"bias": _of((1, 4, 3, 6))}),
    ("dropout-mask-float", "dropout_mask", "type", "MHA-DROP-1", {"dropout_mask": _of(SIZES.scores)}),
    ("dropout-mask-too-short", "dropout_mask", "value", "MHA-MASK-2", {"dropout_mask": _of((2, 4, 2, 5), "bool")}),
    ("sinks-of-kv-heads", "sinks", "value", "MHA-SINK-1", {"sinks": _of((2,))}),
    ("sinks-integer", "sinks", "type", "MHA-SINK-1", {"sinks": _of((4,), "int32")}),
    ("sinks-rank-2", "sinks", "value", "MHA-SINK-1", {"sinks": _of((1, 4))}),
    ("kv-lengths-float", "kv_lengths", "type", "MHA-LEN-3", {"kv_lengths": _of((2,), "float32")}),
    ("kv-lengths-of-heads", "kv_lengths", "value", "MHA-LEN-3", {"kv_lengths": integers(numpy.ones((2, 4)))}),
    ("q-segments-alone", "kv_segment_ids", "value", "MHA-SEG-1", {"q_segment_ids": integers(numpy.zeros((2, 3)))}),
    ("kv-segments-alone", "q_segment_ids", "value", "MHA-SEG-1", {"kv_segment_ids": integers(numpy.zeros((2, 5)))}),
    (
        "kv-segments-of-q-len",
        "kv_segment_ids",
        "value",
        "MHA-SEG-1",
        {name: integers(numpy.zeros((2, 3))) for name in ("q_segment_ids", "kv_segment_ids")},
    ),
    (
        "q-segments-float",
        "q_segment_ids",
        "type",
        "MHA-SEG-1",
        {"q_segment_ids": _of((2, 3), "float32"), "kv_segment_ids": integers(numpy.zeros((2, 5)))},
    ),
)
_AMBIGUOUS: tuple[tuple[str, str, str, dict[str, Input], dict[str, Any]], ...] = (
    ("ambiguous-causal", "q_offset", "MHA-POS-2", {}, {"causal": True}),
    ("ambiguous-window", "q_offset", "MHA-POS-2", {}, {"window": (2, 0)}),
    ("ambiguous-chunk", "q_offset", "MHA-POS-2", {}, {"chunk": 3}),
    (
        "ambiguous-causal-with-kv-lengths",
        "q_offset",
        "MHA-POS-2",
        {"query": _of((2, 4, 5, 7)), "kv_lengths": integers((5, 3))},
        {"causal": True},
    ),
)


def _other_functions() -> Iterator[Description]:
    vjp = "attention_vjp"
    yield _refused(
        "dropout-without-mask", "dropout_mask", "value", "MHA-DROP-4", {}, {"dropout_rate": 0.5}, function=vjp
    )
    yield _refused(
        "dropout-of-tenth-without-mask", "dropout_mask", "value", "MHA-DROP-4", {}, {"dropout_rate": 0.1}, function=vjp
    )
    yield _refused(
        "grad-output-of-wrong-shape",
        "grad_output",
        "value",
        "MHA-VJP-7",
        {"grad_output": _of((2, 4, 3, 7))},
        {},
        function=vjp,
    )
    yield _refused(
        "grad-lse-of-wrong-shape", "grad_lse", "value", "MHA-VJP-7", {"grad_lse": _of((2, 4, 3, 1))}, {}, function=vjp
    )
    yield _refused(
        "dropout-of-weights",
        "dropout_rate",
        "type",
        "MHA-DROP-3",
        {},
        {"dropout_rate": 0.5},
        function="attention_weights",
    )
    yield _refused("ambiguous-causal", "q_offset", "value", "MHA-POS-2", {}, {"causal": True}, function=vjp)
    yield _refused(
        "ambiguous-causal", "q_offset", "value", "MHA-POS-2", {}, {"causal": True}, function="attention_weights"
    )
    yield from _merges()


def _merges() -> Iterator[Description]:
    shape = SIZES.output
    halves = {
        "output_a": _of(shape),
        "lse_a": _of(shape[:3], "softmax"),
        "output_b": _of(shape),
        "lse_b": _of(shape[:3], "softmax"),
    }
    wrong: dict[str, Callable[[], tuple[str, Input]]] = {
        "lse-with-an-axis-too-many": lambda: ("lse_a", _of((*shape[:3], 1), "softmax")),
        "halves-of-unlike-heads": lambda: ("output_b", _of((2, 2, 3, 11))),
        "lse-of-another-length": lambda: ("lse_b", _of((2, 4, 5), "softmax")),
    }
    for name, make in wrong.items():
        argument, array = make()
        identity = f"merge_attention/error/{name}"
        yield refused(identity, argument, "value", "MHA-MERGE-4", {**halves, argument: array}, {}, "merge_attention")
    function = "merge_attention_vjp"
    whole = {"grad_output": _of(shape), **halves}
    for name, (argument, kind, clause, array) in {
        "grad-output-of-wrong-shape": ("grad_output", "value", "MHA-MERGE-7", _of((2, 4, 3, 7))),
        "grad-output-that-broadcasts": ("grad_output", "value", "MHA-MERGE-7", _of((2, 4, 3, 1))),
        "grad-output-integer": ("grad_output", "type", "MHA-MERGE-7", _of(shape, "int32")),
        "grad-lse-of-wrong-shape": ("grad_lse", "value", "MHA-MERGE-7", _of((*shape[:3], 1), "softmax")),
        "grad-lse-integer": ("grad_lse", "type", "MHA-MERGE-7", _of(shape[:3], "int32")),
        "halves-of-unlike-heads": ("output_b", "value", "MHA-MERGE-4", _of((2, 2, 3, 11))),
        "lse-of-another-length": ("lse_b", "value", "MHA-MERGE-4", _of((2, 4, 5), "softmax")),
    }.items():
        yield refused(f"{function}/error/{name}", argument, kind, clause, {**whole, argument: array}, {}, function)
    options = {"return_lse": True}
    yield refused(f"{function}/error/unknown-keyword", "return_lse", "type", "MHA-ARG-1", whole, options, function)
