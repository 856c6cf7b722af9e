"""Compare our backends on a GPU with the native kernels: TFLOP/s, ratios, and the conformance suite.

    python benchmarks/gpu.py                          under 5 minutes, on a CUDA GPU
    python benchmarks/gpu.py --device cpu --quick     small sizes, for a trial run

Calls are in bfloat16 (float32 on a CPU). A ratio is their time over ours: above 1 we are faster. A kernel that refuses
a call has no figure; the reason is printed on stderr. At the end the conformance suite judges each backend on the
device. Exit status: 0 the suite passed, 1 it did not, 2 there is no GPU.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import gpu_torch
import typer
from gpu_settings import settings
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from gpu_settings import Setting

NO_GPU = 2
START = time.perf_counter()
ROWS_UNTIL = {"torch": 110.0, "jax": 190.0}
"""Seconds from the start after which no row of a backend begins."""
END = 290.0
"""Seconds from the start within which the program ends; the suite has the time that is left."""
SECONDS = {"gpu": 0.5, "quick": 0.05}
"""Seconds for which the calls of a row are measured in turns."""
BATCH = 2e-3
"""Seconds of calls before the program waits for the device, so that the wait is a small part."""
BACKWARD = 3.5
"""Operations of both passes over those of the forward: the backward has five products, the forward two."""


def main(
    device: Annotated[str, typer.Option(help="Where to measure: cuda or cpu.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Small sizes and a part of the suite.")] = False,
    conformance: Annotated[bool, typer.Option(help="Ask the conformance suite at the end.")] = True,
) -> None:
    """Measure the backends, print the tables, and run the suite."""
    if not gpu_torch.present(device):
        print("gpu.py: torch finds no CUDA GPU, so there is nothing to measure.", file=sys.stderr)
        raise typer.Exit(NO_GPU)
    warnings.simplefilter("ignore")
    console = Console(width=160)
    backends: list[str] = []
    for name, part in parts(device):
        if isinstance(part, str):
            console.print(f"{name}: {part}")
            continue
        console.print(table(name, part, device, quick=quick))
        backends.append(name)
    asked = backends if conformance else []
    shares = [(END - elapsed()) / len(asked) for _ in asked]
    good = [judged(console, name, device, share, quick=quick) for name, share in zip(asked, shares, strict=True)]
    console.print(f"{elapsed():.0f} s")
    raise typer.Exit(0 if all(good) else 1)


def elapsed() -> float:
    """Return the seconds since the start."""
    return time.perf_counter() - START


def parts(device: str) -> Iterator[tuple[str, ModuleType | str]]:
    """Return each backend, or the reason why it cannot be measured."""
    yield "torch", gpu_torch
    try:
        import gpu_jax
    except ImportError as error:
        yield "jax", f"not measured, it does not import: {error}"
        return
    yield (
        "jax",
        gpu_jax if gpu_jax.present(device) else "not measured, the installed jaxlib lacks the device",
    )


def table(name: str, part: Any, device: str, *, quick: bool) -> Table:
    """Make a table with a row for each setting and pass."""
    rows = [
        (setting, backward, measured(part, setting, device, backward=backward, quick=quick))
        for setting in settings(quick=quick)
        for backward in ((False,) if setting.step else (False, True))
        if elapsed() < ROWS_UNTIL[name]
    ]
    rivals = list(dict.fromkeys(rival for _, _, times in rows for rival in times if rival != "ours"))
    rendered = Table(title=f"mha_spec_{name} on {part.name_of(device)}")
    rendered.add_column("call")
    for heading in ("pass", "ours ms", "TFLOP/s", *(f"{rival} ms (ratio)" for rival in rivals)):
        rendered.add_column(heading, justify="right")
    for setting, backward, times in rows:
        rendered.add_row(setting.name, "both" if backward else "forward", *cells(setting, backward, times, rivals))
    return rendered


def cells(setting: Setting, backward: bool, times: dict[str, float | None], rivals: list[str]) -> list[str]:
    """Format our time and rate, and the time of each rival with its ratio to ours."""
    ours = times["ours"]
    if ours is None:
        return ["failed", "", *("" for _ in rivals)]
    rate = setting.operations * (BACKWARD if backward else 1) / ours / 1e12
    others = [
        "-" if (taken := times.get(rival)) is None else f"{taken * 1e3:.3f} ({taken / ours:.2f})" for rival in rivals
    ]
    return [f"{ours * 1e3:.3f}", f"{rate:.3g}", *others]


def measured(part: Any, setting: Setting, device: str, *, backward: bool, quick: bool) -> dict[str, float | None]:
    """Return the median time of each call in seconds, measured in turns; None for a call that raises."""
    calls: dict[str, Callable[[], object]] = part.calls(setting, device, backward=backward)
    counts: dict[str, int] = {}
    for name, call in calls.items():
        try:
            part.wait(device, call())
            counts[name] = max(1, min(100, int(BATCH / timed(part, device, call, 1))))
        except Exception as error:
            print(
                f"{setting.name}, {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr
            )
    taken: dict[str, list[float]] = {name: [] for name in counts}
    end = time.perf_counter() + SECONDS["quick" if quick else "gpu"]
    while time.perf_counter() < end or min(map(len, taken.values()), default=3) < 3:
        for name, count in counts.items():
            taken[name].append(timed(part, device, calls[name], count))
    return {name: statistics.median(taken[name]) if name in taken else None for name in calls}


def timed(part: Any, device: str, call: Callable[[], object], count: int) -> float:
    """Return the seconds of a call, of `count` calls in a row."""
    start = time.perf_counter()
    result: object = None
    for _ in range(count):
        result = call()
    part.wait(device, result)
    return (time.perf_counter() - start) / count


def judged(console: Console, name: str, device: str, seconds: float, *, quick: bool) -> bool:
    """Run the conformance suite on a backend on the device, and print its result."""
    place = device if name == "torch" or device == "cpu" else "gpu"
    lines = [f"from mha_spec_{name} import attention, attention_vjp, attention_weights, merge_attention", ""]
    lines += [f'arrays = "{name}"', f'device = "{place}"', 'conventions = {"nonfinite": "reaches_tile"}']
    script = "import sys; from mha_spec_conformance.command import main; sys.exit(main())"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, f"{name}_on_{place}.py")
        target.write_text("\n".join(lines) + "\n")
        command = [
            sys.executable,
            "-P",
            "-c",
            script,
            "check",
            str(target),
            *(("--only", "attention/causal/*", "--dtypes", "float32") if quick else ()),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False, env=os.environ, cwd=folder
            )
        except subprocess.TimeoutExpired:
            console.print(f"mha_spec_{name}, conformance on {place}: not done after {seconds:.0f} s")
            return False
    console.print(f"mha_spec_{name}, conformance on {place}: exit status {done.returncode}", style="bold")
    console.print((done.stdout + done.stderr).strip()[-6000:], markup=False, highlight=False)
    return done.returncode == 0


if __name__ == "__main__":
    typer.run(main)
