"""Tools for CI: the plugin of pytest, JUnit XML, Markdown, excluded cases, and shards that are merged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.sharding import shard
from mha_spec_conformance.commands.check import check
from mha_spec_conformance.commands.merge import merge
from mha_spec_conformance.commands.reports import Reports
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.targets.loading import load as load_target

if TYPE_CHECKING:
    from pathlib import Path

ONLY = ("attention/causal*", "attention/smoke*")
WRONG = """
from mha_spec.reference import attention as right

def attention(query, key, value, *, mask=None, causal=False, q_offset=None):
    if query.shape[2] == 1:
        raise NotImplementedError("<one> & query")
    return right(query, key, value, mask=mask, causal=causal, q_offset=0 if causal else None)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("target") / "upper_left.py"
    path.write_text(WRONG)
    return str(path)


def report_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def checked(target: str, folder: Path, name: str, **options: Any) -> tuple[int, dict[str, Any]]:
    path = folder / f"{name}.json"
    status = check(target=target, only=ONLY, dtypes=("float32",), reports=Reports(path), **options)
    return status, report_of(path)


def outcomes(report: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(case["id"], case["dtype"]): case["outcome"] for case in report["cases"]}


@pytest.fixture(scope="module")
def whole(target: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int]:
    folder = tmp_path_factory.mktemp("whole")
    reports = Reports(folder / "report.json", folder / "report.xml", folder / "report.md")
    status = check(target=target, only=ONLY, dtypes=("float32",), reports=reports)
    return folder, report_of(folder / "report.json"), status


def test_junit_has_a_test_for_each_result(whole: tuple[Path, dict[str, Any], int]) -> None:
    folder, report, status = whole
    root = ElementTree.parse(folder / "report.xml").getroot()
    tests = {test.get("name"): test for test in root.iter("testcase")}
    assert status == 1
    assert set(tests) == {f"{case['id']}[{case['dtype']}]" for case in report["cases"]}
    kinds = {"pass": None, "fail": "failure", "deviation": "failure", "error": "error", "unsupported": "skipped"}
    for case in report["cases"]:
        children = [child.tag for child in tests[f"{case['id']}[{case['dtype']}]"]]
        expected = kinds[case["outcome"]] if case["level"] == "MUST" or case["outcome"] == "unsupported" else "skipped"
        assert children == ([] if expected is None or case["outcome"] == "pass" else [expected])
    failed = sum(case["outcome"] in ("fail", "deviation") and case["level"] == "MUST" for case in report["cases"])
    assert root.get("failures") == str(failed) != "0"
    assert "&lt;one&gt;" in (folder / "report.xml").read_text()


def test_markdown_has_the_verdict_and_is_appended(whole: tuple[Path, dict[str, Any], int]) -> None:
    folder, report, _ = whole
    text = (folder / "report.md").read_text()
    assert text.startswith("## ❌ ")
    assert "| feature | pass |" in text
    assert "<details><summary>" in text
    assert str(report["summary"]["pass"]) in text.splitlines()[-1] + text
    Reports(markdown=folder / "report.md").prepare()
    assert (folder / "report.md").read_text() == text


def test_excluded_cases_are_not_asked(target: str, tmp_path: Path, whole: tuple[Path, dict[str, Any], int]) -> None:
    _, report = checked(target, tmp_path, "part", exclude=("attention/smoke*", "MHA-EMPTY-1"))
    excluded = {c["id"] for c in whole[1]["cases"]} - {c["id"] for c in report["cases"]}
    assert any(name.startswith("attention/smoke") for name in excluded)
    assert not any(name.startswith("attention/smoke") for name, _ in outcomes(report))
    assert report["verdict"].startswith("partial run")
    with pytest.raises(MhaSpecError, match="--exclude no-such-case matches none"):
        check(target=target, exclude=("no-such-case",))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_have_every_ask_once_and_similar_costs(count: int) -> None:
    asked = asks(load().cases, load_target("numpy").claims, Selection(dtypes=("float32",)))
    shards = [shard(asked, number, count) for number in range(1, count + 1)]
    keys = [ask.key for part in shards for ask in part]
    assert sorted(keys) == sorted(ask.key for ask in asked)
    assert len(keys) == len(set(keys))
    assert min(len(part) for part in shards) > len(asked) / count / 4


def test_merged_shards_are_the_whole_run(target: str, tmp_path: Path, whole: tuple[Path, dict[str, Any], int]) -> None:
    parts = []
    for number in (1, 2):
        _, report = checked(target, tmp_path, str(number), shard=f"{number}/2")
        assert report["selection"]["shard"] == [number, 2]
        assert report["verdict"].startswith("partial run")
        parts.append(tmp_path / f"{number}.json")
    merged = Reports(tmp_path / "merged.json", tmp_path / "merged.xml")
    assert merge(parts, (), merged) == whole[2]
    report = report_of(tmp_path / "merged.json")
    assert outcomes(report) == outcomes(whole[1])
    for name in ("summary", "features", "status", "conventions", "complete"):
        assert report[name] == whole[1][name]
    assert (tmp_path / "merged.xml").exists()

    refused = {
        "shard 2 is missing": parts[:1],
        "2 reports of shard 1": [parts[0], *parts],
        "is not of a shard": [whole[0] / "report.json"],
    }
    for message, paths in refused.items():
        with pytest.raises(MhaSpecError, match=message):
            merge(paths, (), Reports())
    other = report_of(parts[1])
    other["cases"] += report_of(parts[0])["cases"][:1]
    (tmp_path / "2.json").write_text(json.dumps(other))
    with pytest.raises(MhaSpecError, match="occurs in two reports"):
        merge(parts, (), Reports())
    other["target"]["versions"] = {"numpy": "0"}
    (tmp_path / "2.json").write_text(json.dumps(other))
    with pytest.raises(MhaSpecError, match="differ in target"):
        merge(parts, (), Reports())
    del other["cases"][0]["outcome"]
    (tmp_path / "2.json").write_text(json.dumps(other))
    with pytest.raises(MhaSpecError, match=r"2\.json: `cases\[0\]\.outcome` must be one of pass, .* which is missing"):
        merge(parts, (), Reports())


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_wrong_shard_is_refused(text: str, target: str) -> None:
    with pytest.raises(MhaSpecError, match="--shard must be I/N"):
        check(target=target, shard=text)


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    plugin = ("-p", "no:mha_spec", "-p", "mha_spec_conformance.pytest_plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-P", "-m", "pytest", *plugin, "--rootdir", str(folder), "-rA", *arguments]
    # Other plugins take more time to load than the test.
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "300"}
    return subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False, timeout=300)


def test_pytest_makes_a_test_of_each_case(target: str, tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")
    only = ("--mha-target", target, "--mha-only", "attention/smoke*", "--mha-dtypes", "float32")
    done = run_pytest(tmp_path, *only)
    assert done.returncode == 0, done.stdout
    assert "attention/smoke/plain[float32]" in done.stdout
    assert "test_other" in done.stdout


def test_known_failures_are_strict(target: str, tmp_path: Path, whole: tuple[Path, dict[str, Any], int]) -> None:
    failing = [
        case["id"] for case in whole[1]["cases"] if case["outcome"] in ("fail", "deviation") and case["level"] == "MUST"
    ]
    passing, known, wrong = "attention/smoke/plain", failing[0], failing[1]
    file = tmp_path / "known.toml"
    file.write_text(f'[[known]]\nreason = "a reason"\nid = ["{passing}", "{known}"]\n')
    only = [argument for name in (passing, known, wrong) for argument in ("--mha-only", name)]
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")
    options = ("--mha-target", target, *only, "--mha-dtypes", "float32", "--mha-known", str(file), "-m", "mha_spec")
    done = run_pytest(tmp_path, *options)
    assert done.returncode == 1
    summary = done.stdout.partition("short test summary")[2]
    assert f"XFAIL upper_left.py::{known}[float32] - a reason" in summary.replace(target, "upper_left.py")
    assert f"{passing}[float32]" in summary
    (line,) = (line for line in summary.splitlines() if f"{wrong}[float32]" in line)
    assert re.search(r" - (FAIL|DEVIATION): .{9}", line)
    assert "did not fail" in done.stdout
    assert f"mha-spec explain {wrong}" in done.stdout
    assert "pass --mha-accept causal_alignment=" in done.stdout
    assert "It looks like the mistake offset-ignored" in done.stdout
    assert "test_other" not in summary


def test_a_target_that_cannot_be_judged_is_an_error_of_usage(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--mha-target", "nothing.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "there is no file nothing.py" in done.stderr + done.stdout


def test_the_plugin_imports_nothing_but_pytest() -> None:
    heavy = ("numpy", "typer", "rich", "safetensors", "mha_spec", "torch", "jax", "xml")
    code = (
        "import pytest, sys; before = set(sys.modules); import mha_spec_conformance.pytest_plugin; "
        f"print([n for n in {heavy} if n in sys.modules and n not in before], len(set(sys.modules) - before))"
    )
    shown = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "[] 2"


def test_python_dash_m_does_what_the_script_does() -> None:
    command = [sys.executable, "-P", "-m", "mha_spec_conformance", "spec", "MHA-MASK-1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "True means that the query may attend" in done.stdout
