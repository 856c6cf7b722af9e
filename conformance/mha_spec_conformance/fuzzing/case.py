"""Convert a drawn call to a case of the suite, which is then judged, named and printed like any other case."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy
from safetensors.numpy import save_file

from mha_spec import SPEC_VERSION
from mha_spec.arrays import dtype_name
from mha_spec_conformance.asking.calls import keyword_of
from mha_spec_conformance.suite.cases import FORMAT, Case
from mha_spec_conformance.suite.functions import FUNCTIONS

from .expected import expect

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .call import Call

__all__ = ["case_of", "save"]

FILE = "tensors.safetensors"

OF_FUNCTIONS = {
    "attention": "MHA-SOFTMAX-1",
    "attention_weights": "MHA-WEIGHTS-1",
    "attention_vjp": "MHA-VJP-1",
    "merge_attention": "MHA-MERGE-1",
    "merge_attention_vjp": "MHA-MERGE-7",
    "multi_head_attention": "MHA-LAYER-1",
    "multi_head_attention_and_weights": "MHA-LAYER-4",
    "multi_head_attention_weights": "MHA-LAYER-4",
    "rotary_embedding": "MHA-ROTARY-1",
    "alibi_slopes": "MHA-ALIBI-1",
    "alibi_bias": "MHA-ALIBI-2",
    "varlen_attention": "MHA-VARLEN-1",
    "varlen_attention_vjp": "MHA-VARLEN-11",
}
"""The clause that defines each function."""

OF_ARGUMENTS = {
    "block_table": "MHA-VARLEN-6",
    "seqused_kv": "MHA-VARLEN-4",
    "alibi_slopes": "MHA-VARLEN-8",
    "max_seqlen_q": "MHA-VARLEN-10",
    "max_seqlen_kv": "MHA-VARLEN-10",
    "mask": "MHA-MASK-1",
    "bias": "MHA-BIAS-1",
    "causal": "MHA-CAUSAL-1",
    "q_offset": "MHA-POS-1",
    "window": "MHA-WINDOW-1",
    "chunk": "MHA-WINDOW-3",
    "prefix_lengths": "MHA-CAUSAL-2",
    "q_lengths": "MHA-LEN-2",
    "kv_lengths": "MHA-LEN-1",
    "kv_starts": "MHA-LEN-4",
    "q_segment_ids": "MHA-SEG-1",
    "scale": "MHA-SCORE-1",
    "softcap": "MHA-CAP-1",
    "sinks": "MHA-SINK-1",
    "dropout_mask": "MHA-DROP-1",
    "grad_lse": "MHA-LSE-3",
    "rotary": "MHA-ROTARY-4",
    "q_norm": "MHA-NORM-1",
    "cache_key": "MHA-CACHE-1",
    "cache_block_table": "MHA-CACHE-10",
    "window_cache": "MHA-CACHE-13",
}
"""The clause that defines an argument."""


def case_of(call: Call, name: str) -> Case:
    """Convert the call to a case called `name`; its expected values come from the reference in float64.

    Raises:
        NotAdmitted: The call cannot be a case: a correct implementation may exceed the range of a dtype.
    """
    values, kinds, level = expect(call)
    expected = {label: numpy.asarray(value, numpy.float64) for label, value in values.items()}
    parts = {"input": call.arrays, "output": expected, "kinds": kinds}
    clauses = [OF_ARGUMENTS[label] for label in (*call.recipes, *call.options) if label in OF_ARGUMENTS]
    clauses.append(OF_FUNCTIONS[call.function])

    def place(part: str, label: str) -> dict[str, str]:
        return {"file": FILE, "tensor": f"{name}/{part}-{label}"}

    return Case(
        id=name,
        title=f"A drawn call of {call.function}.",
        function=call.function,
        clauses=tuple(clauses),
        features=tuple(_features(call)),
        level=level,
        tags=("fuzz",),
        dtypes=(call.dtype,),
        options=call.options,
        expect="values",
        error=None,
        input_entries={
            label: {"shape": array.shape, "dtype": dtype_name(array), **place("input", label)}
            for label, array in call.arrays.items()
        },
        output_entries={
            label: {"shape": array.shape, "rows": None, "kinds": place("kinds", label), **place("output", label)}
            for label, array in expected.items()
        },
        tensors={
            (FILE, place(part, label)["tensor"]): array
            for part, arrays in parts.items()
            for label, array in arrays.items()
        },
    )


def _features(call: Call) -> list[str]:
    """Name the features that the call needs, as the goldens do."""
    passed = (*call.recipes, *call.options)
    names = {*passed, *(keyword_of(call.function, name) for name in passed)}
    by_keyword = {**FUNCTIONS["attention"].keyword_features, **FUNCTIONS[call.function].keyword_features}
    features = ["core", *(feature for feature, words in by_keyword.items() if names.intersection(words))]
    features += FUNCTIONS[call.function].features
    features += ["lse"] * call.lse + ["nonfinite"] * any(recipe.marks for recipe in call.recipes.values())
    query, key, value = (call.arrays.get(name) for name in ("query", "key", "value"))
    if query is not None and key is not None and query.ndim == 4:
        features += ["groups"] * (query.shape[1] != key.shape[1]) + ["empty"] * (0 in (*query.shape, *key.shape))
        features += ["value_size"] * (value is not None and value.shape[3] != key.shape[3])
    return list(dict.fromkeys(features))


def save(cases: Sequence[Case], folder: Path) -> None:
    """Write cases as a folder of goldens, which `mha-spec check TARGET --cases FOLDER` asks."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: numpy.ascontiguousarray(array) for case in cases for (_, name), array in case.tensors.items()}
    save_file(tensors, folder / FILE, {"format": FORMAT})
    data = (folder / FILE).read_bytes()
    index: dict[str, Any] = {
        "format": FORMAT,
        "spec_version": SPEC_VERSION,
        "suite_version": "fuzz",
        "files": {FILE: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}},
        "cases": [_entry(case) for case in cases],
    }
    text = (json.dumps(index, indent=1, allow_nan=False, default=list) + "\n").encode()
    (folder / "index.json").write_bytes(text)
    (folder / "index.json.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  index.json\n")


def _entry(case: Case) -> Mapping[str, Any]:
    names = ("id", "title", "function", "clauses", "features", "level", "tags", "dtypes", "options", "expect")
    entries = {"inputs": case.input_entries, "outputs": case.output_entries}
    return {name: getattr(case, name) for name in names} | entries
