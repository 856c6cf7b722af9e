"""Whatever a target does with a question becomes an answer."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy
import pytest

from mha_spec import reference
from mha_spec_conformance.asking import worker
from mha_spec_conformance.asking.question import Answer, Question, Raised
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.conversion import same_bits
from mha_spec_conformance.targets.loading import Target


@pytest.fixture
def question() -> Question:
    """Return a question about plain attention, which is repeated and asked in every layout."""
    generator = numpy.random.default_rng(3)
    shapes = {"query": (2, 3, 5, 7), "key": (2, 3, 11, 7), "value": (2, 3, 11, 13)}
    arrays = {name: generator.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}
    return Question(
        "attention/x",
        "attention",
        "float32",
        arrays,
        {},
        ("output",),
        further=("again", "strided", "reversed", "read_only", "negated"),
    )


def asked(function: object, question: Question, supports: object = None, name: str = "attention") -> Answer:
    """Return the answer of a target that consists of this function."""
    return answer(Target({name: function}, Claims("x", {}, ("float32",)), supports), question)


def test_outputs_of_a_right_attention(question: Question) -> None:
    got = asked(reference.attention, question)
    assert got.kind == "returned"
    assert got.outputs["output"].shape == (2, 3, 5, 13)
    assert got.outputs["output"].dtype == numpy.float32
    assert got.written == got.overwritten == ()
    assert got.foreign is None
    assert set(got.further) == {"again", "strided", "reversed", "read_only"}
    assert all(same_bits(further.outputs["output"], got.outputs["output"]) for further in got.further.values())


def test_options_and_arrays_are_keywords(question: Question) -> None:
    mask = numpy.ones((1, 1, 5, 11), dtype=bool)
    asking = replace(question, arrays={**question.arrays, "mask": mask}, options={"scale": 2.0}, further=())
    seen = {}
    asked(lambda query, *_, **options: seen.update(options) or query, asking)
    assert seen["scale"] == 2.0
    assert numpy.array_equal(seen["mask"], mask)


@pytest.mark.parametrize("value", [None, [1.0], 3.0, "text", numpy.array([None])])
def test_result_that_is_not_an_array_is_malformed(question: Question, value: object) -> None:
    got = asked(lambda *_: value, question)
    assert got.kind == "malformed"
    assert "`output` must be an array" in got.reason


def test_tuple_where_one_array_is_asked(question: Question) -> None:
    got = asked(lambda query, *_: (query, query), question)
    assert got.kind == "malformed"
    assert "a tuple of 2" in got.reason


def test_one_array_where_two_are_asked(question: Question) -> None:
    got = asked(
        lambda query, *_, **__: query, replace(question, outputs=("output", "lse"), options={"return_lse": True})
    )
    assert got.kind == "malformed"
    assert "must return (output, lse)" in got.reason


def test_gradients_are_named_and_those_not_asked_for_may_be_missing(question: Question) -> None:
    asking = replace(
        question,
        function="attention_vjp",
        arrays={"grad_output": question.arrays["value"], **question.arrays},
        further=(),
    )
    wanted = replace(asking, outputs=("grad_query", "grad_key", "grad_value"))
    got = asked(lambda _, *operands: operands, wanted, name="attention_vjp")
    assert set(got.outputs) == set(wanted.outputs)
    lacking = asked(
        lambda _, *operands: (*operands, None, None),
        replace(wanted, outputs=("grad_query", "grad_bias")),
        name="attention_vjp",
    )
    assert lacking.kind == "malformed"
    assert "`grad_bias`" in lacking.reason


@pytest.mark.parametrize("layout", ["plain", "again", "strided"])
def test_inputs_written_to_are_named_in_every_call(question: Question, layout: str) -> None:
    calls = iter(["plain", "again", "strided"])

    def writes(query: numpy.ndarray, key: numpy.ndarray, _: numpy.ndarray) -> numpy.ndarray:
        key *= 2 if next(calls) == layout else 1
        return query

    got = asked(writes, replace(question, further=("again", "strided")))
    written = {"plain": got.written} | {name: further.written for name, further in got.further.items()}
    assert written == {name: ("key",) if name == layout else () for name in ("plain", "again", "strided")}


def test_an_input_that_the_library_converted_is_not_written_to(question: Question) -> None:
    jax = pytest.importorskip("jax")
    wide = numpy.full((1, 1, 5, 11), 0.1)
    target = Target({"attention": lambda *operands, **_: operands[2]}, Claims("x", {}, ("float32",), arrays="jax"))
    asking = replace(question, arrays={**question.arrays, "bias": wide}, further=("again",))
    with jax.enable_x64(False):
        got = answer(target, asking)
    assert got.kind == "returned", got.reason
    assert (got.written, got.further["again"].written) == ((), ())


def test_deleted_input_counts_as_written(question: Question) -> None:
    pytest.importorskip("jax")

    def deletes(query: Any, *_: Any) -> Any:
        output = query + 1
        query.delete()
        return output

    target = Target({"attention": deletes}, Claims("x", {}, ("float32",), arrays="jax"), None)
    assert answer(target, replace(question, further=())).written == ("query",)


def test_layout_that_raises_is_distinguished_from_an_unsupported_layout(question: Question) -> None:
    def picky(query: numpy.ndarray, *_: numpy.ndarray) -> numpy.ndarray:
        if not query.flags.writeable:
            raise ValueError("read-only")
        if not query.flags.c_contiguous:
            raise NotImplementedError("strides")
        return query

    got = asked(picky, question)
    kinds = {"again": "returned", "strided": "unsupported", "reversed": "unsupported", "read_only": "raised"}
    assert {name: further.kind for name, further in got.further.items()} == kinds
    assert "ValueError: read-only" in got.further["read_only"].reason
    assert "strides" in got.further["strided"].reason


@pytest.mark.parametrize("buffers", [1, 2, 4])
def test_result_that_a_later_call_overwrites_is_named(question: Question, buffers: int) -> None:
    ring = [numpy.empty(question.arrays["value"].shape, numpy.float32) for _ in range(buffers)]

    def reuses(_query: numpy.ndarray, _key: numpy.ndarray, value: numpy.ndarray) -> numpy.ndarray:
        ring.append(ring.pop(0))
        ring[0][...] = value
        return ring[0]

    assert asked(reuses, question).overwritten == ("output",)
    assert asked(lambda *operands: operands[2].copy(), question).overwritten == ()


def test_exception_has_its_class_message_and_line(question: Question) -> None:
    got = asked(lambda query, *_: query[99], question)
    assert got.kind == "raised"
    assert got.raised.classes[:2] == ("IndexError", "LookupError")
    assert str(got.raised).startswith("IndexError: index 99 is out of bounds")
    assert got.raised.where.startswith(f"{os.path.relpath(__file__)}:")


def test_message_of_an_exception_is_one_line() -> None:
    assert str(Raised(("ValueError", "Exception"), "\nfirst\nsecond", "x.py:3")) == "ValueError: first (x.py:3)"
    assert str(Raised(("ValueError",), "")) == "ValueError"


def test_system_exit_is_an_error(question: Question) -> None:
    def leaves(*_: object) -> None:
        raise SystemExit(3)

    assert asked(leaves, question).raised.classes[0] == "SystemExit"


def test_not_implemented_is_unsupported(question: Question) -> None:
    def refuses(*_: object) -> None:
        raise NotImplementedError("only heads of size 64")

    got = asked(refuses, question)
    assert (got.kind, got.reason) == ("unsupported", "only heads of size 64")


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("no bfloat16", "no bfloat16"),
        (False, "supports(question) returned False"),
        (numpy.False_, "supports(question) returned False"),
        (numpy.array(False), "supports(question) returned False"),
        (1, "supports(question) returned 1"),
        (numpy.array([True]), "supports(question) returned array([ True])"),
    ],
)
def test_supports_is_called_first(question: Question, returned: object, reason: str) -> None:
    got = asked(
        lambda *_: pytest.fail("was called"),
        question,
        supports=lambda question: returned if question.shapes["query"][3] == 7 else True,
    )
    assert (got.kind, got.reason) == ("unsupported", reason)


@pytest.mark.parametrize("returned", [True, numpy.True_, numpy.array(True)])
def test_supports_may_return_any_bool(question: Question, returned: object) -> None:
    assert asked(reference.attention, question, supports=lambda _: returned).kind == "returned"


def test_array_of_another_library_is_reported(question: Question) -> None:
    torch = pytest.importorskip("torch")
    assert asked(lambda *_: torch.zeros(3), question).foreign == "torch"


@pytest.mark.parametrize("dtype", ["complex128", "longdouble"])
def test_results_of_any_width_are_returned(question: Question, dtype: str) -> None:
    got = asked(lambda *operands: numpy.asarray(reference.attention(*operands)).astype(dtype), question)
    assert got.kind == "returned"
    assert got.outputs["output"].dtype == dtype


def test_fault_of_the_suite_is_not_blamed_on_the_target(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> bool:
        raise KeyError("suite")

    monkeypatch.setattr(worker, "same_bits", fault)
    with pytest.raises(KeyError, match="suite"):
        asked(reference.attention, question)
