"""The folder of a run, for the files of questions and answers. It is removed at the end, or by the next run."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from .process import kill_marked

__all__ = ["Scratch"]

PREFIX = "mha-spec-"
LOCK = "lock"

MEMORY = Path("/dev/shm")
"""A folder in memory, used if it has enough space."""

ENOUGH_MEMORY = 2**28


def _parent() -> Path:
    """Give the folder in which folders of runs lie."""
    usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ENOUGH_MEMORY
    return MEMORY if usable else Path(gettempdir())


class Scratch:
    """A folder that is locked as long as its run lives."""

    def __init__(self) -> None:
        """Remove what runs that were killed have left, and make a folder."""
        parent = _parent()
        for folder in parent.glob(f"{PREFIX}*"):
            _remove_left(folder)
        self.path = Path(mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def folder(self, name: str) -> Path:
        """Make a folder in it."""
        path = self.path / name
        path.mkdir(exist_ok=True, parents=True)
        return path

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_left(folder: Path) -> None:
    """Remove a folder whose lock nobody holds, and kill the processes of its run; one without a lock is being made."""
    with suppress(OSError):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for worker in folder.iterdir():
                kill_marked(worker)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
