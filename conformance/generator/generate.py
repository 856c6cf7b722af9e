"""Write the goldens, or prove that they are the files that this program writes.

    python conformance/generator/generate.py                    write mha_spec_conformance/goldens
    python conformance/generator/generate.py --check            exit with 1 and print the first difference, if any
    python conformance/generator/generate.py --only 'attention/causal*' --output some/folder

The program needs numpy, ml-dtypes, safetensors and python-flint. It imports nothing of mha-spec, so that no golden is
computed by the code that it checks.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import os
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from catalogue import descriptions
from oracle import InadmissibleError, expect
from portable import generate
from storage import FORMAT, NARROW_FIRST, Tensors, holds, smallest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from description import Description, Input
    from oracle import Answer

    Keep = Callable[[numpy.ndarray], dict[str, str]]

FOLDER = Path(__file__).resolve().parent.parent / "mha_spec_conformance" / "goldens"
SPEC_VERSION = "1.1"
SUITE_VERSION = "1.1.0"
LARGEST_TOTAL = 20_000_000
LAYER = {
    "alibi_bias",
    "alibi_slopes",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "multi_head_attention_weights",
    "rotary_embedding",
    "varlen_attention",
    "varlen_attention_vjp",
}
"""Functions whose tensors are stored in a separate file."""
PARAMETERS = (
    *("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o"),
    *("q_norm", "k_norm", "q_joint_norm", "k_joint_norm"),
)
"""Inputs of the layer that many cases share."""
FLOATING = {numpy.dtype(dtype).name: dtype for dtype in NARROW_FIRST}


def answer(description: Description) -> dict[str, Answer] | str:
    """Return the expected values of a case, or the reason why it is not admitted."""
    try:
        for name, item in description.inputs.items():
            check_input(description, name, item)
        return expect(description)
    except InadmissibleError as refusal:
        return str(refusal)


def check_input(description: Description, name: str, item: Input) -> None:
    """Raise InadmissibleError unless the values are exact in each dtype of the case."""
    values = numpy.asarray(item.values)
    if item.generator is not None and not numpy.array_equal(generate(values.shape, **item.generator), values):
        raise InadmissibleError(f"{description.id}: the generator of `{name}` does not give its values")
    if description.error is not None or values.dtype.kind != "f":
        return
    for dtype in description.dtypes if item.dtype == "case" else (item.dtype,):
        if dtype in FLOATING and not holds(FLOATING[dtype], values):
            raise InadmissibleError(f"{description.id}: `{name}` is not exact in {dtype}")


def write_case(description: Description, answers: Mapping[str, Answer], tensors: Tensors) -> dict[str, Any]:
    """Store the arrays of a case and return its entry in the index."""
    keep = partial(tensors.add, layer=description.function in LAYER)
    entry = {name: getattr(description, name) for name in ("id", "title", "function", "clauses", "features", "level")}
    return entry | {
        "tags": description.tags,
        "dtypes": description.dtypes,
        "options": {name: plain(value) for name, value in description.options.items()},
        "inputs": {name: write_input(item, keep) for name, item in description.inputs.items()},
        "outputs": {name: write_output(item, keep) for name, item in answers.items()},
        "expect": "values" if description.error is None else "error",
        **({} if description.error is None else {"error": dict(description.error)}),
    }


def plain(value: Any) -> Any:
    """Return an option as JSON; NaN and infinities, which JSON lacks, become {"number": "nan"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    return value


def write_input(item: Input, keep: Keep) -> dict[str, Any]:
    """Return the entry of an input: its tensor, or its generator with the sha256 of the float64 values."""
    values = numpy.asarray(item.values)
    entry = {"shape": values.shape, "dtype": item.dtype}
    if item.generator is None:
        return entry | keep(smallest(values))
    digest = hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()
    return entry | {"generator": dict(item.generator), "sha256": digest}


def write_output(item: Answer, keep: Keep) -> dict[str, Any]:
    """Return the entry of an expected output, whose values, kinds and rows are tensors."""
    entry: dict[str, Any] = {"shape": item.shape} | keep(item.values)
    for name, array in (("kinds", item.kinds), ("rows", item.rows)):
        entry[name] = None if array is None else keep(array)
    return entry


def build(cases: Sequence[Description], processes: int = 1) -> tuple[dict[str, bytes], list[str]]:
    """Return the files by name, and the refusals."""
    repeated = {case.id for case in cases if sum(other.id == case.id for other in cases) > 1}
    refusals = [f"{name}: two cases have this id" for name in sorted(repeated)]
    ordered = sorted(cases, key=lambda case: case.id)
    if processes == 1:
        answers = [answer(case) for case in ordered]
    else:
        with Pool(processes) as pool:
            answers = pool.map(answer, ordered, chunksize=8)
    tensors, entries = Tensors(), []
    for case, outputs in zip(ordered, answers, strict=True):
        if isinstance(outputs, str):
            refusals.append(outputs)
        else:
            entries.append(write_case(case, outputs, tensors))
    files = tensors.files()
    index = write_index(entries, files, share_parameters(entries))
    digest = f"{hashlib.sha256(index).hexdigest()}  index.json\n"
    return files | {"index.json": index, "index.json.sha256": digest.encode()}, refusals


def share_parameters(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Move the parameters of layers from the inputs of their cases to sets, which the cases name."""
    sets: dict[str, Any] = {}
    for entry in entries:
        inputs: dict[str, Any] = entry["inputs"]
        parameters = {name: inputs.pop(name) for name in PARAMETERS if name in inputs}
        if parameters:
            entry["parameters"] = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
            sets[entry["parameters"]] = parameters
    return dict(sorted(sets.items()))


def write_index(
    entries: Iterable[Mapping[str, Any]], files: Mapping[str, bytes], parameters: Mapping[str, Any]
) -> bytes:
    """Write the index, with one case per line."""
    dump = partial(json.dumps, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    head = {"format": FORMAT, "spec_version": SPEC_VERSION, "suite_version": SUITE_VERSION, "files": sums}
    head |= {"parameters": dict(parameters)} if parameters else {}
    lines = [f"{dump(name)}: {dump(value)}" for name, value in head.items()]
    cases = ",\n".join(dump(entry) for entry in entries)
    return ("{\n" + ",\n".join(lines) + ',\n"cases": [\n' + cases + "\n]\n}\n").encode()


def difference(folder: Path, files: Mapping[str, bytes]) -> str | None:
    """Describe the first difference between a folder and the files that it should hold, or return None."""
    present = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    if present == files:
        return None
    if "index.json" in present and present["index.json"] != files["index.json"]:
        pairs = zip(present["index.json"].splitlines(), files["index.json"].splitlines(), strict=False)
        old, new = next(((old, new) for old, new in pairs if old != new and b'"id"' in new), (b"", b""))
        if new:
            case = json.loads(new.rstrip(b","))["id"]
            return f"index.json, case {case}\n  is:        {old.decode()}\n  should be: {new.decode()}"
    name = next(name for name in sorted({*present, *files}) if present.get(name) != files.get(name))
    state = "is missing" if name not in present else "should not be there" if name not in files else "differs"
    return f"{name} {state}"


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files into the folder, and delete goldens that are not among them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files and path.name.startswith(("tensors-", "layer-", "index.json")):
            path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def main() -> int:
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(
        description="Write the goldens, or prove that they are the files that this program writes."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 and print the first difference, if any"
    )
    parser.add_argument("--only", metavar="PATTERN", help="only cases whose id matches; needs --output")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    options = parser.parse_args()
    if options.only and options.output == FOLDER:
        parser.error("`--only` would delete the other cases of the suite: pass --output=FOLDER too")
    cases = [case for case in descriptions() if fnmatch.fnmatchcase(case.id, options.only or "*")]
    files, refusals = build(cases, os.cpu_count() or 1)
    problem = problem_of(files, refusals)
    if problem is None and options.check:
        problem = difference(options.output, files)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    if not options.check:
        write(options.output, files)
    print(f"{len(cases)} cases, {sum(map(len, files.values()))} bytes, {'unchanged' if options.check else 'written'}")
    return 0


def problem_of(files: Mapping[str, bytes], refusals: Sequence[str]) -> str | None:
    """Return the reason why these files must not become the goldens, or None."""
    foreign = sorted(name for name in sys.modules if name.startswith("mha_spec"))
    if foreign:
        return f"The generator must not import the code that it checks, but {', '.join(foreign)} is imported."
    if refusals:
        return "\n".join(["Not admitted:", *refusals])
    total = sum(map(len, files.values()))
    return f"The goldens have {total} bytes, at most {LARGEST_TOTAL} are allowed." if total > LARGEST_TOTAL else None


if __name__ == "__main__":
    sys.exit(main())
