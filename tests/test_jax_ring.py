"""Attention over several devices in JAX (MHA-SHARD-1 to MHA-SHARD-7).

The calls run in a separate process, which has eight devices. They take a minute of processor time, because each is
compiled for eight devices; what can be counted without a device is counted here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.programs import answers_of

import mha_spec_jax
from mha_spec.arguments import Arguments
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.sharding import LAYOUTS, count_before, pieces, shard_order
from mha_spec_jax.plan import plan_of
from mha_spec_jax.shards import Form, spans

RANKS = 8
MESH = AbstractMesh((RANKS,), ("ranks",), axis_types=(AxisType.Auto,))
TOKENS = PartitionSpec(None, None, "ranks")
MEANINGS = (
    *("ring zigzag", "ring striped", "ring contiguous", "ring segments", "ring chunk"),
    *("all to all", "decoding", "rounding", "golden sinks", "golden poison", "golden gradients", "example"),
    *("example of decoding", "own queries, packed", "own queries, paged", "own queries, blocks"),
    *("explicit axes", "explicit axes, packed"),
    *("explicit axes, cache", "explicit axes, window", "explicit axes, pages"),
)
MISTAKES = ("layout", "offset", "sinks", "merge", "rank of keys")


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Run every part of ring_devices.py in a process with eight devices."""
    parts = ("meanings", "rounding", "goldens", "mistakes", "memory", "programs", "example")
    parts += ("own_queries", "explicit_axes", "explicit_caches")
    return answers_of("ring_devices.py", *parts, timeout=900)


@pytest.mark.parametrize("name", MEANINGS)
def test_eight_devices_give_the_result_of_a_single_device(name: str, answers: dict[str, Any]) -> None:
    assert answers[name] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(name: str, answers: dict[str, Any]) -> None:
    assert answers[f"mistake {name}"]


def test_a_device_needs_a_sixth_of_the_memory_of_a_single_device(answers: dict[str, Any]) -> None:
    over_eight, on_one = answers["memory"]
    assert 6 * over_eight <= on_one


@pytest.mark.parametrize("function", ["", " of weights", " of gradients"])
@pytest.mark.parametrize("options", ["replicated", "sharded"])
def test_sharded_batch_and_heads_are_not_gathered(options: str, function: str, answers: dict[str, Any]) -> None:
    """The options are a mask, a bias, sinks, lengths and segment ids."""
    assert answers[f"program {options}{function}"] == []


@pytest.mark.parametrize("name", ["layer", "replicated of sinks", "sharded of sinks"])
def test_what_is_summed_over_batch_or_heads_is_added_up(name: str, answers: dict[str, Any]) -> None:
    """The output of the layer is a sum over heads, the gradient of sinks one over batch entries."""
    assert answers[f"program {name}"] == ["all-reduce"]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("striped", [0, 2, 4, 6, 1, 3, 5, 7]),
        ("zigzag", [0, 1, 6, 7, 2, 3, 4, 5]),
    ],
)
def test_layouts_are_those_of_the_picture(layout: str, expected: list[int]) -> None:
    assert shard_order(layout, 2, 8).tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_before_a_number_are_counted(layout: str) -> None:
    for rank in range(3):
        tokens = numpy.split(shard_order(layout, 3, 24), 3)[rank]
        for number in range(25):
            counts = [numpy.clip(count_before(number, piece), 0, piece.size) for piece in pieces(layout, rank, 3, 8)]
            assert sum(counts) == (tokens < number).sum()


def work(layout: str, length: int) -> list[list[int]]:
    """Return the visible pairs of a causal call on each rank, and the scores that its blocks compute."""
    form = Form("ranks", frozenset(), RANKS, layout, True, None, None, 0, None, None)
    visible, computed = [0] * RANKS, [0] * RANKS
    count = len(pieces(layout, 0, RANKS, length))
    for a, b in numpy.ndindex(count, count):
        table, programs = spans(form, (length, length), a, b)
        for rank, source in numpy.ndindex(table.shape):
            if table[rank, source]:
                span, size = programs[table[rank, source] - 1], length // count
                assert span is not None
                high, rows = min(span.high, size - 1), numpy.arange(size)
                visible[rank] += int(numpy.clip(rows + high + 1, 0, size).sum())
                x = numpy.zeros((1, 1, size, 1))
                window = None if span.high == size - 1 else (None, span.high)
                groups = plan_of(Arguments(x, x, x, window=window))[0].groups
                computed[rank] += sum(group.count * group.rows * group.keys for group in groups)
    return [visible, computed]


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_causal_work_is_balanced_within_five_percent(layout: str) -> None:
    visible, computed = work(layout, 1024)
    assert sum(visible) == 8192 * 8193 // 2
    assert max(visible) <= 1.05 * min(visible)
    assert max(computed) <= 1.05 * min(computed)


def test_causal_work_of_contiguous_shards_is_not_balanced() -> None:
    visible, computed = work("contiguous", 1024)
    assert sum(visible) == 8192 * 8193 // 2
    assert max(visible) > 10 * min(visible)
    assert max(computed) > 10 * min(computed)


def sent(jaxpr: Any, times: int = 1) -> int:
    """Count the bytes that a rank sends to the next one in a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            total += times * sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += sent(inner, times * equation.params.get("length", 1))
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_sent_are_those_of_the_model(layout: str) -> None:
    """Keys and values go n - 1 times, and with gradients once more, with n times their sums (docs/scaling.md)."""
    query, key, value = (
        jax.ShapeDtypeStruct((3, heads, 16 * RANKS, size), jnp.bfloat16) for heads, size in ((6, 5), (2, 5), (2, 7))
    )

    def ours(*operands: Any) -> Any:
        def call(*operands: Any) -> Any:
            return mha_spec_jax.ring_attention(*operands, axis_name="ranks", layout=layout, causal=True)

        return jax.shard_map(call, mesh=MESH, in_specs=TOKENS, out_specs=TOKENS)(*operands)

    def step(*operands: Any) -> Any:
        output, pull = jax.vjp(ours, *operands)
        return pull(output)

    shard = 3 * 2 * 16 * (5 + 7)
    operands = query, key, value
    assert sent(jax.make_jaxpr(ours)(*operands).jaxpr) == (RANKS - 1) * shard * 2
    assert sent(jax.make_jaxpr(step)(*operands).jaxpr) == 2 * (RANKS - 1) * shard * 2 + RANKS * shard * 4


def shapes(function: str, heads: tuple[int, int] = (8, 8), length: int = 16, batch: int = 1, **options: Any) -> Any:
    """Trace a call on an abstract mesh."""
    query, key = (jax.ShapeDtypeStruct((batch, size, length * RANKS, 4), jnp.float32) for size in heads)

    def call(query: Any, key: Any) -> Any:
        settings: dict[str, Any] = {"axis_name": "ranks"} | options
        return getattr(mha_spec_jax, function)(query, key, key, **settings)

    return jax.eval_shape(jax.shard_map(call, mesh=MESH, in_specs=TOKENS, out_specs=TOKENS), query, key)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"kv_lengths": jnp.zeros(0, jnp.int32)}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_without_batch_entries_has_no_rows(layout: str, options: dict[str, Any]) -> None:
    assert shapes("ring_attention", batch=0, layout=layout, **options).shape == (0, 8, 128, 4)
    assert shapes("ring_attention", length=0, layout=layout).shape == (1, 8, 0, 4)


@pytest.mark.parametrize("function", ["ring_attention", "all_to_all_attention", "sharded_kv_attention"])
@pytest.mark.parametrize("name", ["mask", "bias", "dropout_rate", "dropout_mask", "dropout_key"])
def test_options_of_pairs_are_refused_by_name(function: str, name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"`{name}` is not an option of {function}.*MHA-SHARD-6"):
        shapes(function, **{name: jnp.ones((1, 1, 1, 1))})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "stripes"}, "`layout` must be one of 'contiguous', 'striped', 'zigzag'.*MHA-SHARD-1"),
        ({"layout": "zigzag", "length": 15}, "odd number of tokens, received q_len=15.*MHA-SHARD-1"),
        ({"axis_name": "rows"}, "`axis_name` must be an axis.*MHA-SHARD-1"),
        ({"kv_lengths": [129]}, "`kv_lengths` must be in 0<=kv_lengths<=kv_len=128"),
        ({"causal": True, "kv_lengths": [100]}, "`q_offset` must be given"),
        ({"q_segment_ids": jnp.zeros((1, 128), jnp.int32)}, "`kv_segment_ids` must be given"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentValueError, match=message):
        shapes("ring_attention", **options)


def test_an_axis_is_named_by_a_string() -> None:
    with pytest.raises(ArgumentTypeError, match="`axis_name` must be the name of an axis"):
        shapes("ring_attention", axis_name=3)


def test_a_keyword_that_is_misspelt_has_a_hint() -> None:
    with pytest.raises(ArgumentTypeError, match="Did you mean `layout`"):
        shapes("ring_attention", layuot="zigzag")


def test_the_keyword_of_torch_is_not_suggested() -> None:
    with pytest.raises(ArgumentTypeError, match=r"`group` is not an option of ring_attention\. .*, axis_name, layout"):
        shapes("ring_attention", group=None)


@pytest.mark.parametrize(("heads", "label"), [((12, 4), "heads"), ((16, 4), "kv_heads")])
def test_heads_that_cannot_be_dealt_out_are_refused(heads: tuple[int, int], label: str) -> None:
    with pytest.raises(ArgumentValueError, match=rf"must have {label} that are a multiple of the number of ranks, 8"):
        shapes("all_to_all_attention", heads)
    assert shapes("ring_attention", heads).shape == (1, heads[0], 128, 4)


def test_numbers_of_a_narrow_type_are_counted_in_wide_integers() -> None:
    order = shard_order("zigzag", numpy.int8(100), 1000)
    assert sorted(order.tolist()) == list(range(1000))


@pytest.mark.parametrize("length", [17, 12])
def test_a_length_that_cannot_be_dealt_out_is_refused(length: int) -> None:
    with pytest.raises(ArgumentValueError, match="MHA-SHARD-1"):
        shard_order("zigzag", 4, length)
