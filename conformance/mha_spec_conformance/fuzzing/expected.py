"""Compute the expected results of a drawn call: the values of the reference in float64, and the kind of every element.

The kinds are those of the goldens (SPEC.md, "How results are compared" and "Limits"). They follow from the visible
pairs and from the elements of the inputs that are not finite.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import Array, softmax_dtype_name
from mha_spec.layer_steps import LayerSteps
from mha_spec.steps import Steps
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.judging.bounds.evaluation import Evaluation, in_float64
from mha_spec_conformance.judging.bounds.varlen import VarlenBounds
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE, NAN, NON_FINITE

from .expected_packed import packed_kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .call import Call

__all__ = ["NotAdmitted", "Rows", "expect", "kinds_of"]

Kinds = dict[str, Array]


class NotAdmitted(Exception):
    """The call cannot be a case, because an intermediate value exceeds the range of its dtype."""


def _are_open(sinks: Array) -> Array:
    """Mark the sinks that leave the results of their head open, which are +inf and NaN (SPEC.md, "Limits")."""
    return ~(sinks < numpy.inf)


class Rows:
    """The properties of rows and pairs of an attention: boolean arrays over (batch, heads, q_len) and over pairs."""

    def __init__(
        self,
        arrays: Mapping[str, Array],
        options: Mapping[str, Any],
        dtype: str,
        evaluation: Evaluation | None = None,
    ) -> None:
        """Evaluate the call, unless `evaluation` holds its evaluation."""
        forward = {name: array for name, array in arrays.items() if not name.startswith("grad_")}
        with numpy.errstate(all="ignore"):
            self.evaluation = Evaluation(forward, options, Steps()) if evaluation is None else evaluation
        self.arguments = self.evaluation.arguments
        self.largest = float(numpy.finfo(softmax_dtype_name(dtype)).max)
        self.arrays = arrays
        self.visible = numpy.asarray(self.evaluation.trace.visible)
        self.seeing: Array = self.visible.any(axis=-1)
        self.group = self.arguments.heads // self.arguments.kv_heads

    def vectors(self, name: str, test: Any) -> Array:
        """Mark the vectors with an element that passes the test; heads of key and value are repeated."""
        array = self.evaluation.arrays[name] if name in self.evaluation.arrays else self.arrays[name].astype("float64")
        passed = test(array).any(axis=-1)
        return numpy.repeat(passed, self.group, axis=1) if name in ("key", "value") else passed

    def _pairs(self, name: str, test: Any) -> Array:
        """Mark the pairs whose element of a broadcast array passes the test."""
        array = self.evaluation.arrays.get(name)
        return numpy.zeros_like(self.visible) if array is None else numpy.broadcast_to(test(array), self.visible.shape)

    @property
    def open_sinks(self) -> Array:
        """The heads that their sink leaves open, over (heads,)."""
        sinks = self.arguments.sinks
        return numpy.zeros(self.arguments.heads, bool) if sinks is None else _are_open(sinks)

    @cached_property
    def unspecified(self) -> Array:
        """The rows whose results may be anything (SPEC.md, "Limits")."""
        infinite = self.vectors("key", numpy.isinf)[:, :, None, :] | self._pairs("bias", numpy.isposinf)
        infinite = infinite | self._out_of_range()
        return self.open_sinks[:, None] | (
            self.seeing & (self.vectors("query", numpy.isinf) | (self.visible & infinite).any(axis=-1))
        )

    def _out_of_range(self) -> Array:
        """The pairs whose products, scores or logits come near the largest number of the softmax's type."""
        trace = self.evaluation.trace
        with numpy.errstate(all="ignore"):
            products = abs(trace.query) @ abs(trace.key).swapaxes(-1, -2)
            parts = (products, products * abs(trace.scale), abs(trace.logits))
            return numpy.any([part > self.largest / 4 for part in parts], axis=0)

    @cached_property
    def nan(self) -> Array:
        """The rows that see a NaN in a score, and are otherwise specified (MHA-NAN-1)."""
        pairs = self.vectors("key", numpy.isnan)[:, :, None, :] | self._pairs("bias", numpy.isnan)
        seen = self.vectors("query", numpy.isnan) | (self.visible & pairs).any(axis=-1)
        return self.seeing & seen & ~self.unspecified

    @cached_property
    def finite(self) -> Array:
        """The rows that see a key and have finite results."""
        return self.seeing & ~self.unspecified & ~self.nan

    def over_group(self, pairs: Array) -> Array:
        """Mark the keys that have such a pair in any head of their group, over (batch, kv_heads, kv_len)."""
        batch, _, _, kv_len = pairs.shape
        return pairs.any(axis=-2).reshape(batch, self.arguments.kv_heads, self.group, kv_len).any(axis=2)

    @property
    def has_sink(self) -> Array:
        """The heads that have a sink, over (1, heads, 1)."""
        sinks = self.arguments.sinks
        heads = numpy.zeros(self.arguments.heads, bool) if sinks is None else sinks != -numpy.inf
        return heads[None, :, None]

    @cached_property
    def components(self) -> Array:
        """The components of the output that a visible value makes non-finite (MHA-NAN-2)."""
        value = numpy.repeat(~numpy.isfinite(self.evaluation.arrays["value"]), self.group, axis=1)
        return (self.visible.astype("float64") @ value.astype("float64")) > 0

    @cached_property
    def hidden_reach(self) -> bool:
        """True if a non-finite operand has visible and hidden pairs, which is a SHOULD (MHA-POISON-2)."""
        used = numpy.repeat(self.over_group(self.visible), self.group, axis=1)
        return bool(self.reached_by_hidden(used).any())

    def reached_by_hidden(self, used: Array) -> Array:
        """Mark the hidden pairs with a non-finite operand that other pairs use, for the `used` keys of each head."""
        hidden = ~self.visible & self.seeing[..., None] & used[:, :, None, :]
        bad = self._pairs("bias", _poison)
        for name in ("key", "value"):
            if name in self.arrays:
                bad = bad | self.vectors(name, _not_finite)[:, :, None, :]
        if "grad_output" in self.arrays:
            rows = self.vectors("query", _not_finite) | self.vectors("grad_output", _not_finite)
            bad = bad | rows[..., None]
        return hidden & bad


def _not_finite(array: Array) -> Array:
    return ~numpy.isfinite(array)


def _poison(array: Array) -> Array:
    return numpy.isnan(array) | numpy.isposinf(array)


def _row_kinds(rows: Rows) -> Array:
    """Return the kind of the results of each row."""
    return numpy.select([rows.unspecified, rows.nan, rows.finite], [ANY, NAN, FINITE], EXACT).astype(numpy.uint8)


def _attention(call: Call, rows: Rows) -> Kinds:
    kinds = _row_kinds(rows)
    output = numpy.where(rows.components & (kinds == FINITE)[..., None], NON_FINITE, kinds[..., None])
    lse = numpy.where((kinds == EXACT) & rows.has_sink, FINITE, kinds)
    return {"output": output, "lse": lse}


def _attention_weights(call: Call, rows: Rows) -> Kinds:
    kinds = _row_kinds(rows)[..., None]
    return {"weights": numpy.where(~rows.visible & (kinds == FINITE), EXACT, kinds)}


def _attention_vjp(call: Call, rows: Rows) -> Kinds:
    right = rows.finite & ~rows.components.any(axis=-1) & ~rows.vectors("grad_output", _not_finite)
    right = right | (~rows.seeing & ~rows.unspecified)
    if "grad_lse" in rows.arrays:
        empty = ~rows.seeing & ~rows.has_sink
        right = right & (numpy.isfinite(rows.arrays["grad_lse"].astype("float64")) | empty)
    good, bad = rows.visible & right[..., None], rows.visible & ~right[..., None]

    def kinds(good: Array, bad: Array) -> Array:
        return numpy.select([bad, good], [ANY, FINITE], EXACT)

    of_key = kinds(rows.over_group(good), rows.over_group(bad))[..., None]
    by_name = {
        "grad_query": kinds(good.any(axis=-1), bad.any(axis=-1))[..., None],
        "grad_key": of_key,
        "grad_value": of_key,
    }
    if "bias" in rows.arrays:
        axes = tuple(axis for axis, size in enumerate(rows.arrays["bias"].shape) if size == 1)
        by_name["grad_bias"] = kinds(good.any(axis=axes, keepdims=True), bad.any(axis=axes, keepdims=True))
    if "sinks" in rows.arrays:
        moved = rows.seeing | ("grad_lse" in rows.arrays)
        good_rows, bad_rows = moved & right & rows.has_sink, (moved | rows.unspecified) & ~right
        by_name["grad_sinks"] = kinds(good_rows.any(axis=(0, 2)), bad_rows.any(axis=(0, 2)) | rows.open_sinks)
    return by_name


class Halves:
    """The properties of the rows of two halves that are merged."""

    def __init__(self, call: Call) -> None:
        lse_a, lse_b = (call.arrays[f"lse_{half}"].astype("float64") for half in "ab")
        self.outputs = [call.arrays[f"output_{half}"].astype("float64") for half in "ab"]
        self.empty = [lse == -numpy.inf for lse in (lse_a, lse_b)]
        self.live = ~self.empty[0] & ~self.empty[1]
        self.nan = numpy.isnan(lse_a) | numpy.isnan(lse_b)
        self.infinite = (lse_a == numpy.inf) | (lse_b == numpy.inf)


def _merge_attention(call: Call, rows: None) -> Kinds:
    """Return NaN for a NaN lse, or for +inf merged with a half that is not empty; an empty half changes nothing."""
    h = Halves(call)
    lse = numpy.select([h.nan | (h.infinite & h.live), ~h.live], [NAN, EXACT], FINITE)
    other = numpy.where(h.empty[0][..., None], h.outputs[1], h.outputs[0])
    unchanged = numpy.where(numpy.isnan(other) & ~(h.empty[0] & h.empty[1])[..., None], NAN, EXACT)
    mixed = numpy.where(numpy.isfinite(h.outputs[0]) & numpy.isfinite(h.outputs[1]), FINITE, NON_FINITE)
    output = numpy.select([(lse == NAN)[..., None], (lse == EXACT)[..., None]], [NAN, unchanged], mixed)
    return {"output": output, "lse": lse}


def _merge_attention_vjp(call: Call, rows: None) -> Kinds:
    """An empty half has gradients of 0; a NaN or +inf lse specifies nothing, nor does a non-finite output for lse."""
    h = Halves(call)
    bad_outputs = h.live & ~numpy.all([numpy.isfinite(output).all(axis=-1) for output in h.outputs], axis=0)
    kinds: Kinds = {}
    for half, other in ("ab", "ba"):
        for name in ("output", "lse"):
            cotangent, operand = call.arrays.get(f"grad_{name}"), call.arrays[f"{name}_{half}"]
            unchanged = EXACT if cotangent is None or cotangent.dtype == operand.dtype else FINITE
            empty = [h.empty["ab".index(side)] for side in (half, other)]
            kind = numpy.select([h.nan | h.infinite, empty[0], empty[1]], [ANY, EXACT, unchanged], FINITE)
            kinds[f"grad_{name}_{half}"] = kind[..., None] if name == "output" else numpy.where(bad_outputs, ANY, kind)
    return kinds


def _layer(call: Call, rows: None) -> Kinds:
    """A token whose heads all see nothing gives the bias of the output; slots past the length are not compared.

    A sink of +inf leaves the weights of its head open, and with them the output of every token (SPEC.md, "Limits").

    Of a cache in blocks, and of one whose slots wrap, only the output is compared, with that of a contiguous cache.
    """
    from mha_spec_conformance.asking import calls

    seen: dict[str, list[Array]] = {"attend": [], "weigh": []}

    def recorded(name: str, step: Any) -> Any:
        def taken(query: Any, key: Any, *value: Any, **options: Any) -> Any:
            evaluation = Evaluation({"query": query, "key": key}, options, Steps())
            seen[name].append(numpy.asarray(evaluation.trace.visible))
            return step(query, key, *value, **options)

        return taken

    steps = LayerSteps()
    steps = replace(steps, attend=recorded("attend", steps.attend), weigh=recorded("weigh", steps.weigh))
    arguments = in_float64(call.arrays) | dict(call.options)
    contiguous = {calls.BLOCK_TABLE, calls.WINDOW_CACHE}.isdisjoint(arguments)
    arguments = calls.with_contiguous_cache(arguments)
    function = calls.function_over(steps, call.function)
    answers = calls.joined(list(calls.layer_answers(function, call.function, arguments)))
    every = 2 if call.options.get("drafts") else 1
    visible = {name: numpy.concatenate(pairs[::every], axis=2) for name, pairs in seen.items() if pairs}
    kinds: Kinds = {}
    opened = _are_open(numpy.asarray(arguments.get("sinks", 0.0))).reshape(-1, 1, 1)
    if "weights" in answers:
        kinds["weights"] = numpy.select([opened, visible["weigh"]], [ANY, FINITE], EXACT)
    if "output" in answers:
        empty = ~visible["attend"].any(axis=(1, 3))
        kinds["output"] = numpy.where(opened.any(), ANY, numpy.where(empty, EXACT, FINITE))[..., None]
    if "cache_key" in answers and contiguous:
        slots = numpy.arange(answers["cache_key"].shape[2])
        old, new = (numpy.asarray(named["cache_lengths"])[:, None] for named in (arguments, answers))
        of_slots = numpy.select([slots < old, slots < new], [EXACT, FINITE], ANY)[:, None, :, None]
        kinds |= {"cache_key": of_slots, "cache_value": of_slots, "cache_lengths": numpy.full(len(new), EXACT)}
    return kinds


def _rotary_embedding(call: Call, rows: None) -> Kinds:
    x = call.arrays["x"]
    turned = call.options.get("rotary_dim") or x.shape[-1]
    return {"output": numpy.where(numpy.arange(x.shape[-1]) < turned, FINITE, EXACT)}


def _varlen(call: Call, rows: list[Rows]) -> Kinds:
    """Return the kinds of attention on each sequence, and keep its rows."""
    dense = "attention_vjp" if call.function == "varlen_attention_vjp" else "attention"

    def of_sequence(arrays: dict[str, Array], options: dict[str, Any]) -> Kinds:
        rows.append(Rows(arrays, options, call.dtype))
        return kinds_of(dense, rows[-1])

    kinds = packed_kinds(call, of_sequence)
    if "grad_sinks" in kinds:  # A call without sequences has no row that leaves it open.
        kinds["grad_sinks"][_are_open(in_float64(call.arrays)["sinks"])] = ANY
    return kinds


_KINDS: dict[str, Any] = {
    "attention": _attention,
    "attention_weights": _attention_weights,
    "attention_vjp": _attention_vjp,
    "merge_attention": _merge_attention,
    "merge_attention_vjp": _merge_attention_vjp,
    "multi_head_attention": _layer,
    "multi_head_attention_and_weights": _layer,
    "multi_head_attention_weights": _layer,
    "rotary_embedding": _rotary_embedding,
    "alibi_slopes": lambda call, rows: {"slopes": numpy.array(FINITE)},
    "alibi_bias": lambda call, rows: {"bias": numpy.array(FINITE)},
    "varlen_attention": _varlen,
    "varlen_attention_vjp": _varlen,
}
ATTENTION = ("attention", "attention_weights", "attention_vjp")


def kinds_of(function: str, rows: Rows) -> Kinds:
    """Return the kinds of the elements of each output of attention, broadcastable to the output."""
    return _KINDS[function](None, rows)


def expect(call: Call) -> tuple[dict[str, Array], Kinds, str]:
    """Return the values and kinds of every output, and the level of the call: MUST, or SHOULD (MHA-POISON-2).

    Raises:
        NotAdmitted: A gradient or weight exceeds the range of the type that may hold it.
    """
    with numpy.errstate(all="ignore"):
        evaluated = bounds(call.function, call.arrays, call.options)
        rows = [Rows(call.arrays, call.options, call.dtype)] if call.function in ATTENTION else []
        kinds = _KINDS[call.function](call, rows[0] if rows else rows)
        run = precision(call.dtype)
        allowances = evaluated.allowances(run)
        if call.function == "attention_vjp":
            _admit(evaluated, run.largest)
        if isinstance(evaluated, VarlenBounds) and call.function == "varlen_attention_vjp":
            for part in evaluated.parts:
                _admit(part, run.largest)
    values = {
        n: v for n, v in evaluated.values.items() if n in kinds and (n != "lse" or call.lse or "lse_a" in call.arrays)
    }
    exact = {"cache_lengths"}
    shaped = {
        name: numpy.broadcast_to(kinds[name], numpy.shape(value)).astype(numpy.uint8) for name, value in values.items()
    }
    for name, kind in shaped.items():
        if name not in exact:
            vacuous = (kind == FINITE) & ~numpy.isfinite(allowances[name])
            shaped[name] = numpy.where(vacuous, ANY, kind).astype(numpy.uint8)
    return values, shaped, "SHOULD" if any(part.hidden_reach for part in rows) else "MUST"


def _admit(evaluated: Any, largest: float) -> None:
    """Refuse a gradient whose intermediate values may be stored in a type that does not hold them."""
    for name in ("grad_weights", "grad_logits", "grad_scores"):
        array = numpy.asarray(getattr(evaluated.evaluation, name))
        if (abs(array[numpy.isfinite(array)]) > largest / 4).any():
            raise NotAdmitted
    for value in evaluated.values.values():
        if (abs(value[numpy.isfinite(value)]) > largest / 4).any():
            raise NotAdmitted
