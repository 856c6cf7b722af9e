"""`mha-spec repro`: reduce a case that a target fails, and print a script that shows the fault without the suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.fuzzing.asking import Asker
from mha_spec_conformance.fuzzing.reduction import call_of, reduced
from mha_spec_conformance.fuzzing.script import script_of
from mha_spec_conformance.fuzzing.search import Finding
from mha_spec_conformance.judging.result import FAILING
from mha_spec_conformance.reporting.terminal import details
from mha_spec_conformance.suite.text import printable

from .listing import case_called
from .reports import UsageError

if TYPE_CHECKING:
    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.fuzzing.call import Call
    from mha_spec_conformance.judging.result import Result

__all__ = ["repro"]

SECONDS = 30.0
"""The time that the reduction may take."""


def repro(target: str, identity: str, dtype: str | None = None, *, seconds: float = SECONDS) -> str:
    """Return a script that shows the fault of a target in a case, with the case reduced.

    Raises:
        UnknownName: No case has this id.
        UsageError: The target is not asked the case, or does not fail it.
        TargetError: The target cannot be loaded.
    """
    case = case_called(identity)
    with Pool(target) as pool:

        def answered(question: Question) -> Answer:
            ((_, answer),) = pool.answers([question])
            return answer

        asker = Asker(pool.claims, answered)
        asked = asks([case], pool.claims, Selection(dtypes=() if dtype is None else (dtype,)))
        if not asked:
            raise UsageError(f"target {target} is not asked {identity}: it does not claim what the case needs")
        finding = _reduced(_failing(asked, asker), asker, seconds)
        script = script_of(finding, target, pool.claims.arrays)
    comments = [f"# {printable(line)}"[:120] for line in details(finding.result)[:-1] if not line.startswith("Call")]
    return "\n".join([f"# Reduced from the case {identity} of mha-spec.", *comments[:4], script])


def _failing(asked: list[Ask], asker: Asker) -> Call:
    """Return the call of the first dtype in which the case fails; float32 is tried first."""
    for ask in sorted(asked, key=lambda ask: ask.dtype != "float32"):
        case = ask.case
        call = call_of(case.function, ask.dtype, case.inputs(ask.dtype), case.options, lse="lse" in ask.outputs)
        result = _result(asker, call)
        if result is not None and result.outcome in FAILING:
            return call
    dtypes = ", ".join(ask.dtype for ask in asked)
    raise UsageError(f"the target does not fail {asked[0].case.id} in {dtypes}, so that there is nothing to reproduce")


def _reduced(call: Call, asker: Asker, seconds: float) -> Finding:
    """Reduce a call as far as it shows the same fault, which no other known mistake explains.

    A small call fits many mistakes. Those that explained a candidate are asked about before all others, which is fast.
    """
    asker.suspect(None)
    first = _result(asker, call)
    assert first is not None
    suspects = set(first.diagnosis)

    def fails(candidate: Call) -> bool:
        asker.suspect(suspects)
        if not _is_the_same(first, _result(asker, candidate)):
            return False
        asker.suspect(None)
        result = _result(asker, candidate)
        suspects.update(() if result is None else result.diagnosis)
        return _is_the_same(first, result)

    call = reduced(call, fails, seconds)
    asker.suspect(None)
    result = _result(asker, call)
    return Finding(call, first if result is None else result)


def _is_the_same(first: Result, result: Result | None) -> bool:
    """Tell whether a result has the fault of the first: the same first name, if any, and no name that is new."""
    if result is None or (result.outcome, result.compared) != (first.outcome, first.compared):
        return False
    return result.diagnosis[:1] == first.diagnosis[:1] and set(result.diagnosis) <= set(first.diagnosis)


def _result(asker: Asker, call: Call) -> Result | None:
    """Judge the answer to a call; None if the call is not valid."""
    try:
        return asker.result(call, "repro")
    except MhaSpecError:
        return None
