"""The folder of a run, for the files of questions and answers. It is removed at the end, or by the next run."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from mha_spec.errors import MhaSpecError

from .process import kill_marked

__all__ = ["Scratch", "ScratchError"]

PREFIX = "mha-spec-"
LOCK = "lock"

MEMORY = Path("/dev/shm")
"""A folder in memory, used if it has enough space."""

ENOUGH_MEMORY = 2**28

ATTEMPTS = 10
"""The number of attempts to make a folder, because another run may remove it before it is locked."""


class ScratchError(MhaSpecError):
    """The folder of the run cannot be made."""


class Scratch:
    """A folder that is locked as long as its run lives."""

    def __init__(self) -> None:
        """Remove the folders of runs that were killed, and make a folder.

        Raises:
            ScratchError: There is no place where a folder can be made.
        """
        try:
            temporary = Path(gettempdir())
            for parent in (MEMORY, temporary):
                for folder in parent.glob(f"{PREFIX}*"):
                    _remove_left(folder)
            self.path, self._lock = _locked_folder(MEMORY if _has_space(MEMORY) else temporary)
        except OSError as error:
            raise ScratchError(f"the folder for temporary files cannot be made: {error}") from error

    def folder(self, name: str) -> Path:
        """Make a subfolder."""
        path = self.path / name
        path.mkdir(exist_ok=True, parents=True)
        return path

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _has_space(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= ENOUGH_MEMORY


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """Make a folder and lock it."""
    for _ in range(ATTEMPTS):
        path = Path(mkdtemp(prefix=PREFIX, dir=parent))
        if (lock := _lock(path)) is not None:
            return path, lock
    raise OSError(f"no folder in {parent} can be locked")


def _lock(folder: Path) -> int | None:
    """Lock a folder; return None if another run has locked it, or removed it before it was locked here."""
    with suppress(OSError):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                return lock
        os.close(lock)
    return None


def _remove_left(folder: Path) -> None:
    """Remove a folder whose run has ended, and kill the processes of that run."""
    if (lock := _lock(folder)) is None:
        return
    for worker in folder.iterdir():
        kill_marked(worker)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
