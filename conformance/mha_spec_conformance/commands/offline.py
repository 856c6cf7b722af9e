"""`mha-spec export` and `mha-spec verify`: judge a program on a machine without Python."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec_conformance.asking.protocol import PROTOCOL, claims_from
from mha_spec_conformance.reporting.terminal import Bar, console
from mha_spec_conformance.running import offline
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims

from .check import among, selection_of, settings_of
from .reports import Reports, UsageError, conclude

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["export", "verify"]

NO_REPORTS = Reports()


def export(
    folder: Path,
    claims: Path | None,
    functions: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> str:
    """Write the questions to a folder, and return instructions for the next step."""
    if (claims is None) == (not functions):
        raise UsageError("export needs either --claims FILE, or --functions as in --functions attention")
    suite = load()
    selection = selection_of(suite, only, dtypes if claims is not None else ())
    claimed = _read(claims) if claims is not None else _all_options(functions, dtypes)
    count = offline.export(folder, claimed, suite, selection)
    return (
        f"wrote {count} questions to {folder}; run the program there, as in "
        f"`./program < questions.jsonl > answers.jsonl`, then judge it with: mha-spec verify {folder}"
    )


def _read(path: Path) -> Claims:
    try:
        message = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--claims {path}: cannot be read as JSON: {error}") from error
    if not isinstance(message, dict):
        raise UsageError(f"--claims {path}: must be a JSON object, as docs/protocol.md describes it")
    return claims_from({"message": "claims", "protocol": PROTOCOL} | message, str(path), trusted=False)


def _all_options(functions: tuple[str, ...], dtypes: tuple[str, ...]) -> Claims:
    """Claim functions with all of their options; the program answers `unsupported` to those that it does not have."""
    return Claims(
        name="the program",
        keywords={name: FUNCTIONS[name].claims for name in among("--functions", functions, tuple(FUNCTIONS))},
        dtypes=among("--dtypes", dtypes, FLOATING) or ("float32",),
    )


def verify(
    folder: Path,
    required: tuple[str, ...] = (),
    accepted: tuple[str, ...] = (),
    known: Path | None = None,
    reports: Reports = NO_REPORTS,
) -> int:
    """Judge the answers in a folder, print the verdict, write the report, and return the exit status."""
    suite = load()
    settings = settings_of(suite, required, accepted, known)
    reports.prepare()
    screen = console()
    with Bar(screen, str(folder)) as bar:
        result = offline.verify(folder, suite, settings, bar)
    return conclude(screen, result, reports)
