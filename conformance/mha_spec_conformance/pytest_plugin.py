"""A plugin of pytest: `pytest --mha-target=TARGET` makes a test of each case and dtype that the target claims.

This module is imported in every run of pytest where mha-spec is installed, so it imports nothing but pytest; the suite
is imported only with the option.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mha_spec_conformance.commands.items import Asker


MARKER = "mha_spec"

ASKER: pytest.StashKey[Asker] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, whose meaning is that of `mha-spec check`."""
    group = parser.getgroup("mha-spec", "conformance of an attention")
    group.addoption("--mha-target", metavar="TARGET", help="Make a test of each case that this target claims.")
    group.addoption("--mha-only", action="append", default=[], metavar="PATTERN", help="As mha-spec check --only.")
    group.addoption("--mha-exclude", action="append", default=[], metavar="PATTERN", help="As --exclude.")
    group.addoption("--mha-dtypes", action="append", default=[], metavar="DTYPE", help="As --dtypes.")
    group.addoption("--mha-accept", action="append", default=[], metavar="CONVENTION=VARIANT", help="As --accept.")
    group.addoption("--mha-known", metavar="FILE", help="As --known: these failures are expected, strictly.")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of the tests."""
    config.addinivalue_line("markers", f"{MARKER}: a case of the conformance suite of mha-spec")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Append a test for each case and dtype."""
    target = config.getoption("--mha-target")
    if target is not None:
        cases = MhaTarget.from_parent(session, name=target, nodeid=target, path=config.rootpath)
        items.extend(cases.collect())


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process of the target."""
    if ASKER in config.stash:
        config.stash[ASKER].close()


class MhaTarget(pytest.Collector):
    """The cases that a target claims."""

    def collect(self) -> Iterator[MhaCase]:
        """Return a test for each case and dtype."""
        from pathlib import Path

        from mha_spec.errors import MhaSpecError
        from mha_spec_conformance.commands.items import Asker

        def names(option: str) -> tuple[str, ...]:
            return tuple(self.config.getoption(option) or ())

        known = self.config.getoption("--mha-known")
        try:
            asker = Asker(
                self.name,
                only=names("--mha-only"),
                exclude=names("--mha-exclude"),
                dtypes=names("--mha-dtypes"),
                accepted=names("--mha-accept"),
                known=Path(known) if known else None,
            )
        except MhaSpecError as error:
            raise pytest.UsageError(str(error)) from error
        self.config.stash[ASKER] = asker
        for identity, dtype in asker.keys:
            yield MhaCase.from_parent(self, name=f"{identity}[{dtype}]", identity=identity, dtype=dtype)


class MhaCase(pytest.Item):
    """A case in a dtype."""

    def __init__(self, *, identity: str, dtype: str, **arguments: object) -> None:
        super().__init__(**arguments)  # pyright: ignore[reportArgumentType]
        self.identity, self.dtype = identity, dtype
        self.add_marker(MARKER)

    def runtest(self) -> None:
        """Ask the target and judge the answer; a known failure must fail."""
        outcome = self.config.stash[ASKER].judge(self.identity, self.dtype)
        if outcome.kind == "skip":
            pytest.skip(outcome.reason)
        if outcome.kind == "expected":
            pytest.xfail(outcome.reason)
        if outcome.kind == "fail":
            raise WrongAnswer(outcome.reason)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        """Return the report of a wrong answer, and the traceback of any other error."""
        if isinstance(excinfo.value, WrongAnswer):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[str, None, str]:
        """Return the name of the test in reports."""
        assert self.parent is not None
        return self.parent.name, None, self.name


class WrongAnswer(AssertionError):
    """The target answered a case wrongly."""
