"""Targets that misbehave: each case has exactly its outcome, all others their true one, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.leftovers import nothing_left_behind, wait_until

from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.running.runner import Settings, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mha_spec_conformance.suite.cases import Suite

TARGET = Path(__file__).with_name("hostile_target.py")
CORRECT = """
import os, subprocess, sys, time
from mha_spec import reference

def attention(query, key, value, *, mask=None):
    {first}
    return reference.attention(query, key, value, mask=mask)
"""
ONLY = ("--only", "attention/smoke/", "--dtypes", "float32")
COMMAND = (sys.executable, "-P", "-m", "mha_spec_conformance")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that the test leaves no process and no file behind."""
    with nothing_left_behind(tmp_path / "temporary", monkeypatch):
        yield


@pytest.fixture(autouse=True)
def hang_up_ends() -> Iterator[None]:
    """Let SIGHUP end a process: under nohup it is ignored, which all child processes would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def behaviours() -> dict[str, str]:
    """Return the outcome of each behaviour of the hostile target."""
    names: dict[str, Any] = {}
    exec(compile(TARGET.read_text(), str(TARGET), "exec"), names)
    return {name: outcome for outcome, named in names["BEHAVIOURS"].items() for name in named}


def small_cases(suite: Suite) -> list[str]:
    """Return the ids of plain cases in float32, small ones first, without those that are marked for further calls."""
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


@pytest.mark.parametrize("part", range(3))
def test_every_behaviour_has_its_outcome(part: int, tmp_path: Path, suite: Suite, behaviours: dict[str, str]) -> None:
    assert len(behaviours) >= 150
    ending = {name: outcome for name, outcome in behaviours.items() if outcome != "timeout"}
    judge_behaviours(dict(list(ending.items())[part::3]), 30.0, tmp_path, suite)


def test_every_behaviour_that_does_not_end_is_a_timeout(
    tmp_path: Path, suite: Suite, behaviours: dict[str, str]
) -> None:
    endless = {name: outcome for name, outcome in behaviours.items() if outcome == "timeout"}
    judge_behaviours(endless, 2.0, tmp_path, suite)


def judge_behaviours(behaviours: dict[str, str], limit: float, tmp_path: Path, suite: Suite) -> None:
    """Judge a target that has these behaviours, each in a separate case, and assert the outcome of every case."""
    chosen = small_cases(suite)
    asked_further = chosen[:2]  # the first cases of their features are those with further calls
    hostile = dict(zip(behaviours, chosen[2:], strict=False))
    assert len(hostile) == len(behaviours), len(chosen)
    path = tmp_path / "hostile.py"
    path.write_text(f"CASES = { ({case: name for name, case in hostile.items()})!r}\n" + TARGET.read_text())
    selection = Selection((*SMOKE, *asked_further, *hostile.values()), ("float32",))
    done = run(str(path), suite, Settings(selection, jobs=2, limit=limit))
    results = {result.ask.case.id: result for result in done.results}
    received = {name: results[case].outcome for name, case in hostile.items()}
    wrong = {name: results[hostile[name]] for name in received if received[name] != behaviours[name]}
    assert {name: (result.outcome, result.reason) for name, result in wrong.items()} == {}
    others = {name: result for name, result in results.items() if name not in hostile.values()}
    assert set(others) == {*SMOKE, *asked_further}
    assert {(result.outcome, result.reason) for result in others.values()} == {("pass", None)}
    texts = [text for result in done.results for text in (result.reason or "", done.verdict)]
    assert all(text.isprintable() and len(text) <= 2200 for text in texts)


SMOKE = ("attention/smoke/plain", "attention/smoke/head-layout")


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    line = [*COMMAND, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a target whose attention begins with a statement."""

    def write(first: str = "pass", before: str = "") -> Path:
        path = tmp_path / "target.py"
        path.write_text(before + CORRECT.format(first=first))
        return path

    return write


@contextmanager
def runner_in_a_call(target: Path, begun: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run, and return its process when the target has begun its first call; the process does not outlive it."""
    line = [*COMMAND, "check", str(target), "--timeout", "60"]
    # A shell starts background jobs with SIGINT ignored, which programs inherit; the tests may be such a job.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, inherited)
    with process:
        try:
            wait_until(lambda: begun.exists() or process.poll() is not None)
            yield process
        finally:
            process.kill()


@pytest.fixture
def sleeping(write: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """Write a target that starts a process, makes a file, and sleeps; return the target and the file."""
    begun = tmp_path / "begun"
    return write(f"subprocess.Popen(['sleep', '78']); open({str(begun)!r}, 'w').close(); time.sleep(78)"), begun


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_end_of_the_runner_leaves_nothing(sleeping: tuple[Path, Path], number: int, status: int) -> None:
    with runner_in_a_call(*sleeping) as process:
        process.send_signal(number)
        assert process.wait(30) == status


def test_run_that_was_killed_is_cleaned_by_the_next(
    sleeping: tuple[Path, Path], write: Callable[..., Path], suite: Suite
) -> None:
    with runner_in_a_call(*sleeping) as process:
        process.kill()
    done = run(str(write()), suite, Settings(Selection(("attention/smoke/plain",), ("float32",))))
    assert done.summary["pass"] == 1


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(60)"])
def test_orphan_without_a_mark_ends_with_its_worker(write: Callable[..., Path], end: str) -> None:
    orphan = "subprocess.Popen(['sleep', '79'], start_new_session=True, env={})"
    done = command("check", write(f"if mask is not None: {orphan}; {end}"), *ONLY, "--timeout", "2")
    assert done.returncode == 1
    assert "partial run" in done.stdout


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
