"""Write a run as JUnit XML, which CI services show as tests: a test suite for each function, a test for each case."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from mha_spec_conformance.judging.result import FAILING, INTERNAL
from mha_spec_conformance.suite.text import printable

from .files import write_text
from .terminal import details

if TYPE_CHECKING:
    from pathlib import Path

    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.running.run import Run

__all__ = ["junit", "write_junit"]


def junit(run: Run) -> str:
    """Return the report of a run as JUnit XML.

    An accepted, known or SHOULD failure is a skipped test, as is an unsupported case; the message says which.
    """
    root = ElementTree.Element("testsuites", name=f"mha-spec {printable(run.claims.name)}")
    by_function = sorted(run.results, key=lambda result: result.ask.case.function)
    for function, results in groupby(by_function, key=lambda result: result.ask.case.function):
        suite = ElementTree.SubElement(root, "testsuite", name=function)
        for result in results:
            suite.append(_test(run, result))
        _count(suite)
    _count(root)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _test(run: Run, result: Result) -> ElementTree.Element:
    ask = result.ask
    name = f"{ask.case.id}[{ask.dtype}]"
    test = ElementTree.Element("testcase", classname=ask.case.function, name=name, time=f"{result.seconds:.6f}")
    if result.outcome == "pass":
        return test
    excuse = _excuse(run, result)
    kind = "skipped" if excuse else "failure" if result.outcome in ("fail", "deviation") else "error"
    message = printable(f"{excuse}: {result.reason}" if excuse else f"{result.outcome}: {result.reason}")
    element = ElementTree.SubElement(test, kind, message=message)
    if not excuse:
        element.text = "\n".join(printable(line) for line in details(result))
    return test


def _excuse(run: Run, result: Result) -> str | None:
    """Return the reason why a result that is not a pass does not count."""
    if result.outcome == "unsupported":
        return "unsupported"
    if result.outcome == INTERNAL or result.outcome not in FAILING:
        return None
    return run.excuse(result) or (None if result.must else "SHOULD")


def _count(parent: ElementTree.Element) -> None:
    """Write the numbers of tests, failures, errors and skipped tests, and the time, as attributes."""
    tests = list(parent.iter("testcase"))
    parent.set("tests", str(len(tests)))
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        parent.set(attribute, str(sum(test.find(kind) is not None for test in tests)))
    parent.set("time", f"{sum(float(test.get('time', 0)) for test in tests):.3f}")


def write_junit(run: Run, path: Path) -> None:
    """Write the report of a run to a file, which is never seen half written.

    Raises:
        OSError: The file cannot be written.
    """
    write_text(path, junit(run))
