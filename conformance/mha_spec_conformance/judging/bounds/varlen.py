"""Error bounds of packed and paged attention: those of the attention of each sequence.

A slot that several keys name, and a sink, have sums of gradients: their errors add, and each addition rounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import dtype_name, softmax_dtype_name
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec.varlen_reference import Call, Varlen, VarlenSteps
from mha_spec_conformance.asking.calls import varlen_over

from .backward import BackwardBounds
from .evaluation import in_float64
from .forward import ForwardBounds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.layer_steps import LayerSteps
    from mha_spec.steps import Steps
    from mha_spec.varlen_sequences import PackedSequence

    from .evaluation import AttentionBounds
    from .roundoff import Precision

    Arrays = Mapping[str, numpy.ndarray]
    Options = Mapping[str, Any]

__all__ = ["VarlenBounds", "dense_calls"]

OPERANDS = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")
FORWARD, VJP = VARLEN_FUNCTIONS


def results_of(varlen: Varlen, function: str, arrays: Arrays, options: Options) -> Any:
    """Call a packed function, whose operands are positional; the forward also returns the lse."""
    keywords: dict[str, Any] = {**options, **arrays}
    operands = [keywords.pop(name, None) for name in OPERANDS]
    if function == VJP:
        return varlen.varlen_attention_vjp(keywords.pop("grad_output"), *operands, **keywords)
    return varlen.varlen_attention(*operands, **keywords | {"return_lse": True})


def dense_calls(
    function: str, arrays: Arrays, options: Options, steps: VarlenSteps
) -> list[tuple[Call, dict[str, numpy.ndarray]]]:
    """Return the dense call of each sequence of a packed call, with its arrays by name, and compute none of them."""
    calls: list[tuple[Call, dict[str, numpy.ndarray]]] = []

    def keep(call: Call, steps: VarlenSteps, **cotangents: Any) -> None:
        named = {"query": call.query, "key": call.key, "value": call.value, "sinks": call.sinks, **cotangents}
        named["bias"] = steps.linear_bias(call)
        calls.append((call, {name: array for name, array in named.items() if array is not None}))

    def attend(call: Call, steps: VarlenSteps, *, return_lse: bool) -> Any:
        keep(call, steps)
        rows = call.query.shape[:3]
        return numpy.zeros((*rows, call.value.shape[3])), numpy.zeros(rows)

    def differentiate(call: Call, grad_output: Any, grad_lse: Any, steps: VarlenSteps) -> Any:
        keep(call, steps, grad_output=grad_output, grad_lse=grad_lse)
        return *map(numpy.zeros_like, call[:3]), None if call.sinks is None else numpy.zeros_like(call.sinks)

    results_of(Varlen(replace(steps, attend=attend, differentiate=differentiate)), function, arrays, options)
    return calls


class VarlenBounds:
    """Bounds of `varlen_attention` and of `varlen_attention_vjp`."""

    @numpy.errstate(all="ignore")
    def __init__(
        self, function: str, arrays: Arrays, options: Options, steps: Steps | LayerSteps | VarlenSteps
    ) -> None:
        """Evaluate the sequences of a case."""
        backward = function == VJP
        self._dtype = dtype_name(arrays["query"])
        self._arrays = arrays
        of_packed = varlen_over(steps)
        converted = in_float64(arrays)
        results = results_of(Varlen(of_packed), function, converted, options)
        names = ("grad_query", "grad_key", "grad_value", "grad_sinks") if backward else ("output", "lse")
        self.values = {name: result for name, result in zip(names, results, strict=True) if result is not None}
        kind = BackwardBounds if backward else ForwardBounds
        self._parts: list[tuple[PackedSequence, AttentionBounds[Any]]] = [
            (call.sequence, self._part(kind(named, call.options, of_packed.attention), named))
            for call, named in dense_calls(function, converted, options, of_packed)
        ]

    def _part(self, part: AttentionBounds[Any], arrays: Arrays) -> AttentionBounds[Any]:
        """Tell the bounds of a sequence the dtypes of the run and its linear bias, which the call computes."""
        part.use({name: self._dtype_of(name) for name in arrays})
        part.evaluation.linear_bias = arrays.get("bias", 0.0)
        return part

    def _dtype_of(self, name: str) -> str:
        """Return the dtype of an array in the run; that of a linear bias is the softmax's type."""
        array = self._arrays.get(name)
        return softmax_dtype_name(self._dtype) if array is None else dtype_name(array)

    @property
    def parts(self) -> list[AttentionBounds[Any]]:
        """The bounds of each sequence."""
        return [part for _, part in self._parts]

    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        parts = [(sequence, part, part.allowances(precision)) for sequence, part in self._parts]
        return self._packed(parts, lambda error, value: error + precision.u_a * value, lambda x: x)

    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        parts = [(sequence, part, part.deviations(precision)) for sequence, part in self._parts]
        return self._packed(parts, lambda error, value: error**2 + (precision.u_a * value) ** 2 / 3, numpy.sqrt)

    @numpy.errstate(all="ignore")
    def _packed(self, parts: Any, term: Callable[..., Any], finish: Callable[..., Any]) -> dict[str, numpy.ndarray]:
        """Put the errors of each sequence at its tokens; those of the same slot and of a sink add."""
        whole = {name: numpy.zeros(value.shape) for name, value in self.values.items()}
        for sequence, part, errors in parts:
            for name, error in errors.items():
                if name not in whole:
                    continue
                value = numpy.asarray(part.values[name], dtype=numpy.float64)
                if name == "lse":
                    whole[name][:, sequence.queries] = error[0]
                elif name in ("output", "grad_query"):
                    whole[name][sequence.queries] = error[0].swapaxes(0, 1)
                elif name == "grad_sinks":
                    whole[name] += term(error, self._repeats(name) * abs(value))
                else:
                    places = self._places(sequence)
                    terms = term(error, self._repeats(name) * abs(value))[0].swapaxes(0, 1)
                    numpy.add.at(whole[name], places, terms)
        sums = ("grad_key", "grad_value", "grad_sinks")
        return {name: finish(error) if name in sums else error for name, error in whole.items()}

    def _repeats(self, name: str) -> int:
        """Return the most additions of a sum beyond the first term."""
        if name == "grad_sinks":
            return max(0, len(self._parts) - 1)
        if not self._parts or self._parts[0][0].blocks is None:
            return 0
        blocks = numpy.concatenate([numpy.array(sequence.blocks, int) for sequence, _ in self._parts])
        return max(0, int(numpy.bincount(blocks).max(initial=0)) - 1)

    def _places(self, sequence: PackedSequence) -> Any:
        """Return the index of the keys of a sequence in their array."""
        if sequence.blocks is None:
            return (numpy.arange(sequence.keys.start, sequence.keys.stop),)
        size = self._arrays["key"].shape[1]
        positions = numpy.arange(len(sequence.keys))
        return numpy.array(sequence.blocks, int)[positions // size], positions % size
