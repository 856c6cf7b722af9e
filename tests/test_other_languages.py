"""The attentions in other languages are built, judged by the suite, and asked wrong and damaged questions."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mha_spec_conformance.asking.question import Answer
    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

    Arrays = dict[str, numpy.ndarray]
    Build = Callable[..., list[str]]

EXAMPLES = Path(__file__).parents[1] / "examples"
HELLO = {"message": "hello", "protocol": "mha-spec-protocol/1", "spec_version": "1.1", "folder": "."}

STRICT = ("-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-O2")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Language:
    """A language: its tool, the dtypes that the example claims, and how a program is built with it, if it is."""

    tool: str
    dtypes: tuple[str, ...]
    source: Path
    compile: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


LANGUAGES = {
    "c": Language(
        "gcc",
        ("float64", "float32", "float16", "bfloat16"),
        EXAMPLES / "c" / "attention.c",
        (*STRICT, str(EXAMPLES / "c" / "protocol.c")),
        ("-lm",),
    ),
    "javascript": Language("node", ("float64", "float32"), EXAMPLES / "javascript" / "attention.mjs"),
    "rust": Language(
        "rustc",
        ("float64", "float32"),
        EXAMPLES / "rust" / "attention.rs",
        ("--edition", "2021", "-O", "-D", "warnings"),
    ),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build the program of a language, with further options of the compiler, and give the command that runs it."""
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
    done = judged(build(language), suite)
    assert done.verdict.startswith("conformant on ")
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
    "sinks": ({"sinks": zeros(3)}, {}, "sinks"),
    "length beyond the buffer": ({"kv_lengths": numpy.array([3, 12])}, {}, "kv_lengths"),
    "negative length": ({"q_lengths": numpy.array([-1, 2])}, {}, "q_lengths"),
    "lengths of another batch": ({"q_lengths": numpy.array([1, 2, 3])}, {}, "q_lengths"),
    "floating lengths": ({"q_lengths": zeros(2)}, {}, "q_lengths"),
    "one of two segments": ({"q_segment_ids": zeros(2, 5, dtype="int32")}, {}, "q_segment_ids"),
    "causal without an offset": ({}, {"causal": True}, "q_offset"),
    "reading": ({}, {"causal": True, "q_offset": "lower_left"}, "q_offset"),
    "offset of 2^31": ({}, {"q_offset": 2**31}, "q_offset"),
    "window of one": ({}, {"window": [3]}, "window"),
    "negative window": ({}, {"window": [-1, None], "q_offset": 0}, "window"),
    "scale": ({}, {"scale": float("inf")}, "scale"),
    "scale beyond float32": ({}, {"scale": 1e39}, "scale"),
    "softcap": ({}, {"softcap": 0.0}, "softcap"),
    "softcap below the normal numbers": ({}, {"softcap": 1e-39}, "softcap"),
    "rate": ({"dropout_mask": zeros(1, 1, 1, 1, dtype="bool")}, {"dropout_rate": 1.0}, "dropout_rate"),
}


def test_wrong_argument_is_named(ask: Callable[..., Answer]) -> None:
    assert ask({}, {}).kind == "returned"
    answers = {case: ask(arrays, options) for case, (arrays, options, _) in WRONG.items()}
    assert {case: answer.kind for case, answer in answers.items()} == dict.fromkeys(WRONG, "raised")
    assert [case for case, (_, _, name) in WRONG.items() if name not in str(answers[case].reason)] == []


def test_missing_function_and_drawn_dropout_are_unsupported(ask: Callable[..., Answer]) -> None:
    assert ask({}, {}, "attention_weights").kind == "unsupported"
    assert ask({}, {"dropout_rate": 0.5}).kind == "unsupported"


def replies(command: list[str], *lines: str | dict[str, object], folder: Path | None = None) -> list[dict[str, object]]:
    """Give the messages of a program that receives these lines and then the end of its input."""
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_another_protocol_is_refused(language: str, build: Build) -> None:
    (reply,) = replies(build(language), HELLO | {"protocol": "mha-spec-protocol/2"})
    assert reply["message"] == "refusal"


def question(number: int, **changes: object) -> dict[str, object]:
    """Give the message of a question whose files lie in the working directory."""
    message = {"message": "question", "number": number, "id": "x", "function": "attention", "dtype": "float32"}
    files = {"arrays": f"{number}.question", "answer": f"{number}.answer", "most_bytes": 10**6}
    return message | files | {"options": {}, "outputs": ["output"]} | changes


def test_paths_and_strings_with_escapes_are_read(language: str, build: Build, tmp_path: Path) -> None:
    name = 'a "\\\n\té€😀'
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


def test_line_that_is_not_a_message_ends_the_program(language: str, build: Build) -> None:
    for line in ("", "{", "[1, 2]", "nul", "[" * 1000):
        done = subprocess.run(
            build(language), input=f"{line}\n", capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == "" or "refusal" in done.stdout
        assert done.returncode >= 0
