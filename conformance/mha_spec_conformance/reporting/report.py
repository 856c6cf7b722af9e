"""Write the report of a run as a JSON file."""

from __future__ import annotations

import json
import math
import platform
from typing import TYPE_CHECKING, Any

from mha_spec_conformance.judging.bounds import RULE_VERSION

from .files import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mha_spec_conformance.judging.causes import Cause, Story
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.running.run import Run

__all__ = ["SCHEMA", "as_json", "is_whole", "label_of", "write_json"]

SCHEMA = "mha-spec-report/1"


def as_json(run: Run) -> dict[str, object]:
    """Return the report of a run as plain data."""
    features = {feature for result in run.musts for feature in result.ask.features}
    return {
        **_origin(run),
        "selection": {
            "only": list(run.selection.only),
            "dtypes": list(run.selection.dtypes),
            "exclude": list(run.selection.exclude),
            "shard": None if run.selection.shard is None else list(run.selection.shard),
        },
        "complete": run.complete,
        "verdict": run.verdict,
        "status": run.status,
        "accepted": [str(convention) for convention in sorted(run.accepted)],
        "known": [
            {"id": entry.id, "dtype": entry.dtype, "outcome": entry.outcome, "reason": entry.reason}
            for entry in run.known
        ],
        "summary": run.summary,
        "should": run.tally(result for result in run.results if not result.must),
        "features": {name: run.tally_of(name) for name in sorted(features)},
        "conventions": run.conventions,
        "refused": {name: {"refused": part, "asked": whole} for name, (part, whole) in run.refused.items()},
        "failing_features": list(run.failing_features),
        "shared": _story(run.findings.story),
        "diagnosis": [
            {"variant": cause.name, "explains": len(cause.results), "clauses": list(cause.clauses)}
            for cause in run.findings.causes
            if cause.kind == "mistake"
        ],
        "causes": [_cause(cause) for cause in run.findings.causes],
        "laws": [
            {"law": law.name, "same": law.same, "close": law.close, "broken": list(law.broken)} for law in run.laws
        ],
        "notes": [*run.notes, *run.statistics, *run.stale],
        "cases": [_case(run.findings.with_cause(result)) for result in run.results],
    }


def _origin(run: Run) -> dict[str, object]:
    """Describe the target, the suite and the machine of a run."""
    claims = run.claims
    deterministic = [result.deterministic for result in run.results if result.deterministic is not None]
    return {
        "schema": SCHEMA,
        "spec_version": run.suite.spec_version,
        "suite": {
            "version": run.suite.version,
            "goldens_sha256": run.suite.goldens_sha256,
            "accuracy_rule": RULE_VERSION,
        },
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": claims.hardware,
            "libraries": dict(claims.versions),
        },
        "target": {
            "name": claims.name,
            "versions": dict(claims.versions),
            "features": list(claims.features),
            "dtypes": list(claims.dtypes),
            "conventions": dict(claims.conventions),
            "profile": claims.profile,
            "ranks": claims.ranks,
            "rank_layout": claims.rank_layout,
            "deterministic": all(deterministic) if deterministic else None,
        },
    }


def _cause(cause: Cause) -> dict[str, object]:
    return {
        "kind": cause.kind,
        "name": cause.name,
        "others": list(cause.others),
        "failures": len(cause.results),
        "clauses": list(cause.clauses),
        "features": list(cause.features),
        **(_story(cause.story) or {}),
        "cases": [{"id": result.ask.case.id, "dtype": result.ask.dtype} for result in cause.results],
    }


def _story(story: Story | None) -> dict[str, object] | None:
    """Return what failures share, the places of their wrong elements and keys; None without failures."""
    if story is None:
        return None
    share = story.share and {
        "properties": list(story.share.properties),
        "failures": [story.share.failures, story.share.of_failures],
        "passes": [story.share.passes, story.share.of_passes],
    }
    places, amounts = (
        [{"text": place.text, "failures": [place.failures, place.of_failures]} for place in kind]
        for kind in (story.places, story.amounts)
    )
    keys = story.keys and {"text": story.keys.text, "id": story.keys.case, "dtype": story.keys.dtype}
    return {"share": share, "places": places, "amounts": amounts, "keys": keys}


def _case(result: Result) -> dict[str, object]:
    worst = result.worst
    return {
        "id": result.ask.case.id,
        "function": result.ask.case.function,
        "dtype": result.ask.dtype,
        "clauses": list(result.clauses),
        "features": list(result.ask.features),
        "level": result.ask.level,
        "outcome": result.outcome,
        "reason": result.reason,
        "allowance_used": _number(result.allowance_used),
        "worst": worst
        and {
            "output": worst.output,
            "index": [int(i) for i in worst.index],
            "expected": _number(worst.expected),
            "got": _number(worst.got),
            "allowance": _number(worst.allowance),
        },
        "diagnosis": list(result.diagnosis),
        "conventions": [str(convention) for convention in result.conventions],
        "seconds": round(result.seconds, 6),
    }


def _number(value: float | None) -> float | str | None:
    """Convert a number for JSON, which has neither NaN nor infinity: these become strings."""
    return None if value is None else float(value) if math.isfinite(value) else str(float(value))


def is_whole(report: Mapping[str, Any]) -> bool:
    """Tell whether the run of a report asked everything that the target claims."""
    return report["complete"] and not any(report["selection"].values())


def label_of(report: Mapping[str, Any]) -> str:
    """Return the verdict of a report in a few words; only a complete run is called conformant or not."""
    passed = report["status"] == 0
    if report["status"] == 2:
        return "not judged"
    if not is_whole(report):
        return f"partial run, {'passed' if passed else 'failed'}"
    if not report["verdict"].startswith("conformant"):
        return "only known failures, not conformant" if passed else "not conformant"
    if not passed:
        return "requirements not met"
    return "conformant, with accepted conventions" if report["accepted"] else "conformant"


def write_json(run: Run, path: Path) -> None:
    """Write the report of a run to a file, which is never seen half written; a device is written to directly.

    Raises:
        OSError: The file cannot be written.
    """
    write_text(path, json.dumps(as_json(run), indent=1, allow_nan=False) + "\n")
