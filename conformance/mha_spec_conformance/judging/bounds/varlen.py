"""Error bounds of packed and paged attention: those of the attention of each sequence.

A slot that several keys name, and a sink, have sums of gradients: their errors add, and each addition rounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import dtype_name, softmax_dtype_name
from mha_spec.layer_steps import LayerSteps
from mha_spec.varlen_reference import Call, Varlen, VarlenSteps

from .backward import BackwardBounds
from .evaluation import as_float64
from .forward import ForwardBounds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.steps import Steps
    from mha_spec.varlen_sequences import PackedSequence

    from .evaluation import AttentionBounds
    from .roundoff import Precision

    Arrays = Mapping[str, numpy.ndarray]

__all__ = ["VarlenBounds"]

OPERANDS = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")
COTANGENTS = ("grad_output", "grad_lse")


class VarlenBounds:
    """Bounds of `varlen_attention` and of `varlen_attention_vjp`."""

    @numpy.errstate(all="ignore")
    def __init__(self, function: str, arrays: Arrays, options: Mapping[str, Any], steps: Steps | VarlenSteps) -> None:
        """Evaluate the sequences of a case."""
        if isinstance(steps, LayerSteps):
            steps = VarlenSteps()
        self._steps = steps if isinstance(steps, VarlenSteps) else VarlenSteps(attention=steps)
        self._function, self._backward = function, function == "varlen_attention_vjp"
        self._parts: list[tuple[PackedSequence, AttentionBounds[Any]]] = []
        self._dtype = dtype_name(arrays["query"])
        self._arrays = arrays
        self.values = self._evaluate({name: as_float64(array) for name, array in arrays.items()}, options)
        cotangents = {name: arrays.get(name) for name in COTANGENTS if name in arrays}
        inner = replace(self._steps, attend=self._attend, differentiate=self._differentiate)
        self._cotangents = cotangents
        self._call(Varlen(inner), {name: as_float64(array) for name, array in arrays.items()}, options)

    def _evaluate(self, arrays: Arrays, options: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        results = self._call(Varlen(self._steps), arrays, options)
        names = ("grad_query", "grad_key", "grad_value", "grad_sinks") if self._backward else ("output", "lse")
        return {name: result for name, result in zip(names, results, strict=True) if result is not None}

    def _call(self, varlen: Varlen, arrays: Arrays, options: Mapping[str, Any]) -> Any:
        given: dict[str, Any] = {**options, **arrays}
        operands = [given.pop(name, None) for name in OPERANDS]
        if self._backward:
            return varlen.varlen_attention_vjp(given.pop("grad_output"), *operands, **given)
        return varlen.varlen_attention(*operands, **given | {"return_lse": True})

    def _attend(self, call: Call, steps: VarlenSteps, *, return_lse: bool) -> Any:
        """Keep the bounds of a sequence instead of computing it."""
        self._keep(call, steps, ForwardBounds, {})
        length, heads = call.query.shape[2], call.query.shape[1]
        return numpy.zeros((1, heads, length, call.value.shape[3])), numpy.zeros((1, heads, length))

    def _differentiate(self, call: Call, grad_output: Any, grad_lse: Any, steps: VarlenSteps) -> Any:
        more = {"grad_output": grad_output} | ({} if grad_lse is None else {"grad_lse": grad_lse})
        self._keep(call, steps, BackwardBounds, more)
        return *(numpy.zeros_like(x) for x in call[:3]), None if call.sinks is None else numpy.zeros_like(call.sinks)

    def _keep(self, call: Call, steps: VarlenSteps, kind: Callable[..., AttentionBounds[Any]], more: Arrays) -> None:
        arrays = {"query": call.query, "key": call.key, "value": call.value, **more}
        bias = steps.linear_bias(call)
        arrays |= {name: x for name, x in (("bias", bias), ("sinks", call.sinks)) if x is not None}
        part = kind(arrays, call.options, steps.attention)
        part.use({name: self._dtype_of(name) for name in arrays})
        part.evaluation.linear_bias = 0.0 if bias is None else bias
        self._parts.append((call.sequence, part))

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
