"""Targets that misbehave: each case has exactly its outcome, all others their true one, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mha_spec_conformance.asking import scratch
from mha_spec_conformance.asking.process import MARK, PROCESSES
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.running.runner import Settings, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mha_spec_conformance.suite.cases import Suite

TARGET = Path(__file__).with_name("hostile_target.py")
RIGHT = """
import time
from mha_spec import reference

def attention(query, key, value, *, mask=None):
    {first}
    return reference.attention(query, key, value, mask=mask)
"""
ONLY = ("--only", "attention/smoke/", "--dtypes", "float32")


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the folders of runs into a folder of this test, and assert that no file and no process is left."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(scratch, "MEMORY", folder)
    yield folder
    assert not list(folder.iterdir())
    assert not marked(folder)


def marked(folder: Path) -> list[str]:
    """Give the commands of the processes that a run with its files in the folder has left."""
    mark = f"{MARK}={folder}".encode()
    left = []
    for process in PROCESSES.iterdir() if PROCESSES.is_dir() else ():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes():
                left.append((process / "cmdline").read_text())
        except OSError:
            continue
    return left


@pytest.fixture
def behaviours() -> dict[str, str]:
    """Give the outcome of each behaviour of the hostile target."""
    names: dict[str, Any] = {}
    exec(compile(TARGET.read_text(), str(TARGET), "exec"), names)
    return {name: outcome for outcome, named in names["BEHAVIOURS"].items() for name in named}


def small_cases(suite: Suite) -> list[str]:
    """Give the ids of plain cases in float32, small ones first, without those that are marked for further calls."""
    plain = [
        case
        for case in suite.cases
        if case.function == "attention"
        and case.expect != "error"
        and case.level == "MUST"
        and "float32" in case.dtypes
        and not case.options
        and set(case.input_names) == {"query", "key", "value"}
        and set(case.features) <= {"core", "groups", "value_size"}
        and "smoke" not in case.tags
    ]
    return [case.id for case in sorted(plain, key=lambda case: sum(x.size for x in case.inputs("float32").values()))]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("part", range(3))
def test_every_behaviour_has_its_outcome(part: int, tmp_path: Path, suite: Suite, behaviours: dict[str, str]) -> None:
    assert len(behaviours) >= 90
    behaviours = dict(list(behaviours.items())[part::3])
    smoke = ["attention/smoke/plain", "attention/smoke/head-layout"]
    chosen = small_cases(suite)
    first = chosen[:2]  # these are marked for further calls
    hostile = dict(zip(behaviours, chosen[2:], strict=False))
    assert len(hostile) == len(behaviours), len(chosen)
    path = tmp_path / "hostile.py"
    path.write_text(f"CASES = { ({case: name for name, case in hostile.items()})!r}\n" + TARGET.read_text())
    selection = Selection((*smoke, *first, *hostile.values()), ("float32",))
    done = run(str(path), suite, Settings(selection, jobs=2, limit=2.0))
    outcomes = {result.ask.case.id: result for result in done.results}
    wrong = {
        name: (outcomes[case].outcome, outcomes[case].reason)
        for name, case in hostile.items()
        if outcomes[case].outcome != behaviours[name]
    }
    assert not wrong
    others = {name: result.reason for name, result in outcomes.items() if name not in hostile.values()}
    assert not {name for name in others if outcomes[name].outcome != "pass"}
    texts = [text for result in done.results for text in (result.reason or "", done.verdict)]
    assert all(text.isprintable() and len(text) <= 2200 for text in texts)


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    line = [sys.executable, "-P", "-m", "mha_spec_conformance", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a target whose attention begins with a statement."""

    def write(first: str = "pass", before: str = "") -> Path:
        path = tmp_path / "target.py"
        path.write_text(before + RIGHT.format(first=first))
        return path

    return write


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_end_of_the_runner_leaves_nothing(write: Callable[..., Path], tmp_path: Path, number: int, status: int) -> None:
    marker = tmp_path / "begun"
    body = f"import subprocess; subprocess.Popen(['sleep', '78']); open({str(marker)!r}, 'w'); time.sleep(78)"
    code = f"import sys; sys.argv[:] = ['mha-spec', 'check', {str(write(body))!r}, '--timeout', '60']\n"
    process = subprocess.Popen([sys.executable, "-P", "-c", code + IN_FOLDER.format(folder=tmp_path)])
    while not marker.exists():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == status
    assert not marked(tmp_path)
    assert not list(tmp_path.glob("mha-spec-*"))


IN_FOLDER = """
import pathlib
from mha_spec_conformance.asking import scratch
scratch.MEMORY = pathlib.Path({folder!r})
from mha_spec_conformance.commands.cli import main
main()
""".replace("{folder!r}", "'{folder}'")


def test_run_that_was_killed_is_cleaned_by_the_next(
    write: Callable[..., Path], tmp_path: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "begun"
    body = f"import subprocess; subprocess.Popen(['sleep', '78']); open({str(marker)!r}, 'w'); time.sleep(78)"
    code = f"import sys; sys.argv[:] = ['mha-spec', 'check', {str(write(body))!r}]\n"
    process = subprocess.Popen([sys.executable, "-P", "-c", code + IN_FOLDER.format(folder=tmp_path)])
    while not marker.exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    monkeypatch.setattr(scratch, "MEMORY", tmp_path)
    run(str(write()), suite, Settings(Selection(("attention/smoke/plain",), ("float32",))))
    assert not marked(tmp_path)
    assert not list(tmp_path.glob("mha-spec-*"))


def test_report_never_replaces_another_file(write: Callable[..., Path]) -> None:
    target = write()
    text = target.read_text()
    for option in ("--json", "--results"):
        done = command("check", target, *ONLY, option, target)
        assert done.returncode == 2
        assert "the file exists and does not hold" in done.stderr
        assert target.read_text() == text


def test_output_that_is_closed_does_not_change_the_status(write: Callable[..., Path]) -> None:
    line = f"{sys.executable} -P -m mha_spec_conformance check {write()} {' '.join(ONLY)}"
    for shell in (f"{line} >&-", f"set -o pipefail; {line} | true"):
        assert subprocess.run(["bash", "-c", shell], check=False, stderr=subprocess.DEVNULL).returncode == 0


def test_characters_that_the_terminal_lacks_are_escaped(write: Callable[..., Path]) -> None:
    target = write("if mask is not None: raise ValueError('größe \\x1b[2J \\udcff')")
    done = command("check", target, *ONLY, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 1
    assert r"gr\xf6\xdfe \x1b[2J \udcff" in done.stdout
    assert "partial run" in done.stdout


def test_unknown_backend_in_the_environment_is_one_line() -> None:
    environment = {**os.environ, "MHA_SPEC_BACKEND": "nope"}
    assert command("--help", env=environment).returncode == 0
    done = command("check", "numpy", env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no backend is called 'nope'" in done.stderr


def test_run_goes_on_with_the_results_of_a_file(write: Callable[..., Path], tmp_path: Path) -> None:
    file, counter = tmp_path / "results.jsonl", tmp_path / "calls"
    target = write(f"open({str(counter)!r}, 'a').write('.')")
    whole = command("check", target, *ONLY, "--results", file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:40])
    counter.unlink()
    done = command("check", target, *ONLY, "--results", file, "--resume")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, whole.stdout.splitlines()[-1])
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()[1:] if line.endswith("}")]
    assert {"attention/smoke/plain", "attention/smoke/head-layout"} <= set(ids)
    other = command("check", "numpy", *ONLY, "--results", file, "--resume")
    assert (other.returncode, "results of another run; it differs in target" in other.stderr) == (2, True)


@pytest.mark.usefixtures("nothing_left")
def test_import_that_fails_again_is_the_outcome_of_the_cases_that_follow(
    write: Callable[..., Path], tmp_path: Path, suite: Suite
) -> None:
    marker = tmp_path / "marker"
    before = f"import os\nif os.path.exists({str(marker)!r}): raise RuntimeError('the device is lost')\n"
    target = write(f"if mask is not None: open({str(marker)!r}, 'w'); os._exit(3)", before)
    done = run(str(target), suite, Settings(Selection(("attention/smoke/", "attention/mask/"), ("float32",))))
    outcomes = {result.outcome for result in done.results}
    assert outcomes == {"pass", "crash"} or outcomes == {"crash"}
    assert any("the device is lost" in (result.reason or "") for result in done.results)
