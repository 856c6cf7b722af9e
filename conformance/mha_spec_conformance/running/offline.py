"""Export the questions of a run to a folder, and verify the answers that a program wrote there.

Both are runs of the suite. The export asks a source that writes every question, and counts every answer as right,
so that the run asks all that it can ask. To verify, the run asks a source that reads the answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.folder import Recorded, Recorder
from mha_spec_conformance.asking.selection import asks, probes
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.judging.result import Result

from .alignment import Alignment
from .runner import Settings, check_selection, judge_all, without_progress

if TYPE_CHECKING:
    from pathlib import Path

    from mha_spec_conformance.asking.question import Answer
    from mha_spec_conformance.asking.selection import Ask, Selection
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

    from .run import Run
    from .runner import Progress

__all__ = ["export", "verify"]


class _Everything(Judge):
    """Counts every answer as right."""

    def result(self, ask: Ask, answer: Answer) -> Result:
        """Let the ask pass."""
        return Result(ask, "pass")


def export(folder: Path, claims: Claims, suite: Suite, selection: Selection) -> int:
    """Write the questions to a target with these claims to an empty folder, and return their number.

    Raises:
        FolderError: The folder has contents, or cannot be written.
        NothingToJudge: The claims contain nothing that is selected.
    """
    check_selection(suite, claims, selection)  # raises before the folder is made
    recorder = Recorder(folder, claims, selection, suite)
    judge_all(recorder, _Everything(claims), suite, Settings(selection=selection))
    # Which alignment the answers will show is not known yet, so the questions of all that are possible are written.
    for name in probes(suite.cases, claims, selection):
        declared = Alignment(name).declared_by(claims)
        if asks(suite.cases, declared, selection):
            recorder.repeat(declared)
            judge_all(recorder, _Everything(claims), suite, Settings(selection=selection))
    return recorder.count


def verify(folder: Path, suite: Suite, settings: Settings, progress: Progress = without_progress) -> Run:
    """Judge the answers in a folder; the selection is that of the export, and a missing answer is an error.

    Raises:
        FolderError: The folder is not an export of this suite, or has no answers.
        NothingToJudge: None of the answers can be compared.
    """
    recorded = Recorded(folder, suite)
    settings = replace(settings, selection=recorded.selection)
    run = judge_all(recorded, Judge(recorded.claims, settings.accepted), suite, settings, progress)
    if not recorded.missing:
        return run
    note = f"questions without an answer: {len(recorded.missing)}, of which the first is {recorded.missing[0]}"
    return replace(run, notes=(*run.notes, note))
