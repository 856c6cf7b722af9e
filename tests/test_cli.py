"""The command line: its output, its report and its exit status."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mha_spec_conformance.commands import cli

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Command = Callable[..., tuple[int, str, str]]

SMOKE = ("--only", "attention/smoke/", "--dtypes", "float32")
REPORT = {
    "schema", "spec_version", "suite", "environment", "target", "selection", "complete", "verdict", "accepted", "known",
    "summary", "features", "conventions", "diagnosis", "cases",
}  # fmt: skip
CASE = {
    "id",
    "function",
    "dtype",
    "clauses",
    "features",
    "level",
    "outcome",
    "reason",
    "allowance_used",
    "worst",
    "diagnosis",
    "conventions",
    "seconds",
}
OUTCOMES = ["pass", "fail", "deviation", "error", "crash", "timeout", "unsupported"]


@pytest.fixture
def mha_spec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command and return its exit status, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mha-spec", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture
def starter(tmp_path: Path, mha_spec: Command) -> Path:
    """Write a target file with `mha-spec new`."""
    path = tmp_path / "mine.py"
    status, out, _ = mha_spec("new", path)
    assert (status, out) == (0, f"wrote {path}; judge it with: mha-spec check {path}\n")
    return path


def test_starter_is_conformant_on_what_it_claims(mha_spec: Command, starter: Path, tmp_path: Path) -> None:
    status, out, err = mha_spec("check", starter, "--json", tmp_path / "report.json")
    assert (status, err) == (0, "")
    assert f"{starter}: conformant on " in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"]
    assert report["verdict"] in out
    assert "not asked: " in report["verdict"]
    assert set(report["summary"]) == set(OUTCOMES)
    assert report["summary"]["pass"] > 200
    assert report["features"]["mask"]["pass"] > 10
    assert "softcap" not in report["features"]


@pytest.mark.parametrize("name", ["a\\x.py", 'a"""b.py', "a b.py", "\u00e9.py", "a\\N{x}.py"])
def test_starter_of_any_name_is_a_module(name: str, mha_spec: Command, tmp_path: Path) -> None:
    status, out, _ = mha_spec("new", tmp_path / name)
    assert (status, out.startswith("wrote ")) == (0, True)
    text = (tmp_path / name).read_text(encoding="utf-8")
    module: dict[str, Any] = {}
    exec(compile(text, name, "exec"), module)
    assert f"mha-spec check {shlex.quote(str(tmp_path / name))}" in module["__doc__"]


def test_existing_file_is_not_overwritten(mha_spec: Command, starter: Path) -> None:
    text = starter.read_text()
    status, _, err = mha_spec("new", starter)
    assert status == 2
    assert err == f"mha-spec: {starter} already exists; choose another name\n"
    assert starter.read_text() == text


def test_report_has_every_key_of_its_schema(mha_spec: Command, starter: Path, tmp_path: Path) -> None:
    starter.write_text(starter.read_text().replace("visible &= mask", "visible &= ~mask"))
    status, out, _ = mha_spec("check", starter, *SMOKE, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 1
    assert report.keys() >= REPORT
    assert report["schema"] == "mha-spec-report/1"
    assert report["suite"].keys() >= {"version", "goldens_sha256"}
    assert report["environment"].keys() == {"python", "platform", "device", "libraries"}
    assert report["target"].keys() >= {"name", "versions", "features", "dtypes", "conventions", "profile"}
    assert report["target"]["features"] == ["mask", "causal"]
    assert report["target"]["deterministic"] is True
    assert report["selection"] == {
        "only": ["attention/smoke/"],
        "dtypes": ["float32"],
        "exclude": [],
        "shard": None,
    }
    assert not report["complete"]
    assert list(report["summary"]) == OUTCOMES
    assert all(list(tally) == OUTCOMES for tally in report["features"].values())
    assert all(case.keys() == CASE for case in report["cases"])
    wrong = next(case for case in report["cases"] if case["outcome"] == "deviation")
    assert wrong["id"] == "attention/smoke/mask-polarity"
    assert wrong["reason"] == "mask_polarity=true_hides"
    assert wrong["worst"].keys() == {"output", "index", "expected", "got", "allowance"}
    assert wrong["diagnosis"]
    assert report["conventions"] == {"mask_polarity": "true_hides"}
    assert report["diagnosis"][0].keys() == {"variant", "explains", "clauses"}
    assert "DEVIATION  attention/smoke/mask-polarity" in out
    assert "MHA-MASK-1: " in out
    assert "--accept mask_polarity=true_hides" in out


def test_failure_can_be_acted_on(mha_spec: Command, starter: Path) -> None:
    starter.write_text(starter.read_text().replace("/ qk_dim**0.5", "/ qk_dim"))
    status, out, _ = mha_spec("check", starter, *SMOKE)
    assert status == 1
    assert "FAIL  attention/smoke/" in out
    assert "Call: attention(query (2, 3, 5, 11), key (2, 3, 7, 11), value (2, 3, 7, 11)" in out
    assert "times the allowance" in out
    assert "MHA-SCORE-2: " in out
    assert "conformant" not in out.splitlines()[-1]


def test_accept_require_and_known(mha_spec: Command, starter: Path, tmp_path: Path) -> None:
    starter.write_text(starter.read_text().replace("visible &= mask", "visible &= ~mask"))
    assert mha_spec("check", starter, *SMOKE, "--accept", "mask_polarity=true_hides")[0] == 0
    assert (
        mha_spec("check", starter, *SMOKE, "--accept", "mask_polarity=true_hides", "--require", "mask,causal")[0] == 1
    )
    known = tmp_path / "known.toml"
    known.write_text('[[known]]\nid = "attention/smoke/mask-polarity"\nreason = "inverted"\n')
    assert mha_spec("check", starter, *SMOKE, "--known", known)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "nothere"), "is not a backend"),
        (("check", "numpy", "--only", "nothing/like/it"), "--only nothing/like/it matches none of"),
        (
            ("check", "numpy", "--dtypes", "float8"),
            "--dtypes must be one of float64, float32, float16, bfloat16, received 'float8'",
        ),
        (("check", "numpy", "--require", "masks"), "--require must be one of "),
        (("check", "numpy", "--accept", "mask"), "a convention is written CONVENTION=VARIANT"),
        (("check", "numpy", "--accept", "mask_polarity=x"), "must be true_attends or true_hides, received 'x'"),
        (("check", "numpy", "--known", "none.toml"), "known failures none.toml: "),
        (("check", "numpy", "--json", "no/such/folder.json"), "there is no folder no/such"),
        (("check", "numpy", "--resume"), "--resume needs --results FILE"),
        (("spec", "MHA-MASK-99"), "there is no clause 'MHA-MASK-99'; similar ids are MHA-MASK"),
        (
            ("explain", "attention/smoke/plane"),
            "there is no case 'attention/smoke/plane'; similar ids are attention/smoke/plain",
        ),
        (("explain", "attention/smoke/plain", "--dtype", "float8"), "is asked in float64"),
        (("cases", "nothing/like/it"), "no case matches"),
    ],
)
def test_error_of_the_user_is_one_line(mha_spec: Command, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = mha_spec(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("mha-spec: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "known = 3",
        "[[known]]\nid = 'x'",
        "[[known]]\nid = 'x'\nreason = ''",
        "[[known]]\nid = 'x'\nreason = 'y'\nwhy = 'z'",
        "[[known]]\nid = 'x'\nreason = 'y'\ndtype = 'float31'",
        "[[known]]\nid = 'x'\nreason = 'y'\n[[nown]]\nid = 'x'",
        "[[",
        "",
    ],
)
def test_invalid_file_of_known_failures_is_refused(mha_spec: Command, tmp_path: Path, text: str) -> None:
    path = tmp_path / "known.toml"
    path.write_text(text)
    status, _, err = mha_spec("check", "numpy", "--known", path)
    assert status == 2
    assert err.startswith(f"mha-spec: known failures {path}: ")


@pytest.mark.parametrize(
    ("module", "arguments"), [("check", ("numpy",)), ("offline.verify", (".",)), ("fuzz", ("numpy",))]
)
def test_interrupted_command_ends_with_status_130(
    mha_spec: Command, monkeypatch: pytest.MonkeyPatch, module: str, arguments: tuple[str, ...]
) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    module, _, name = module.partition(".")
    monkeypatch.setattr(f"mha_spec_conformance.commands.{module}.{name or module}", interrupted)
    assert mha_spec(name or module, *arguments) == (130, "", "mha-spec: interrupted\n")


def test_missing_goldens_are_refused(mha_spec: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mha_spec_conformance.suite import cases

    monkeypatch.setattr(cases, "FOLDER", tmp_path)
    status, _, err = mha_spec("check", "numpy")
    assert status == 2
    assert "index.json" in err


def test_spec_cases_and_backends_are_listed(mha_spec: Command) -> None:
    assert mha_spec("spec", "mha-mask-1")[1].startswith("MHA-MASK-1  MUST  ")
    assert "MHA-MASK-1 " in mha_spec("spec")[1]
    assert "numpy        mha_spec_numpy" in mha_spec("backends")[1]
    listed = mha_spec("cases", "attention/smoke/")[1].splitlines()
    assert listed[-1] == f"{len(listed) - 1} cases"
    assert all(line.startswith("attention/smoke/") for line in listed[:-1])


@pytest.mark.parametrize("name", ["case.npz", "case", 'a"b\\x'])
def test_snippet_of_a_case_runs_without_the_suite(name: str, mha_spec: Command, tmp_path: Path) -> None:
    file = tmp_path / name
    status, out, _ = mha_spec("explain", "attention/smoke/mask-polarity", "--save", file)
    assert status == 0
    for part in (
        "MHA-MASK-1: ",
        "S = 1/sqrt(11) * Q K^T",
        "visible: mask",
        "query  shape=(2, 3, 5, 11) dtype=float32",
        "   1 # # . . . . .",
    ):
        assert part in out
    snippet = out.partition("without the suite:\n")[2].replace("\n    ", "\n").strip()
    from mha_spec.reference import attention

    results: list[numpy.ndarray] = []
    exec(snippet.removeprefix("    "), {"attention": attention, "print": results.append})
    assert numpy.allclose(results[0], numpy.load(file)["expected_output"], rtol=1e-5)


def test_every_case_can_be_explained(mha_spec: Command) -> None:
    listed = [line.split()[0] for line in mha_spec("cases")[1].splitlines()[:-1]]
    for name in listed[::61]:
        status, out, err = mha_spec("explain", name)
        assert (status, err) == (0, "")
        assert out.startswith(name)


def test_help_loads_neither_cases_nor_frameworks(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = python(
        "import sys; from mha_spec_conformance.commands import cli;"
        "loaded = [name in sys.modules for name in ('mha_spec_conformance.commands.cli', 'safetensors', 'torch')];"
        "print(*loaded, 'mha_spec_conformance.suite.cases' in sys.modules)"
    )
    assert done.stdout.split() == ["True", "False", "False", "False"], done.stderr


def test_internal_error_is_one_line(mha_spec: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from mha_spec_conformance.commands import check as checking

    def fault(**_: object) -> int:
        raise KeyError("lost\nkey")

    monkeypatch.setattr(checking, "check", fault)
    message = "mha-spec: internal error: KeyError: 'lost\\nkey'; please report it\n"
    assert mha_spec("check", "numpy") == (2, "", message)
    monkeypatch.setenv("MHA_SPEC_TRACEBACK", "1")
    status, _, err = mha_spec("check", "numpy")
    assert status == 2
    assert err.startswith("Traceback ")
    assert err.endswith(message)


def test_report_says_that_nothing_was_judged(mha_spec: Command, starter: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert mha_spec("check", starter, *SMOKE, "--json", report)[0] == 0
    assert json.loads(report.read_text())["status"] == 0
    starter.write_text(starter.read_text() + "\n\ndef supports(question):\n    return 'not today'\n")
    status, out, err = mha_spec("check", starter, *SMOKE, "--json", report)
    assert (status, out) == (2, "")
    assert "refused all 4 questions as unsupported: not today" in err
    content = json.loads(report.read_text())
    assert (content["status"], content["summary"]["pass"]) == (2, 0)
    assert "refused all 4 questions" in content["verdict"]


def test_a_target_that_does_not_import_is_in_the_report_and_on_the_page(mha_spec: Command, tmp_path: Path) -> None:
    target, report, page = (tmp_path / name for name in ("absent.py", "report.json", "page.html"))
    target.write_text("import a_package_that_is_absent\n")
    reason = "does not import: ModuleNotFoundError: No module named 'a_package_that_is_absent'"
    status, out, err = mha_spec("check", target, "--json", report, "--junit", tmp_path / "junit.xml")
    assert (status, out) == (2, "")
    assert reason in err
    assert not (tmp_path / "junit.xml").exists()
    content = json.loads(report.read_text())
    assert (content["status"], content["complete"], content["cases"]) == (2, False, [])
    status, out, _ = mha_spec("matrix", report, "--html", page)
    assert status == 0
    assert f"no case was judged: target {target} {reason}"[:200] in " ".join(out.split())
    assert "not judged" in page.read_text()
    assert "a_package_that_is_absent" in page.read_text()
    assert '"right"' not in page.read_text().partition("<tbody>")[2].partition("</tbody>")[0]


def test_stale_known_failure_is_in_the_report(mha_spec: Command, starter: Path, tmp_path: Path) -> None:
    known, report = tmp_path / "known.toml", tmp_path / "report.json"
    known.write_text('[[known]]\nid = "attention/smoke/plain"\nreason = "none"\n')
    assert mha_spec("check", starter, *SMOKE, "--known", known, "--json", report)[0] == 1
    written = json.loads(report.read_text())
    assert written["status"] == 1
    assert any("attention/smoke/plain did not fail" in note for note in written["notes"])


def test_every_pattern_must_match(mha_spec: Command) -> None:
    status, _, err = mha_spec("check", "numpy", *SMOKE, "--only", "attention/smoek/")
    assert status == 2
    assert "--only attention/smoek/ matches none of" in err


def test_exception_of_the_target_is_printed_without_a_clause(mha_spec: Command, starter: Path) -> None:
    starter.write_text(starter.read_text().replace("visible &= mask", "raise KeyError(':fire: [bold]')"))
    _, out, _ = mha_spec("check", starter, *SMOKE)
    assert "ERROR  attention/smoke/mask-polarity" in out
    assert "MHA-MASK-1: " not in out
    assert "The case also cites" not in out
    assert ":fire: [bold]" in out
