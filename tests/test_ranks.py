"""A target whose keys lie on several ranks is allowed the errors of merging their partial results (MHA-SHARD-3)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.layouts import Inside

from mha_spec import reference
from mha_spec.sharding import shard_order
from mha_spec_conformance.asking.protocol import claims_from, claims_message
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.judging.bounds import allowances, precision
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.reporting.report import as_json
from mha_spec_conformance.running.runner import Settings, judge_all
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims, Shards
from mha_spec_conformance.targets.loading import TargetError, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

    Array = numpy.ndarray

RANKS = 4
GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_bias", "grad_sinks")
STEEP = ("attention/causal/size-64/low-1", "attention/segments/size-64/levels-4", "attention/sinks/size-64/steep-3")
"""Cases whose lse is large, so that merges in float64 exceed the allowance of one call."""


@pytest.fixture
def judged(suite: Suite) -> Callable[..., Run]:
    """Judge an attention in this process."""

    def judged(functions: dict[str, Any], ranks: int, *only: str) -> Run:
        keywords = {name: FUNCTIONS[name].keywords for name in functions}
        claims = Claims("ring", keywords, ("float64",), ranks=ranks, rank_layout="zigzag")
        settings = Settings(selection=Selection(only=only))
        run = judge_all(Inside(functions, claims), Judge(claims), suite, settings)
        assert len(run.results) >= len(only)
        return run

    return judged


def ring(query: Array, key: Array, value: Array, *, return_lse: bool = False, sinks: Any = None, **options: Any) -> Any:
    """Merge the reference over the pieces of the keys, one after the other."""
    output, lse = numpy.zeros((*query.shape[:3], value.shape[3])), numpy.full(query.shape[:3], -numpy.inf)
    lse = lse if sinks is None else numpy.broadcast_to(sinks[:, None], lse.shape)
    kv_len = key.shape[2]
    for keys in numpy.split(shard_order("zigzag", RANKS, -(-kv_len // (2 * RANKS)) * 2 * RANKS), 2 * RANKS):
        mask = numpy.isin(numpy.arange(kv_len), keys)[None, None, None]
        half = reference.attention(query, key, value, mask=mask, return_lse=True, **options)
        output, lse = reference.merge_attention(output, lse, *half)
    return (output, lse) if return_lse else output


def test_merges_may_exceed_the_allowance_of_one_call_where_ranks_are_declared(judged: Callable[..., Run]) -> None:
    functions = {"attention": ring}
    assert not judged(functions, RANKS, *STEEP).failures
    alone = judged(functions, 1, *STEEP)
    assert len(alone.failures) == len(alone.results)
    assert all(result.allowance_used > 1 for result in alone.failures)


def wrong_gradients(of_alone: float, of_ranks: float) -> Callable[..., Any]:
    """Return gradients that err by shares of both allowances, where merges allow twice the error of one call."""

    def attention_vjp(grad_output: Array, query: Array, key: Array, value: Array, **options: Any) -> Any:
        arguments = {"grad_output": grad_output, "query": query, "key": key, "value": value, **options}
        arrays = {name: x for name, x in arguments.items() if isinstance(x, numpy.ndarray)}
        rest = {name: x for name, x in arguments.items() if name not in arrays}
        runs = precision("float64"), precision("float64", shards=Shards(RANKS, "zigzag"))
        alone, ranks = (allowances("attention_vjp", arrays, rest, run) for run in runs)
        error = {name: of_alone * alone[name] + of_ranks * ranks[name] for name in alone}
        gradients = reference.attention_vjp(grad_output, query, key, value, **options)
        return tuple(
            x if x is None else x + numpy.where(ranks[name] > 2 * alone[name], error[name], 0.0)
            for name, x in zip(GRADIENTS, gradients, strict=True)
        )

    return attention_vjp


@pytest.mark.parametrize(("of_alone", "of_ranks", "passes"), [(0.5, 0.5, True), (1.0, 1.0, False)])
def test_gradients_may_have_the_errors_of_merges(
    judged: Callable[..., Run], of_alone: float, of_ranks: float, passes: bool
) -> None:
    functions = {"attention_vjp": wrong_gradients(of_alone, of_ranks)}
    only = "attention_vjp/kv-heads-equal-kv-len/levels-1", "attention_vjp/boundary/both"
    assert bool(judged(functions, RANKS, *only).failures) is not passes
    alone = judged(functions, 1, *only)
    assert len(alone.failures) == len(alone.results)


def test_the_report_says_that_merges_are_allowed(judged: Callable[..., Run]) -> None:
    note = "the allowance includes the merges of 4 ranks in the layout zigzag (MHA-SHARD-3)"
    reports: list[Any] = [as_json(judged({"attention": ring}, ranks, "attention/smoke/*")) for ranks in (RANKS, 1)]
    report, alone = reports
    assert report["notes"] == [note]
    assert alone["notes"] == []
    assert {"ranks": 4, "rank_layout": "zigzag"}.items() <= report["target"].items()
    assert alone["target"]["ranks"] == 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_declared_ranks_pass_through_the_protocol(tmp_path: Path, ranks: int) -> None:
    path = tmp_path / "target.py"
    lines = f'ranks, rank_layout = {ranks}, "striped"\n' if ranks > 1 else ""
    path.write_text(f"{lines}def attention(query, key, value): ...\n")
    declared = load(str(path)).claims
    assert declared.shards == (None if ranks == 1 else Shards(4, "striped"))
    message = json.loads(json.dumps(claims_message(declared)))
    assert claims_from(message, declared.name, trusted=False) == declared
    del message["ranks"]
    assert claims_from(message, declared.name, trusted=False).shards is None


def test_ranks_share_dense_arrays(tmp_path: Path) -> None:
    path = tmp_path / "target.py"
    path.write_text("layout, ranks = 'thd', 4\ndef attention(query, key, value, cu_seqlens_q, cu_seqlens_kv): ...\n")
    with pytest.raises(TargetError, match="`ranks` must be 1 in the layout thd, received 4"):
        load(str(path))
