"""The attentions of other libraries: what is known of them names cases and clauses, and the page has a row of each."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.judging.naming import named
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.running.known import read_known
from mha_spec_conformance.suite.spec import clauses
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target
from mha_spec_conformance.targets.metadata import dependencies

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Suite

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "conformance" / "targets"
TARGETS = sorted(path.stem for path in FOLDER.iterdir() if path.suffix in (".py", ".mjs"))
SCRIPTS = sorted((ROOT / "docs" / "findings").glob("*.py"))
KNOWN = sorted(FOLDER.glob("*.known.toml"))
DEVICES = FOLDER / "devices"
OF_DEVICES = sorted({*DEVICES.glob("*.py")} - {DEVICES / "processes.py"})


@pytest.mark.parametrize("file", [*KNOWN, *DEVICES.glob("*.known.toml")], ids=lambda file: file.name)
def test_known_deviations_name_a_target_cases_and_a_clause(suite: Suite, file: Path) -> None:
    cases = {case.id: case for case in suite.cases}
    known = read_known(file)
    name = file.name.removesuffix(".known.toml")
    assert any(file.with_name(name + suffix).exists() for suffix in (".py", ".mjs"))
    assert {entry.id for entry in known} <= set(cases)
    assert all(cases[entry.id].level == "MUST" for entry in known)
    assert {entry.reason.partition(":")[0] for entry in known} <= set(clauses())


def test_the_page_has_a_row_of_every_target_and_says_which_deviate() -> None:
    page = (ROOT / "docs" / "targets.md").read_text()
    rows = re.findall(r"^\| (\w+) \| .+ \| (\d+) \| (\d+) \|.* \| (?:CI|by hand) \|$", page, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == TARGETS
    deviating = {f"{name}.known.toml" for name, asked, passed in rows if asked != passed}
    assert deviating == {file.name for file in KNOWN}


@pytest.mark.parametrize("file", [*sorted(FOLDER.glob("*.py")), *OF_DEVICES, *SCRIPTS], ids=lambda file: file.stem)
def test_a_target_or_finding_pins_the_packages_that_it_needs(file: Path) -> None:
    text = file.read_text()
    block = re.match(r"# /// script\n# dependencies = (\[.*?\])\n# ///\n", text, re.DOTALL)
    listed = json.loads(re.sub(r"^#|,(?=\s*(?:# )?\])", "", block[1], flags=re.MULTILINE))
    pinned = [re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==[A-Za-z0-9._]+", requirement) for requirement in listed]
    assert all(pinned), listed
    assert dependencies(SimpleNamespace(__file__=str(file))) == tuple(match[1] for match in pinned)


def test_the_targets_in_javascript_pin_the_packages_that_they_need() -> None:
    needed = {
        package
        for program in FOLDER.glob("*.mjs")
        for package in re.findall(r'createRequire\(import\.meta\.url\)\("([^"]+)"\)', program.read_text())
    }
    pinned = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    assert set(pinned) == needed
    assert needed
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in pinned.values())


def test_the_page_of_findings_has_a_section_of_every_script() -> None:
    _, *sections = re.split(r"^## ", (ROOT / "docs" / "findings.md").read_text(), flags=re.MULTILINE)
    parts = [re.findall(r"^- \*(\w+)\*:", section, re.MULTILINE) for section in sections]
    assert all(names == ["Promise", "Result", "Script", "Upstream"] for names in parts), parts
    titles = [section.partition("\n")[0].casefold() for section in sections]
    assert titles == sorted(titles)
    linked = [name for section in sections for name in re.findall(r"\(findings/(\w+\.py)\)", section)]
    assert sorted(linked) == [script.name for script in SCRIPTS]


@pytest.mark.parametrize("text", ["", "# /// script\n# dependencies = [\n# ///\n", "# /// script\n# x = 1\n# ///\n",
                                  "# /// script\n# dependencies = [1]\n# ///\n", "\0"])  # fmt: skip
def test_metadata_that_cannot_be_read_names_no_package(text: str, tmp_path: Path) -> None:
    (tmp_path / "target.py").write_text(text)
    assert dependencies(SimpleNamespace(__file__=str(tmp_path / "target.py"))) == ()
    assert dependencies(SimpleNamespace(__file__=None)) == ()


def test_further_calls_of_a_layer_follow_the_convention_of_the_first(suite: Suite) -> None:
    claims = Claims("mine", {"multi_head_attention": ("kv_lengths",)}, ("float64",))
    mean = next(mistake for mistake in MISTAKES if mistake.name == "empty-row-mean")
    layer = function_over(mean.steps, "multi_head_attention")
    judge, (ask, *_) = Judge(claims), asks(suite.cases, claims, Selection(("multi_head_attention/one-token/",)))
    ask = replace(ask, every_layout=True)
    result = judge.result(ask, answer(Target({"multi_head_attention": layer}, claims), ask.question()))
    assert result.wrong is not None
    names = named([result.wrong], [], judge.recognition)
    explained = judge.explained(result, names[ask.key])
    assert (explained.outcome, explained.reason) == ("deviation", "fully_masked_row=mean_of_values")
