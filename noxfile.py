"""Every check of this repository: `nox` runs all of them, and `nox -s NAME` runs one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nox
from nox.command import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Iterable

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
"""The targets that are fast and need no further package; `-- NAME` judges others, and the session `field` all."""
DEFAULTS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true",
}
QUICKLY = {name: os.environ.get(name, default) for name, default in DEFAULTS.items()}
"""JAX and TensorFlow compile thousands of programs, most of them for a few calls that do not repay optimisation.

The rewrites of XLA itself stay, but LLVM does not optimise, and XLA's older generator of code is used, which takes half
the time. The workflow judges optimised programs (`conformance` with other values of these variables), as does `fuzz`.
Two processes run at the same time, and a thread of OpenMP that waits for another one occupies a processor: with
two threads in each process, tests of PyTorch took twice as long on two processors.
"""
PATIENTLY = ("--jobs", "2", "--timeout", "300")
"""The first call of a compiled function may take longer than the usual minute on a machine with other work."""
TOOLS = Path(".nox", "environment", "bin").resolve()
FOLDER = Path("conformance", "targets")
FIELD = Path(".nox", "field").resolve()
"""The reports of the targets, the page of all of them, and a folder for each set of packages that only some need."""
GENERIC = ("backends", "benchmarks", "conformance", "docs", "examples", "generator", "noxfile", "targets", "tests")


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group."""
    return list(nox.project.dependency_groups(PROJECT, name))


@nox.session(default=False)
def environment(session: nox.Session) -> None:
    """Install the wheel, every framework and every tool once, for the sessions that need all of them."""
    install(session, ".[conformance]", *group("dev"))
    install(session, "--no-deps", *group("judges-alone"))


def install(session: nox.Session, *requirements: str) -> None:
    """Install packages; Python compiles the modules that are imported, which are a small part of all modules."""
    session.install("--no-compile", *requirements)


def run_tool(session: nox.Session, tool: str, *arguments: str, **options: Any) -> None:
    """Run a tool that the session `environment` has installed."""
    session.run(str(TOOLS / tool), *arguments, external=True, **options)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style, the format, and the directions of imports between the packages."""
    install(session, "--editable", ".", *group("lint"))
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
    run_tool(session, "pytest", *(session.posargs or ["--numprocesses", "2", "--dist", "loadfile"]), env=QUICKLY)


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def conformance(session: nox.Session, backend: str) -> None:
    """Judge each backend and the reference by the whole suite."""
    framework = [requirement for requirement in group("frameworks") if requirement.startswith(backend)]
    install(session, ".[conformance]", *framework)
    session.run("mha-spec", "check", backend, *PATIENTLY, *session.posargs, env=QUICKLY)


@nox.session(requires=["environment"], venv_backend="none")
def targets(session: nox.Session) -> None:
    """Judge attentions of other libraries, or those of `-- NAME`: each must deviate as its *.known.toml states."""
    reports = judged(session, session.posargs or TARGETS)
    session.log("cases passed out of cases asked, by feature\n" + "\n".join(by_feature(reports)))
    require_success(session, reports)


@nox.session(requires=["environment"], venv_backend="none", default=False)
def field(session: nox.Session) -> None:
    """Judge every attention in conformance/targets, or those of `-- NAME`, and write a page of all reports.

    A target that cannot be judged has its column on the page, which says so.
    """
    if not session.posargs:
        for earlier in FIELD.glob("*.json"):
            earlier.unlink()
    every = sorted(path.stem for path in FOLDER.iterdir() if path.suffix in (".py", ".mjs"))
    reports = judged(session, session.posargs or every)
    page = ("--html", str(FIELD / "field.html"), "--badge", str(FIELD / "field.svg"))
    run_tool(session, "mha-spec", "matrix", *map(str, sorted(FIELD.glob("*.json"))), *page)
    session.log(f"the page is {FIELD / 'field.html'}")
    require_success(session, reports)


def judged(session: nox.Session, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Judge targets, each with the packages that it needs, and return their reports, which are in FIELD."""
    FIELD.mkdir(parents=True, exist_ok=True)
    reports: dict[str, dict[str, Any]] = {}
    for name in names:
        target, packages = target_with_packages(session, name)
        known, report = FOLDER / f"{name}.known.toml", FIELD / f"{name}.json"
        deviations = ("--known", str(known)) if known.exists() else ()
        options = (*PATIENTLY, *deviations, "--json", str(report))
        command = ("mha-spec", "check", *target, *options)
        report.unlink(missing_ok=True)
        run_tool(session, *command, env=packages, success_codes=[0, 1, 2])
        if not report.exists():
            session.error(f"{name} was not judged because of an option or of its known deviations")
        reports[name] = json.loads(report.read_text())
    return reports


def target_with_packages(session: nox.Session, name: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the arguments of `mha-spec check` for a target in Python or JavaScript, and where its packages are."""
    if (program := FOLDER / f"{name}.mjs").exists():
        return ("--command", f"node {program}"), {"NODE_PATH": node_packages(session)}
    target = FOLDER / f"{name}.py"
    return (str(target),), {"PYTHONPATH": further_packages(session, target)}


def node_packages(session: nox.Session) -> str:
    """Install what package.json pins for the targets in JavaScript, if npm is there, and return the folder of it."""
    wanted = FOLDER / "package.json"
    folder = FIELD / hashlib.sha256(wanted.read_bytes()).hexdigest()[:16]
    packages = folder / "node_modules"
    if not packages.exists() and shutil.which("npm"):
        folder.mkdir(exist_ok=True)
        shutil.copy(wanted, folder)
        # Packages that cannot be installed are absent for the targets, whose reports say so.
        npm = ("npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund")
        session.run(*npm, external=True, success_codes=[0, 1])
    return str(packages)


def further_packages(session: nox.Session, target: Path) -> str:
    """Install what the inline metadata of a target names and `environment` lacks, and return the folder of it.

    The metadata names all that is needed, so that no package brings another build of a framework, and nothing is built.
    """
    wanted = nox.project.load_toml(target)["dependencies"]
    present = {*group("test"), *group("judges-alone")}
    lacking = sorted(requirement for requirement in wanted if requirement not in present)
    folder = FIELD / hashlib.sha256("\n".join(lacking).encode()).hexdigest()[:16]
    if lacking and not folder.exists():
        pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *lacking)
        # A package that cannot be installed is absent for its target, whose report says so.
        run_tool(session, "python", *pip, success_codes=[0, 1])
    return str(folder)


@nox.session(requires=["environment"], venv_backend="none", default=False)
def findings(session: nox.Session) -> None:
    """Run the scripts of docs/findings.md, or those of `-- NAME`: each exits with 0 if the library still deviates."""
    FIELD.mkdir(parents=True, exist_ok=True)
    gone: list[str] = []
    for name in session.posargs or sorted(path.stem for path in Path("docs", "findings").glob("*.py")):
        script = Path("docs", "findings", f"{name}.py")
        paths = {"PYTHONPATH": further_packages(session, script)}
        try:
            run_tool(session, "python", "-P", str(script), env=paths)
        except CommandFailed:
            gone.append(name)
    if gone:
        session.error(f"no longer so, or not run: {', '.join(gone)}")


def require_success(session: nox.Session, reports: dict[str, dict[str, Any]]) -> None:
    """End the session with an error if a target deviates otherwise than known, or could not be judged."""
    if failed := [f"{name}: {report['verdict']}" for name, report in reports.items() if report["status"] != 0]:
        session.error("not as recorded: " + "; ".join(failed))


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
    install(session, *group("generator"))
    session.run("python", "-P", "-c", "import importlib.util as i; assert i.find_spec('mha_spec') is None")
    session.run("python", "conformance/generator/generate.py", "--check")


@nox.session(requires=["environment"], venv_backend="none")
def accuracy(session: nox.Session) -> None:
    """Validate the accuracy rule: correct implementations stay within it, and planted errors exceed it."""
    run_tool(session, "python", "conformance/accuracy/honest.py", *session.posargs)


@nox.session(requires=["environment"], venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation site in docs/_build/html, and look at a sample of its pages in Chromium.

    A warning, a broken link, and a rule of axe that a page breaks are errors; `-- --audit all` looks at every page.
    The site has the page of the field if the session `field` has made it.
    """
    page = FIELD / "field.html"
    matrix = ("--matrix", str(page)) if page.exists() else ()
    arguments = session.posargs or ("--audit", "sample")
    run_tool(session, "python", "-P", "docs/website/build.py", *matrix, *arguments)


@nox.session
def wheel(session: nox.Session) -> None:
    """Install the wheel alone in a fresh environment, outside the tree: it must give the results of the tree."""
    install(session, "build", "--editable", ".[conformance]")
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
