"""The attentions in other languages are built, judged by the suite, and asked wrong and damaged questions."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy
import pytest
from safetensors.numpy import save

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.protocol import claims_from
from mha_spec_conformance.asking.question import Question
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.running.offline import export, verify
from mha_spec_conformance.running.runner import Settings, judge_all
from mha_spec_conformance.targets.conversion import same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mha_spec_conformance.asking.question import Answer
    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

    Arrays = dict[str, numpy.ndarray]
    Build = Callable[..., list[str]]

EXAMPLES = Path(__file__).parents[1] / "examples"
HELLO = {"message": "hello", "protocol": "mha-spec-protocol/1", "spec_version": "1.1"}

STRICT = ("-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-O2")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Language:
    """A language: its tool, the dtypes that the example claims, and how a program is built with it, if it is.

    The cases are asked in the dtypes `asked`, by default in all; dtypes of a slow program differ only in rounding.
    """

    tool: str
    dtypes: tuple[str, ...]
    source: Path
    compile: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


LANGUAGES = {
    "c": Language(
        "gcc",
        ("float64", "float32", "float16", "bfloat16"),
        EXAMPLES / "c" / "attention.c",
        (*STRICT, str(EXAMPLES / "c" / "protocol.c")),
        ("-lm",),
    ),
    "javascript": Language(
        "node", ("float64", "float32"), EXAMPLES / "javascript" / "attention.mjs", asked=("float32",)
    ),
    "rust": Language(
        "rustc",
        ("float64", "float32"),
        EXAMPLES / "rust" / "attention.rs",
        ("--edition", "2021", "-O", "-D", "warnings"),
    ),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build the program of a language, with further options of the compiler, and return the command that runs it."""
    programs: dict[tuple[str, ...], list[str]] = {}

    def build(name: str, *options: str) -> list[str]:
        language = LANGUAGES[name]
        if (tool := shutil.which(language.tool)) is None:
            pytest.skip(f"{language.tool} is not installed")
        if not language.compile:
            return [tool, str(language.source)]
        if (name, *options) not in programs:
            program = str(tmp_path_factory.mktemp(name) / "attention")
            command = [tool, *language.compile, *options, "-o", program, str(language.source), *language.libraries]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            programs[name, *options] = [program]
        return programs[name, *options]

    return build


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


def judged(command: list[str], suite: Suite, *only: str, dtypes: tuple[str, ...] = ()) -> Run:
    """Judge the program that the command runs."""
    with Pool("attention", command=command) as pool:
        return judge_all(pool, Judge(pool.claims), suite, Settings(Selection(only, dtypes)))


def test_program_conforms_on_all_that_it_claims(language: str, build: Build, suite: Suite) -> None:
    done = judged(build(language), suite, dtypes=LANGUAGES[language].asked)
    assert done.verdict.startswith("conformant on " if not LANGUAGES[language].asked else "partial run: ")
    assert done.status == 0
    assert done.claims.dtypes == LANGUAGES[language].dtypes
    assert done.summary["unsupported"] == 0
    assert {"mask", "bias", "causal", "offset", "window", "segments", "softcap", "sinks", "dropout", "lse"} <= set(
        done.asked_features
    )


def test_planted_shift_of_the_causal_diagonal_is_diagnosed(build: Build, suite: Suite) -> None:
    done = judged(build("c", "-DCAUSAL_SHIFT=1"), suite, "attention/causal*", dtypes=("float32",))
    assert done.status == 1
    assert "causal-shows-the-next" in {name for result in done.failures for name in result.diagnosis}


def test_program_answers_an_exported_folder(language: str, build: Build, suite: Suite, tmp_path: Path) -> None:
    (claimed,) = replies(build(language), HELLO)
    claims = claims_from(claimed, language, trusted=False)
    export(tmp_path / "export", claims, suite, Selection(("attention/causal+mask/",), ("float32",)))
    answers = replies(build(language), *questions_in(tmp_path / "export"), folder=tmp_path / "export")
    (tmp_path / "export" / "answers.jsonl").write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))
    done = verify(tmp_path / "export", suite, Settings())
    assert done.status == 0
    assert done.notes == ()


def questions_in(folder: Path) -> list[str]:
    return (folder / "questions.jsonl").read_text().splitlines()


@pytest.fixture
def ask(language: str, build: Build) -> Iterator[Callable[..., Answer]]:
    """Ask the program for a plain call with some of its arrays and options replaced."""
    with Pool("attention", command=build(language)) as pool:

        def ask(arrays: Arrays, options: dict[str, object], function: str = "attention") -> Answer:
            question = Question("x", function, "float32", OPERANDS | arrays, options, ("output",))
            ((_, answer),) = pool.answers([question])
            return answer

        yield ask


def zeros(*shape: int, dtype: str = "float32") -> numpy.ndarray:
    return numpy.zeros(shape, dtype)


OPERANDS = {"query": zeros(2, 6, 5, 7), "key": zeros(2, 3, 11, 7), "value": zeros(2, 3, 11, 13)}

WRONG = {
    "rank": ({"query": zeros(2, 6, 7)}, {}, "query"),
    "batch": ({"key": zeros(1, 3, 11, 7)}, {}, "key"),
    "qk_dim": ({"key": zeros(2, 3, 11, 8)}, {}, "key"),
    "kv_len": ({"value": zeros(2, 3, 10, 13)}, {}, "value"),
    "heads of 0": ({"query": zeros(2, 0, 5, 7)}, {}, "query"),
    "multiple": ({"query": zeros(2, 5, 5, 7)}, {}, "heads"),
    "dtype": ({"value": zeros(2, 3, 11, 13, dtype="float64")}, {}, "value"),
    "mask of numbers": ({"mask": zeros(1, 1, 5, 11)}, {}, "mask"),
    "mask of rank 2": ({"mask": zeros(5, 11, dtype="bool")}, {}, "mask"),
    "bias of booleans": ({"bias": zeros(1, 1, 5, 11, dtype="bool")}, {}, "bias"),
    "bias that does not broadcast": ({"bias": zeros(1, 4, 5, 11)}, {}, "bias"),
    "bias of integers": ({"bias": zeros(1, 1, 5, 11, dtype="int32")}, {}, "bias"),
    "sinks of another length": ({"sinks": zeros(3)}, {}, "sinks"),
    "sinks of rank 2": ({"sinks": zeros(6, 1)}, {}, "sinks"),
    "sinks of integers": ({"sinks": zeros(6, dtype="int32")}, {}, "sinks"),
    "sinks of booleans": ({"sinks": zeros(6, dtype="bool")}, {}, "sinks"),
    "length beyond the buffer": ({"kv_lengths": numpy.array([3, 12])}, {}, "kv_lengths"),
    "negative length": ({"q_lengths": numpy.array([-1, 2])}, {}, "q_lengths"),
    "lengths of another batch": ({"q_lengths": numpy.array([1, 2, 3])}, {}, "q_lengths"),
    "floating lengths": ({"q_lengths": zeros(2)}, {}, "q_lengths"),
    "one of two segments": ({"q_segment_ids": zeros(2, 5, dtype="int32")}, {}, "q_segment_ids"),
    "causal without an offset": ({}, {"causal": True}, "q_offset"),
    "reading": ({}, {"causal": True, "q_offset": "lower_left"}, "q_offset"),
    "causal as a number": ({}, {"causal": 1, "q_offset": 0}, "causal"),
    "offset of 2^31": ({}, {"q_offset": 2**31}, "q_offset"),
    "offsets of 2^64 - 1": ({"q_offset": numpy.array([0, 2**64 - 1], numpy.uint64)}, {}, "q_offset"),
    "offset as a boolean": ({}, {"q_offset": True}, "q_offset"),
    "window of one": ({}, {"window": [3]}, "window"),
    "negative window": ({}, {"window": [-1, None], "q_offset": 0}, "window"),
    "window as a string": ({}, {"window": "ab", "q_offset": 0}, "window"),
    "window of strings": ({}, {"window": ["a", "b"], "q_offset": 0}, "window"),
    "window of booleans": ({}, {"window": [True, False], "q_offset": 0}, "window"),
    "window without an end": ({}, {"window": [float("inf"), None], "q_offset": 0}, "window"),
    "infinite scale": ({}, {"scale": float("inf")}, "scale"),
    "scale as a boolean": ({}, {"scale": True}, "scale"),
    "scale as a string": ({}, {"scale": "1"}, "scale"),
    "scale as an unknown number": ({}, {"scale": {"number": "one"}}, "scale"),
    "softcap as a boolean": ({}, {"softcap": True}, "softcap"),
    "rate as a string": ({"dropout_mask": zeros(1, 1, 1, 1, dtype="bool")}, {"dropout_rate": "0"}, "dropout_rate"),
    "scale beyond float32": ({}, {"scale": 1e39}, "scale"),
    "softcap": ({}, {"softcap": 0.0}, "softcap"),
    "softcap below the normal numbers": ({}, {"softcap": 1e-39}, "softcap"),
    "rate": ({"dropout_mask": zeros(1, 1, 1, 1, dtype="bool")}, {"dropout_rate": 1.0}, "dropout_rate"),
}


def words_of(answer: Answer) -> list[str]:
    """Return the names in a reason, as in "`name` must" or "name=value"."""
    return re.findall(r"\w+(?=[`=])", str(answer.reason))


def test_wrong_argument_is_named(ask: Callable[..., Answer]) -> None:
    assert ask({}, {}).kind == "returned"
    answers = {case: ask(arrays, options) for case, (arrays, options, _) in WRONG.items()}
    assert {case: answer.kind for case, answer in answers.items()} == dict.fromkeys(WRONG, "raised")
    assert [case for case, (_, _, name) in WRONG.items() if name not in words_of(answers[case])] == []
    assert [case for case, answer in answers.items() if ",))" in str(answer.reason)] == []


def test_option_that_is_null_has_its_default(ask: Callable[..., Answer]) -> None:
    query = numpy.random.default_rng(3).standard_normal((2, 6, 5, 7)).astype(numpy.float32)
    value = numpy.random.default_rng(5).standard_normal((2, 3, 11, 13)).astype(numpy.float32)
    arrays = {"query": query, "key": value[..., :7].copy(), "value": value}
    plain = ask(arrays, {})
    for name in ("causal", "q_offset", "window", "scale", "softcap", "dropout_rate"):
        answer = ask(arrays, {name: None})
        assert (name, answer.kind) == (name, "returned")
        assert same_bits(answer.outputs["output"], plain.outputs["output"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arrays_of_16_bits_are_read_or_refused(language: str, ask: Callable[..., Answer], dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    for arrays in ({"sinks": numpy.zeros(6, kind)}, {"bias": numpy.zeros((1, 1, 5, 11), kind)}):
        answer = ask(arrays, {})
        if dtype in LANGUAGES[language].dtypes:
            assert answer.kind == "returned"
        else:
            assert (answer.kind, "F16" in str(answer.reason)) == ("unsupported", True)


def test_missing_function_and_drawn_dropout_are_unsupported(ask: Callable[..., Answer]) -> None:
    assert {ask({}, {}, name).kind for name in ("attention_weights", "toString")} == {"unsupported"}
    assert ask({}, {"dropout_rate": 0.5}).kind == "unsupported"


def replies(command: list[str], *lines: str | dict[str, object], folder: Path | None = None) -> list[dict[str, object]]:
    """Return the messages of a program that receives these lines and then the end of its input."""
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_another_protocol_is_refused(language: str, build: Build) -> None:
    (reply,) = replies(build(language), HELLO | {"protocol": "mha-spec-protocol/2"})
    assert reply["message"] == "refusal"


def question(number: int, **changes: object) -> dict[str, object]:
    """Return the message of a question whose files lie in the working directory."""
    message = {"message": "question", "number": number, "id": "x", "function": "attention", "dtype": "float32"}
    files = {"arrays": f"{number}.question", "answer": f"{number}.answer", "most_bytes": 10**6}
    return message | files | {"options": {}, "outputs": ["output"]} | changes


def test_paths_and_strings_with_escapes_are_read(language: str, build: Build, tmp_path: Path) -> None:
    name = 'a "\\\n\t\x7f\x80é\u07ff\u0800€\u2028\uffff😀\U0010ffff'
    (tmp_path / name).write_bytes(save(OPERANDS))
    asked = question(1, arrays=name, answer=f"{name}.answer", unknown={"a": [1, {"b": None}, -1.5e-3, "\u0001"]})
    for line in (json.dumps(asked), json.dumps(asked, ensure_ascii=False)):
        assert [reply["kind"] for reply in replies(build(language), line, folder=tmp_path)] == ["returned"]
    assert (tmp_path / f"{name}.answer").exists()


def damaged(drawn: random.Random, data: bytes) -> bytes:
    """Change some bytes in the header of a file, or cut it."""
    damaged = bytearray(data)
    for _ in range(drawn.randint(1, 3)):
        damaged[drawn.randrange(400)] = drawn.choice(b'\0\xff019"{}[],:FUI')
    return bytes(damaged[: drawn.choice([None, None, drawn.randrange(len(data))])])


@pytest.mark.parametrize("options", [(), SANITIZERS], ids=["plain", "sanitizers"])
def test_damaged_files_are_lost_and_every_question_has_an_answer(
    language: str, options: tuple[str, ...], build: Build, tmp_path: Path
) -> None:
    if options and language != "c":
        pytest.skip("the sanitizers are those of the C compiler")
    drawn = random.Random(3)
    arrays = OPERANDS | {"mask": zeros(1, 1, 5, 11, dtype="bool"), "kv_lengths": numpy.array([3, 11])}
    for number in range(300):
        (tmp_path / f"{number}.question").write_bytes(damaged(drawn, save(arrays)))
    answers = replies(build(language, *options), HELLO, *map(question, range(300)), folder=tmp_path)[1:]
    assert [answer["number"] for answer in answers] == list(range(300))
    kinds = [answer["kind"] for answer in answers]
    assert kinds.count("lost") > 100
    assert set(kinds) <= {"lost", "raised", "returned", "unsupported"}


def entry(**changes: object) -> bytes:
    """Write a file with the operands, in which the entry of the query has other members."""
    data = save(OPERANDS)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["query"] |= changes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


DAMAGED = {
    "nothing": b"",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header that is a list": (2).to_bytes(8, "little") + b"[]",
    "negative lengths": entry(shape=[-2, -6, 5, 7]),
    "a length that is not an integer": entry(shape=[0.5, 120, 1, 7]),
    "a length in words": entry(shape=["2", 6, 5, 7]),
    "too many elements": entry(shape=[2**62, 2**62, 2**62, 2**62]),
    "too few elements": entry(shape=[2, 6, 5, 6]),
    "no shape": entry(shape=None),
    "offsets in the other order": entry(data_offsets=[1680, 0]),
    "offsets beyond the file": entry(data_offsets=[2**50, 2**50 + 1680]),
    "one offset": entry(data_offsets=[0]),
}


def test_file_that_is_damaged_is_lost(language: str, build: Build, tmp_path: Path) -> None:
    assert entry() != entry(shape=None)
    for number, data in enumerate((entry(), *DAMAGED.values())):
        (tmp_path / f"{number}.question").write_bytes(data)
    count = len(DAMAGED) + 1
    first, *answers = replies(build(language), *map(question, range(count)), question(count), folder=tmp_path)
    assert first["kind"] == "returned"
    kinds = {name: answer["kind"] for name, answer in zip([*DAMAGED, "no file"], answers, strict=True)}
    assert kinds == dict.fromkeys([*DAMAGED, "no file"], "lost")


LINES = ("", "{", "[1, 2]", "nul", "null", "7", "[" * 1000, "{}", '{"message": 7}', '{"message": "answer"}')


def test_line_that_is_not_a_message_ends_the_program(language: str, build: Build, tmp_path: Path) -> None:
    (tmp_path / "1.question").write_bytes(save(OPERANDS))
    whole = question(1)
    incomplete = [json.dumps({key: value for key, value in whole.items() if key != name}) for name in REQUIRED]
    for line in (*LINES, *incomplete, json.dumps(whole | {"number": -1}), json.dumps(whole | {"options": []})):
        text = f"{line}\n{json.dumps(HELLO)}\n"
        done = subprocess.run(
            build(language), input=text, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
        )
        assert (line, done.returncode, done.stdout) == (line, 1, "")
        assert done.stderr == "standard input has a line that is not a message of mha-spec-protocol/1\n"


REQUIRED = ("number", "function", "arrays", "options", "outputs", "answer")
"""The members without which no example answers a question."""

IN_CPP = """
#include <chrono>
#include <thread>
#include "protocol.h"

static void answer_to(const Question *question, Answer *answer) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    refuse(answer, UNSUPPORTED, "%s is slow", question->function);
}

int main() { return answer_questions("{}", answer_to); }
"""


def test_code_in_cpp_calls_the_reader_in_c_and_the_time_is_that_of_the_call(tmp_path: Path) -> None:
    if not (shutil.which("gcc") and shutil.which("g++")):
        pytest.skip("the compilers of C and C++ are not installed")
    (tmp_path / "slow.cpp").write_text(IN_CPP)
    (tmp_path / "1.question").write_bytes(save(OPERANDS))
    program, reader = str(tmp_path / "slow"), str(tmp_path / "protocol.o")
    for command in (
        ["gcc", *STRICT, "-c", "-o", reader, str(EXAMPLES / "c" / "protocol.c")],
        ["g++", "-Wall", "-Wextra", "-Werror", f"-I{EXAMPLES / 'c'}", "-o", program, "slow.cpp", reader, "-lm"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    (answer,) = replies([program], question(1), folder=tmp_path)
    assert (answer["kind"], answer["reason"]) == ("unsupported", "attention is slow")
    assert answer["seconds"] >= 0.02  # the time of the processor is 0
