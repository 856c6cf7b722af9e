"""Find what a run leaves behind: processes, files in shared memory, and temporary files.

Nothing of the suite is used for the search. Linux makes the process of the tests the parent of all orphans, so that
each process that a run has started is among its descendants.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

__all__ = ["nothing_left_behind", "wait_until"]

PROCESSES = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")

SET_CHILD_SUBREAPER = 36
"""The operation of prctl that makes a process the parent of the orphans among its descendants."""


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until the condition holds, and raise if it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not hold in {seconds} s")
        time.sleep(0.02)


@contextmanager
def nothing_left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that no new process and no new file exists at the end; temporary files lie in the folder, which is new."""
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    processes, files = set(_descendants()), _files_in_memory()
    _adopt_orphans(True)
    try:
        yield
        assert _left_after_a_while(processes, files) == ([], [])
        assert sorted(folder.iterdir()) == []
    finally:
        _adopt_orphans(False)


def _adopt_orphans(adopt: bool) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, int(adopt))


def _left_after_a_while(processes: set[int], files: set[Path]) -> tuple[list[str], list[Path]]:
    """Return the new processes and files; those that were killed, and those of other runs, have the time to end."""
    deadline = time.monotonic() + 5
    while True:
        left = [command for process, command in _descendants().items() if process not in processes]
        new = [path for path in _files_in_memory() - files if not _is_used_by_others(path)]
        if not (left or new) or time.monotonic() > deadline:
            return left, new
        time.sleep(0.05)


def _descendants() -> dict[int, str]:
    """Return the commands of the running processes that descend from this process."""
    parents: dict[int, int] = {}
    for process in _all_processes():
        state, parent = _state(process)
        if state not in ("", "Z"):
            parents[process] = parent
    descendants: dict[int, str] = {}
    level = {os.getpid()}
    while level:
        level = {process for process, parent in parents.items() if parent in level}
        descendants |= {process: _command(process) for process in level}
    return descendants


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in PROCESSES.iterdir() if entry.name.isdigit()] if PROCESSES.is_dir() else []


def _state(process: int) -> tuple[str, int]:
    """Return the state and the parent of a process; the state is empty if it has ended."""
    try:
        state, parent = (PROCESSES / str(process) / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


def _command(process: int) -> str:
    try:
        return (PROCESSES / str(process) / "cmdline").read_text(errors="replace").replace("\0", " ")[:200]
    except OSError:
        return ""


def _files_in_memory() -> set[Path]:
    return set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()


def _is_used_by_others(path: Path) -> bool:
    """Tell whether a process that does not belong to the tests has a file in the folder open, as another run has."""
    others = set(_all_processes()) - set(_descendants()) - {os.getpid()}
    return any(target.startswith(f"{path}{os.sep}") for process in others for target in _open_files(process))


def _open_files(process: int) -> list[str]:
    try:
        return [str(entry.readlink()) for entry in (PROCESSES / str(process) / "fd").iterdir()]
    except OSError:
        return []
