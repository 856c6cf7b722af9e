"""The limit of memory kills a program that exceeds it, names the limit, and leaves all other programs alone."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mha_spec_conformance.asking import memory
from mha_spec_conformance.asking.memory import MemoryLimit, half_of_the_machine, parse_size, shown_size
from mha_spec_conformance.asking.pool import Pool
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
    """Give the exit status of a program that is measured, and the reason why it was killed."""
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


def test_reserved_addresses_do_not_count(limit: MemoryLimit) -> None:
    assert ending(limit, "import mmap, time; data = mmap.mmap(-1, 2**30); time.sleep(0.3)") == (0, None)


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


def test_default_is_below_the_memory_of_the_machine() -> None:
    assert MIB < half_of_the_machine() < 2**45


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
    with Pool(str(target), memory=256 * MIB) as pool:
        done = judge_all(pool, Judge(pool.claims), suite, Settings(selection))
    outcomes = {result.ask.case.id.rpartition("/")[2]: result for result in done.results}
    assert {name: result.outcome for name, result in outcomes.items()} == {
        "plain": "pass",
        "head-layout": "pass",
        "lse": "pass",
        "mask-polarity": "crash",
    }
    assert "the limit is 256.0 MiB (--memory)" in str(outcomes["mask-polarity"].reason)
