"""Measure the time of `import mha_spec` after NumPy is imported: the median of fresh interpreters, at most 20 ms.

Run it with `python -P benchmarks/import_time.py`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

LIMIT = 0.020
RUNS = 21
CODE = "import numpy, time; start = time.perf_counter(); import mha_spec; print(time.perf_counter() - start)"


def seconds() -> float:
    """Import both in a fresh interpreter, and time the second."""
    done = subprocess.run([sys.executable, "-P", "-c", CODE], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Print the median, and fail above the limit."""
    median = statistics.median(seconds() for _ in range(RUNS))
    print(f"import mha_spec: {median * 1000:.1f} ms above numpy (median of {RUNS}, limit {LIMIT * 1000:.0f} ms)")
    sys.exit(median > LIMIT)


if __name__ == "__main__":
    main()
