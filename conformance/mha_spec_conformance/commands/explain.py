"""`mha-spec explain CASE`: the formula and the numbers of a case, and how to call it without the suite."""

from __future__ import annotations

import json
import re
import textwrap
from typing import TYPE_CHECKING

import ml_dtypes
import numpy

from mha_spec.arguments import OPTIONS, Arguments
from mha_spec.arrays import dtype_name
from mha_spec.errors import MhaSpecError
from mha_spec.reference import Reference
from mha_spec_conformance.asking.calls import CACHE, is_parameter
from mha_spec_conformance.judging.bounds.evaluation import as_float64
from mha_spec_conformance.suite.functions import FUNCTIONS

from .listing import case_called

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mha_spec_conformance.suite.cases import Case, Expected

__all__ = ["explain"]

SMALL = 64
"""The largest number of elements of an array that is printed whole and written out in the snippet."""

WIDEST_GRID = 64

FORMULAS = {
    "merge_attention": (
        "lse = ln(exp lse_a + exp lse_b)\noutput = exp(lse_a - lse) output_a + exp(lse_b - lse) output_b"
    ),
    "merge_attention_vjp": (
        "a = exp(lse_a - lse), b = exp(lse_b - lse), t = a b sum_c dO (output_a - output_b)\n"
        "d output_a = a dO, d output_b = b dO, d lse_a = a grad_lse + t, d lse_b = b grad_lse - t"
    ),
    "varlen_attention": (
        "rows of sequence b = attention(its queries, its keys, its values), positions from 0 in each sequence\n"
        "K[b,j] = key[cu_seqlens_kv[b] + j], or key[block_table[b, j // block_size], j % block_size]"
    ),
    "varlen_attention_vjp": "the gradients of attention for each sequence; those of sinks and of shared slots add",
    "multi_head_attention": (
        "q, k, v = rotate(norm(query w_q + b_q)), rotate(norm(key w_k + b_k)), value w_v + b_v\n"
        "k, v = the keys and values of the cache, followed by these\n"
        "output = sum_h attention(q, k, v)[h] w_o[h] + b_o"
    ),
    "multi_head_attention_and_weights": "output as multi_head_attention, weights as multi_head_attention_weights",
    "multi_head_attention_weights": (
        "q, k = rotate(norm(query w_q + b_q)), rotate(norm(key w_k + b_k))\nweights = attention_weights(q, k)"
    ),
    "rotary_embedding": "a = position * base^(-2i / rotary_dim); u' = u cos a - v sin a, v' = v cos a + u sin a",
    "alibi_slopes": "slope[h] = 2^(-8 (h + 1) / heads) if heads is a power of two",
    "alibi_bias": "bias = -slope[h] |q_offset[b] + i - j|",
}
"""The formulas of the functions other than attention, with every optional part."""


def explain(name: str, dtype: str | None = None, save: Path | None = None) -> str:
    """Explain the case called `name`.

    Raises:
        UnknownName: No case has this id.
        MhaSpecError: The case is not asked in `dtype`.
    """
    case = case_called(name)
    dtype = dtype or ("float32" if "float32" in case.dtypes else case.dtypes[0])
    if dtype not in case.dtypes:
        raise MhaSpecError(f"case {case.id} is asked in {', '.join(case.dtypes)}, not in {dtype}")
    inputs = case.inputs(dtype)
    if save is not None:
        _save(case, inputs, save)
    parts = [
        f"{case.id}\n{case.title}\n{case.level}, {', '.join(case.tags)}; asked in {', '.join(case.dtypes)}",
        _clauses(case),
        _formula(case, inputs),
        _arguments(case, inputs),
        _visibility(case, inputs),
        _outcome(case),
        _snippet(case, inputs, save),
    ]
    return "\n\n".join(part for part in parts if part)


def _clauses(case: Case) -> str:
    from mha_spec_conformance.suite.spec import clauses

    by_id = clauses()
    return "\n".join(f"{name}: {by_id[name].sentence}" for name in case.clauses if name in by_id)


def _formula(case: Case, inputs: Mapping[str, numpy.ndarray]) -> str:
    """Write the formula with only the options of this case."""
    if case.function in FORMULAS:
        return FORMULAS[case.function]
    options = case.options
    scale = options.get("scale")
    shown = f"1/sqrt({inputs['query'].shape[3]})" if scale is None else f"{scale!r}"
    score = f"{shown} * Q K^T"
    score = (
        f"{options['softcap']!r} * tanh({score} / {options['softcap']!r})"
        if options.get("softcap") is not None
        else score
    )
    lines = [f"S = {score}" + (" + bias" if "bias" in inputs else "")]
    sums = "ln(sum_j exp S" + (" + exp sink)" if "sinks" in inputs else ")")
    lines += [f"lse = {sums} over visible pairs", "P = exp(S - lse)"]
    if case.function != "attention_weights":
        factor = f" * dropout_mask / (1 - {options.get('dropout_rate', 0.0)!r})" if "dropout_mask" in inputs else ""
        lines.append(f"output = (P{factor}) V" if factor else "output = P V")
    if case.function == "attention_vjp":
        lines.append("D = rowsum(P dP)" + (" - grad_lse" if "grad_lse" in inputs else "") + ", dS = P (dP - D)")
        lines.append("dQ = scale dX K, dK = scale dX^T Q, dV = P^T dO, dX = dS times the slope of the cap")
    return "\n".join([*lines, *_constraints(case, inputs)])


def _constraints(case: Case, inputs: Mapping[str, numpy.ndarray]) -> list[str]:
    """Write the conditions under which a pair (i, j) is visible in this case."""
    options, conditions = case.options, []
    left, right = (
        tuple(options.get("window") or (None, None))
        if isinstance(options.get("window"), (list, tuple))
        else (None, None)
    )
    offset = "q_offset[b]" if "q_offset" in inputs else options.get("q_offset", 0)
    conditions += ["mask"] if "mask" in inputs else []
    conditions += ["bias > -inf"] if "bias" in inputs else []
    prefix = "(j <= p or j < prefix_lengths[b])"
    conditions += [prefix if "prefix_lengths" in inputs else "j <= p"] if options.get("causal") is True else []
    conditions += [f"p - {left} <= j"] if left is not None else []
    conditions += [f"j <= p + {right}"] if right is not None else []
    conditions += _conditions_of_chunks(options.get("chunk"), padded="kv_starts" in inputs)
    conditions += ["kv_starts[b] <= j"] if "kv_starts" in inputs else []
    conditions += ["j < kv_lengths[b]"] if "kv_lengths" in inputs else []
    conditions += ["i < q_lengths[b]"] if "q_lengths" in inputs else []
    conditions += ["q_segment_ids[b, i] = kv_segment_ids[b, j]"] if "q_segment_ids" in inputs else []
    position = f"; query i is at p = {offset} + i" if any(re.search(r"\bp\b", part) for part in conditions) else ""
    return [f"visible: {' and '.join(conditions)}{position}"] if conditions else []


def _conditions_of_chunks(chunk: object, *, padded: bool) -> list[str]:
    if not isinstance(chunk, int):
        return []
    sides = (f"({side} - kv_starts[b])" if padded else side for side in "pj")
    return [" = ".join(f"floor({side} / {chunk})" for side in sides)]


def _arguments(case: Case, inputs: Mapping[str, numpy.ndarray]) -> str:
    lines = [f"{name} = {value!r}" for name, value in case.options.items()]
    for name, array in inputs.items():
        lines.append(f"{name}  shape={tuple(array.shape)} dtype={dtype_name(array)}")
        lines += [textwrap.indent(_numbers(array), "    ")]
    return "\n".join(lines)


def _numbers(array: numpy.ndarray) -> str:
    """Write the numbers of a small array, or those of the first matrix of a large array."""
    wide = as_float64(array)
    if wide.size <= SMALL or wide.ndim < 3:
        return numpy.array2string(wide, precision=9, threshold=SMALL, edgeitems=3, max_line_width=100)
    first = wide[(0,) * (wide.ndim - 2)]
    shown = numpy.array2string(first, precision=9, threshold=SMALL, edgeitems=3, max_line_width=100)
    return f"[{', '.join('0' * (wide.ndim - 2))}] is\n{shown}"


def _visibility(case: Case, inputs: Mapping[str, numpy.ndarray]) -> str:
    """Draw the visible pairs of the batch entry and head with the most hidden pairs."""
    if case.function in FORMULAS or case.expect == "error":
        return ""
    named = {name: as_float64(array) for name, array in inputs.items() if name in ("query", "key", "value", *OPTIONS)}
    a = Arguments(
        **{"value": None, **named, **{k: tuple(v) if isinstance(v, list) else v for k, v in case.options.items()}}
    )
    batch, heads, q_len, kv_len = a.batch, a.heads, a.q_len, a.kv_len
    if not batch or not q_len or not kv_len or q_len > WIDEST_GRID or kv_len > WIDEST_GRID:
        return ""
    grids = numpy.broadcast_to(Reference().visible(a), (batch, heads, q_len, kv_len))
    hidden = (~grids).sum(axis=(2, 3))
    if not hidden.any():
        return "every query sees every key"
    entry, head = numpy.unravel_index(int(hidden.argmax()), hidden.shape)
    rows = [f"{i:>4} " + " ".join("#" if seen else "." for seen in row) for i, row in enumerate(grids[entry, head])]
    return "\n".join([f"visible (#) in batch entry {entry}, head {head}: query i down, key j across", *rows])


def _outcome(case: Case) -> str:
    if case.expect == "error":
        error = case.error or {}
        return f"expected: an error of kind {error.get('kind')} that names `{error.get('argument')}`"
    lines = ["expected, correctly rounded to float64"]
    for name, expected in case.expected.items():
        lines.append(f"{name}  shape={tuple(expected.shape)}{_sampled(expected)}")
        lines.append(textwrap.indent(_numbers(expected.values), "    "))
    return "\n".join(lines)


def _sampled(expected: Expected) -> str:
    return "" if expected.rows is None else f", {len(expected.rows)} of its rows"


def _save(case: Case, inputs: Mapping[str, numpy.ndarray], path: Path) -> None:
    """Write inputs and expected values to an .npz file; bfloat16 becomes float32, which is exact."""
    wide = {
        name: array.astype(numpy.float32) if array.dtype == ml_dtypes.bfloat16 else array
        for name, array in inputs.items()
    }
    expected_values = {f"expected_{name}": expected.values for name, expected in case.expected.items()}
    try:
        # To an open file, because savez appends .npz to a path without it.
        with path.open("wb") as file:
            numpy.savez(file, **wide, **expected_values)
    except OSError as error:
        raise MhaSpecError(f"--save {path}: {error.strerror}") from error


def _snippet(case: Case, inputs: Mapping[str, numpy.ndarray], save: Path | None) -> str:
    """Write Python code that calls the function of the case; it needs only NumPy."""
    head = ["import numpy", *_assignments(case, inputs, save)]
    function = FUNCTIONS[case.function]
    if function.of_layer:
        return _layer_snippet(case, head)
    keywords = [f"{name}={name}" for name in inputs if name not in function.operands]
    keywords += [
        f"{name}={tuple(value) if isinstance(value, list) else value!r}" for name, value in case.options.items()
    ]
    keywords += [f"{word}=True" for name, word in function.optional.items() if name in case.expected]
    keywords = [word for word in keywords if word.partition("=")[0] not in function.operands]
    operands = [name if name in inputs else str(case.options.get(name)) for name in function.operands]
    call = f"{case.function}({', '.join([*operands, *keywords])})"
    body = "\n".join([*head, f"print({call})"])
    return "without the suite:\n" + textwrap.indent(body, "    ")


def _assignments(case: Case, inputs: Mapping[str, numpy.ndarray], save: Path | None) -> list[str]:
    """Write the arrays out where they are small; else load them from the file that `--save` writes."""
    if save is None and all(array.size <= SMALL for array in inputs.values()):
        return [f"{name} = {_literal(array)}" for name, array in inputs.items()]
    file = "case.npz" if save is None else str(save)
    how_to_save = f"  # mha-spec explain {case.id} --save {file}" if save is None else ""
    loaded = [f'{name} = case["{name}"]{_remark(array)}' for name, array in inputs.items()]
    return [f"case = numpy.load({json.dumps(file)}){how_to_save}", *loaded]


def _layer_snippet(case: Case, head: list[str]) -> str:
    """Write the call of a layer: the parameters are a mapping, and a cache is three arrays."""
    names = case.input_names
    shown = [name for name in names if is_parameter(name)]
    parameters = ", ".join(f'"{name}": {name}' for name in shown)
    words = [f"{name}={name}" for name in names if name not in (*shown, *CACHE, "query", "key", "value")]
    words += [f"{name}={value!r}" for name, value in case.options.items() if name not in ("chunks", "drafts")]
    words += [f"cache=KVCache({', '.join(CACHE)})"] if CACHE[0] in names else []
    operands = [name if name in names else "None" for name in FUNCTIONS[case.function].operands[:-1]]
    call = f"{case.function}({', '.join([*operands, 'params', *words])})"
    head += [f"# in consecutive calls over {case.options['chunks']} tokens"] if "chunks" in case.options else []
    body = "\n".join([*head, f"params = {{{parameters}}}", f"print({call})"])
    return "without the suite:\n" + textwrap.indent(body, "    ")


def _remark(array: numpy.ndarray) -> str:
    return "  # bfloat16, stored as float32" if array.dtype == ml_dtypes.bfloat16 else ""


def _literal(array: numpy.ndarray) -> str:
    """Write an expression that gives the array bit for bit."""
    name = dtype_name(array)
    text = repr(as_float64(array).tolist()).replace("nan", "numpy.nan").replace("inf", "numpy.inf")
    shape = f".reshape({tuple(array.shape)})" if array.size == 0 else ""
    kind = "float32" if name == "bfloat16" else name
    return f'numpy.array({text}, dtype="{kind}"){shape}{_remark(array)}'
