"""Validate the accuracy rule: honest implementations stay within the allowance, planted mistakes do not.

    python conformance/accuracy/honest.py [--problems 500]

The program prints, for each dtype and output, the largest share of the allowance that an honest implementation uses and
its largest error in standard deviations, the same for kernels that read 1,000 keys and more in blocks and splits, then
by how much planted mistakes exceed their allowances, and both for packed and paged calls, rotations and layers. The
exit status is 1 if an honest implementation exceeds its allowance, or if a mistake in float32 or float16 does not.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated

import planted
import typer
from rich.console import Console
from rich.table import Table
from shares import PLANTED_PROBLEMS, REFUSED_IN, Shares
from trials import Tally, tally

from mha_spec.arrays import FLOATING
from mha_spec_conformance.judging.bounds import RULE_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""One thread per process, and no warnings of PyTorch about its private functions."""


def trials_of(dtype: str, first: int, count: int, each: int) -> Tally:
    """Run the trials of one dtype in a separate process, so that each formula is compiled once."""
    from frameworks import FRAMEWORKS

    return tally(dtype, first, count, each, FRAMEWORKS)


def layers_of(dtype: str, first: int, count: int) -> Shares:
    """Run the trials of layers in one dtype."""
    from layers import try_layers

    return try_layers(dtype, first, count)


def packed_of(dtype: str, first: int, count: int) -> Shares:
    """Run the trials of packed and paged calls in one dtype."""
    from packed import try_packed

    return try_packed(dtype, first, count)


def rotations_of(dtype: str, first: int, count: int) -> Shares:
    """Run the trials of rotations by given frequencies in one dtype."""
    from rotations import try_rotations

    return try_rotations(dtype, first, count)


def many_keys_of(dtype: str, first: int, count: int, each: int) -> Tally:
    """Run the trials of many keys in one dtype."""
    from many_keys import try_many_keys

    return try_many_keys(dtype, first, count, each)


def main(
    problems: Annotated[int, typer.Option(help="Random problems for each dtype.")] = 500,
    each: Annotated[int, typer.Option(help="NumPy variants that answer one problem.")] = 3,
    seed: Annotated[int, typer.Option(help="Number of the first problem.")] = 0,
    layers: Annotated[int, typer.Option(help="Random layers for each dtype.")] = 100,
    packed: Annotated[int, typer.Option(help="Random packed and paged calls for each dtype.")] = 60,
    rotations: Annotated[int, typer.Option(help="Random rotations for each dtype.")] = 200,
    many_keys: Annotated[int, typer.Option(help="Random problems with 1,000 keys and more for each dtype.")] = 12,
    kernels: Annotated[int, typer.Option(help="Kernels that answer one problem with many keys.")] = 5,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Try every dtype, print the tables and exit with 1 if the rule does not hold."""
    console, started, total, of_blocks = Console(width=120), time.monotonic(), Tally(), Tally()
    os.environ.update(ENVIRONMENT)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for part in pool.map(trials_of, FLOATING, *([value] * len(FLOATING) for value in (seed, problems, each))):
            total.add(part)
        # These are not tried in float64, because the goldens judge it.
        for part in pool.map(many_keys_of, FLOATING[1:], *([value] * 3 for value in (seed, many_keys, kernels))):
            of_blocks.add(part)
        trials = {packed_of: packed, rotations_of: rotations, layers_of: layers}
        shared = [sum_of(pool.map(trial, FLOATING[1:], [seed] * 3, [count] * 3)) for trial, count in trials.items()]
    console.print(outputs_table(total, "Honest, by output"), implementations_table(total, "Honest, by implementation"))
    console.print(outputs_table(of_blocks, "1,000 keys and more, by output"))
    console.print(implementations_table(of_blocks, "1,000 keys and more, by kernel"))
    table, overlooked = mistakes_table()
    console.print(table)
    total.refused += of_blocks.refused
    for shares in shared:
        console.print(*shares_tables(shares))
        total.refused += shares.refused
        overlooked += shares.overlooked
    for line in [*total.refused[:20], *overlooked]:
        console.print(f"[red]{line}[/red]", highlight=False)
    answers = sum(sum(counts.values()) for counts in (total.runs, of_blocks.runs, *(s.answers for s in shared)))
    seconds = time.monotonic() - started
    console.print(f"rule version {RULE_VERSION}: {answers} answers judged in {seconds:.0f} s")
    sys.exit(bool(total.refused or overlooked))


def outputs_table(total: Tally, title: str) -> Table:
    """Show by dtype and output the share of the allowance, and the error on generic data in standard deviations."""
    columns = ("dtype", "output", "elements", "largest share", "largest |z|", "largest rms z")
    table = Table(*columns, title=title)
    for key in total.used:
        z, rms = total.largest.get(key, 0.0), total.rms.get(key, 0.0)
        figures = (f"{total.elements[key]:,}", f"{total.used[key]:.3f}", f"{z:.2f}", f"{rms:.2f}" if rms else "")
        table.add_row(*key, *figures)
    return table


def implementations_table(total: Tally, title: str) -> Table:
    """Show by implementation and dtype the number of answers and the largest share of the allowance."""
    dtypes = [dtype for dtype in FLOATING if total.problems[dtype]]
    problems = [f"{dtype}, {total.problems[dtype]} problems" for dtype in dtypes]
    table = Table("implementation", *problems, title=f"{title}: answers, largest share in its profile")
    for name in dict.fromkeys(name for _, name in total.runs):
        cells = [(total.runs[dtype, name], total.used_by.get((dtype, name), 0.0)) for dtype in dtypes]
        table.add_row(name, *(f"{runs}, {share:.3f}" if runs else "" for runs, share in cells))
    return table


def sum_of(parts: Iterable[Shares]) -> Shares:
    """Join the shares of all dtypes."""
    joined, *others = parts
    for other in others:
        joined.add(other)
    return joined


def shares_tables(shares: Shares) -> tuple[Table, Table]:
    """Show the largest share of each honest implementation of a subject, and the least of each planted mistake."""
    tables: list[Table] = []
    titles = {f"Honest, {shares.subject}: largest share": shares.used}
    titles[f"Planted in {shares.subject}: least share of {PLANTED_PROBLEMS} problems"] = shares.least
    for title, by_name in titles.items():
        table = Table("implementation", *FLOATING[1:], title=title)
        for name in dict.fromkeys(name for _, name in by_name):
            table.add_row(name, *(f"{by_name[dtype, name]:.3g}" for dtype in FLOATING[1:]))
        tables.append(table)
    return tables[0], tables[1]


def mistakes_table() -> tuple[Table, list[str]]:
    """Show by planted mistake and dtype the least share of any seed, and list the mistakes that stay allowed."""
    dtypes = ("float32", "float16", "bfloat16")
    table = Table(
        "planted", *dtypes, title=f"Planted mistakes: share of the allowance, least of {PLANTED_PROBLEMS} seeds"
    )
    overlooked: list[str] = []
    for name, mistake in {"none": planted.honest, **planted.MISTAKES}.items():
        cells: list[str] = []
        for dtype in dtypes:
            trials = [planted.deviation(dtype, mistake, seed) for seed in range(PLANTED_PROBLEMS)]
            least = {output: min(shares[output] for shares in trials) for output in trials[0]}
            cells.append(", ".join(f"{output} {share:.3g}" for output, share in least.items()))
            if name != "none" and dtype in REFUSED_IN and min(max(used.values()) for used in trials) <= 1:
                overlooked.append(f"{name} is within the allowance in {dtype}")
        table.add_row(name, *cells)
    return table, overlooked


if __name__ == "__main__":
    typer.run(main)
