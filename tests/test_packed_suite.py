"""The suite's packed and paged cases: their allowances, properties and axes, and the fuzzer's packed calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.searches import LONG, asker_of, first_finding, mistaken

from mha_spec import reference
from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking.selection import Ask, Selection, asks
from mha_spec_conformance.commands.explain import explain
from mha_spec_conformance.fuzzing.expected import expect
from mha_spec_conformance.fuzzing.reduction import call_of, reduced
from mha_spec_conformance.fuzzing.reduction_packed import smaller_packed
from mha_spec_conformance.judging.axes import axes_of
from mha_spec_conformance.judging.bounds import allowances, bounds, precision
from mha_spec_conformance.judging.bounds.varlen import VarlenBounds
from mha_spec_conformance.judging.compare import FINITE
from mha_spec_conformance.judging.properties import Properties, sizes_of
from mha_spec_conformance.targets.claims import Claims

if TYPE_CHECKING:
    from mha_spec_conformance.fuzzing.call import Call
    from mha_spec_conformance.suite.cases import Case, Suite

FUNCTIONS = ("varlen_attention", "varlen_attention_vjp")


def case_of(suite: Suite, identity: str) -> Case:
    return next(case for case in suite.cases if case.id == identity)


def test_expectations_of_the_fuzzer_are_those_of_the_goldens(suite: Suite) -> None:
    compared = 0
    for case in suite.cases:
        if case.function not in FUNCTIONS or case.expect == "error":
            continue
        dtype = case.dtypes[0]
        call: Any = SimpleNamespace(
            function=case.function, arrays=case.inputs(dtype), options=case.options, dtype=dtype, lse=True
        )
        values, kinds, _ = expect(call)
        for name, golden in case.expected.items():
            wanted = numpy.zeros(golden.values.shape) if golden.kinds is None else golden.kinds
            assert (kinds[name] == wanted).all(), (case.id, name)
            finite = wanted == FINITE
            assert numpy.allclose(values[name][finite], golden.values[finite]), (case.id, name)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", ["packed-positions-run-on", "pages-tail-seen"])
def test_the_fuzzer_finds_a_planted_mistake(name: str) -> None:
    assert name in first_finding(mistaken(name), functions=FUNCTIONS).result.diagnosis


def test_smaller_calls_are_valid(suite: Suite) -> None:
    """The reference accepts each call that a reduction tries, and one of them has fewer elements in each array."""
    for name in ("varlen_attention/all", "varlen_attention_vjp/paged-repeated", "varlen_attention/no-sequences"):
        case = case_of(suite, name)
        arrays, sizes = case.inputs("float32"), set()
        for smaller in smaller_packed(arrays):
            getattr(reference, case.function)(**{"cu_seqlens_kv": None, **smaller}, **case.options)
            sizes |= {label for label, array in smaller.items() if array.size < arrays[label].size}
        unread = {"key", "value"} if name.endswith("no-sequences") else set()
        assert sizes >= {"query", *unread}


def test_a_failure_is_reduced_to_a_block_that_a_sequence_reads_twice(suite: Suite) -> None:
    case = case_of(suite, "varlen_attention_vjp/paged-repeated")
    asker = asker_of(mistaken("pages-gradient-stored"))
    whole = call_of(case.function, "float32", case.inputs("float32"), case.options, lse=False)

    def fails(call: Call) -> bool:
        try:
            return asker.result(call, "smaller").outcome == "fail"
        except MhaSpecError:  # A call without its lengths is not valid.
            return False

    arrays = reduced(whole, fails, LONG).arrays
    assert {label: arrays[label].shape for label in ("query", "block_table", "value")} == {
        "query": (1, 1, 1),
        "block_table": (1, 3),
        "value": (7, 3, 1, 1),
    }
    ((first, second, _),) = arrays["block_table"].tolist()
    assert first == second
    assert arrays["seqused_kv"] > 3


def test_properties_tell_what_the_sequences_share(suite: Suite) -> None:
    case = case_of(suite, "varlen_attention_vjp/paged-shared")
    properties = Properties()(Ask(case, "float32", ("grad_query",)))
    assert properties >= {
        "several sequences",
        "sequences of different lengths",
        "a sequence without queries",
        "a sequence without keys",
        "a query that no sequence has",
        "a block that is used repeatedly",
        "group > 1 and several kv heads",
    }
    alone = Properties()(Ask(case_of(suite, "varlen_attention/one-sequence"), "float32", ("output",)))
    assert not alone & {"several sequences", "a query that no sequence has", "a block that is used repeatedly"}


def test_sizes_of_a_paged_call(suite: Suite) -> None:
    arrays = case_of(suite, "varlen_attention/paged").inputs("float32")
    assert sizes_of(arrays) == {"heads": 4, "kv_heads": 2, "qk_dim": 5, "v_dim": 3}


@pytest.mark.parametrize(
    ("output", "rank", "axes"),
    [
        ("output", 3, ("token", "head", "component")),
        ("lse", 2, ("head", "token")),
        ("grad_key", 3, ("token", "kv head", "component")),
        ("grad_value", 4, ("block", "slot", "kv head", "component")),
        ("grad_sinks", 1, ("head",)),
        ("output", 2, ("axis 0", "axis 1")),
    ],
)
def test_axes_of_packed_outputs_have_names(output: str, rank: int, axes: tuple[str, ...]) -> None:
    assert axes_of(output, rank, "varlen_attention") == axes


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_linear_bias_may_be_rounded(suite: Suite, dtype: str) -> None:
    """The allowance grows by 2 u |B| of each logit, whatever the dtype (MHA-ACC-1)."""
    case = case_of(suite, "varlen_attention/slopes")
    arrays, run = case.inputs(dtype), precision(dtype)
    evaluated = bounds(case.function, arrays, case.options)
    assert isinstance(evaluated, VarlenBounds)
    with_bias = evaluated.allowances(run)["lse"]
    for part in evaluated.parts:
        part.evaluation.linear_bias = 0.0
    without = evaluated.allowances(run)["lse"]
    assert (with_bias >= without).all()
    assert (with_bias > without).any()
    assert numpy.array_equal(with_bias, allowances(case.function, arrays, case.options, run)["lse"])


def test_the_terms_of_a_shared_slot_add_their_errors(suite: Suite) -> None:
    """The sequence before the last reads block 3 three times, the last once, and nothing reads block 0."""
    case = case_of(suite, "varlen_attention_vjp/paged-repeated")
    arrays, run = case.inputs("float32"), precision("float32")
    assert arrays["block_table"][3].tolist() == [3, 3, 3]
    evaluated = bounds(case.function, arrays, case.options)
    assert isinstance(evaluated, VarlenBounds)
    allowed = evaluated.allowances(run)["grad_value"]
    # A slot is the sum of at most four terms, so three additions round.
    terms = [
        part.allowances(run)["grad_value"][0] + 3 * run.u_a * abs(part.values["grad_value"][0])
        for part in evaluated.parts[-2:]
    ]
    (heads, _, size), used = terms[0].shape, terms[1].shape[1]
    added = terms[0].reshape(heads, 3, 3, size).sum(axis=1)
    added[:, :used] += terms[1]
    added = added.swapaxes(0, 1)
    assert (added > 0).all()
    numpy.testing.assert_allclose(allowed[3], added, rtol=1e-12)
    assert (allowed[0] == 0).all()


def test_explain_writes_none_for_an_operand_that_a_call_lacks() -> None:
    text = explain("varlen_attention/paged")
    assert "varlen_attention(query, key, value, cu_seqlens_q, None, block_table=block_table" in text


def test_a_kernel_that_aligns_to_the_lower_right_is_asked_the_cases_of_its_alignment(suite: Suite) -> None:
    """A kernel without q_offset is asked the cases whose offset its alignment implies, others with numbers."""
    words = ("causal", "window", "block_table", "seqused_kv")
    conventions = {"causal_alignment": "lower_right_of_lengths"}
    aligned = Claims("mine", {"varlen_attention": words}, ("float32",), conventions=conventions)
    asked = {ask.case.id.rpartition("/")[2]: ask for ask in asks(suite.cases, aligned, Selection(("varlen*",)))}
    assert {"lower-right", "used", "paged-full", "window", "plain"} <= asked.keys()
    assert asked.keys().isdisjoint({"upper-left", "offsets", "slopes", "sinks", "all"})
    assert "q_offset" not in asked["lower-right"].question().options
    numbers = Claims("mine", {"varlen_attention": (*words, "q_offset")}, ("float32",))
    question = next(ask for ask in asks(suite.cases, numbers, Selection(("varlen_attention/used",)))).question()
    # The sequences have 1, 0, 1, 2 and 3 queries, and 2, 2, 0, 4 and 1 keys in use.
    assert question.arrays["q_offset"].tolist() == [1, 2, -1, 2, -2]
