"""Run the program of a target in a new session, and kill it together with all processes that it started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mha_spec_conformance.suite.text import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LAUNCH",
    "PREPARE",
    "PROCESSES",
    "SESSION",
    "STATE",
    "Process",
    "adopt_orphans",
    "fields_of",
    "kill_marked",
    "maps_of",
    "other_processes",
]

MARK = "MHA_SPEC_SCRATCH"
"""The environment variable that marks all processes of a run with the folder of the run."""

PREPARE = (
    "import ctypes, sys; sys.platform == 'linux' and [ctypes.CDLL(None).prctl(*call) for call in ((1, 9), (36, 1))]"
)
"""Python code by which Linux kills the process when its parent ends, and makes it the parent of all processes below it.

Both hold after it has become another program. The process runs this code itself: code between fork and exec would run
in a copy of a parent that may have threads.
"""

PR_SET_CHILD_SUBREAPER = 36

LAUNCH = f"{PREPARE}; import os; os.execvp(sys.argv[1], sys.argv[1:])"
"""Python code that becomes the program in its arguments."""

KEPT_BYTES = 4096
"""The part of the printed text that is kept: the end."""

ROUNDS = 20
"""The number of searches for processes of a run, because a process may fork while the others are killed."""

PROCESSES = Path("/proc")

STATE, PARENT, SESSION = 0, 1, 3
"""Places in /proc/PID/stat after the name of the program."""


class _Adoption:
    """The children of this process that are not orphans of a program, if orphans become its children."""

    active = False
    others: ClassVar[set[int]] = set()


def adopt_orphans() -> None:
    """Become the parent of the processes whose program ends by itself, so that they are killed wherever they moved.

    From now on, each other child that leads or joins another session is killed at the end of a program. So only a
    process that starts nothing but programs may call this, as the command line does.
    """
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0:
        _Adoption.active = True
        _Adoption.others.update(_children_in_other_sessions())


class Process:
    """A program, its pipes, and the end of what it printed."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        """Start the program; its environment names the folder.

        Raises:
            OSError: The program cannot be started.
        """
        self._folder = folder
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, MARK: str(folder)},
            start_new_session=True,
        )
        _Adoption.others.add(self._popen.pid)
        streams = self._popen.stdin, self._popen.stdout, self._popen.stderr
        self._stdin, self._stdout, self._stderr = (stream.fileno() for stream in streams if stream is not None)
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._unsent = self._unread = self._printed = b""
        self._closed = False
        self._stopped = threading.Event()
        self._drain = threading.Thread(target=self._keep_end_of_printed, daemon=True)
        self._drain.start()

    def _keep_end_of_printed(self) -> None:
        """Read what the program prints, so that it never waits, and keep the end."""
        while not self._stopped.is_set():
            if wait([self._stderr], timeout=0.1):
                read = os.read(self._stderr, 2**16)
                if not read:
                    return
                self._printed = (self._printed + read)[-KEPT_BYTES:]

    @property
    def id(self) -> int:
        """The id of the program, which is also that of its session."""
        return self._popen.pid

    @property
    def waited_for(self) -> int:
        """The descriptor that becomes readable when there is something to read, or the program ends."""
        return self._stdout

    @property
    def ended(self) -> bool:
        """True if the program ended, or closed its standard output; what it wrote can still be read."""
        return self._closed or self._popen.poll() is not None

    def send(self, line: bytes) -> None:
        """Write a line, as much of it as the pipe takes; the rest follows when more is sent or read."""
        self._unsent += line
        with suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                self._unsent = self._unsent[os.write(self._stdin, self._unsent) :]

    def lines(self, most_bytes: int) -> list[bytes]:
        """Read the lines that have arrived; a line that exceeds the limit is returned in parts."""
        self.send(b"")
        while not self._closed:
            try:
                read = os.read(self._stdout, 2**16)
            except BlockingIOError:
                break
            self._closed = not read
            self._unread += read
            if len(self._unread) > most_bytes:
                break
        *lines, self._unread = self._unread.split(b"\n")
        if len(self._unread) > most_bytes:
            lines.append(self._unread)
            self._unread = b""
        return lines

    def ending(self) -> str:
        """Describe how the program ended, with the last line that it printed."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)
        code = self._popen.returncode
        if code is None:
            how = "closed its standard output"
        else:
            how = f"ended with exit status {code}" if code >= 0 else f"ended with signal {_name_of(-code)}"
        self._drain.join(0.3)
        lines = self._printed.decode(errors="replace").strip().splitlines()
        return f"the process {how}" + (f"; last printed: {one_line(lines[-1], 200)}" if lines else "")

    def stop(self) -> None:
        """Kill the program and all processes that it started."""
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None:
                stream.close()
        if self._popen.poll() is None:
            _kill_descendants(self._popen.pid)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.kill()
        self._popen.wait()
        _Adoption.others.discard(self._popen.pid)
        kill_marked(self._folder)
        if _Adoption.active:
            _kill_adopted()
        self._stopped.set()
        self._drain.join()
        if self._popen.stderr is not None:
            self._popen.stderr.close()


def _name_of(number: int) -> str:
    """Name a signal; real-time signals have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _kill_descendants(program: int) -> None:
    """Kill all processes below a program, wherever they moved; it is stopped first, so that it starts no others."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(program, signal.SIGSTOP)
    for _ in range(ROUNDS):
        descendants = _descendants(program)
        for process in descendants:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if not descendants:
            return
        time.sleep(0.01)


def _kill_adopted() -> None:
    """Kill the orphans of programs; their children are adopted next. A program has a session different from ours."""
    for _ in range(ROUNDS):
        orphans = _children_in_other_sessions() - _Adoption.others
        for process in orphans:
            with suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        if not orphans:
            return


def _children_in_other_sessions() -> set[int]:
    fields = {process: fields_of(process) for process in other_processes()}
    children = {process: field for process, field in fields.items() if field and int(field[PARENT]) == os.getpid()}
    return {process for process, field in children.items() if int(field[SESSION]) != os.getsid(0)}


def _descendants(program: int) -> set[int]:
    """Find the running processes below a program."""
    fields = {process: fields_of(process) for process in other_processes()}
    parents = {process: int(field[PARENT]) for process, field in fields.items() if field and field[STATE] != "Z"}
    descendants: set[int] = set()
    level = {program}
    while level:
        level = {process for process, parent in parents.items() if parent in level}
        descendants |= level
    return descendants


def fields_of(process: int) -> list[str]:
    """Read the state of a process; nothing if it has ended."""
    try:
        return (PROCESSES / str(process) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def maps_of(process: int) -> int:
    """Count the memory maps of a process; none if it has ended, or the system has no /proc."""
    try:
        return (PROCESSES / str(process) / "maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def kill_marked(folder: Path) -> None:
    """Kill the processes whose environment names the folder, and those that they forked, wherever they moved."""
    mark = f"{MARK}={folder}".encode()
    for _ in range(ROUNDS):
        marked = [process for process in other_processes() if _has_mark(process, mark)]
        for process in marked:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if not marked:
            return
        time.sleep(0.01)


def other_processes() -> list[int]:
    """List the other processes of the machine; a system without /proc lists none."""
    if not PROCESSES.is_dir():
        return []
    numbers = [int(entry.name) for entry in PROCESSES.iterdir() if entry.name.isdigit()]
    return [number for number in numbers if number != os.getpid()]


def _has_mark(process: int, mark: bytes) -> bool:
    """Tell whether a process runs with the mark in its environment; an ended process has no environment."""
    try:
        return mark in (PROCESSES / str(process) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
