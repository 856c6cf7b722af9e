"""The protocol between the runner and a target: messages fit the schema, and reading raises ProtocolError alone."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_fuzz import Fuzzer

from mha_spec import reference
from mha_spec_conformance.asking import files, protocol
from mha_spec_conformance.asking.protocol import (
    ProtocolError,
    answer_from,
    answer_message,
    claims_from,
    claims_message,
    hello_message,
    line_of,
    message_from,
    question_from,
    question_message,
)
from mha_spec_conformance.asking.question import FURTHER, Answer, Further, Question, Raised
from mha_spec_conformance.asking.selection import Ask, Selection
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.running.runner import Settings, run
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.conversion import same_bits
from mha_spec_conformance.targets.loading import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec_conformance.suite.cases import Suite

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "protocol.schema.json").read_text())
CLAIMS = Claims("x", {"attention": ("mask", "causal")}, ("float64", "float32"), further=FURTHER)
ARRAYS = {
    "query": numpy.arange(6, dtype=numpy.float32).reshape(1, 2, 3, 1),
    "bits": numpy.array([True, False]),
    "half": numpy.zeros((2, 0, 3), ml_dtypes.bfloat16),
    "big": numpy.array([1.5], ">f8"),
    "scalar": numpy.array(7, numpy.uint64),
}
OPTIONS = {"scale": float("inf"), "window": (1, None), "rotary": {"base": 5.0}, "q_offset": numpy.int32(3), "n": 10**30}
QUESTION = Question("a/b", "attention", "float32", ARRAYS, OPTIONS, ("output",), ("core",), further=FURTHER)
RETURNED = Answer(
    "returned",
    {"output": numpy.ones((2, 3), numpy.float32)},
    written=("query",),
    further={"again": Further("returned", {"output": numpy.zeros(2)}), "strided": Further("raised", reason="no")},
    foreign="torch",
    seconds=0.5,
    overwritten=("output",),
)
RAISED = Answer("raised", reason="no", raised=Raised(("ValueError", "Exception"), "no\nmore", "x.py:3"))


def check(message: dict[str, Any]) -> dict[str, Any]:
    """Read a message as it is written, and check it against the schema."""
    jsonschema = pytest.importorskip("jsonschema")
    read = message_from(line_of(message).rstrip(b"\n"))
    jsonschema.validate(read, SCHEMA)
    return read


def test_messages_fit_the_schema(tmp_path: Path) -> None:
    check(hello_message())
    check(claims_message(CLAIMS))
    check({"message": "refusal", "reason": "not today"})
    check(question_message(QUESTION, 7, tmp_path, FURTHER))
    check(answer_message(RETURNED, 7, tmp_path / "7.answer", 2**20))
    check(answer_message(RAISED, 7, tmp_path / "7.answer", 2**20))


def test_question_arrives_as_it_was_asked(tmp_path: Path) -> None:
    files.write(tmp_path / "7.question", ARRAYS)
    message = check(question_message(QUESTION, 7, tmp_path, FURTHER))
    got = question_from(message, files.read(Path(message["arrays"]), 2**20))
    assert {name: (array.dtype.name, array.shape) for name, array in got.arrays.items()} == {
        name: (array.dtype.name, array.shape) for name, array in ARRAYS.items()
    }
    assert same_bits(got.arrays["query"], ARRAYS["query"])
    assert got.arrays["big"].tolist() == [1.5]
    assert got.options == OPTIONS
    assert (got.id, got.function, got.outputs, got.further) == ("a/b", "attention", ("output",), FURTHER)


def test_answer_arrives_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "7.answer"
    got = answer_from(check(answer_message(RETURNED, 7, path, 2**20)), QUESTION, path)
    assert (got.kind, got.written, got.seconds) == ("returned", ("query",), 0.5)
    assert (got.foreign, got.overwritten) == ("torch", ("output",))
    assert same_bits(got.outputs["output"], RETURNED.outputs["output"])
    assert {name: further.kind for name, further in got.further.items()} == {"again": "returned", "strided": "raised"}
    got = answer_from(check(answer_message(RAISED, 7, path, 2**20)), QUESTION, path)
    assert got.raised == RAISED.raised


@pytest.mark.parametrize(
    ("array", "dtype"),
    [(numpy.zeros(3, complex), "complex128"), (numpy.broadcast_to(numpy.float32(1), (2**45,)), "float32")],
)
def test_output_that_no_file_holds_is_described(tmp_path: Path, array: numpy.ndarray, dtype: str) -> None:
    path = tmp_path / "7.answer"
    message = check(answer_message(Answer("returned", {"output": array}), 7, path, 2**20))
    output = answer_from(message, QUESTION, path).outputs["output"]
    assert (output.shape, output.dtype.name) == (array.shape, dtype)


@pytest.mark.parametrize("dtype", ["(,)f4", "(2,)f4", "f4,i4", None, 7, ["f4"], {"names": []}, "O", "T", "a", "void"])
def test_output_whose_dtype_is_not_a_name_of_numbers_is_malformed(tmp_path: Path, dtype: object) -> None:
    message = answer_message(Answer("returned", {"output": numpy.zeros(3, complex)}), 7, tmp_path / "7.answer", 2**20)
    message["described"] = {"output": {"shape": [3], "dtype": dtype}}
    assert answer_from(message, QUESTION, tmp_path / "7.answer").kind == "malformed"


@pytest.mark.parametrize("kind", ["raised", "unsupported", "malformed"])
@pytest.mark.parametrize("reason", [{}, {"reason": None}])
def test_answer_without_a_reason_says_so(tmp_path: Path, kind: str, reason: dict[str, None]) -> None:
    message = {"message": "answer", "number": 7, "kind": kind, "foreign": None} | reason
    assert answer_from(message, QUESTION, tmp_path / "7.answer").reason == "it gives no reason"


@pytest.mark.parametrize(
    "seconds", [pytest.param(10**400, id="huge"), float("inf"), float("nan"), -1, True, "1", None, [1]]
)
def test_time_that_is_not_a_number_of_seconds_is_refused(tmp_path: Path, seconds: object) -> None:
    message = answer_message(RETURNED, 7, tmp_path / "7.answer", 2**20) | {"seconds": seconds}
    with pytest.raises(ProtocolError, match="not an answer"):
        answer_from(message, QUESTION, tmp_path / "7.answer")


def test_line_has_a_limit() -> None:
    message_from(b'{"message": "a"}'.ljust(2**20))
    with pytest.raises(ProtocolError, match="more than 1048576 bytes"):
        message_from(b'{"message": "a"}'.ljust(2**20 + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtypes": ["float8"]}, "`dtypes` must be one of"),
        ({"dtypes": []}, "`dtypes` must be a list"),
        ({"functions": {"attend": []}}, "`functions` must be one of"),
        ({"functions": {"attention": "mask"}}, "`functions` must map"),
        ({"profile": None}, "`profile` must be one of"),
        ({"conventions": {"lse_base": "2"}}, "may declare only causal_alignment"),
        ({"protocol": "mha-spec-protocol/9"}, "must reply to hello"),
        ({"message": "refusal", "reason": "no\x1b[2J GPU"}, r"no\\x1b\[2J GPU"),
    ],
)
def test_wrong_claims_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        claims_from({**claims_message(CLAIMS), **changes}, "x", trusted=False)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("trusted", "value", "expected"), [(True, True, True), (False, True, False), (True, 1, False)])
def test_only_a_trusted_program_calls_itself_a_backend(trusted: bool, value: object, expected: bool) -> None:
    claims = claims_from({**claims_message(CLAIMS), "registered": value}, "x", trusted=trusted)
    assert claims.registered is expected


@pytest.mark.parametrize(
    ("registered", "answer", "outcome", "clause", "reason"),
    [
        (False, {}, "pass", "", "None"),
        (False, {"overwritten": ("output",)}, "fail", "MHA-PURE-4", "a later call overwrote its result output"),
        (False, {"foreign": "torch"}, "pass", "", "None"),
        (True, {"foreign": "torch"}, "fail", "", "an output is an array of torch, but the inputs are arrays of numpy"),
    ],
)
def test_members_of_an_answer_decide_its_outcome(
    suite: Suite, registered: bool, answer: dict[str, Any], outcome: str, clause: str, reason: str
) -> None:
    case = next(case for case in suite.cases if case.id == "attention/smoke/plain")
    outputs = {"output": numpy.asarray(reference.attention(**case.inputs("float32")))}
    judge = Judge(replace(CLAIMS, registered=registered))
    result = judge.result(Ask(case, "float32", ("output",)), Answer("returned", outputs, **answer))
    assert (result.outcome, str(result.reason)) == (outcome, reason)
    assert not clause or result.clauses == (clause,)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["output", "again"]),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "shape", "dtype", "output", "again", "written"]), values, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.fixed_dictionaries(
    {"message": st.just("answer"), "number": st.just(7), "kind": st.sampled_from(["returned", "raised", "x"])},
    optional=dict.fromkeys(
        ("seconds", "reason", "raised", "written", "foreign", "described", "further", "overwritten"), JSON
    ),
)


@settings(max_examples=300, deadline=None)
@given(message=MESSAGES, data=st.binary(max_size=60) | st.none())
def test_every_answer_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, message: dict[str, Any], data: bytes | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.answer"
    files.write(path, RETURNED.outputs)
    if data is not None:
        path.write_bytes(data)
    with suppress(ProtocolError):
        assert (answer_from(message, QUESTION, path).reason or "").isprintable()


def test_damaged_messages_and_files_raise_only_errors_of_the_protocol(tmp_path: Path) -> None:
    counts = Fuzzer(0, tmp_path).read(1500)
    assert min(counts[outcome] for outcome in ("answer: returned", "claims: read", "file: read", "number: read")) > 10


def test_damaged_messages_find_a_reader_that_does_not_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_is_names", lambda _: True)
    with pytest.raises((AttributeError, TypeError, KeyError)):
        Fuzzer(0, tmp_path).read(1500)


@settings(max_examples=300, deadline=None)
@given(line=st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_every_line_and_all_claims_are_read_or_refused(line: bytes) -> None:
    with suppress(ProtocolError, TargetError):
        claims_from({**message_from(line), "protocol": "mha-spec-protocol/1"}, "x", trusted=False)


PROGRAM = """
import json, os, sys
from pathlib import Path
import numpy
from safetensors.numpy import load_file, save_file

print(json.dumps({{"message": "claims", "protocol": json.loads(input())["protocol"], "registered": True,
                  "functions": {{"attention": ["scale"]}}, "dtypes": ["float32"]}}), flush=True)
asked = set()
for line in sys.stdin:
    question = json.loads(line)
    number = question["number"]
    is_new = number not in asked
    asked.add(number)
    answer = {{"message": "answer", "number": number, "kind": "returned"}}
    if is_new:
        {first}
    a = load_file(question["arrays"])
    key, value = (numpy.repeat(a[n], a["query"].shape[1] // a[n].shape[1], 1) for n in ("key", "value"))
    scores = a["query"] @ key.swapaxes(2, 3) * question["options"].get("scale", a["query"].shape[3] ** -0.5)
    weights = numpy.exp(scores - scores.max(3, keepdims=True))
    output = numpy.ascontiguousarray(weights / weights.sum(3, keepdims=True) @ value)
    save_file({{"output": output.astype(numpy.float32)}}, question["answer"])
    {then}
    print(json.dumps(answer), flush=True)
"""
SAY_LOST = "print(json.dumps(answer | {'kind': 'lost', 'reason': 'no file'}), flush=True); continue"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, ...]]:
    """Write a program that does `first` when a question arrives the first time, and `then` after each call."""
    from mha_spec_conformance.running import runner

    monkeypatch.setattr(runner, "try_smoke_cases", lambda *_: ())

    def command(first: str = "pass", then: str = "pass") -> tuple[str, ...]:
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.format(first=first, then=then))
        return sys.executable, "-P", str(path)

    return command


SELECTION = Selection(("attention/smoke/plain", "attention/smoke/head-layout"), ("float32",))


@pytest.mark.parametrize(
    ("first", "then", "outcome", "reason"),
    [
        ("pass", "pass", "pass", "None"),
        ("pass", "answer['kind'] = 'unsupported'", "unsupported", "it gives no reason"),
        ("pass", "print('debug', flush=True)", "crash", "the process wrote a line that is not JSON: debug"),
        ("pass", "sys.exit(3)", "crash", "the process ended with exit status 3"),
        ("pass", "Path(question['answer']).unlink()", "fail", "cannot be read: No such file or directory"),
        ("pass", "is_new and Path(question['answer']).unlink()", "pass", "None"),
        ("pass", "answer['overwritten'] = ['output']", "fail", "a later call overwrote its result output"),
        ("pass", "answer['written'] = ['key', 'x']", "fail", "the call wrote to its input key"),
        ("pass", "answer['foreign'] = 'torch'", "pass", "None"),
        (SAY_LOST, "pass", "pass", "None"),
        ("Path(question['arrays']).unlink(); " + SAY_LOST, "pass", "pass", "None"),
        ("Path(question['arrays']).write_bytes(b''); " + SAY_LOST, "pass", "pass", "None"),
        ("pass", "answer |= {'kind': 'lost', 'reason': 'no file'}", "internal", "no file"),
    ],
)
def test_program_that_is_not_a_module_is_asked(
    command: Callable[..., tuple[str, ...]], suite: Suite, first: str, then: str, outcome: str, reason: str
) -> None:
    done = run("program", suite, Settings(SELECTION, command=command(first, then)))
    assert {(result.outcome, str(result.reason)) for result in done.results} == {(outcome, reason)}
    assert len(done.results) == 2
    assert not done.claims.registered


def test_question_that_is_lost_twice_is_a_fault_of_the_suite(
    command: Callable[..., tuple[str, ...]], suite: Suite
) -> None:
    program = command(SAY_LOST, "if question['id'].endswith('plain'): answer |= {'kind': 'lost', 'reason': 'no file'}")
    done = run("program", suite, Settings(SELECTION, command=program))
    assert {result.ask.case.id.rpartition("/")[2]: result.outcome for result in done.results} == {
        "plain": "internal",
        "head-layout": "pass",
    }
    assert done.status == 2
