"""The limit of memory kills a program that exceeds it, names the limit, and leaves all other programs alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mha_spec_conformance.asking import memory, pool
from mha_spec_conformance.asking.memory import MemoryLimit, half_of_the_machine, parse_size, shown_size
from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.protocol import PROTOCOL
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.running.runner import Settings, judge_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mha_spec_conformance.suite.cases import Suite

MIB = 2**20

pytestmark = pytest.mark.skipif(not hasattr(memory.os, "pidfd_open"), reason="the system has no process handles")


@pytest.fixture
def limit() -> Iterator[MemoryLimit]:
    limited = MemoryLimit(192 * MIB)
    yield limited
    limited.close()


def started(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)


def ending(limit: MemoryLimit, code: str) -> tuple[int, str | None]:
    """Return the exit status of a program that is measured, and the reason why it was killed."""
    program = started(code)
    limit.watch(program.pid)
    status = program.wait(30)
    return status, limit.forget(program.pid)


def test_program_within_the_limit_ends_by_itself(limit: MemoryLimit) -> None:
    assert ending(limit, f"import time; data = bytearray({64 * MIB}); time.sleep(0.3)") == (0, None)


def test_program_that_exceeds_the_limit_is_killed_and_the_limit_is_named(limit: MemoryLimit) -> None:
    status, reason = ending(limit, f"import time; data = b'1' * {256 * MIB}; time.sleep(20)")
    assert status == -9
    assert reason is not None
    assert "the limit is 192.0 MiB (--memory)" in reason


@pytest.mark.parametrize("reserve", ["mmap.mmap(-1, 2**30)", "ctypes.CDLL(None).calloc(1, 2**30)"])
def test_memory_that_is_reserved_but_not_touched_does_not_count(limit: MemoryLimit, reserve: str) -> None:
    assert ending(limit, f"import ctypes, mmap, time; data = {reserve}; time.sleep(0.3)") == (0, None)


def test_memory_of_the_processes_that_it_started_counts(limit: MemoryLimit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SESSION_EVERY", 2)
    code = f"import os, time; os.fork(); data = b'1' * {128 * MIB}; time.sleep(2)"
    status, reason = ending(limit, code)
    assert status == -9
    assert reason is not None


def test_memory_that_processes_share_counts_once(limit: MemoryLimit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SESSION_EVERY", 2)
    code = f"import os, time; data = b'1' * {100 * MIB}; os.fork(); os.fork(); time.sleep(0.5)"
    assert ending(limit, code) == (0, None)


def test_processes_that_ended_but_were_not_waited_for_do_not_count(
    limit: MemoryLimit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SESSION_EVERY", 2)
    code = f"""
import os, time
for _ in range(3):
    if (child := os.fork()) == 0:
        data = b"1" * {120 * MIB}
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
time.sleep(0.5)
"""
    assert ending(limit, code) == (0, None)


def test_measurements_go_on_while_a_process_has_ended(limit: MemoryLimit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SESSION_EVERY", 2)
    code = (
        f"import os, time\nif os.fork() == 0: os._exit(0)\ntime.sleep(0.2); data = b'1' * {256 * MIB}; time.sleep(20)"
    )
    status, reason = ending(limit, code)
    assert (status, reason is None) == (-9, False)


def test_program_that_ended_is_not_measured(limit: MemoryLimit) -> None:
    program = started("")
    program.wait(30)
    limit.watch(program.pid)
    assert limit.forget(program.pid) is None


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 2**33), ("500 MiB", 500 * MIB), ("1.5k", 1536), ("1000000", 10**6), ("2TB", 2**41)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "1X", "G", "1e9", "nan", "0.0001"])
def test_text_that_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size is written"):
        parse_size(text)


def test_sizes_are_shown_in_units() -> None:
    assert [shown_size(size) for size in (2**33, 3 * 2**19, 2048)] == ["8.0 GiB", "1.5 MiB", "2.0 KiB"]


MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824\n", 2**29),
        ("max\n", MACHINE // 2),
        (f"{2**62}\n", MACHINE // 2),
        ("", MACHINE // 2),
        (None, MACHINE // 2),
    ],
)
def test_default_is_half_of_the_machine_or_of_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, size: int
) -> None:
    container = tmp_path / "memory.max"
    if text is not None:
        container.write_text(text)
    monkeypatch.setattr(memory, "CONTAINER", container)
    assert half_of_the_machine() == size


@pytest.mark.parametrize(("jobs", "size", "expected"), [(1, None, 999), (3, None, 333), (3, 500, 500)])
def test_workers_share_the_default_and_each_has_the_limit_of_the_option(
    monkeypatch: pytest.MonkeyPatch, jobs: int, size: int | None, expected: int
) -> None:
    monkeypatch.setattr(pool, "half_of_the_machine", lambda: 999 * MIB)
    program = (sys.executable, "-S", "-c", f"input(); print({json.dumps(CLAIMS)!r}, flush=True); input()")
    with Pool("program", jobs, command=program, memory=size and size * MIB) as workers:
        assert workers.memory.most_bytes == expected * MIB


CLAIMS = {"message": "claims", "protocol": PROTOCOL, "functions": {"attention": []}, "dtypes": ["float32"]}


def test_case_that_exceeds_the_limit_is_a_crash_and_all_others_are_judged(tmp_path: Path, suite: Suite) -> None:
    target = tmp_path / "target.py"
    target.write_text(
        "import time\nimport numpy\nfrom mha_spec import reference\n"
        "def attention(query, key, value, *, mask=None):\n"
        "    if mask is not None:\n"
        f"        data = numpy.ones({300 * MIB}, 'u1')\n"
        "        time.sleep(20)\n"
        "    return reference.attention(query, key, value, mask=mask)\n"
    )
    selection = Selection(("attention/smoke/",), ("float32",))
    with Pool(str(target), memory=256 * MIB) as workers:
        done = judge_all(workers, Judge(workers.claims), suite, Settings(selection))
    outcomes = {result.ask.case.id.rpartition("/")[2]: result for result in done.results}
    assert {name: result.outcome for name, result in outcomes.items()} == {
        "plain": "pass",
        "head-layout": "pass",
        "lse": "pass",
        "mask-polarity": "crash",
    }
    assert "the limit is 256.0 MiB (--memory)" in str(outcomes["mask-polarity"].reason)
