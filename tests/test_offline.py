"""Exported questions are those of a run, and the answers in a folder are judged as those of a process are."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pytest
from safetensors.numpy import load_file, save_file
from support.runs import outcomes

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking import files
from mha_spec_conformance.asking.folder import FolderError
from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.commands import offline as commands
from mha_spec_conformance.commands.reports import Reports
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.reporting.report import as_json
from mha_spec_conformance.running.offline import export, verify
from mha_spec_conformance.running.runner import NothingToJudge, Settings, judge_all
from mha_spec_conformance.suite.functions import DECLARED_FEATURES
from mha_spec_conformance.targets.claims import Claims

if TYPE_CHECKING:
    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

SELECTION = Selection(("attention/causal+mask/", "attention/mask/", "attention/smoke/"), ("float32",))
CLAIMS = Claims("mine", {"attention": ("mask", "causal", "q_offset", "return_lse")}, ("float32",), further=("again",))
PROGRAM = [sys.executable, "-P", "-m", "mha_spec_conformance.asking.serving", "mha_spec.reference"]


@pytest.fixture
def folder(answered: Path, tmp_path: Path) -> Path:
    """Copy the answered folder."""
    return Path(shutil.copytree(answered, tmp_path / "export"))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, suite: Suite) -> Path:
    """Export the questions and let the reference answer them."""
    folder = tmp_path_factory.mktemp("answered") / "export"
    count = export(folder, CLAIMS, suite, SELECTION)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "questions.jsonl").open("rb") as questions, (folder / "answers.jsonl").open("wb") as answers:
        subprocess.run(PROGRAM, stdin=questions, stdout=answers, cwd=folder, env=environment, check=True, timeout=120)
    assert len((folder / "answers.jsonl").read_bytes().splitlines()) == count + 1
    return folder


def answers(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_bytes().splitlines()]


def write_answers(folder: Path, messages: list[dict[str, object]]) -> None:
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(message)}\n" for message in messages))


def numbers_of(folder: Path, case: str) -> list[int]:
    """Return the numbers of the questions that ask a case."""
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_bytes().splitlines()]
    return [question["number"] for question in questions if question.get("id") == case]


def cases_of(run: Run) -> list[dict[str, object]]:
    """Return the cases of the report, without their times."""
    cases = as_json(run)["cases"]
    assert isinstance(cases, list)
    return [case | {"seconds": 0} for case in cases]


def test_answers_in_a_folder_are_judged_as_those_of_a_process(folder: Path, suite: Suite) -> None:
    done = verify(folder, suite, Settings())
    with Pool("mha_spec.reference") as pool:
        pool.claims = CLAIMS
        asked = judge_all(pool, Judge(CLAIMS), suite, Settings(SELECTION))
    assert done.status == asked.status == 0
    assert done.verdict == asked.verdict
    assert len(done.results) > 10
    assert cases_of(done) == cases_of(asked)
    assert all(result.deterministic for result in done.results if result.ask.every_layout)


def test_messages_follow_the_schema(folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(__file__).parents[1] / "docs" / "protocol.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    messages = [*answers(folder), *map(json.loads, (folder / "questions.jsonl").read_text().splitlines())]
    assert {message["message"] for message in messages} == {"hello", "claims", "question", "answer"}
    assert [str(error) for message in messages for error in validator.iter_errors(message)] == []


def test_folder_can_be_moved(folder: Path, suite: Suite) -> None:
    assert verify(folder.rename(folder.with_name("moved")), suite, Settings()).status == 0


def test_versions_and_hardware_are_those_of_the_program_that_answered(folder: Path, suite: Suite) -> None:
    claims, *others = answers(folder)
    write_answers(folder, [claims | {"versions": {"kernel": "3"}, "hardware": "phone"}, *others])
    done = verify(folder, suite, Settings())
    assert (done.claims.versions, done.claims.hardware) == ({"kernel": "3"}, "phone")


def test_wrong_number_fails_with_a_reason(folder: Path, suite: Suite) -> None:
    for number in numbers_of(folder, "attention/smoke/lse"):
        path = folder / "files" / f"{number}.answer"
        save_file({name: array + numpy.float32(0.5) for name, array in load_file(path).items()}, path)
    done = verify(folder, suite, Settings())
    assert done.status == 1
    assert [case for case, outcome in outcomes(done).items() if outcome != "pass"] == ["attention/smoke/lse"]
    assert "received" in str(done.failures[0].reason)


def test_wrong_answer_to_a_repeated_question_fails(folder: Path, suite: Suite) -> None:
    repeated = next(
        r.ask.case.id for r in verify(folder, suite, Settings()).results if _is_repeated(folder, r.ask.case.id)
    )
    path = folder / "files" / f"{numbers_of(folder, repeated)[-1]}.answer"
    save_file({name: -array for name, array in load_file(path).items()}, path)
    done = verify(folder, suite, Settings())
    assert {case: outcome for case, outcome in outcomes(done).items() if outcome != "pass"} == {repeated: "fail"}
    assert done.failures[0].clauses == ("MHA-PURE-3",)


def _is_repeated(folder: Path, case: str) -> bool:
    return not case.startswith("attention/smoke/") and len(numbers_of(folder, case)) > 1


@pytest.mark.parametrize("which", [0, -1])
def test_missing_answer_is_an_error_and_noted(folder: Path, suite: Suite, which: int) -> None:
    case = "attention/smoke/plain"
    missing = numbers_of(folder, case)[which]
    write_answers(folder, [message for message in answers(folder) if message.get("number") != missing])
    done = verify(folder, suite, Settings())
    assert done.status == 1
    assert {name: outcome for name, outcome in outcomes(done).items() if outcome != "pass"} == {case: "error"}
    assert f"no answer to question {missing}" in str(done.failures[0].reason)
    assert done.notes == (f"questions without an answer: 1, of which the first is {missing}",)


def test_answers_of_a_program_that_ended_early_are_judged(folder: Path, suite: Suite) -> None:
    messages = answers(folder)
    write_answers(folder, messages[: len(messages) // 2])
    tally = verify(folder, suite, Settings()).summary
    assert tally["pass"] > 0
    assert tally["error"] > 0
    assert tally["unsupported"] == 0


def test_missing_file_fails(folder: Path, suite: Suite) -> None:
    for number in numbers_of(folder, "attention/smoke/plain"):
        (folder / "files" / f"{number}.answer").unlink()
    assert outcomes(verify(folder, suite, Settings()))["attention/smoke/plain"] == "fail"


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"kind": "raised", "reason": "no"}, "error"),
        ({"kind": "lost", "reason": "no"}, "error"),
        ({"kind": "unsupported", "reason": "no"}, "unsupported"),
        ({"kind": "internal", "reason": "no"}, "internal"),
        ({"kind": "splendid"}, "crash"),
    ],
)
def test_kinds_of_answers(folder: Path, suite: Suite, changes: dict[str, object], outcome: str) -> None:
    numbers = numbers_of(folder, "attention/smoke/lse")
    write_answers(folder, [m | (changes if m.get("number") in numbers else {}) for m in answers(folder)])
    assert outcomes(verify(folder, suite, Settings()))["attention/smoke/lse"] == outcome


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no answer"),
        ('{"message": "claims"}\n', "must reply to hello with claims"),
        ('{"message": "refusal", "reason": "not today"}\n', "not today"),
        ("Segmentation fault\n", "line 1"),
        ("\ufeff{}\n", "line 1"),
    ],
)
def test_output_that_holds_no_answers_cannot_be_judged(folder: Path, suite: Suite, text: str, message: str) -> None:
    (folder / "answers.jsonl").write_text(text)
    with pytest.raises(MhaSpecError, match=message):
        verify(folder, suite, Settings())


@pytest.mark.parametrize("name", ["answers.jsonl", "questions.jsonl", "export.json"])
def test_missing_file_of_the_folder_is_named(folder: Path, suite: Suite, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FolderError, match=name):
        verify(folder, suite, Settings())


@pytest.mark.parametrize("name", ["answers.jsonl", "export.json"])
def test_pipe_where_a_file_must_be_is_refused(folder: Path, suite: Suite, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FolderError, match="is not a file"):
        verify(folder, suite, Settings())


def test_pipe_where_the_file_of_an_answer_must_be_fails(folder: Path, suite: Suite) -> None:
    for number in numbers_of(folder, "attention/smoke/plain"):
        (folder / "files" / f"{number}.answer").unlink()
        os.mkfifo(folder / "files" / f"{number}.answer")
    assert outcomes(verify(folder, suite, Settings()))["attention/smoke/plain"] == "fail"


@pytest.mark.parametrize("number", [-1, 2**70])
def test_answer_with_another_number_answers_nothing(folder: Path, suite: Suite, number: object) -> None:
    numbers = numbers_of(folder, "attention/smoke/lse")
    write_answers(folder, [m | ({"number": number} if m.get("number") in numbers else {}) for m in answers(folder)])
    assert outcomes(verify(folder, suite, Settings()))["attention/smoke/lse"] == "error"


@pytest.mark.parametrize("number", [None, "1", 1.0, True, [1], {"a": 1}])
def test_answer_whose_number_is_not_an_integer_is_refused(folder: Path, suite: Suite, number: object) -> None:
    claims, first, *others = answers(folder)
    write_answers(folder, [claims, first | {"number": number}, *others])
    with pytest.raises(FolderError, match=r"answers\.jsonl: line 2: .* not a numbered answer"):
        verify(folder, suite, Settings())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"message": "question", "number": 1}, "line 2: .* not a numbered answer"),
        ({"message": "log", "number": 1}, "line 2: .* not a numbered answer"),
        ({"message": "answer", "number": 1, "kind": "raised", "reason": "x" * 2**20}, "line 2: .* more than 1048576"),
    ],
)
def test_line_that_is_not_an_answer_is_refused(
    folder: Path, suite: Suite, line: dict[str, object], message: str
) -> None:
    claims, _, *others = answers(folder)
    write_answers(folder, [claims, line, *others])
    with pytest.raises(FolderError, match=message):
        verify(folder, suite, Settings())


def test_line_of_the_questions_that_is_not_a_question_is_refused(folder: Path, suite: Suite) -> None:
    with (folder / "questions.jsonl").open("a") as file:
        file.write('{"message": "answer", "number": 1}\n')
    with pytest.raises(FolderError, match=r"questions\.jsonl: line .* not a numbered question"):
        verify(folder, suite, Settings())


def test_version_of_the_export_is_shown_in_one_line(folder: Path, suite: Suite) -> None:
    export = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(export | {"spec_version": "1\x1b[2J\n" + "0" * 5000}))
    with pytest.raises(FolderError, match="received spec_version=1") as caught:
        verify(folder, suite, Settings())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_selection_without_a_case_leaves_no_folder(tmp_path: Path, suite: Suite) -> None:
    with pytest.raises(NothingToJudge):
        export(tmp_path / "export", CLAIMS, suite, Selection(("attention/softcap",)))
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full_ends_the_export_with_an_error_of_ours(
    tmp_path: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(FolderError, match="cannot be written: No space left on device"):
        export(tmp_path / "export", CLAIMS, suite, SELECTION)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 10000, '{"format": "mha-spec-export/1"}'])
def test_file_that_export_did_not_write_is_refused(folder: Path, suite: Suite, text: str) -> None:
    (folder / "export.json").write_text(text)
    with pytest.raises(FolderError, match="did not write this"):
        verify(folder, suite, Settings())


def test_damaged_messages_raise_only_errors_of_the_protocol(folder: Path, suite: Suite) -> None:
    drawn = random.Random(5)
    for name in ("questions.jsonl", "answers.jsonl", "export.json"):
        original = (folder / name).read_bytes()
        for _ in range(8):
            damaged = bytearray(original)
            for _ in range(4):
                damaged[drawn.randrange(len(damaged))] = drawn.choice(b'\0\xff0"{}[],:1ea')
            (folder / name).write_bytes(damaged)
            with suppress(MhaSpecError):
                assert verify(folder, suite, Settings()).status in (0, 1, 2)
        (folder / name).write_bytes(original)


def test_export_of_another_version_is_refused(folder: Path, suite: Suite) -> None:
    exported = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(exported | {"goldens_sha256": "0"}))
    with pytest.raises(FolderError, match="export the questions again"):
        verify(folder, suite, Settings())


def test_folder_with_contents_is_left_alone(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FolderError, match="must be empty"):
        export(tmp_path, CLAIMS, suite, SELECTION)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_commands_have_the_status_and_the_report_of_check(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert commands.verify(folder, ("mask",), (), None, Reports(report)) == 0
    assert json.loads(report.read_text())["status"] == 0
    assert commands.verify(folder, ("dropout",)) == 1


def test_claims_come_from_a_file_or_from_the_names_of_functions(tmp_path: Path) -> None:
    claims = tmp_path / "claims.json"
    claims.write_text(json.dumps({"functions": {"attention": ["mask"]}, "dtypes": ["float32", "float64"]}))
    only = ("attention/smoke/",)
    assert "questions to" in commands.export(tmp_path / "a", claims, (), ("float64",), only)
    assert "questions to" in commands.export(tmp_path / "b", None, ("attention",), (), only)
    asked = [(tmp_path / name / "questions.jsonl").read_text() for name in "ab"]
    assert ['"dtype": "float64"' in text for text in asked] == [True, False]
    assert ['"return_lse": true' in text for text in asked] == [False, True]


@pytest.mark.parametrize("feature", DECLARED_FEATURES)
def test_functions_have_the_features_that_no_signature_shows(tmp_path: Path, feature: str) -> None:
    only = (
        "multi_head_attention/joint-norm/",
        "multi_head_attention/cache/paged/",
        "multi_head_attention/cache/wrapping/",
    )
    commands.export(tmp_path / "layer", None, ("multi_head_attention",), (), only)
    assert f'"{feature}"' in (tmp_path / "layer" / "questions.jsonl").read_text()


@pytest.mark.parametrize(
    ("claims", "functions", "message"),
    [
        (None, (), "export needs either"),
        ("{}", ("attention",), "export needs either"),
        ("[]", (), "must be a JSON object"),
        ("{", (), "cannot be read as JSON"),
        ("[" * 100_000, (), "cannot be read as JSON"),
        ("{}", (), "`functions` must map names"),
        (None, ("attend",), "--functions must be one of"),
    ],
)
def test_wrong_claims_are_named(tmp_path: Path, claims: str | None, functions: tuple[str, ...], message: str) -> None:
    path = tmp_path / "claims.json"
    path.write_text(claims or "")
    with pytest.raises(MhaSpecError, match=message):
        commands.export(tmp_path / "folder", path if claims else None, functions)
