"""The files to which a command writes the report of a run, each in its format."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.reporting.html import FORMAT, write_html
from mha_spec_conformance.reporting.junit import write_junit
from mha_spec_conformance.reporting.markdown import write_markdown
from mha_spec_conformance.reporting.report import SCHEMA, write_json
from mha_spec_conformance.reporting.terminal import print_run
from mha_spec_conformance.running.runner import NothingToJudge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from mha_spec_conformance.running.run import Run

__all__ = ["Reports", "UsageError", "check_output", "conclude", "writing"]


class UsageError(MhaSpecError):
    """An option has an invalid value."""


@dataclass(frozen=True)
class Reports:
    """The files of a report; None is not written. Markdown is appended to its file, the others replace theirs."""

    json: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    html: Path | None = None

    def prepare(self) -> None:
        """Make sure that the files can be written, and remove those of an earlier run."""
        check_output("--json", self.json, SCHEMA.encode())
        check_output("--junit", self.junit, b"<testsuites")
        check_output("--markdown", self.markdown)
        check_output("--html", self.html, FORMAT.encode())
        for path in (self.json, self.junit, self.html):
            # An old report could be mistaken for the new report; devices and links are kept.
            if path is not None and path.is_file() and not path.is_symlink():
                path.unlink()

    def write(self, run: Run) -> UsageError | None:
        """Write all files; return the first error, which is shown after the verdict."""
        errors: list[UsageError] = []
        for option, path, write in self._writers():
            try:
                with writing(option, path):
                    write(run, path)
            except UsageError as error:
                errors.append(error)
        return errors[0] if errors else None

    def record(self, run: Run) -> None:
        """Write the JSON report of a target that could not be judged, so that `mha-spec matrix` shows it as such.

        The other files are not written, because a test report without a failure looks like a success.
        """
        with suppress(OSError):  # the reason why the target could not be judged is the error that is shown
            if self.json is not None:
                write_json(run, self.json)

    def _writers(self) -> Iterator[tuple[str, Path, Callable[[Run, Path], None]]]:
        for option, path, write in (
            ("--json", self.json, write_json),
            ("--junit", self.junit, write_junit),
            ("--markdown", self.markdown, write_markdown),
            ("--html", self.html, write_html),
        ):
            if path is not None:
                yield option, path, write


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Report a file that cannot be written as an error of the option."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error


def conclude(screen: Console, result: Run, reports: Reports) -> int:
    """Write the reports, print the verdict, and return the exit status."""
    if not result.deciding:
        reports.record(result)
        raise NothingToJudge(f"target {result.claims.name}: {result.verdict}")
    fault = reports.write(result)
    print_run(screen, result)
    if fault is not None:
        raise fault
    return result.status


def check_output(option: str, path: Path | None, form: bytes | None = None) -> None:
    """Raise if the file cannot be written, or if it exists and does not have the form that the option writes."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option} {path}: this is a folder, or there is no folder {path.parent}")
    if form is not None and path.is_file() and not _has_form(path, form):
        raise UsageError(f"{option} {path}: the file exists and does not hold {form.decode()}; choose another name")


def _has_form(path: Path, form: bytes) -> bool:
    """Tell whether a file is empty, or has the form at its beginning."""
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return not start or (start[:1] in b"{<" and form in start)
