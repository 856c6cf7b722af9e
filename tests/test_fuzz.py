"""The fuzzer: its calls, its expectations, the faults that it finds, and its reports."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy
import pytest
from support.budget import affordable
from support.comparisons import assert_near
from support.searches import LONG, asker_of, first_finding, mistaken
from support.subject import Subject

from mha_spec.reference import attention_weights, varlen_attention
from mha_spec_conformance.commands.check import check
from mha_spec_conformance.commands.fuzz import fuzz
from mha_spec_conformance.fuzzing.call import Call, Recipe
from mha_spec_conformance.fuzzing.expected import NotAdmitted, expect
from mha_spec_conformance.fuzzing.script import script_of
from mha_spec_conformance.fuzzing.search import Finding, RoundIsOver, Search
from mha_spec_conformance.fuzzing.worlds import WORLDS, UnknownWorld, load_in_world, world_of
from mha_spec_conformance.judging.compare import EXACT, FINITE
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.targets.conversion import lay_out, layouts_of, same_bits, to_library, to_numpy

if TYPE_CHECKING:
    from pathlib import Path

EVERY = 7
"""The number of parts into which the cases that are compared with the fuzzer's expectations are split."""


def target_file(folder: Path, body: str) -> str:
    """Write a target with the attention of the specification, after the statement `body`, which sees the arguments."""
    path = folder / "planted.py"
    path.write_text(
        "import os, time\n"
        "from mha_spec import reference\n\n"
        "dtypes = ('float32',)\n\n\n"
        "def attention(query, key, value, *, causal=False, q_offset=None, kv_lengths=None):\n"
        f"    {body}\n"
        "    return reference.attention(\n"
        "        query, key, value, causal=causal, q_offset=q_offset, kv_lengths=kv_lengths\n"
        "    )\n"
    )
    return str(path)


WRONG_LENGTHS = "kv_lengths = None if kv_lengths is None else (kv_lengths + 1).clip(0, key.shape[2])"


@pytest.mark.parametrize("number", range(EVERY))
def test_values_and_kinds_are_those_of_the_goldens(number: int) -> None:
    compared = 0
    for case in affordable(load().cases, one_in=31)[number::EVERY]:
        if case.expect == "error":
            continue
        arrays = case.inputs(case.dtypes[0])
        call: Any = SimpleNamespace(
            function=case.function, arrays=arrays, options=case.options, dtype=case.dtypes[0], lse=True
        )
        try:
            values, kinds, _ = expect(call)
        except NotAdmitted:
            continue
        contiguous = {"paged_cache", "window_cache"}.isdisjoint(case.features)
        for name, golden in case.expected.items():
            if name not in kinds and not contiguous:
                continue  # Of these caches, only the output is compared.
            picked = [array[name] for array in (values, kinds)]
            if golden.rows is not None:
                width = golden.values.size // max(len(golden.rows), 1)
                picked = [array.reshape(-1, width)[golden.rows].reshape(golden.values.shape) for array in picked]
            wanted = numpy.zeros(golden.values.shape) if golden.kinds is None else golden.kinds
            # A cotangent that comes back unchanged is exact in the dtype of the run, and need not be in narrower ones.
            returned = (picked[1] == EXACT) if case.function == "merge_attention_vjp" else False
            assert ((picked[1] == wanted) | (returned & (wanted == FINITE))).all(), (case.id, name)
            finite = wanted == FINITE
            assert numpy.allclose(picked[0][finite], golden.values[finite]), (case.id, name)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mask-polarity-inverted", "attention"),
        ("window-left-exclusive", "attention"),
        ("heads-tiled", "attention"),
        ("cap-slope-missing", "attention_vjp"),
        ("cache-one-slot-late", "multi_head_attention"),
    ],
)
def test_planted_mistake_is_found_named_and_shrunk(name: str, function: str) -> None:
    """A mistake is named in the function that has it: a layer around it may have mistakes with the same result."""
    finding = first_finding(mistaken(name), functions=(function,))
    assert name in finding.result.diagnosis
    assert finding.call.size[1] <= 200
    assert len(finding.call.options) <= 3


@pytest.mark.parametrize(
    "name", ["paged-tokens-one-block-late", "window-cache-one-slot-late", "joint-norm-gain-of-a-head"]
)
def test_mistake_of_a_feature_that_no_signature_shows_is_found_and_named(name: str) -> None:
    finding = first_finding(mistaken(name), functions=("multi_head_attention",))
    assert name in finding.result.diagnosis


def test_mistake_is_reported_once() -> None:
    outcome = Search(asker_of(mistaken("window-left-exclusive")), 1, 15.0).run()
    # A fault of the last seconds may be left without a diagnosis, so only the named faults are counted.
    assert sum("window-left-exclusive" in finding.result.diagnosis for finding in outcome.findings) == 1
    assert outcome.status == 1


class Recorder:
    """Stands for an asker that passes everything, and stops the search after some calls."""

    def __init__(self, claims: Any, most: int) -> None:
        self.claims, self.most = claims, most
        self.calls: list[Call] = []

    def suspect(self, names: Any) -> None:
        """Nothing is diagnosed."""

    def result(self, call: Call) -> None:
        self.calls.append(call)
        if len(self.calls) == self.most:
            raise KeyboardInterrupt


def drawn(seed: int) -> list[Call]:
    recorder: Any = Recorder(Subject.over(MISTAKES[0].steps).target.claims, 60)
    with pytest.raises(KeyboardInterrupt):
        Search(recorder, seed, LONG).run()
    return recorder.calls


def test_same_seed_draws_the_same_calls() -> None:
    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_draws_vary() -> None:
    calls = [call for seed in range(20) for call in drawn(seed)]
    assert {call.function for call in calls} >= {
        "attention",
        "attention_vjp",
        "multi_head_attention",
        "merge_attention",
    }
    assert {call.dtype for call in calls} == {"float64", "float32", "float16", "bfloat16"}
    assert any(call.layouts for call in calls)
    assert any(call.host for call in calls)
    assert any(call.reused for call in calls)
    assert any(recipe.marks for call in calls for recipe in call.recipes.values())


def test_end_of_the_time_in_the_middle_of_shrinking_keeps_the_fault() -> None:
    search = Search(asker_of(mistaken("mask-ignored")), 0, LONG, most=1)
    wrong = search._wrong

    def hurried(call: Call) -> Finding | None:
        if search._smallest is not None:
            raise RoundIsOver
        return wrong(call)

    search._wrong = hurried
    assert search.run().status == 1


@pytest.mark.parametrize("passed", ["right", "wrong"])
def test_script_reproduces(tmp_path: Path, capsys: pytest.CaptureFixture[str], passed: str) -> None:
    target = target_file(tmp_path, WRONG_LENGTHS)
    assert fuzz(target=target, seconds=LONG, max_fail=1) == 1
    printed = capsys.readouterr().out.splitlines()
    start = printed.index("  script:")
    lines = [line[6:] for line in printed[start + 1 : printed.index("", start)]]
    assert len(lines) <= 40
    if passed == "right":
        target_file(tmp_path, "pass")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join(lines)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert ("AssertionError" in done.stderr) == (passed == "wrong")
    assert done.returncode == (1 if passed == "wrong" else 0)


def test_saved_case_is_asked_by_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, saved = target_file(tmp_path, WRONG_LENGTHS), tmp_path / "saved"
    assert fuzz(target=target, seconds=LONG, max_fail=1, folder=saved) == 1
    assert check(target=target, cases=saved) == 1
    assert "kv_lengths" in capsys.readouterr().out
    assert check(target="mha_spec.reference", cases=saved) == 0


def test_honest_target_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(target="mha_spec.reference", seconds=4.0, seed=2) == 0
    assert "no fault found" in capsys.readouterr().out


def test_target_without_answers_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(target=target_file(tmp_path, "raise NotImplementedError"), seconds=2.0) == 2
    assert "no call could be judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("time.sleep(60 if causal else 0)", "TIMEOUT"),
        ("causal and os._exit(3)", "CRASH"),
        ("causal and 1 / 0", "ERROR"),
    ],
)
def test_target_that_does_not_answer_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, outcome: str
) -> None:
    assert fuzz(target=target_file(tmp_path, body), seconds=20.0, max_fail=1, limit=4.0) == 1
    printed = capsys.readouterr().out
    assert outcome in printed
    assert "causal=True" in printed


def test_call_that_is_open_at_the_end_of_the_time_is_not_a_fault(tmp_path: Path) -> None:
    hangs_at_the_second_call = "os.environ.get('CALLED') and time.sleep(60); os.environ['CALLED'] = 'yes'"
    assert fuzz(target=target_file(tmp_path, hangs_at_the_second_call), seconds=2.0, limit=60.0) == 0


def test_first_answer_may_take_longer_than_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(target=target_file(tmp_path, "time.sleep(3)"), seconds=0.5, limit=60.0) == 0
    assert "1 calls" in capsys.readouterr().out


def test_number_of_calls_ends_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(target="numpy", seconds=LONG, most_calls=5, functions=("alibi_slopes",)) == 0
    assert "5 calls" in capsys.readouterr().out


@pytest.mark.parametrize("layout", layouts_of("numpy"))
def test_layout_keeps_the_elements(layout: str) -> None:
    array = numpy.arange(2 * 3 * 5 * 7, dtype="float32").reshape(2, 3, 5, 7)
    assert same_bits(lay_out(array, layout), array)


def test_expanded_array_has_stride_0_where_it_is_constant() -> None:
    array = numpy.broadcast_to(numpy.arange(5.0)[:, None], (3, 5, 7))
    assert lay_out(array, "expanded").strides == (0, 8, 0)


CACHES: dict[str, dict[str, Any]] = {
    "KVCache": {"shape": (2, 1, 5, 4)},
    "PagedKVCache": {"shape": (3, 2, 1, 4), "table": "[[2, 0], [1, -1]]"},
    "WindowKVCache": {"shape": (2, 1, 3, 4), "options": {"window_cache": True, "window": (1, 0)}},
}


@pytest.mark.parametrize("kind", CACHES)
def test_script_of_every_cache_runs(kind: str) -> None:
    shape, table, options = (CACHES[kind].get(name) for name in ("shape", "table", "options"))
    shapes = {"query": (2, 1, 3), "key": (2, 1, 3), "value": (2, 1, 3), "cache_key": shape, "cache_value": shape}
    shapes |= dict.fromkeys(("w_q", "w_k", "w_v"), (3, 1, 4)) | {"w_o": (1, 4, 3)}
    recipes = {name: Recipe(f"random.standard_normal({shape})", "float32", 3) for name, shape in shapes.items()}
    recipes["cache_lengths"] = Recipe("[2, 1]", "int32")
    recipes |= {} if table is None else {"cache_block_table": Recipe(table, "int32")}
    call = Call("multi_head_attention", "float32", recipes, options or {"causal": True})
    result = asker_of(Subject.over(MISTAKES[0].steps).target).result(call)
    assert result is not None
    assert result.outcome == "pass"
    names: dict[str, Any] = {}
    exec(script_of(Finding(call, result), "mha_spec.reference", "numpy"), names)
    output, cache = names["results"]
    assert output.shape == (2, 1, 3)
    assert type(cache).__name__ == kind


def overwriting(function: Any) -> Any:
    """Return a function that returns the same buffer for all results of one shape."""
    buffers: dict[tuple[Any, ...], numpy.ndarray] = {}

    def call(*operands: Any, **options: Any) -> Any:
        output = function(*operands, **options)
        buffer = buffers.setdefault((*output.shape, output.dtype), output)
        buffer[...] = output
        return buffer

    return call


def test_reused_buffer_is_found() -> None:
    target = Subject({"attention_weights": overwriting(attention_weights)}).target
    finding = first_finding(target, functions=("attention_weights",))
    assert finding.result.clauses == ("MHA-PURE-4",)


def strided(function: Any) -> Any:
    """Return a function that reads an array as if its elements lay one behind the other."""

    def call(query: Any, *operands: Any, **options: Any) -> Any:
        memory = query if query.base is None else query.base
        as_if = memory.reshape(-1)[: query.size].reshape(query.shape) if memory.size >= query.size else query
        return function(as_if, *operands, **options)

    return call


def test_ignored_strides_are_found() -> None:
    target = Subject({"attention_weights": strided(attention_weights)}).target
    finding = first_finding(target, functions=("attention_weights",))
    assert "query" in finding.call.layouts


@pytest.mark.parametrize(
    ("layout", "expression"), [(layout, "random.standard_normal((2, 3, 5, 4))") for layout in layouts_of("numpy")]
)
def test_script_of_every_layout_runs(layout: str, expression: str) -> None:
    recipes = {name: Recipe(expression, "float32", 3) for name in ("query", "key")}
    call = Call("attention_weights", "float32", recipes, layouts={"query": layout, "key": layout})
    result = asker_of(Subject.over(MISTAKES[0].steps).target).result(call)
    assert result is not None
    names: dict[str, Any] = {}
    exec(script_of(Finding(call, result), "mha_spec.reference", "numpy"), names)
    assert names["results"].shape == (2, 3, 5, 5)


def stop_after_three(outcome: Any) -> None:
    if outcome.judged.total() == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("target", "world"), [(target, world) for target, worlds in WORLDS.items() for world in worlds]
)
def test_every_world_answers(target: str, world: str) -> None:
    pytest.importorskip(target)
    loaded = load_in_world(target, world)
    functions = ("attention",) if "attention" in loaded.functions else ("attention_vjp",)
    search = Search(
        asker_of(loaded), 0, LONG, functions=functions, world=world_of(target, world), progress=stop_after_three
    )
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert search.outcome.findings == []


@pytest.mark.parametrize(("target", "world"), [("torch", "func-grad"), ("jax", "grad"), ("tensorflow", "tape")])
@pytest.mark.parametrize("grad_lse", [None, 2.0, numpy.nan])
def test_gradient_of_a_sink_of_minus_infinity_is_0_without_keys(
    target: str, world: str, grad_lse: float | None
) -> None:
    pytest.importorskip(target)
    rows, keys = numpy.ones((1, 2, 3, 5), "float32"), numpy.ones((1, 2, 0, 5), "float32")
    options = {"sinks": numpy.array([-numpy.inf, 0.5], "float32")}
    options |= {} if grad_lse is None else {"grad_lse": numpy.full((1, 2, 3), grad_lse, "float32")}
    operands = [to_library(array, target, None, "plain") for array in (rows, rows, keys, keys)]
    gradients = load_in_world(target, world).functions["attention_vjp"](
        *operands, **{name: to_library(array, target, None, "plain") for name, array in options.items()}
    )
    received = to_numpy(cast("tuple[object, ...]", gradients)[4])
    assert received[0] == 0
    assert numpy.array_equal(received[1], 3 * numpy.float32(grad_lse or 0), equal_nan=True)


def test_paged_call_without_cumulative_lengths_of_keys_is_traced() -> None:
    pytest.importorskip("tensorflow")
    query, pages = numpy.ones((7, 6, 2)), numpy.arange(90.0).reshape(5, 3, 3, 2)
    operands = [query, pages, pages, numpy.array([0, 4, 7]), None]
    integers = {"block_table": numpy.array([[4, 1], [0, 2]]), "seqused_kv": numpy.array([5, 2])}

    def moved(array: numpy.ndarray | None) -> Any:
        return None if array is None else to_library(array, "tensorflow", None, "plain")

    traced = load_in_world("tensorflow", "function-unknown").functions["varlen_attention"]
    output = traced(*map(moved, operands), **{name: moved(array) for name, array in integers.items()})
    assert_near(output, moved(cast("numpy.ndarray", varlen_attention(*cast("Any", operands), **integers))))


def test_unknown_world_is_an_error_that_names_those_that_are_known() -> None:
    with pytest.raises(UnknownWorld, match="torch vmap"):
        fuzz(target="numpy", seconds=1.0, world="jit")
