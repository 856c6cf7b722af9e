"""`mha-spec diff`: regressions, mends and other changes between two reports, the exit status, and refused reports."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from support.stored_reports import CASE, cause, entry, report, written
from typer.testing import CliRunner

from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.commands.cli import app
from mha_spec_conformance.commands.diff import diff, markdown_lines, text_lines
from mha_spec_conformance.judging.result import FAILING, INTERNAL, OUTCOMES
from mha_spec_conformance.reporting.difference import Difference, difference
from mha_spec_conformance.reporting.report import as_json
from mha_spec_conformance.reporting.stored import ReportError, read_report
from mha_spec_conformance.running.runner import Settings, run

if TYPE_CHECKING:
    from pathlib import Path

    from mha_spec_conformance.suite.cases import Suite


def compared(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> Difference:
    return difference(*(read_report(path) for path in written(folder, old, new)))


KINDS = {
    **{("pass", outcome): "regression" for outcome in (*OUTCOMES[1:], INTERNAL, None)},
    **{(outcome, "pass"): "mend" for outcome in OUTCOMES[1:]},
    **{("unsupported", outcome): "regression" for outcome in sorted(FAILING)},
    **{(before, after): "regression" for before in ("fail", "deviation", "error") for after in ("crash", "timeout")},
    **{(before, after): "other change" for before in ("crash", "fail") for after in ("error", "unsupported")},
    **{(None, outcome): "other change" for outcome in OUTCOMES},
    **{(outcome, None): "other change" for outcome in OUTCOMES[1:]},
    **{(outcome, outcome): None for outcome in OUTCOMES},
    ("crash", "timeout"): "other change",
    ("deviation", "fail"): "other change",
}


@pytest.mark.parametrize(("before", "after"), KINDS)
def test_a_change_of_the_outcome_has_a_kind(before: str | None, after: str | None, tmp_path: Path) -> None:
    always = entry("pass", "attention/core/generic-1")
    reports = [report(always, *([entry(outcome)] if outcome else [])) for outcome in (before, after)]
    changed = compared(tmp_path, *reports)
    kind = KINDS[before, after]
    assert [change.kind for change in changed.changes] == [kind] * (kind is not None)
    assert changed.status == (kind == "regression")
    assert changed.unchanged == 1 + (before == after)


def test_results_that_do_not_count_are_not_regressions(tmp_path: Path) -> None:
    inverted = entry("deviation", conventions=["mask_polarity=true_hides"])
    known = {"id": CASE, "dtype": "float32", "outcome": None, "reason": "issue 12"}
    excused = {
        "accepted": report(inverted, accepted=["mask_polarity=true_hides"]),
        "known": report(entry("fail"), known=[known]),
        "SHOULD": report(entry("fail", level="SHOULD")),
    }
    for excuse, new in excused.items():
        changed = compared(tmp_path, report(entry("pass")), new)
        assert [change.kind for change in changed.changes] == ["other change"]
        assert excuse in changed.changes[0].transition
        assert changed.status == 0
    for new in (
        report(inverted),
        report(entry("crash"), known=[known]),
        report(entry("fail"), known=[{**known, "id": "x"}]),
    ):
        assert compared(tmp_path, report(entry("pass")), new).status == 1
    should = report(entry("pass", level="SHOULD"))
    assert compared(tmp_path, should, report()).status == 0


def test_a_failure_with_another_cause_is_a_change(tmp_path: Path) -> None:
    failure = entry("fail")
    old, new = (report(failure, causes=[cause(name, failure)]) for name in ("mask-ignored", "mask-polarity-inverted"))
    assert compared(tmp_path, old, old).changes == ()
    changed = compared(tmp_path, old, new)
    (change,) = changed.changes
    assert (change.kind, change.transition) == ("other change", "still fail, for another cause")
    assert "mask-polarity-inverted" in changed.groups[0].title
    readings = [report(entry("deviation", conventions=[f"mask_polarity={x}"])) for x in ("true_hides", "true_attends")]
    assert len(compared(tmp_path, *readings).changes) == 1


def test_regressions_come_first_and_are_grouped_by_cause(tmp_path: Path) -> None:
    names = [f"attention/mask/{number}" for number in range(12)]
    old = report(*[entry("pass", name) for name in names[:9]], *[entry("error", name) for name in names[9:]])
    failures = [entry("fail", name) for name in names[:7]]
    others = [entry("unsupported", names[7]), entry("crash", names[8])]
    new = report(
        *failures,
        *others,
        *[entry("pass", name) for name in names[9:]],
        entry("pass", names[0], "float16"),
        causes=[cause("mask-polarity-inverted", *failures)],
        version="2.0",
    )
    changed = compared(tmp_path, old, new)
    assert changed.summary == "9 regressions, 3 mends, 1 other change; 0 results unchanged"
    assert [(group.transition, len(group.changes)) for group in changed.groups] == [
        ("pass → crash", 1),
        ("pass → fail", 7),
        ("pass → unsupported", 1),
        ("error → pass", 3),
        ("not asked → pass", 1),
    ]
    lines = list(text_lines(changed))
    assert "Old: my_attention.py (library 1.0)" in lines[0]
    assert "New: my_attention.py (library 2.0)" in lines[1]
    assert "specification 1.1, suite 1.1.0, accuracy rule 2, goldens abab" in lines[2]
    text = "\n".join(lines)
    headings = ["Regressions (9)", "Mends (3)", "Other changes (1)"]
    assert [line for line in lines if line in headings] == headings
    assert "reads True in a mask as hidden" in text
    assert "[MHA-MASK-1] (7)" in text
    assert "and 2 more cases" in text
    assert "mha-spec repro my_attention.py attention/mask/0 --dtype float32" in text
    assert "pass → unsupported: the reason of unsupported" in text
    assert lines[-1] == changed.summary


def test_the_largest_group_of_the_same_outcomes_is_first(tmp_path: Path) -> None:
    names = [f"attention/mask/{number}" for number in range(5)]
    old = report(*[entry("pass", name) for name in names])
    new = report(*[entry("error", name, reason=f"reason {number % 3 % 2}") for number, name in enumerate(names)])
    changed = compared(tmp_path, old, new)
    assert [(group.title, len(group.changes)) for group in changed.groups] == [("reason 0", 3), ("reason 1", 2)]
    assert {group.clauses for group in changed.groups} == {("MHA-MASK-1",)}
    assert "\n".join(text_lines(changed)).count("reason 0") == 1, "a case does not repeat the reason of its group"


def test_a_feature_that_is_no_longer_claimed_is_named(tmp_path: Path) -> None:
    new = report()
    old = report(entry("pass", features=["core", "mask"]))
    new["target"].update(features=[])
    (group,) = compared(tmp_path, old, new).groups
    assert (group.kind, group.title) == ("regression", "my_attention.py does not claim mask")
    new["target"].update(dtypes=["float16"])
    (group,) = compared(tmp_path, old, new).groups
    assert (group.kind, group.title) == ("regression", "my_attention.py does not claim float32")
    (group,) = compared(tmp_path, report(entry("pass")), report(complete=False)).groups
    assert group.title == "the run of my_attention.py did not ask it"


def test_remarks_name_what_differs_between_the_runs(tmp_path: Path) -> None:
    old = report(entry("pass"), entry("pass", "x", allowance_used=0.125))
    new = report(entry("pass", allowance_used=0.75), accepted=["lse_base=2"], complete=False)
    new["target"].update(name="other.py", profile="fused", conventions={"causal_alignment": "lower_right"})
    remarks = "\n".join(compared(tmp_path, old, new).remarks)
    for part in ("my_attention.py and other.py", "profile", "conventions", "accepted", "new run is partial", "0.25 of"):
        assert part in remarks
    assert list(compared(tmp_path, old, old).remarks) == []
    known = report(*old["cases"], known=[{"id": CASE, "dtype": "float32", "outcome": None, "reason": "issue 12"}])
    (remark,) = compared(tmp_path, old, known).remarks
    assert "known" in remark
    (remark,) = compared(tmp_path, new, {**new, "complete": True}).remarks
    assert "old run is partial" in remark


def test_long_lists_are_cut(tmp_path: Path) -> None:
    new = report(*[entry("error", f"attention/mask/{i}", reason=f"reason {i} " + "long " * 100) for i in range(50)])
    old = report(*[entry("pass", case["id"]) for case in new["cases"]])
    for lines in (text_lines, markdown_lines):
        text = list(lines(compared(tmp_path, old, new)))
        assert any("and 30 more of 30 other causes" in line for line in text)
        assert len(text) < 80
        assert max(map(len, text)) < 400


def test_texts_of_a_report_cannot_forge_lines_or_markup(tmp_path: Path) -> None:
    hostile = "\x1b[31m\n## forged <script>|`[x](y)"
    new = report(entry("error", reason=hostile), verdict=hostile)
    new["target"].update(name=hostile, versions={hostile: hostile})
    changed = compared(tmp_path, report(entry("pass")), new)
    for lines in (text_lines, markdown_lines):
        assert all(line.isprintable() for line in lines(changed))
    markdown = "\n".join(markdown_lines(changed))
    assert "<script" not in markdown
    assert "[x](" not in markdown


def test_the_command_prints_appends_markdown_and_has_a_status(tmp_path: Path) -> None:
    old, new = written(tmp_path, report(entry("pass")), report(entry("fail")))
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    for paths, status, sign in (((old, new), 1, "❌"), ((new, old), 0, "✅")):
        result = CliRunner().invoke(app, ["diff", *map(str, paths), "--markdown", str(summary)])
        assert result.exit_code == status, result.output
        assert f"## {sign} my\\_attention.py: " in summary.read_text()
    assert summary.read_text().startswith("before\n")
    assert "0 regressions, 1 mend, 0 other changes" in result.output


def test_reports_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    right = report(entry("pass"))
    other_suite, other_rule, other_part = copy.deepcopy(right), copy.deepcopy(right), copy.deepcopy(right)
    other_suite["suite"]["goldens_sha256"] = "cd" * 32
    other_rule["suite"]["accuracy_rule"] = "3"
    other_part["selection"].update(only=["attention/mask*"], shard=[1, 4])
    messages = {
        "different suites: .*abab.*cdcd.*same version of mha-spec": other_suite,
        "different suites: .*rule 2.*rule 3": other_rule,
        "different selections: .*the whole suite.*--only attention/mask\\* --shard 1/4": other_part,
    }
    for message, new in messages.items():
        with pytest.raises(ReportError, match=message):
            compared(tmp_path, right, new)


def test_a_file_that_is_not_a_report_is_refused_with_the_wrong_member(tmp_path: Path) -> None:
    twice = report(entry("pass"), entry("pass"))
    missing = {name: value for name, value in report().items() if name != "causes"}
    wrong = {
        "does not hold mha-spec-report/1": {"schema": "mha-spec-results/1"},
        "`causes` must be a list, which is missing": missing,
        r"`cases\[1\].outcome` must be one of pass, .*received 'good'": report(entry("pass"), entry("good", "x")),
        r"`cases\[0\].allowance_used` must be a number": report(entry("pass", allowance_used=[1])),
        r"`cases\[0\].conventions` must be a list of conventions": report(entry("pass", conventions=["colour=red"])),
        r"`cases` must be a list of objects": report(cases=[None]),
        "`suite.version` must be a string": report(suite={}),
        "`target` must be an object": report(target=[]),
        r"`causes\[0\]` must be an object": report(causes=[1]),
        r"`known\[0\].id` must be a string": report(known=[{"reason": "x"}]),
        "`status` must be 0, 1 or 2": report(status=True),
        "occurs twice": twice,
    }
    for message, content in wrong.items():
        (path,) = written(tmp_path, content)
        with pytest.raises(ReportError, match=message):
            read_report(path)
    path = tmp_path / "damaged.json"
    for content in (b"\xff", b"[" * 100_000, b"", b"null"):
        path.write_bytes(content)
        with pytest.raises(ReportError):
            read_report(path)
    with pytest.raises(ReportError, match="cannot be read"):
        diff(tmp_path / "no-file.json", path)


WRONG = """
from mha_spec.reference import attention as right

dtypes = ("float32",)

def attention(query, key, value, *, mask=None):
    return right(query, key, value, mask=~mask if mask is not None and INVERTED else mask)
"""


def test_reports_of_real_runs_are_compared(suite: Suite, tmp_path: Path) -> None:
    settings = Settings(selection=Selection(only=("attention/smoke/*", "attention/mask/size-64-generic")))
    reports = []
    for inverted in (False, True):
        path = tmp_path / "target.py"
        path.write_text(WRONG.replace("INVERTED", str(inverted)))
        reports.append(as_json(run(str(path), suite, settings)))
    changed = compared(tmp_path, *reports)
    assert changed.status == 1
    assert {group.transition for group in changed.groups} == {"pass → deviation"}
    assert {group.clauses for group in changed.groups} == {("MHA-MASK-1",)}
    assert all("True in a mask as hidden" in group.title for group in changed.groups)
    assert changed.unchanged > 0
    assert {change.kind for change in compared(tmp_path, *reversed(reports)).changes} == {"mend"}
