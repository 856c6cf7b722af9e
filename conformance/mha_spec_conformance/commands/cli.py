"""The command line. A command imports frameworks, goldens and the library of the terminal only if it needs them."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.suite.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

app = typer.Typer(
    name="mha-spec",
    help="Read the specification of multi-head attention, and judge implementations by it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

Names = list[str] | None
TARGET = typer.Argument(help="A backend, package.module:function, or path/to/file.py[:function].")
Only = Annotated[
    Names, typer.Option(help="Ask only cases whose id matches or contains this pattern, or that cite this clause.")
]
Dtypes = Annotated[Names, typer.Option(help="Ask only in these dtypes, as in float32,float16.")]
Require = Annotated[Names, typer.Option(help="Fail if any of these features was not asked, as in mask,causal.")]
Accept = Annotated[Names, typer.Option(help="Accept a deviation that you intend, as in mask_polarity=true_hides.")]
Known = Annotated[Path | None, typer.Option(help="TOML file of known failures: [[known]] with id and reason.")]
Report = Annotated[Path | None, typer.Option(help="Write the report to this file.")]
Junit = Annotated[Path | None, typer.Option(help="Write the report as JUnit XML to this file.")]
Markdown = Annotated[
    Path | None, typer.Option(help="Append the report as Markdown to this file, as to $GITHUB_STEP_SUMMARY.")
]
Html = Annotated[Path | None, typer.Option(help="Write the report as a page to this file, which needs no other file.")]
MaxFail = Annotated[int | None, typer.Option(min=1, help="Stop after this number of failures.")]
Jobs = Annotated[int, typer.Option(min=1, help="Worker processes.")]
Timeout = Annotated[float, typer.Option(min=0.01, help="Time limit of a call in seconds.")]
Cases = Annotated[Path | None, typer.Option(help="Ask the cases in this folder (see `fuzz --save`).")]
Command = Annotated[
    str | None, typer.Option(help="Judge this program, in any language, instead of TARGET (docs/protocol.md).")
]
Memory = Annotated[
    str | None,
    typer.Option(help="Most memory of a worker, as in 8G; by default, all workers have half of the machine's."),
]
Results = Annotated[Path | None, typer.Option(help="Append each result to this file of JSON lines.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that wrote the --results file.")]
Exclude = Annotated[
    Names, typer.Option(help="Leave out cases whose id matches or contains this pattern, or that cite this clause.")
]
Shard = Annotated[str | None, typer.Option(help="Ask only part I of N parts of similar cost, as in 1/4; see `merge`.")]

NOT_JUDGED = 2
INTERRUPTED = 130

TRACEBACK = "MHA_SPEC_TRACEBACK"
"""The environment variable that, if it is 1, prints the traceback of an internal error."""


def main() -> None:
    """Run the command line; an error of the user or of the suite is a line on stderr and exit status 2."""
    _prepare_output()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    try:
        app()
    except MhaSpecError as error:
        print(f"mha-spec: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(NOT_JUDGED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        _report(error)
        sys.exit(NOT_JUDGED)


def _prepare_output() -> None:
    """Make output that is closed, or that cannot show a character, an output that takes everything."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _end(number: int, frame: object) -> None:
    """End the run as an exception does, so that its processes and files are removed."""
    sys.exit(128 + number)


def _report(error: Exception) -> None:
    """Print an internal error in a line, after its traceback if the environment asks for that."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    message = printable(" ".join(f"{type(error).__name__}: {error}".split()))
    print(f"mha-spec: internal error: {message}; please report it", file=sys.stderr)


def _end_with_status(function: Callable[..., int], /, *arguments: object, **options: object) -> NoReturn:
    """Run the function of a command, and end with its exit status, or with another if the user interrupts it."""
    try:
        status = function(*arguments, **options)
    except KeyboardInterrupt:
        print("mha-spec: interrupted", file=sys.stderr)
        status = INTERRUPTED
    raise typer.Exit(status)


def _names(values: Names) -> tuple[str, ...]:
    """Split `a,b c` and repeated options into names."""
    return tuple(name for value in values or () for name in value.replace(",", " ").split())


@app.command()
def check(
    target: Annotated[str | None, TARGET] = None,
    only: Only = None,
    require: Require = None,
    accept: Accept = None,
    known: Known = None,
    json: Report = None,
    junit: Junit = None,
    markdown: Markdown = None,
    html: Html = None,
    max_fail: MaxFail = None,
    jobs: Jobs = 1,
    dtypes: Dtypes = None,
    timeout: Timeout = 60.0,
    cases: Cases = None,
    command: Command = None,
    memory: Memory = None,
    results: Results = None,
    resume: Resume = False,
    exclude: Exclude = None,
    shard: Shard = None,
) -> None:
    """Judge a target. The exit status is 0 if every case passed, 1 if not, and 2 if the target cannot be judged."""
    from . import check as checking
    from .reports import Reports, UsageError

    if (target is None) is (command is None):
        raise UsageError("either TARGET or --command must be given, and not both")
    _end_with_status(
        checking.check,
        target=target or str(command),
        only=tuple(only or ()),
        required=_names(require),
        accepted=tuple(accept or ()),
        known=known,
        reports=Reports(json, junit, markdown, html),
        max_fail=max_fail,
        jobs=jobs,
        dtypes=_names(dtypes),
        limit=timeout,
        cases=cases,
        command=command,
        memory=memory,
        results=results,
        resume=resume,
        exclude=tuple(exclude or ()),
        shard=shard,
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="An empty folder for the questions.")],
    claims: Annotated[
        Path | None, typer.Option(help="JSON file with the claims of the program: its reply to hello.")
    ] = None,
    functions: Annotated[
        Names, typer.Option(help="Without --claims: these functions, with all of their options.")
    ] = None,
    dtypes: Dtypes = None,
    only: Only = None,
) -> None:
    """Write the questions to a folder, for a program that answers them on a machine without Python."""
    from . import offline

    print(offline.export(folder, claims, _names(functions), _names(dtypes), tuple(only or ())))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `export` made, with answers.jsonl.")],
    require: Require = None,
    accept: Accept = None,
    known: Known = None,
    json: Report = None,
    junit: Junit = None,
    markdown: Markdown = None,
    html: Html = None,
) -> None:
    """Judge the answers in a folder. The exit status is that of `check`; a question without an answer is an error."""
    from . import offline
    from .reports import Reports

    reports = Reports(json, junit, markdown, html)
    _end_with_status(offline.verify, folder, _names(require), tuple(accept or ()), known, reports)


@app.command()
def merge(
    report: Annotated[list[Path], typer.Argument(help="The reports of all shards: check --shard I/N --json FILE.")],
    require: Require = None,
    json: Report = None,
    junit: Junit = None,
    markdown: Markdown = None,
    html: Html = None,
) -> None:
    """Join the reports of the shards of a run. The exit status is that of `check` without shards."""
    from . import merge as merging
    from .reports import Reports

    _end_with_status(merging.merge, report, _names(require), Reports(json, junit, markdown, html))


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="The report of the old version: check --json FILE.")],
    new: Annotated[Path, typer.Argument(help="The report of the new version.")],
    markdown: Annotated[
        Path | None, typer.Option(help="Append the changes as Markdown to this file, as to $GITHUB_STEP_SUMMARY.")
    ] = None,
) -> None:
    """Print what changed between two reports of a target. The exit status is 1 with a regression, and else 0."""
    from .diff import diff as difference

    _end_with_status(difference, old, new, markdown)


@app.command()
def matrix(
    report: Annotated[list[Path], typer.Argument(help="The reports of several targets: check --json FILE.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the matrix as a page to this file, which needs no other.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Append the matrix as Markdown to this file.")] = None,
    badge: Annotated[
        list[Path] | None, typer.Option(help="Write a badge to this .svg file, or for shields.io to this .json file.")
    ] = None,
) -> None:
    """Put the reports of several targets side by side, clause by clause."""
    from .matrix import show_matrix

    _end_with_status(show_matrix, report, html, markdown, tuple(badge or ()))


@app.command()
def fuzz(
    target: Annotated[str, TARGET],
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of the search in seconds.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same calls.")] = 0,
    world: Annotated[
        str | None, typer.Option(help="Call a registered backend in this way: jit, vmap, compile, function, ...")
    ] = None,
    only: Annotated[Names, typer.Option(help="Call only these functions, as in attention.")] = None,
    accept: Accept = None,
    save: Annotated[Path | None, typer.Option(help="Write the faults as cases to this folder.")] = None,
    max_fail: MaxFail = None,
    calls: Annotated[int | None, typer.Option(min=1, help="Stop after this number of judged calls.")] = None,
    timeout: Timeout = 60.0,
) -> None:
    """Ask a target random calls. The exit status is 0 without a fault, 1 with a fault, and 2 if no call was judged."""
    from . import fuzz as fuzzing

    _end_with_status(
        fuzzing.fuzz,
        target=target,
        seconds=seconds,
        seed=seed,
        world=world,
        functions=_names(only),
        accepted=tuple(accept or ()),
        folder=save,
        max_fail=max_fail,
        most_calls=calls,
        limit=timeout,
    )


@app.command()
def repro(
    target: Annotated[str, TARGET],
    case: Annotated[str, typer.Argument(help="The id of a case that the target fails.")],
    dtype: Annotated[str | None, typer.Option(help="The dtype; by default, the first in which the case fails.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to reduce the case in seconds.")] = 30.0,
) -> None:
    """Reduce a case that the target fails, and print a script that shows the fault without the suite."""
    from .repro import repro as reproduction

    print(reproduction(target, case, dtype, seconds=seconds))


@app.command()
def detect(target: Annotated[str, TARGET], json: Report = None, timeout: Timeout = 60.0) -> None:
    """Print the conventions that a target follows, from its answers to a few questions about each."""
    from .detect import detect as detection

    detection(target, json_file=json, limit=timeout)


@app.command()
def new(file: Annotated[Path, typer.Argument(help="The file to write, as in my_attention.py.")]) -> None:
    """Write a target file to start from."""
    from .new import write_starter

    write_starter(file)
    print(f"wrote {file}; judge it with: mha-spec check {shlex.quote(str(file))}")


@app.command()
def explain(
    case: Annotated[str, typer.Argument(help="The id of a case; `mha-spec cases` lists all ids.")],
    dtype: Annotated[str | None, typer.Option(help="The dtype of the inputs.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write inputs and expected outputs to this .npz file.")] = None,
) -> None:
    """Show the formula and the numbers of a case, and how to call it without the suite."""
    from .explain import explain as explanation

    print(explanation(case, dtype, save))


@app.command()
def spec(
    clause: Annotated[str | None, typer.Argument(help="A clause, as in MHA-MASK-1.")] = None,
) -> None:
    """Print a clause of the specification, or list all clauses."""
    from . import listing

    print(listing.clause_text(clause) if clause else listing.all_clauses())


@app.command()
def backends() -> None:
    """List the backends: origin, versions, and the features of each, or the packages that it needs."""
    from . import listing

    print(listing.all_backends())


@app.command()
def cases(
    pattern: Annotated[
        str | None,
        typer.Argument(help="List only cases whose id matches or contains this pattern, or that cite this clause."),
    ] = None,
    *,
    kinds: Annotated[
        bool, typer.Option("--kinds", help="Count the cases that each kind of real attention can be asked, by option.")
    ] = False,
) -> None:
    """List the cases: id, level and title."""
    from . import listing

    print(listing.all_kinds(pattern) if kinds else listing.all_cases(pattern))
