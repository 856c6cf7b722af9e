"""The limit of the memory of a target: a process that exceeds it is killed before the machine runs out of memory.

The resident memory is measured, because frameworks reserve far more addresses than they use: a limit of the address
space (RLIMIT_AS) would refuse every target that runs on CUDA or JAX.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .process import PROCESSES, SESSION, STATE, fields_of, other_processes

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MemoryLimit", "half_of_the_machine", "parse_size", "shown_size"]

CONTAINER = Path("/sys/fs/cgroup/memory.max")
"""The file with the memory limit of the container, if any."""

SECONDS = 0.05
"""The time between two measurements of a program."""

SESSION_EVERY = 20
"""The processes that the program started are measured once in this number of times, because all of /proc is read."""

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)

PAGES = 21
"""Place in /proc/PID/stat after the name of the program."""


def half_of_the_machine() -> int:
    """Return half of the memory of the machine, or of the container, in bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        memory = min(memory, int(CONTAINER.read_text()))
    return memory // 2


def parse_size(text: str) -> int:
    """Read a number of bytes, as in `8G`, `500 MiB` or `1000000`; the units are powers of 1024.

    Raises:
        ValueError: The text is not a size above 0.
    """
    match = SIZE.fullmatch(text.strip())
    size = 0 if match is None else int(float(match[1]) * UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"a size is written as in 8G, 500M or 1000000 bytes, received {text!r}")
    return size


def shown_size(size: int) -> str:
    """Write a number of bytes for people."""
    unit = next((unit for unit in "TGM" if size >= UNITS[unit]), "K")
    return f"{size / UNITS[unit]:.1f} {unit}iB"


@dataclass
class _Watched:
    """A program: its handle, which no other process can take over, and the reason why it was killed."""

    handle: int
    reason: str | None = None


class MemoryLimit:
    """Kills programs whose resident memory, with that of the processes of their session, exceeds a limit.

    A system without /proc or without process handles has no limit.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, program: int) -> None:
        """Measure a program that leads a session; it must not have been waited for."""
        if not hasattr(os, "pidfd_open") or not PROCESSES.is_dir():
            return
        with self._lock, suppress(OSError):
            self._watched[program] = _Watched(os.pidfd_open(program))
        if self._thread is None:
            self._thread = threading.Thread(target=self._measure_until_ended, daemon=True)
            self._thread.start()

    def forget(self, program: int) -> str | None:
        """Stop measuring a program; return the reason if it was killed here."""
        with self._lock:
            watched = self._watched.pop(program, None)
            if watched is not None:
                os.close(watched.handle)
        return None if watched is None else watched.reason

    def close(self) -> None:
        """Stop measuring all programs."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for program in list(self._watched):
            self.forget(program)

    def _measure_until_ended(self) -> None:
        round_number = 0
        while not self._ended.wait(SECONDS):
            round_number += 1
            with self._lock:
                sizes = self._sizes(whole_sessions=round_number % SESSION_EVERY == 0)
                for program, size in sizes.items():
                    if size > self.most_bytes:
                        self._kill(program, size)

    def _sizes(self, *, whole_sessions: bool) -> dict[int, int]:
        """Measure each program, or its whole session."""
        if whole_sessions and self._watched:
            return _session_sizes(self._watched.keys(), self.most_bytes)
        return {program: _resident(fields_of(program)) for program in self._watched}

    def _kill(self, program: int, size: int) -> None:
        watched = self._watched[program]
        with suppress(OSError):
            signal.pidfd_send_signal(watched.handle, signal.SIGKILL)
            watched.reason = watched.reason or (
                f"the process used {shown_size(size)} of memory; the limit is {shown_size(self.most_bytes)} (--memory)"
            )


def _session_sizes(programs: Iterable[int], most_bytes: int) -> dict[int, int]:
    """Sum the memory of each session; pages that processes share are counted once if the sum exceeds the limit."""
    members: dict[int, dict[int, int]] = {}
    for process in other_processes():
        fields = fields_of(process)
        if fields and fields[STATE] != "Z":
            members.setdefault(int(fields[SESSION]), {})[process] = _resident(fields)
    sizes = {program: sum(members.get(program, {}).values()) for program in programs}
    return {
        program: sum(map(_proportional, members[program])) if size > most_bytes and len(members[program]) > 1 else size
        for program, size in sizes.items()
    }


def _resident(fields: list[str]) -> int:
    return int(fields[PAGES]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > PAGES else 0


def _proportional(process: int) -> int:
    """Return the memory of a process, where a page that n processes share counts as 1/n."""
    with suppress(OSError):
        for line in (PROCESSES / str(process) / "smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Pss":
                return int(value.split()[0]) * 1024
    return 0
