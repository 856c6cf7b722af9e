"""Measure `mha-spec check` on targets with hundreds of failures in four dtypes: processor time, and time on the clock.

    python benchmarks/failures.py            # all three targets
    python benchmarks/failures.py scale      # those of which the name contains this

The targets are the functions of attention of the NumPy backend with a known mistake, with errors that no mistake
makes, or with results that are rounded to bfloat16.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from mha_spec_conformance.running.runner import Settings, run
from mha_spec_conformance.suite.cases import load

TARGET = """
import functools
import ml_dtypes, numpy, mha_spec_numpy as backend

arrays = "numpy"
dtypes = ("float64", "float32", "float16", "bfloat16")

def scale_ignored(function, operands, options):
    return function(*operands, **options | {{"scale": None}})

def without_a_name(function, operands, options):
    grouped = operands[-2].shape[1] != operands[0].shape[1]
    change = lambda x: x * (1 + 0.1 * numpy.sin(numpy.arange(x.size)).reshape(x.shape)).astype(x.dtype)
    return changed(change if grouped else numpy.asarray, function(*operands, **options))

def rounded(function, operands, options):
    return changed(lambda x: x.astype(ml_dtypes.bfloat16).astype(x.dtype), function(*operands, **options))

def changed(change, results):
    if isinstance(results, tuple):
        return tuple(x if x is None else change(x) for x in results)
    return change(results)

def wrong(function):
    return functools.wraps(function)(lambda *operands, **options: {name}(function, operands, options))

attention, attention_weights, attention_vjp = map(
    wrong, (backend.attention, backend.attention_weights, backend.attention_vjp)
)
"""

NAMES = ("scale_ignored", "without_a_name", "rounded")


def processor_seconds() -> float:
    """Return the processor time of this process and of the workers that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Print the failures, the causes and the times of each target."""
    suite, only = load(), sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in NAMES if only in name):
            path = Path(folder, f"{name}.py")
            path.write_text(TARGET.format(name=name))
            before, start = processor_seconds(), time.monotonic()
            done = run(str(path), suite, Settings())
            causes = [f"{cause.title} ({len(cause.results)})" for cause in done.findings.causes]
            seconds = processor_seconds() - before
            print(
                f"{name}: {len(done.failures)} failures of {', '.join(causes[:3])}; {seconds:.0f} s of processor time, "
                f"{time.monotonic() - start:.0f} s, load {os.getloadavg()[0]:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
