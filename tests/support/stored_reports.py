"""JSON reports as `mha-spec check --json` writes them, with chosen results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CASE = "attention/mask/generic-1"


def entry(outcome: str, identity: str = CASE, dtype: str = "float32", **members: Any) -> dict[str, Any]:
    """Return a result as a report has it."""
    return {
        "id": identity,
        "function": "attention",
        "dtype": dtype,
        "clauses": ["MHA-MASK-1", "MHA-HEAD-1"],
        "features": ["mask"],
        "level": "MUST",
        "outcome": outcome,
        "reason": None if outcome == "pass" else f"the reason of {outcome}",
        "allowance_used": 0.25 if outcome == "pass" else None,
        "worst": None,
        "diagnosis": [],
        "conventions": [],
        "seconds": 0.01,
        **members,
    }


def cause(name: str, *entries: dict[str, Any], kind: str = "mistake") -> dict[str, Any]:
    """Return a cause as a report has it."""
    cases = [{"id": case["id"], "dtype": case["dtype"]} for case in entries]
    return {"kind": kind, "name": name, "others": [], "clauses": ["MHA-MASK-1"], "features": ["mask"], "cases": cases}


def report(*entries: dict[str, Any], version: str = "1.0", **members: Any) -> dict[str, Any]:
    """Return a report with the members that are read."""
    return {
        "schema": "mha-spec-report/1",
        "spec_version": "1.1",
        "suite": {"version": "1.1.0", "goldens_sha256": "ab" * 32, "accuracy_rule": "2"},
        "target": {
            "name": "my_attention.py",
            "versions": {"library": version},
            "features": ["mask"],
            "dtypes": ["float32", "float16"],
            "conventions": {},
            "profile": "standard",
        },
        "selection": {"only": [], "dtypes": [], "exclude": [], "shard": None},
        "complete": True,
        "verdict": "conformant on mask (1 of 1 passed)",
        "status": 0,
        "accepted": [],
        "known": [],
        "causes": [],
        "cases": list(entries),
        **members,
    }


def written(folder: Path, *reports: Any) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(reports))]
    for path, content in zip(paths, reports, strict=True):
        path.write_text(json.dumps(content))
    return paths
