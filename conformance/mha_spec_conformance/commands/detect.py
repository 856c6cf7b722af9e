"""`mha-spec detect`: read the conventions of a target off its answers, and print them."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from rich.table import Table

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.reporting.terminal import Bar, console
from mha_spec_conformance.running.detecting import detect as detection_of
from mha_spec_conformance.suite.cases import load

from .reports import UsageError, check_output

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from mha_spec_conformance.running.detecting import Detection

__all__ = ["detect"]

SCHEMA = "mha-spec-conventions/1"


def detect(target: str, *, json_file: Path | None = None, limit: float = 60.0) -> None:
    """Ask the target a few questions about each convention, print a table of its readings, and write them to a file.

    Raises:
        TargetError: The target cannot be loaded.
        NothingToJudge: No answer can be compared.
        UsageError: The file cannot be written.
    """
    check_output("--json", json_file, SCHEMA.encode())
    screen = console()
    with Pool(target, limit=limit) as pool, Bar(screen, target) as bar:
        detection = detection_of(pool, load(), bar)
    _print(screen, target, detection)
    if json_file is not None:
        _write(json_file, target, detection)


def _print(screen: Console, target: str, detection: Detection) -> None:
    table = Table("convention", "reading", "evidence", box=None, pad_edge=False)
    for reading in detection.readings:
        name = reading.convention if reading.dtype is None else f"{reading.convention}, {reading.dtype}"
        table.add_row(name, reading.variant, reading.evidence)
    screen.print(table, markup=False)
    for note in detection.notes:
        screen.print(f"\nNote: {note}.", markup=False, highlight=False)
    if detection.accepted:
        accepted = " ".join(f"--accept {convention}" for convention in detection.accepted)
        screen.print(f"\nIf all of this is intended: mha-spec check {shlex.quote(target)} {accepted}", soft_wrap=True)
    for name, value in detection.declared.items():
        screen.print(f"\nFor the target file: {name} = {json.dumps(value)}", markup=False, soft_wrap=True)


def _write(path: Path, target: str, detection: Detection) -> None:
    data = {
        "schema": SCHEMA,
        "target": target,
        "conventions": [vars(reading) for reading in detection.readings],
        "accept": list(detection.accepted),
        "declare": detection.declared,
        "notes": list(detection.notes),
    }
    try:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path}: {error.strerror}") from error
