"""The pool accounts for every question, whatever the programs write and wherever the files cannot be written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import sys
import time
from typing import TYPE_CHECKING

import numpy
import pytest

from mha_spec_conformance.asking import files, scratch
from mha_spec_conformance.asking import pool as pool_module
from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.question import Question
from mha_spec_conformance.asking.scratch import Scratch, ScratchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    Start = Callable[..., Pool]

CLAIMS = {
    "message": "claims",
    "protocol": "mha-spec-protocol/1",
    "functions": {"attention": []},
    "dtypes": ["float32"],
}
PROGRAM = """
import json, os, sys, time

asked = 0
for line in sys.stdin:
    question = json.loads(line)
    if question["message"] == "hello":
        FIRST
        print('CLAIMS', flush=True)
        continue
    asked += 1
    answer = json.dumps({"message": "answer", "number": question["number"], "kind": "unsupported", "reason": "no"})
    THEN
""".replace("CLAIMS", json.dumps(CLAIMS))
REPLY = "print(answer, flush=True)"


def questions(count: int) -> list[Question]:
    arrays = {name: numpy.zeros((1, 1, 2, 3), numpy.float32) for name in ("query", "key", "value")}
    return [Question(f"q/{number}", "attention", "float32", arrays, {}, ("output",)) for number in range(count)]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a pool of programs that do `first` before their claims, and `then` after each question."""

    def start(then: str = REPLY, first: str = "pass", jobs: int = 1) -> Pool:
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.replace("FIRST", first).replace("THEN", then))
        return Pool("program", jobs, 5.0, command=(sys.executable, "-S", str(path)))

    return start


def kinds(pool: Pool, count: int) -> list[str]:
    return [answer.kind for _, answer in pool.answers(questions(count))]


@pytest.mark.parametrize("stray", ["done\\n", "{}\\n", "\\0\\n"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_line_after_an_answer_does_not_end_the_run(start: Start, stray: str, count: int) -> None:
    with start(f"os.write(1, (answer + '\\n{stray}').encode())") as pool:
        received = kinds(pool, count)
        assert len(received) == count
        assert received[0] == "unsupported"
        assert kinds(pool, 1) == ["unsupported"]


@pytest.mark.parametrize("seconds", ["1e999", "1" + "0" * 400, "-1", "NaN", "true", '"1"'])
def test_time_that_is_not_a_number_of_seconds_is_a_crash(start: Start, seconds: str) -> None:
    with start(f"print(answer[:-1] + ', \"seconds\": {seconds}}}', flush=True)") as pool:
        assert kinds(pool, 1) == ["crash"]


def test_programs_start_at_the_same_time(start: Start) -> None:
    began = time.monotonic()
    with start(first="time.sleep(1.5)", jobs=3) as pool:
        assert time.monotonic() - began < 3.5
        assert kinds(pool, 9) == ["unsupported"] * 9


@pytest.mark.parametrize(
    "then", [REPLY, "os._exit(3)", "asked == 2 and os._exit(3); " + REPLY, "print('done', flush=True)"]
)
def test_files_of_questions_are_removed_with_them(
    start: Start, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(scratch, "MEMORY", folder)
    with start(then) as pool:
        assert len(kinds(pool, 11)) == 11
        assert not list(folder.rglob("*.question"))
        early = pool.answers(questions(11))
        next(early)
        early.close()
        assert not list(folder.rglob("*.question"))


def test_question_that_cannot_be_written_is_not_blamed_on_the_target(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, arrays: object) -> None:
        if path.name in ("2.question", "5.question"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, arrays)

    write = files.write
    monkeypatch.setattr(files, "write", full)
    with start() as pool:
        answers = {question.id: answer for question, answer in pool.answers(questions(7))}
    faults = {name: answer.reason for name, answer in answers.items() if answer.kind != "unsupported"}
    assert faults == dict.fromkeys(("q/1", "q/4"), "the question cannot be written: No space left on device")
    assert {answers[name].kind for name in faults} == {"internal"}
    assert len(answers) == 7


def test_worker_that_starts_again_does_not_hold_up_the_others(start: Start) -> None:
    first = "again = os.path.exists(__file__ + '.crashed'); time.sleep(again)"
    then = f"if question['id'] == 'q/0': open(__file__ + '.crashed', 'w'); os._exit(3)\n    {REPLY}"
    asked = questions(44)
    with start(then, first, jobs=2) as pool:
        names = [question.id for question, _ in pool.answers(asked[:4], asked[4:])]
    assert names[-3:] == ["q/1", "q/2", "q/3"]
    assert len(set(names)) == 44


@pytest.mark.skipif(sys.platform != "linux", reason="memory maps are counted in /proc")
@pytest.mark.parametrize("jobs", [1, 2])
def test_program_that_holds_many_memory_maps_is_replaced(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(pool_module, "MOST_MAPS", 700)
    # Files that are mapped one by one are not merged to one map. The program ends where a system would end it.
    first = "import mmap; maps = []; open(__file__ + '.starts', 'a').write('x')"
    then = f"maps += [mmap.mmap(-1, 4096) for _ in range(10)]; len(maps) > 1300 and os._exit(9)\n    {REPLY}"
    with start(then, first, jobs) as pool:
        assert kinds(pool, 607) == ["unsupported"] * 607
    assert len((tmp_path / "program.py.starts").read_text()) > 607 * 10 / 1300


@pytest.mark.parametrize(
    "change", ["shutil.rmtree(f, True)", "shutil.rmtree(f, True); open(f, 'w').close()", "os.chmod(f, 0)"]
)
def test_folder_that_a_program_changes_is_made_again(start: Start, change: str) -> None:
    # The runner may have made the folder again between two steps of the change.
    then = f"""import contextlib, shutil; f = os.path.dirname(question['answer'])
    with contextlib.suppress(OSError):
        if asked % 3 == 0: {change}
    {REPLY}"""
    with start(then) as pool:
        assert kinds(pool, 11) == ["unsupported"] * 11


def test_prints_are_read_when_the_runner_has_many_open_files(start: Start) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, allowed[1]), allowed[1]))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with start("os.write(2, bytes(2**20)); " + REPLY) as pool:
            assert kinds(pool, 2) == ["unsupported"] * 2
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Put the folders of runs into two folders of this test: in memory, and among the temporary files."""
    memory, temporary = tmp_path / "memory", tmp_path / "temporary"
    for folder in (memory, temporary):
        folder.mkdir()
    monkeypatch.setattr(scratch, "MEMORY", memory)
    monkeypatch.setattr(scratch, "gettempdir", lambda: str(temporary))
    return memory, temporary


@pytest.mark.parametrize("enough", [0, 2**62])
def test_folders_that_killed_runs_left_are_removed_from_both_places(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, enough: int
) -> None:
    for place in places:
        (place / f"{scratch.PREFIX}left" / "0").mkdir(parents=True)
        (place / f"{scratch.PREFIX}left" / scratch.LOCK).touch()
        (place / f"{scratch.PREFIX}begun").mkdir()
    monkeypatch.setattr(scratch, "ENOUGH_MEMORY", enough)
    folder = Scratch()
    assert folder.path.parent == places[enough > 0]
    assert [path for place in places for path in place.iterdir()] == [folder.path]
    folder.remove()


@pytest.mark.parametrize(("module", "name"), [(fcntl, "flock"), (os, "open")])
@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_begins_at_the_same_time_keeps_the_folders_of_others(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, ends: bool
) -> None:
    function = getattr(module, name)
    others: list[Scratch] = []

    def after_another_run(*arguments: int) -> object:
        monkeypatch.setattr(module, name, function)
        others.append(Scratch())
        if ends:
            others.pop().remove()
        return function(*arguments)

    monkeypatch.setattr(module, name, after_another_run)
    folders = [Scratch(), *others]
    folders.append(Scratch())
    assert {path for place in places for path in place.iterdir()} == {folder.path for folder in folders}
    for folder in folders:
        folder.remove()


def test_the_error_names_the_place_without_a_folder(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "ENOUGH_MEMORY", 2**62)
    places[1].rmdir()
    with pytest.raises(ScratchError, match=r"folder for temporary files cannot be made: .*temporary"):
        Scratch()
