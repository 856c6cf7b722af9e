"""Tests of mha_spec_numpy beyond the suite: small blocks, other libraries, memory, threads and equal bits."""

from __future__ import annotations

import math
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.budget import is_small
from support.random_calls import (
    BATCH,
    HEADS,
    KV_HEADS,
    KV_LEN,
    OUTPUTS,
    Q_LEN,
    ask,
    assert_allowed,
    assert_same_bits,
    converted,
    random_arrays,
    random_call,
)

import mha_spec_numpy
from mha_spec import reference
from mha_spec.arrays import dtype_name, library_of, namespace_of
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_conformance.judging.bounds import allowances, precision
from mha_spec_conformance.judging.compare import judge
from mha_spec_conformance.targets.conversion import to_library, to_numpy
from mha_spec_numpy import anchors, dropout, forward, plan, problem, strip, tiling, visibility

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mha_spec_conformance.suite.cases import Case, Suite


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan every call anew, since the plans of earlier calls have other blocks."""
    monkeypatch.setattr(plan, "LARGEST", -1)


@pytest.fixture
def small(unshared: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """Make blocks so small that every call has several, some of them with one row or one key."""
    monkeypatch.setattr(tiling, "STACK", 0)
    monkeypatch.setattr(visibility, "ROWS", 14)
    monkeypatch.setattr(forward, "SCORES", 70)
    monkeypatch.setattr(strip, "SCORES", 70)
    monkeypatch.setattr(strip, "HIGHEST", 10)
    monkeypatch.setattr(strip, "LOWEST", 10)
    monkeypatch.setattr(anchors, "FEWEST_ROWS", 0)


@pytest.fixture(params=[1, 2, KV_HEADS, BATCH * KV_HEADS], ids="stacks of {}".format)
def stacked(small: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:  # noqa: ARG001
    """Make blocks small, each with one matrix or with several."""
    monkeypatch.setattr(tiling, "STACK", request.param * HEADS // KV_HEADS * Q_LEN * KV_LEN)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Count the scores that a call computes."""
    scores: list[int] = []
    compute = problem.Problem.block

    def counted(self: problem.Problem, scaled: Any, tile: Any, keys: range, *scratch: Any, **slope: Any) -> Any:
        scores.append(math.prod(tile.folded) * len(keys))
        return compute(self, scaled, tile, keys, *scratch, **slope)

    monkeypatch.setattr(problem.Problem, "block", counted)

    def count(function: Callable[..., Any], *arrays: numpy.ndarray, **options: Any) -> int:
        scores.clear()
        function(*arrays, **options)
        return sum(scores)

    return count


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("function", OUTPUTS)
def test_goldens_in_small_blocks(function: str, suite: Suite) -> None:
    with_values = (case for case in suite.cases if case.function == function and case.expect == "values")
    cases = [case for case in with_values if is_small(case)]
    assert len(cases) > 20
    wrong = [reason for case in cases if (reason := _judged(case)) is not None]
    assert wrong == []


def _judged(case: Case) -> str | None:
    dtype = "float32" if "float32" in case.dtypes else case.dtypes[0]
    options = {name: tuple(value) if name == "window" else value for name, value in case.options.items()}
    got = ask(mha_spec_numpy, case.function, case.inputs(dtype) | options)
    allowed = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    judgement = judge(case, case.expected, got, allowed, precision(dtype))
    return None if judgement.passed else f"{case.id}: {judgement.reason}"


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("function", OUTPUTS)
def test_options_together(function: str, dtype: str) -> None:
    for seed in range(25):
        call = converted(random_call(seed), dtype)
        got = ask(mha_spec_numpy, function, call)
        assert {dtype_name(value) for name, value in got.items() if name != "lse"} == {dtype}
        assert_allowed(function, call, got)


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("function", OUTPUTS)
def test_nan_reaches_the_same_results_as_in_the_reference(function: str) -> None:
    for seed in range(25):
        clean = random_call(seed)
        random, call = numpy.random.default_rng(seed), dict(clean)
        for name in ("query", "key", "value", "grad_output"):
            call[name] = clean[name].copy()
            call[name][random.random(call[name].shape[:-1]) < 0.05] = numpy.nan
        got, wanted, unpoisoned = (ask(*arguments) for arguments in _thrice(function, call, clean))
        for name, value in got.items():
            right = ~numpy.isnan(wanted[name])
            assert not numpy.isnan(value[right]).any(), name
            if not name.startswith("grad"):
                assert numpy.isnan(value[~right]).all(), name
            same = right & (wanted[name] == ask(reference, function, clean)[name])
            assert numpy.array_equal(value[same], unpoisoned[name][same]), name


def _thrice(
    function: str, call: Mapping[str, Any], clean: Mapping[str, Any]
) -> Iterator[tuple[Any, str, Mapping[str, Any]]]:
    yield mha_spec_numpy, function, call
    yield reference, function, call
    yield mha_spec_numpy, function, clean


@pytest.mark.parametrize("library", ["array_api_strict", "jax", "torch"])
@pytest.mark.parametrize("function", OUTPUTS)
def test_other_libraries(function: str, library: str, request: pytest.FixtureRequest) -> None:
    compiles_each_shape = library == "jax"
    if not compiles_each_shape:
        request.getfixturevalue("small")
    for seed in (2,) if compiles_each_shape else range(6):
        call = converted(random_call(seed, q_len=35, kv_len=42), "float32")
        host = {"q_lengths", "kv_lengths"} if seed % 2 else set()
        in_library = {name: _in_library(value, library) if name not in host else value for name, value in call.items()}
        got = ask(mha_spec_numpy, function, in_library)
        for value in got.values():
            assert namespace_of(value) is namespace_of(in_library["query"])
            assert dtype_name(value) == "float32"
        assert_allowed(function, call, {name: to_numpy(value) for name, value in got.items()})


def _in_library(value: Any, library: str) -> Any:
    if library == "array_api_strict":
        import array_api_strict

        return array_api_strict.asarray(value) if isinstance(value, numpy.ndarray) else value
    return to_library(value, library) if isinstance(value, numpy.ndarray) else value


@pytest.mark.parametrize("function", OUTPUTS)
def test_arrays_of_other_libraries_are_never_read(function: str) -> None:
    torch = pytest.importorskip("torch")
    for seed in range(4):
        call = random_call(seed)
        meta = {
            name: torch.asarray(value).to("meta") if isinstance(value, numpy.ndarray) else value
            for name, value in call.items()
        }
        for name, value in ask(mha_spec_numpy, function, meta).items():
            assert library_of(value) == "torch"
            assert tuple(value.shape) == ask(reference, function, call)[name].shape


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("function", OUTPUTS)
def test_sizes_of_zero(function: str, batch: int, q_len: int, kv_len: int) -> None:
    for seed in range(8):
        call = random_call(seed, batch=batch, q_len=q_len, kv_len=kv_len)
        assert_allowed(function, call, ask(mha_spec_numpy, function, call))


def test_merging_is_that_of_the_reference() -> None:
    assert mha_spec_numpy.merge_attention is reference.merge_attention


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"causal": True}, 0.61),
        ({"causal": True, "q_offset": -30}, 0.08),
        ({"window": (2, 0)}, 0.25),
        ({"window": (0, 2), "q_offset": 100}, 0.0),
        ({"kv_lengths": [9, 0]}, 0.12),
        ({"q_lengths": [11, 0]}, 0.2),
        (
            {
                "q_segment_ids": numpy.arange(82).reshape(2, 41) // 10,
                "kv_segment_ids": numpy.arange(82).reshape(2, 41) // 10,
            },
            0.5,
        ),
        ({"mask": numpy.arange(41).reshape(1, 1, 1, 41) % 41 < 5}, 0.2),
        ({"mask": numpy.zeros((2, 1, 1, 1), dtype=bool)}, 0.0),
    ],
)
def test_unseen_blocks_are_skipped(
    function: str, options: dict[str, Any], share: float, computed: Callable[..., int]
) -> None:
    arrays = random_arrays(0, q_len=KV_LEN)
    names = [*(["grad_output"] if function == "attention_vjp" else []), "query", "key", "value"]
    operands = [arrays[name] for name in names]
    call = getattr(mha_spec_numpy, function)
    pairs = BATCH * HEADS * KV_LEN**2
    assert computed(call, *operands) == pairs
    assert computed(call, *operands, **options) <= share * pairs


@pytest.fixture
def without_anchor(unshared: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:  # noqa: ARG001
    """Count the rows of a call that have no anchor, and all rows; those that are computed again count again."""
    monkeypatch.setattr(tiling, "STACK", HEADS // KV_HEADS * KV_LEN**2 * KV_HEADS)
    rows: list[numpy.ndarray] = []
    anchor_of = anchors.anchor_of

    def noted(block: problem.Block, needed: numpy.ndarray | bool = False) -> numpy.ndarray | None:
        anchor = anchor_of(block, needed)
        rows.append(numpy.zeros(block.tile.folded) if anchor is None else anchor)
        return anchor

    monkeypatch.setattr(forward, "anchor_of", noted)
    monkeypatch.setattr(strip, "anchor_of", noted)

    def count(function: str, call: Mapping[str, Any]) -> tuple[int, int]:
        rows.clear()
        assert_allowed(function, call, ask(mha_spec_numpy, function, call))
        return sum(int((anchors == 0).sum()) for anchors in rows), sum(anchors.size for anchors in rows)

    return count


def _with(call: Mapping[str, Any], name: str, number: float) -> dict[str, Any]:
    """Return a call in which one vector of the first batch entry and head holds another number."""
    array = call[name].copy()
    array[0, 0, 3] = number
    return {**call, name: array}


ROWS = HEADS * Q_LEN
"""The rows of a batch entry."""


@pytest.mark.parametrize("function", OUTPUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_small_logits_need_no_anchor(function: str, dtype: str, without_anchor: Callable[..., tuple[int, int]]) -> None:
    call = converted(random_arrays(3), dtype)
    rows, of_a_matrix = BATCH * ROWS, ROWS // KV_HEADS
    assert without_anchor(function, call) == (rows, rows)
    assert without_anchor(function, {**call, "softcap": 1.5}) == (rows, rows)
    assert without_anchor(function, {**call, "scale": 9.0})[0] < rows / 2
    assert without_anchor(function, _with(call, "query", 90.0)) == (rows - 1, rows)
    assert rows - of_a_matrix <= without_anchor(function, _with(call, "key", 90.0))[0] < rows
    if function == "attention_vjp":
        for name in ("value", "grad_output"):
            assert without_anchor(function, _with(call, name, 2.0**50)) == (rows - of_a_matrix, rows)


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "q_offset": -2}])
def test_small_logits_need_no_anchor_where_pairs_are_invisible(
    options: dict[str, Any], without_anchor: Callable[..., tuple[int, int]]
) -> None:
    call = {**random_arrays(3, q_len=KV_LEN), **options}
    rows = BATCH * HEADS * KV_LEN
    assert without_anchor("attention_weights", call) == (rows, rows)
    assert without_anchor("attention_weights", _with(call, "query", 90.0))[0] == rows - 1
    assert without_anchor("attention", call)[0] == 0, "the lse of a row that sees one key is its logit"
    assert without_anchor("attention_vjp", call)[0] == 0, "an invisible value must not decide"


def test_rows_whose_sums_overflow_are_computed_again(without_anchor: Callable[..., tuple[int, int]]) -> None:
    call = converted(random_arrays(3), "float32")
    rows = BATCH * ROWS
    assert without_anchor("attention", _with(call, "value", 2.0**50)) == (rows, rows)
    call["query"] *= 3
    unanchored, computed = without_anchor("attention", _with(call, "value", 2.0**126))
    assert computed == rows + ROWS, "the batch entries are computed one by one"
    assert rows <= unanchored < computed


def test_few_rows_use_their_maximum(without_anchor: Callable[..., tuple[int, int]]) -> None:
    assert without_anchor("attention", random_arrays(3, q_len=31))[0] == 0


@pytest.mark.parametrize("function", OUTPUTS)
def test_invisible_pairs_do_not_decide_about_the_anchor(function: str) -> None:
    call = random_arrays(3, q_len=KV_LEN)
    large = call | {name: call[name].copy() for name in ("key", "value")}
    for name in ("key", "value"):
        large[name][:, :, -2:] = 2.0**50
    visible = numpy.arange(KV_LEN) < KV_LEN - 2
    options: dict[str, Any]
    for options in (
        {"mask": visible[None, None, None]},
        {"bias": numpy.where(visible, 1.0, -math.inf)[None, None, None]},
        {"kv_lengths": [KV_LEN - 2, 5]},
        {"causal": True, "q_offset": -2},
        {f"{side}_segment_ids": numpy.tile(ids, (BATCH, 1)) for side, ids in _segments(visible).items()},
    ):
        assert_same_bits(*(ask(mha_spec_numpy, function, arrays | options) for arrays in (large, call)))


def _segments(visible: numpy.ndarray) -> dict[str, numpy.ndarray]:
    return {"q": numpy.ones(KV_LEN, dtype=int), "kv": visible.astype(int)}


def _memory(function: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _plain(
    query: numpy.ndarray, key: numpy.ndarray, value: numpy.ndarray, lengths: int, ids: numpy.ndarray, window: int
) -> numpy.ndarray:
    """Compute the formula with little memory: a single array of scores, which is overwritten, and a single mask."""
    positions = numpy.arange(key.shape[0], dtype=numpy.int32)
    visible = positions <= positions[:, None]
    visible &= positions >= positions[:, None] - window
    visible &= positions < lengths
    visible &= ids == ids[:, None]
    scores = query / numpy.float32(numpy.sqrt(query.shape[1])) @ key.T
    scores[~visible] = -numpy.inf
    scores -= numpy.maximum(scores.max(axis=1, keepdims=True), numpy.finfo("float32").min)
    numpy.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores @ value


def test_memory_is_a_twentieth() -> None:
    length, window = 8192, 1024
    random = numpy.random.default_rng(0)
    query, key, value = (random.standard_normal((1, 1, length, 64), dtype=numpy.float32) for _ in range(3))
    ids = numpy.sort(random.integers(0, 3, (1, length)))
    options: dict[str, Any] = {
        "causal": True,
        "q_offset": 0,
        "window": (window, 0),
        "kv_lengths": [length - 100],
        "q_segment_ids": ids,
        "kv_segment_ids": ids,
    }
    with numpy.errstate(all="ignore"):
        plain = _memory(lambda: _plain(query[0, 0], key[0, 0], value[0, 0], length - 100, ids[0], window))
    assert _memory(lambda: mha_spec_numpy.attention(query, key, value, **options)) <= plain / 20
    assert _memory(lambda: mha_spec_numpy.attention(query, key, value)) <= plain / 20
    assert _memory(lambda: mha_spec_numpy.attention_vjp(value, query, key, value, **options)) <= plain / 20


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("function", OUTPUTS)
def test_inputs_are_only_read_and_strides_do_not_matter(function: str) -> None:
    for seed in range(8):
        call = random_call(seed)
        wanted = ask(mha_spec_numpy, function, call)
        strided: dict[str, Any] = dict(call)
        for name, value in call.items():
            if isinstance(value, numpy.ndarray):
                strided[name] = numpy.asfortranarray(value)[..., ::-1].copy(order="K")[..., ::-1]
                strided[name].flags.writeable = False
        before = {name: value.copy() for name, value in strided.items() if isinstance(value, numpy.ndarray)}
        assert_same_bits(ask(mha_spec_numpy, function, strided), wanted)
        assert_same_bits({name: strided[name] for name in before}, before)


def _drawn(key: int, rate: float, q_len: int, kv_len: int) -> numpy.ndarray:
    """Return the mask that a seed draws, which is the output of equal weights and one-hot values."""
    query, identity = numpy.zeros((BATCH, HEADS, q_len, 1)), numpy.eye(kv_len)
    value = numpy.broadcast_to(identity, (BATCH, KV_HEADS, kv_len, kv_len))
    keys = numpy.zeros((BATCH, KV_HEADS, kv_len, 1))
    return mha_spec_numpy.attention(query, keys, value, dropout_rate=rate, dropout_key=key) > 0


def test_drawn_dropout_is_that_of_its_mask(small: None) -> None:  # noqa: ARG001 - the fixture is meant
    call = random_call(0) | {"dropout_rate": 0.3}
    call.pop("dropout_mask", None)
    mask = _drawn(11, 0.3, Q_LEN, KV_LEN)
    got = ask(mha_spec_numpy, "attention", call | {"dropout_key": 11})
    assert_same_bits(got, ask(mha_spec_numpy, "attention", call | {"dropout_mask": mask}))


def test_drawn_dropout_does_not_depend_on_blocks(request: pytest.FixtureRequest) -> None:
    large = _drawn(11, 0.3, 67, 521)
    assert numpy.array_equal(large, _drawn(11, 0.3, 67, 521))
    assert not numpy.array_equal(large, _drawn(12, 0.3, 67, 521))
    request.getfixturevalue("small")
    assert numpy.array_equal(large, _drawn(11, 0.3, 67, 521))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drawn_dropout_keeps_its_share_independently(rate: float) -> None:
    """A count is off by 7 standard deviations once in 10^11 times by chance, one of these 15 once in 10^9."""
    mask = _drawn(5, rate, 61, 509)
    count, keep = mask.size, 1 - rate
    limit = 7 * numpy.sqrt(count * keep * (1 - keep))
    assert abs(mask.sum() - count * keep) <= limit
    for axis, distance in ((1, 1), (2, 1), (3, 1), (3, dropout.COLUMNS)):
        pairs = mask & numpy.roll(mask, distance, axis=axis)
        share = keep**2
        assert abs(pairs.sum() - count * share) <= 7 * numpy.sqrt(count * share * (1 + 2 * keep - 3 * share))


def test_without_a_key_the_seed_is_drawn_from_numpy() -> None:
    arrays = random_arrays(0)
    call = {"query": arrays["query"], "key": arrays["key"], "value": arrays["value"], "dropout_rate": 0.5}
    numpy.random.seed(3)  # noqa: NPY002 - the global generator is what is tested
    first, second = (mha_spec_numpy.attention(**call) for _ in range(2))
    numpy.random.seed(3)  # noqa: NPY002
    assert numpy.array_equal(first, mha_spec_numpy.attention(**call))
    assert not numpy.array_equal(first, second)


@pytest.mark.parametrize(
    ("key", "error"), [(0.5, ArgumentTypeError), (True, ArgumentTypeError), (-1, ArgumentValueError)]
)
def test_a_dropout_key_that_is_not_a_seed_is_refused(key: object, error: type[Exception]) -> None:
    arrays = random_arrays(0)
    with pytest.raises(error, match=r"`dropout_key` must be .* received dropout_key="):
        mha_spec_numpy.attention(arrays["query"], arrays["key"], arrays["value"], dropout_rate=0.1, dropout_key=key)


@pytest.mark.usefixtures("small")
def test_a_bias_that_its_conversion_makes_infinite_hides() -> None:
    call = {name: array.astype("float32") for name, array in random_arrays(5).items() if not name.startswith("grad")}
    bias = numpy.zeros((1, 1, 1, KV_LEN))
    bias[..., : KV_LEN - 1] = -1e300
    got, hidden = (
        ask(mha_spec_numpy, "attention", {**call, "bias": finite_or_infinite})
        for finite_or_infinite in (bias, numpy.where(bias < 0, -math.inf, 0.0))
    )
    assert_same_bits(got, hidden)
    assert_allowed("attention", {**call, "bias": bias}, got)
