"""Runs of the suite, as tests compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mha_spec_conformance.running.run import Run

__all__ = ["outcomes"]


def outcomes(run: Run, folder: str = "") -> dict[str, str]:
    """Return the outcome of every case by its id, of which the folder is left out."""
    return {result.ask.case.id.removeprefix(folder): result.outcome for result in run.results}
