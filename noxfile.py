"""Every check of this repository: `nox` runs all of them, and `nox -s NAME` runs one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

PROJECT: dict[str, Any] = nox.project.load_toml("pyproject.toml")
BACKENDS = [*PROJECT["project"]["entry-points"]["mha_spec.backends"], "mha_spec.reference"]
WORLDS = (
    *("numpy", "torch", "jax", "tensorflow"),
    *("torch --world compile", "torch --world compile-dynamic", "torch --world func-grad", "torch --world vmap"),
    *("jax --world jit", "jax --world vmap", "jax --world grad"),
    *("tensorflow --world function", "tensorflow --world function-unknown", "tensorflow --world xla"),
    "tensorflow --world tape",
)
"""The backends in eager mode, then in each of their worlds, as `mha-spec fuzz` takes them."""
SAME_CALLS = ("--seed", "0", "--calls", "300", "--seconds", "15")
"""A fixed seed and number of calls, so that a run cannot fail by other draws; slow worlds ask fewer of these calls."""
TARGETS = (
    "jax_nn",
    "onnxruntime_attention",
    "onnxruntime_grouped",
    "onnxruntime_multihead",
    "torch_layer",
    "torch_sdpa",
)
"""The targets that are fast and need no further package; `-- NAME` judges others, which docs/targets.md lists."""
UNOPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")}
"""JAX compiles 900 signatures, most of them for a few calls that do not repay the optimisations of LLVM.

The rewrites of XLA itself stay. The workflow judges optimised programs (it sets the variable to 0), and so does `fuzz`.
"""
TOOLS = Path(".nox", "environment", "bin").resolve()
GENERIC = ("backends", "benchmarks", "conformance", "docs", "examples", "generator", "noxfile", "targets", "tests")


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group."""
    return list(nox.project.dependency_groups(PROJECT, name))


@nox.session(default=False)
def environment(session: nox.Session) -> None:
    """Install the wheel, every framework and every tool once, for the sessions that need all of them."""
    session.install(".[conformance]", *group("dev"))
    session.install("--no-deps", *group("judges-alone"))


def run_tool(session: nox.Session, tool: str, *arguments: str) -> None:
    """Run a tool that the session `environment` has installed."""
    session.run(str(TOOLS / tool), *arguments, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style, the format, and the directions of imports between the packages."""
    session.install("--editable", ".", *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session(requires=["environment"], venv_backend="none")
def typecheck(session: nox.Session) -> None:
    """Check the types, strictly in mha_spec."""
    run_tool(session, "pyright", "--pythonpath", str(TOOLS / "python"))


@nox.session(requires=["environment"], venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the project's tests against the wheel."""
    run_tool(session, "pytest", *(session.posargs or ["--numprocesses", "2", "--dist", "loadfile"]))


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def conformance(session: nox.Session, backend: str) -> None:
    """Judge each backend and the reference by the whole suite."""
    framework = [requirement for requirement in group("frameworks") if requirement.startswith(backend)]
    session.install(".[conformance]", *framework)
    session.run("mha-spec", "check", backend, "--jobs", "2", *session.posargs, env=UNOPTIMIZED)


@nox.session(requires=["environment"], venv_backend="none")
def targets(session: nox.Session) -> None:
    """Judge attentions of other libraries, or those of `-- NAME`: each must deviate as its *.known.toml states."""
    reports: dict[str, dict[str, Any]] = {}
    for target in (Path("conformance/targets", f"{name}.py") for name in session.posargs or TARGETS):
        known, report = target.with_suffix(".known.toml"), Path(session.create_tmp(), "report.json").resolve()
        deviations = ("--known", str(known)) if known.exists() else ()
        run_tool(session, "mha-spec", "check", str(target), "--jobs", "2", *deviations, "--json", str(report))
        reports[target.stem] = json.loads(report.read_text())
    session.log("cases passed out of cases asked, by feature\n" + "\n".join(by_feature(reports)))


def by_feature(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Make the lines of the table in docs/targets.md: for each feature and target, cases passed out of cases asked."""
    features = list(dict.fromkeys(feature for report in reports.values() for feature in report["features"]))
    lines = [f"| feature | {' | '.join(reports)} |", "| --- |" + " --- |" * len(reports)]
    for feature in features:
        cells: list[str] = []
        for report in reports.values():
            counts = report["features"].get(feature, {})
            asked = sum(number for outcome, number in counts.items() if outcome != "unsupported")
            cells.append(f"{counts['pass']} of {asked}" if asked else "")
        lines += [f"| {feature} | {' | '.join(cells)} |"] if any(cells) else []
    return lines


@nox.session(requires=["environment"], venv_backend="none")
@nox.parametrize("world", WORLDS, ids=[world.replace(" --world ", "-") for world in WORLDS])
def fuzz(session: nox.Session, world: str) -> None:
    """Ask a backend random calls, the same in each run; `-- --seconds 1200 --seed 7` asks other calls for longer."""
    run_tool(session, "mha-spec", "fuzz", *world.split(), *(session.posargs or SAME_CALLS))


@nox.session
def goldens(session: nox.Session) -> None:
    """Generate the expected values again without mha_spec installed: no bit may differ."""
    session.install(*group("generator"))
    session.run("python", "-P", "-c", "import importlib.util as i; assert i.find_spec('mha_spec') is None")
    session.run("python", "conformance/generator/generate.py", "--check")


@nox.session(requires=["environment"], venv_backend="none")
def accuracy(session: nox.Session) -> None:
    """Validate the accuracy rule: correct implementations stay within it, and planted errors exceed it."""
    run_tool(session, "python", "conformance/accuracy/honest.py", *session.posargs)


@nox.session(requires=["environment"], venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation site in docs/_build/html; a warning or a broken link is an error."""
    run_tool(session, "python", "-P", "docs/website/build.py", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Install the wheel alone in a fresh environment, outside the tree: it must give the results of the tree."""
    session.install("build", "--editable", ".[conformance]")
    folder = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"), silent=True)
    (built,) = (folder / "dist").glob("*.whl")
    session.run("python", "-m", "venv", "--clear", str(folder / "fresh"))
    fresh = folder / "fresh" / "bin"
    session.run(str(fresh / "pip"), "install", "--quiet", f"{built}[conformance]", external=True)
    names = f"import importlib.util as i; print([n for n in {GENERIC} if i.find_spec(n)])"
    text = "import mha_spec, pathlib; print(pathlib.Path(mha_spec.__file__).with_name('SPEC.md').read_text(), end='')"
    specification = Path("mha_spec/SPEC.md").read_text()
    with session.chdir(folder):

        def output_of(*command: str) -> str:
            return str(session.run(*command, external=True, silent=True))

        def summary(program: str) -> object:
            reports = ("--json", "short.json", "--html", "short.html")  # the page needs its template from the wheel
            session.run(program, "check", "numpy", "--only", "attention/causal*", *reports, external=True)
            return json.loads(Path("short.json").read_text())["summary"]

        if output_of(str(fresh / "python"), "-c", names).strip() != "[]":
            session.error("the wheel installs packages with generic names")
        if output_of(str(fresh / "python"), "-c", text) != specification:
            session.error("SPEC.md of the wheel is not that of the tree")
        if output_of("mha-spec", "cases") != output_of(str(fresh / "mha-spec"), "cases"):
            session.error("the cases of the wheel are not those of the tree")
        if summary("mha-spec") != summary(str(fresh / "mha-spec")):
            session.error("a check from the wheel does not give what it gives in the tree")
