"""Ask many questions of a target that crashes in some of them, and measure the time that a crash costs.

The target is a file in Python, or, with `--command`, a program without libraries, which starts at once.

    python benchmarks/crashes.py [--questions N] [--every N] [--jobs N] [--command]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.question import Question

TARGET = """
import os

def supports(question):
    if question.id.endswith("crash"):
        os._exit(3)
    return "not today"

def attention(query, key, value):
    return query
"""

PROGRAM = """
import json, os, sys

claims = {"message": "claims", "protocol": "mha-spec-protocol/1", "functions": {"attention": []}, "dtypes": ["float32"]}
for line in sys.stdin:
    question = json.loads(line)
    if question["message"] == "hello":
        print(json.dumps(claims), flush=True)
    elif question["id"].endswith("crash"):
        os._exit(3)
    else:
        answer = {"message": "answer", "number": question["number"], "kind": "unsupported", "reason": "not today"}
        print(json.dumps(answer), flush=True)
"""


def questions(count: int, every: int) -> list[Question]:
    """Make questions; every n-th question crashes."""
    arrays = {name: numpy.zeros((1, 1, 2, 3), numpy.float32) for name in ("query", "key", "value")}
    ids = [f"{number}/{'crash' if number % every == 0 else 'right'}" for number in range(count)]
    return [Question(name, "attention", "float32", arrays, {}, ("output",)) for name in ids]


def timed(pool: Pool, asked: list[Question], jobs: int) -> tuple[float, Counter[tuple[str, str]]]:
    """Ask all questions; return the seconds, and the number of answers of each kind to each sort of question."""
    start = time.perf_counter()
    groups = [asked[first::jobs] for first in range(jobs)]
    answers = [(question.id, answer.kind) for question, answer in pool.answers(*groups)]
    assert sorted(name for name, _ in answers) == sorted(question.id for question in asked)
    return time.perf_counter() - start, Counter((name.partition("/")[2], kind) for name, kind in answers)


def main() -> None:
    """Print the numbers of answers, and the time that a crash costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--command", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "target.py"
        path.write_text(PROGRAM if options.command else TARGET)
        command = (sys.executable, "-I", "-S", str(path)) if options.command else None
        with Pool(str(path), options.jobs, command=command) as pool:
            right = [question for question in questions(options.questions, options.every) if "right" in question.id]
            quiet, _ = timed(pool, right, options.jobs)
            seconds, count = timed(pool, questions(options.questions, options.every), options.jobs)
    crashes = count["crash", "crash"]
    print(f"{options.questions} questions in {seconds:.1f} s, without the crashes in {quiet:.1f} s: {dict(count)}")
    print(f"a crash costs {(seconds - quiet) / crashes * 1000:.0f} ms")


if __name__ == "__main__":
    main()
