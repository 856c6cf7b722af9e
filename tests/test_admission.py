"""Each case of the suite must be able to fail: null answers, unused arguments and vacuous allowances are refused."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import pytest
from support.budget import affordable

from mha_spec import reference
from mha_spec.steps import Steps
from mha_spec_conformance.asking.calls import with_contiguous_cache
from mha_spec_conformance.judging import compare, prediction
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.suite import cases, spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mha_spec_conformance.suite.cases import Case

    Arrays = Mapping[str, numpy.ndarray]
    Outputs = dict[str, numpy.ndarray]
    Options = Mapping[str, Any]

Item = TypeVar("Item")

OUTPUTS = {
    "attention": ("output", "lse"),
    "attention_weights": ("weights",),
    "attention_vjp": ("grad_query", "grad_key", "grad_value", "grad_bias", "grad_sinks"),
    "merge_attention": ("output", "lse"),
    "merge_attention_vjp": ("grad_output_a", "grad_lse_a", "grad_output_b", "grad_lse_b"),
}
LARGEST_SHARE = 1 / 8
"""The largest share of the median magnitude that the median allowance may be; else a case detects too little."""

FARTHEST = 2**30
"""The largest magnitude of offsets and window bounds."""

POSITIONAL = {"q_offset", "left of window", "right of window"}
"""Arguments that need not matter at the ends of their range: a bound beyond every key hides none."""

NUMERIC = {"scale", "softcap", "bias", "sinks", "dropout_rate", "dropout_mask"}
"""Arguments that must matter in 16-bit types too; the others decide which pairs are visible."""

OPTIONS = {
    "mask", "bias", "causal", "offset", "window", "q_lengths", "kv_lengths", "segments",
    "softcap", "sinks", "scale", "dropout",
}  # fmt: skip
FEATURES = OPTIONS | {
    "core", "groups", "value_size", "empty", "lse", "weights", "vjp", "merge", "poison", "nonfinite", "errors",
}  # fmt: skip
MASK_FEATURES = {"chunk", "kv_starts", "prefix_lengths"}
PACKED_FEATURES = {"varlen", "paged", "kv_used", "slopes"}
LAYER_FEATURES = {
    "projection", "cross", "rotary", "positions", "norm", "joint_norm", "cache", "paged_cache", "window_cache", "alibi",
}  # fmt: skip
NORMS = ("q_norm", "k_norm", "q_joint_norm", "k_joint_norm")
PARAMETERS = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o", *NORMS)
HEAD_SIZES = (64, 128)


def ask(function: str, arrays: Arrays, options: Options) -> Outputs:
    """Return the outputs of the reference by name."""
    if function not in OUTPUTS:
        return prediction.answer(Steps(), function, arrays, options)
    more = {"return_lse": True} if function == "attention" else {}
    answer = getattr(reference, function)(**arrays, **options, **more)
    answers = answer if isinstance(answer, tuple) else (answer,)
    return {name: array for name, array in zip(OUTPUTS[function], answers, strict=True) if array is not None}


class Admission:
    """The admission of one case: its inputs, the reference's answer, and the allowances in every dtype."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.expected = dict(case.expected)
        self.arrays = case.inputs(case.dtypes[0])
        self.answer = ask(case.function, self.arrays, case.options)
        self.zeros = {name: numpy.zeros_like(array) for name, array in self.answer.items()}
        self.precisions = {dtype: precision(dtype) for dtype in case.dtypes}
        evaluated = bounds(case.function, self.arrays, case.options)
        self.allowances = {dtype: evaluated.allowances(run) for dtype, run in self.precisions.items()}

    def passes(self, outputs: Outputs, dtype: str) -> bool:
        """Return True if an answer would be accepted in `dtype`."""
        return compare.judge(self.case, self.expected, outputs, self.allowances[dtype], self.precisions[dtype]).passed

    def violations(self) -> Iterator[str]:
        """Yield the reasons to refuse the case."""
        if not self.passes(self.answer, self.case.dtypes[0]):
            yield "the reference does not pass it"
        for dtype in self.case.dtypes:
            yield from self._vacuous(dtype)
            yield from self._null_answers(dtype)
        yield from self._arguments_that_do_not_matter()

    def _finite_places(self, dtype: str) -> Iterator[tuple[str, numpy.ndarray, numpy.ndarray]]:
        """Yield the expected values and allowances of the finite elements of each output."""
        for name, expected in self.expected.items():
            allowed = numpy.broadcast_to(self.allowances[dtype][name], expected.shape)
            if expected.rows is not None:
                allowed = allowed.reshape(-1, expected.values.size // len(expected.rows))[expected.rows]
            finite = (
                numpy.ones(expected.values.size, dtype=bool)
                if expected.kinds is None
                else numpy.ravel(expected.kinds) == compare.FINITE
            )
            yield name, numpy.ravel(expected.values)[finite], numpy.ravel(allowed)[finite]

    def _vacuous(self, dtype: str) -> Iterator[str]:
        largest = self.precisions[dtype].largest / 4
        for name, expected, allowed in self._finite_places(dtype):
            if not numpy.isfinite(allowed).all():
                yield f"{dtype}: an allowance of {name} is not finite"
            places = expected != 0
            if not places.any() or "cancellation" in self.case.tags:
                continue
            median, middle = float(numpy.median(allowed[places])), float(numpy.median(abs(expected[places])))
            if median > LARGEST_SHARE * middle:
                yield f"{dtype}: the median allowance of {name}, {median:.2g}, is too large compared with {middle:.2g}"
            if name != "lse" and abs(expected).max() > largest:
                yield f"{dtype}: {name} exceeds a quarter of the largest number"

    def _null_answers(self, dtype: str) -> Iterator[str]:
        if not any((expected != 0).any() for _, expected, _ in self._finite_places(dtype)):
            return
        for label, outputs in null_answers(self.case.function, self.arrays, self.zeros):
            if self.passes(outputs, dtype):
                yield f"{dtype}: {label} would pass"

    def _arguments_that_do_not_matter(self) -> Iterator[str]:
        changed: dict[str, list[Outputs]] = defaultdict(list)
        function = self.case.function
        by_function = changes if function in OUTPUTS else packed_changes if "varlen" in function else layer_changes
        for name, arrays, options in by_function(self.arrays, self.case.options):
            changed[name].append({**self.zeros, **ask(self.case.function, arrays, options)})
        for name, answers in changed.items():
            if "boundary" in self.case.tags and name in POSITIONAL:
                continue
            if "decode" in self.case.tags and name == "causal":
                # A single query at the end of its keys sees them all, and decoders are causal all the same.
                continue
            for dtype in self.case.dtypes if name in NUMERIC else self.case.dtypes[:1]:
                if all(self.passes(outputs, dtype) for outputs in answers):
                    yield f"{dtype}: {name} does not matter"


def null_answers(function: str, arrays: Arrays, zeros: Outputs) -> Iterator[tuple[str, Outputs]]:
    """Yield answers that need no attention, and that must not pass."""
    yield "an answer of zeros", zeros
    if function not in OUTPUTS:
        yield from layer_null_answers(function, arrays, zeros)
    elif function == "attention":
        heads = arrays["query"].shape[1]
        value = numpy.repeat(arrays["value"], heads // arrays["value"].shape[1], axis=1)
        if value.shape[2]:
            yield "the mean of the values", {**zeros, "output": zeros["output"] + value.mean(axis=2, keepdims=True)}
            yield "the first value", {**zeros, "output": zeros["output"] + value[:, :, :1]}
        if arrays["query"].shape == zeros["output"].shape:
            yield "the query", {**zeros, "output": arrays["query"]}
    elif function == "attention_weights":
        yield "uniform weights", {"weights": zeros["weights"] + 1 / zeros["weights"].shape[-1]}
    elif function == "merge_attention":
        for half in "ab":
            yield f"half {half}", {"output": arrays[f"output_{half}"], "lse": arrays[f"lse_{half}"]}
    elif function == "merge_attention_vjp":
        half = {name: array / 2 for name, array in arrays.items() if name.startswith("grad_")}
        shared = {name: half[name[:-2]] for name in zeros if name[:-2] in half}
        yield "half of the cotangents for each half", {**zeros, **shared}
    else:
        operands = {
            f"grad_{name}": arrays[name] for name in ("query", "key", "value", "bias", "sinks") if name in arrays
        }
        yield "the operands", {**zeros, **operands}


_LEFT_OUT = (
    *(
        (name,)
        for name in ("mask", "bias", "sinks", "grad_lse", "softcap", "scale", "q_lengths", "kv_lengths", *MASK_FEATURES)
    ),
    ("causal", "prefix_lengths"),
    ("q_segment_ids", "kv_segment_ids"),
    ("dropout_mask", "dropout_rate"),
)
_TENSORS = ("query", "key", "value", "grad_output", "output_a", "output_b")


def changes(arrays: Arrays, options: Options) -> Iterator[tuple[str, Arrays, Options]]:
    """Yield calls with one argument omitted or changed; of the calls of a name, at least one must change the answer."""
    for names in _LEFT_OUT:
        if names[0] in arrays or names[0] in options:
            yield names[0], without(arrays, *names), without(options, *names)
    if options.get("dropout_rate"):
        yield "dropout_rate", arrays, without(options, "dropout_rate")
    for name in tensors_that_matter(arrays, options):
        yield name, {**arrays, name: _moved_values(arrays[name])}, options
    for name in {"lse_a", "lse_b"} & arrays.keys():
        yield name, {**arrays, name: arrays[name] + 0.5}, options
    for step in (-1, 1):
        yield from _moved(arrays, options, step)


def tensors_that_matter(arrays: Arrays, options: Options) -> list[str]:
    """Name the tensors that must matter: not those multiplied by 0, behind a weight of 1, or without a visible pair."""
    if any(0 in array.shape for array in arrays.values()) or ("mask" in arrays and not arrays["mask"].any()):
        return []
    blind = set[str]()
    if "query" in arrays and not arrays["query"].any():
        blind = {"key"}
    if options.get("scale") == 0 or _is_weighed_alone(arrays, weights=True):
        blind = {"query", "key"}
    if _is_weighed_alone(arrays, weights=False):
        blind = {"value"}
    return [name for name in _TENSORS if name in arrays and name not in blind]


def _is_weighed_alone(arrays: Arrays, *, weights: bool) -> bool:
    """Return True if the only key has the weight 1 in each row that sees it, in a case of weights or of gradients."""
    alone = "key" in arrays and arrays["key"].shape[2] == 1 and "sinks" not in arrays
    return alone and ("value" not in arrays if weights else "grad_output" in arrays)


def layer_null_answers(function: str, arrays: Arrays, zeros: Outputs) -> Iterator[tuple[str, Outputs]]:
    """Yield answers of the layer without attention, rotation or slopes."""
    if "output" in zeros and "b_o" in arrays:
        yield "the bias of the output", {**zeros, "output": zeros["output"] + arrays["b_o"]}
    if "weights" in zeros:
        yield "uniform weights", {"weights": zeros["weights"] + 1 / zeros["weights"].shape[-1]}
    if function == "rotary_embedding":
        yield "vectors that are not turned", {"output": arrays["x"]}
    if "slopes" in zeros and zeros["slopes"].size > 1:
        yield "one slope for all", {"slopes": zeros["slopes"] + 0.5}


def layer_changes(arrays: Arrays, options: Options) -> Iterator[tuple[str, Arrays, Options]]:
    """Yield changed calls of the layer; optional parameters are omitted, and the chunks of a sequence do not matter.

    Those of a paged cache or a window cache have a cache with a slot for each token, which takes every option.
    """
    if "cache_block_table" in arrays:
        table = (arrays["cache_block_table"] + 1) % len(arrays["cache_key"])
        yield "cache_block_table", {**arrays, "cache_block_table": table}, options
    wraps = {"window_cache": True} if "window_cache" in options else {}
    arrays = with_contiguous_cache({**arrays, **wraps})
    options = without(options, "window_cache")
    shown = {name: array for name, array in arrays.items() if name not in ("query", "key", "value")}
    tokens = {name: arrays[name] for name in ("query", "key", "value") if name in arrays}
    heads = {name: array[:, None] for name, array in tokens.items()}
    for name, changed, plain in changes({**shown, **heads}, options):
        if name not in heads and not ("chunks" in options and name in ("causal", "right of window")):
            yield name, {**changed, **tokens}, plain
    for name in layer_tensors_that_matter(arrays, options):
        if name.startswith(("b_", *NORMS)) and name in arrays:
            yield name, without(arrays, name), options
        elif name in arrays:
            yield name, {**arrays, name: _moved_values(arrays[name])}, options
    if "positions" in arrays:  # A layer without a cache sees only their differences.
        for moved in (arrays["positions"] + 1, arrays["positions"][..., ::-1]):
            yield "positions", {**arrays, "positions": moved}, options
    if "cache_lengths" in arrays:
        for step in (-1, 1):
            room = arrays["cache_key"].shape[2] - arrays["query"].shape[1]
            lengths = numpy.clip(arrays["cache_lengths"] + step, 0, room)
            yield "cache_lengths", {**arrays, "cache_lengths": lengths}, options
    if "norm_epsilon" in options:
        yield "norm_epsilon", arrays, without(options, "norm_epsilon")
    yield from _turned_otherwise(arrays, options)


def packed_changes(arrays: Arrays, options: Options) -> Iterator[tuple[str, Arrays, Options]]:
    """Yield changed calls of packed sequences; without a sequence no token has a result that depends on anything."""
    if len(arrays["cu_seqlens_q"]) == 1:
        return
    yield from changes(arrays, options)
    if "alibi_slopes" in arrays:
        yield "alibi_slopes", without(arrays, "alibi_slopes"), options
    if "seqused_kv" in arrays:
        yield "seqused_kv", {**arrays, "seqused_kv": numpy.maximum(arrays["seqused_kv"] - 1, 0)}, options
    if "block_table" in arrays:
        table, blocks = arrays["block_table"], len(arrays["key"])
        others = numpy.where((table >= 0) & (table < blocks), (table + 1) % blocks, table).astype(table.dtype)
        yield "block_table", {**arrays, "block_table": others}, options
    for name in {"cu_seqlens_q", "cu_seqlens_kv"} & arrays.keys():
        # The keys in use must remain within the bounds.
        if name == "cu_seqlens_q" or "seqused_kv" not in arrays:
            yield name, {**arrays, name: numpy.maximum(arrays[name] - 1, 0)}, options


def _moved_values(array: numpy.ndarray) -> numpy.ndarray:
    """Change every value and keep the dtype, which NumPy promotes for bfloat16."""
    return (1.25 * array + 0.25).astype(array.dtype)


def layer_tensors_that_matter(arrays: Arrays, options: Options) -> list[str]:
    """Name the tensors that must matter: not those of an empty cache, of values of weights, or of absent keys.

    If there is only one token, its weight is 1, so that query and key do not matter.
    """
    blind = set[str]()
    if "cache_lengths" in arrays and not arrays["cache_lengths"].any():
        blind = {"cache_key", "cache_value"}
    if "cache_lengths" in arrays and "key" not in arrays:
        blind |= {"w_k", "w_v"}
    if "w_v" not in arrays:
        blind |= {"cache_value"}
    if "key" in arrays and arrays["key"].shape[1] == 1 and "sinks" not in arrays and "cache_lengths" not in arrays:
        blind |= {"w_q", "w_k", "query", "key"}
    if (
        not {"rotary", "softcap"} & options.keys()
        and not {"k_norm", "k_joint_norm", "sinks", "cache_lengths"} & arrays.keys()
    ):
        # The bias of the keys then adds the same to each score of a row, which the softmax removes.
        blind |= {"b_k"}
    names = (*PARAMETERS, "query", "key", "value", "x", "cache_key", "cache_value", "slopes")
    return [name for name in names if name not in blind]


def _turned_otherwise(arrays: Arrays, options: Options) -> Iterator[tuple[str, Arrays, Options]]:
    """Yield calls without the rotation, or without each of its options."""
    if "rotary" in options:
        yield "rotary", without(arrays, "positions"), without(options, "rotary")
    for name in _removable(options.get("rotary", options)):
        if name in options:
            yield name, arrays, without(options, name)
        if name in options.get("rotary", {}):
            yield name, arrays, {**options, "rotary": without(options["rotary"], name)}


def _removable(rotary: Options) -> tuple[str, ...]:
    """Name the options of a rotation that can be left out; the number of frequencies fits a single rotary_dim."""
    names = ("base", "interleaved", "rotary_dim", "frequencies", "attention_factor")
    return tuple(name for name in names if name != "rotary_dim" or "frequencies" not in rotary)


def _moved(arrays: Arrays, options: Options, step: int) -> Iterator[tuple[str, Arrays, Options]]:
    """Yield calls with each length, offset and window bound changed by 1."""
    for name, tensor in (("q_lengths", "query"), ("kv_lengths", "key")):
        if name in arrays:
            yield name, {**arrays, name: numpy.clip(arrays[name] + step, 0, arrays[tensor].shape[2])}, options
    if "q_offset" in arrays:
        offsets = numpy.clip(arrays["q_offset"] + step, -FARTHEST, FARTHEST)
        yield "q_offset", {**arrays, "q_offset": offsets}, options
    if isinstance(options.get("q_offset"), str):
        other = {"upper_left": "lower_right", "lower_right": "upper_left"}[options["q_offset"]]
        yield "q_offset", arrays, {**options, "q_offset": other}
    elif "q_offset" in options and abs(options["q_offset"] + step) <= FARTHEST:
        yield "q_offset", arrays, {**options, "q_offset": options["q_offset"] + step}
    left, right = options.get("window") or (None, None)
    if left is not None and 0 <= left + step <= FARTHEST:
        yield "left of window", arrays, {**options, "window": (left + step, right)}
    if right is not None and 0 <= right + step <= FARTHEST:
        yield "right of window", arrays, {**options, "window": (left, right + step)}


def without(mapping: Mapping[str, Item], *names: str) -> dict[str, Item]:
    """Return the mapping without some names."""
    return {name: value for name, value in mapping.items() if name not in names}


def with_values(suite: cases.Suite) -> list[Case]:
    """Return the cases with expected values."""
    return [case for case in suite.cases if case.expect == "values"]


def test_every_case_can_fail(suite: cases.Suite) -> None:
    """Allowances are finite and small, null answers fail, and each argument matters; ALL_CASES=1 tries all cases."""
    with numpy.errstate(all="ignore"):
        tried = affordable(with_values(suite), one_in=31)
        refused = [f"{case.id}: {reason}" for case in tried for reason in Admission(case).violations()]
    assert not refused, f"{len(refused)} reasons to refuse a case:\n" + "\n".join(refused)


def test_the_suite_is_large_and_its_signatures_are_few(suite: cases.Suite) -> None:
    """Cases of errors are not counted, because nothing is compiled for them."""
    core = [case for case in with_values(suite) if case.function in ("attention", "attention_vjp")]
    assert len(core) >= 600
    assert sum(case.function == "attention_vjp" for case in core) >= 200
    assert sum(case.expect == "error" for case in suite.cases) >= 45
    assert len({case.id for case in suite.cases}) == len(suite.cases)
    assert sum(case.function not in OUTPUTS for case in with_values(suite)) >= 200


def test_smoke_cases_are_few_and_ask_for_little(suite: cases.Suite) -> None:
    """Smoke cases distinguish a wrong target file from a wrong attention."""
    smoke = [case for case in suite.cases if "smoke" in case.tags]
    assert 3 <= len(smoke) <= 5
    assert {feature for case in smoke for feature in case.features} <= {"core", "mask", "lse"}


def test_every_clause_is_cited_twice(suite: cases.Suite) -> None:
    """No case cites an unknown clause either.

    Goldens cannot hold arrays of two libraries, as MHA-ARG-4 needs, the runner tests MHA-PURE-4 in every case, the
    layouts of a target are not those of a golden, rotary_frequencies computes on the host, without a target, the table
    of a paged cache is read on the host only, and a golden lies on a single device.
    """
    cited = Counter(clause for case in suite.cases for clause in case.clauses)
    known = spec.clauses()
    assert not cited.keys() - known.keys()
    rare = {clause for clause in known if cited[clause] < 2 and not clause.startswith(("MHA-LAYOUT-", "MHA-SHARD-"))}
    on_host = {f"MHA-ROTARY-{number}" for number in range(9, 17)}
    assert rare <= {"MHA-ARG-4", "MHA-PURE-4", "MHA-CACHE-11", *on_host}


def test_every_feature_is_asked_at_64_and_at_128(suite: cases.Suite) -> None:
    """Some kernels support no other head sizes."""
    asked: set[tuple[str, int]] = set()
    for case in with_values(suite):
        shapes = {name: array.shape for name, array in case.inputs("float64").items()}
        sizes = {shapes[name][-1] for name in _sized(case) if name in shapes}
        if sizes <= set(HEAD_SIZES):
            asked |= {(feature, size) for feature in case.features for size in sizes}
    known = FEATURES | MASK_FEATURES | LAYER_FEATURES | PACKED_FEATURES
    assert {feature for case in suite.cases for feature in case.features} == known
    missing = {(feature, size) for feature in FEATURES - {"errors"} for size in HEAD_SIZES} - asked
    assert not missing
    assert {("projection", 64), ("rotary", 64), ("cache", 64), ("varlen", 64), ("varlen", 128)} <= asked


def _sized(case: Case) -> tuple[str, ...]:
    """Name the inputs whose last axis is the size of a head."""
    if "w_q" in case.input_names:
        return ("w_q", "w_v")
    return ("query", "value", "output_a", "x")


def test_every_pair_of_options_is_asked(suite: cases.Suite) -> None:
    """Most mistakes are in combinations of options; a case with all options together does not count."""
    asked = [OPTIONS & set(case.features) for case in with_values(suite)]
    few = [together for together in asked if together < OPTIONS]
    missing = [pair for pair in combinations(sorted(OPTIONS), 2) if not any(together >= set(pair) for together in few)]
    assert not missing


@pytest.fixture
def admission(suite: cases.Suite) -> Admission:
    """Return an admission that a test can change."""
    return Admission(next(case for case in suite.cases if case.id == "attention/smoke/mask-polarity"))


def test_a_mask_that_hides_nothing_is_refused(admission: Admission) -> None:
    admission.arrays["mask"] = numpy.ones_like(admission.arrays["mask"])
    admission.answer = ask("attention", admission.arrays, {})
    admission.expected["output"] = dataclasses.replace(admission.expected["output"], values=admission.answer["output"])
    assert "float64: mask does not matter" in list(admission.violations())


def test_a_case_that_zeros_pass_is_refused(admission: Admission) -> None:
    admission.allowances["float16"] = {name: array + 100 for name, array in admission.allowances["float16"].items()}
    reasons = list(admission.violations())
    assert "float16: an answer of zeros would pass" in reasons
    assert any(reason.startswith("float16: the median allowance of output") for reason in reasons)


def test_a_case_that_the_reference_does_not_pass_is_refused(admission: Admission) -> None:
    values = admission.expected["output"].values + 1
    admission.expected["output"] = dataclasses.replace(admission.expected["output"], values=values)
    assert "the reference does not pass it" in list(admission.violations())
