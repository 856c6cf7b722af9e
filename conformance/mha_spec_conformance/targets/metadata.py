"""Read the inline metadata of a target file, a comment that names the packages which the file needs (PEP 723)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["dependencies"]

BLOCK = re.compile(r"^# /// script\n(?P<lines>(?:#(?: .*)?\n)+)# ///$", re.MULTILINE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def dependencies(module: ModuleType) -> tuple[str, ...]:
    """Return the names of the packages in the metadata of the module's file; without readable metadata, none."""
    try:
        block = BLOCK.search(Path(str(module.__file__)).read_text(encoding="utf-8"))
        lines = block["lines"].splitlines() if block else []
        listed = tomllib.loads("\n".join(line[2:] for line in lines)).get("dependencies", [])
        names = [NAME.match(requirement) for requirement in listed]
    except (AttributeError, OSError, TypeError, ValueError):
        return ()  # the metadata only adds versions to the report
    return tuple(name[0] for name in names if name is not None)
