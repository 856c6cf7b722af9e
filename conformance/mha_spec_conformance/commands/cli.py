"""The command line. Frameworks, goldens and the terminal's library come in only where a command needs them."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from mha_spec.errors import MhaSpecError

__all__ = ["app", "main"]

app = typer.Typer(
    name="mha-spec",
    help="Multi-head attention: what it means, and whether an implementation does it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

NOT_JUDGED = 2
INTERRUPTED = 130

TRACEBACK = "MHA_SPEC_TRACEBACK"
"""The environment variable that asks, with 1, for the traceback of an internal error."""


def main() -> None:
    """Run the command line; a mistake of the user, and one of ours, is one line on stderr and exit status 2."""
    try:
        app()
    except MhaSpecError as error:
        print(f"mha-spec: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(NOT_JUDGED)
    except BrokenPipeError:
        sys.stderr.close()
    except Exception as error:
        _report(error)
        sys.exit(NOT_JUDGED)


def _report(error: Exception) -> None:
    """Say that the fault is ours, with the traceback where it is asked for."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"mha-spec: internal error: {said}; please report", file=sys.stderr)


def _names(values: list[str] | None) -> tuple[str, ...]:
    """Split `a,b c` and repeated options into names."""
    return tuple(name for value in values or () for name in value.replace(",", " ").split())


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="A backend, package.module:function, or path/to/file.py[:function].")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Cases whose id matches this pattern or holds it, or that cite this clause."),
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option(help="Features that must have been asked, as in mask,causal.")
    ] = None,
    accept: Annotated[
        list[str] | None, typer.Option(help="A deviation that is meant, as in mask_polarity=true_hides.")
    ] = None,
    known: Annotated[
        Path | None, typer.Option(help="TOML file of known failures: [[known]] with id and reason.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    max_fail: Annotated[int | None, typer.Option(min=1, help="Stop after so many failures.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    dtypes: Annotated[list[str] | None, typer.Option(help="Only these dtypes, as in float32,float16.")] = None,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds that one case may take.")] = 60.0,
    cases: Annotated[Path | None, typer.Option(help="Ask the cases of this folder, as `fuzz --save` writes.")] = None,
) -> None:
    """Judge a target: 0 = all that was asked passed, 1 = not, 2 = it could not be judged."""
    from . import check as checking

    try:
        status = checking.check(
            target=target,
            only=tuple(only or ()),
            required=_names(require),
            accepted=tuple(accept or ()),
            known=known,
            json=json,
            max_fail=max_fail,
            jobs=jobs,
            dtypes=_names(dtypes),
            limit=timeout,
            cases=cases,
        )
    except KeyboardInterrupt:
        print("mha-spec: interrupted", file=sys.stderr)
        status = INTERRUPTED
    raise typer.Exit(status)


@app.command()
def fuzz(
    target: Annotated[str, typer.Argument(help="A backend, package.module:function, or path/to/file.py[:function].")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to search.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same calls.")] = 0,
    world: Annotated[
        str | None, typer.Option(help="How a backend of ours is called, as in jit, vmap, compile, function.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these functions, as in attention,attention_vjp.")] = None,
    accept: Annotated[
        list[str] | None, typer.Option(help="A deviation that is meant, as in mask_polarity=true_hides.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the faults as cases to this folder.")] = None,
    max_fail: Annotated[int | None, typer.Option(min=1, help="Stop after so many faults.")] = None,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds that one call may take.")] = 60.0,
) -> None:
    """Ask a target random calls: 0 = no fault was found, 1 = some were, 2 = it could not be judged."""
    from . import fuzz as fuzzing

    try:
        status = fuzzing.fuzz(
            target=target,
            seconds=seconds,
            seed=seed,
            world=world,
            functions=_names(only),
            accepted=tuple(accept or ()),
            folder=save,
            max_fail=max_fail,
            limit=timeout,
        )
    except KeyboardInterrupt:
        print("mha-spec: interrupted", file=sys.stderr)
        status = INTERRUPTED
    raise typer.Exit(status)


@app.command()
def new(file: Annotated[Path, typer.Argument(help="The file to write, as in my_attention.py.")]) -> None:
    """Write a target file to start from."""
    from .new import write_starter

    write_starter(file)
    print(f"wrote {file}; judge it with: mha-spec check {file}")


@app.command()
def explain(
    case: Annotated[str, typer.Argument(help="The id of a case, as `mha-spec cases` lists them.")],
    dtype: Annotated[str | None, typer.Option(help="The dtype of the inputs.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write inputs and expected outputs to this .npz file.")] = None,
) -> None:
    """Show a case in formula and numbers, and how to ask it without the suite."""
    from .explain import explain as explanation

    print(explanation(case, dtype, save))


@app.command()
def spec(
    clause: Annotated[str | None, typer.Argument(help="One clause, as in MHA-MASK-1; without, a list of all.")] = None,
) -> None:
    """Print a clause of the specification."""
    from . import listing

    print(listing.one_clause(clause) if clause else listing.all_clauses())


@app.command()
def backends() -> None:
    """List the backends: origin, versions, and what each supports or how to install what it needs."""
    from . import listing

    print(listing.all_backends())


@app.command()
def cases(
    pattern: Annotated[str | None, typer.Argument(help="Ids that match this pattern or hold it, or a clause.")] = None,
) -> None:
    """List the cases: id, level and title."""
    from . import listing

    print(listing.all_cases(pattern))
